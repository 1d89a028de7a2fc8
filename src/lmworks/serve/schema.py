"""What clients send and get: the legacy completions interface of OpenAI, as far as it means something here.

A parameter that this server cannot honour is refused by name, never ignored. `top_k` and `repeat_penalty` are ours.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lmworks.base.types import Generation

MOST_PROMPTS, MOST_CHARACTERS, MOST_STOPS = 32, 200_000, 4
NEUTRAL = {  # known to OpenAI's clients, not implemented here: accepted with the value that changes nothing
    "n": 1,
    "best_of": 1,
    "echo": False,
    "logprobs": None,
    "suffix": None,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": None,
}


class StreamOptions(BaseModel):
    """`include_usage` adds a last chunk with the token counts."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class CompletionRequest(BaseModel):
    """The body of POST /v1/completions."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: list[str]
    model: str | None = None
    max_tokens: int = Field(16, ge=1, le=100_000)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    repeat_penalty: float = Field(1.0, gt=0, le=10)
    stop: list[str] = Field(default_factory=list, max_length=MOST_STOPS)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def refuse_the_unsupported(cls, body: Any) -> Any:
        """Drop known parameters that ask for nothing; refuse them when they ask for something."""
        if not isinstance(body, dict):
            raise ValueError("the body must be a JSON object")
        for name, neutral in NEUTRAL.items():
            if name in body and body[name] not in (neutral, None):
                raise Unsupported(name)
        return {name: value for name, value in body.items() if name not in NEUTRAL}

    @field_validator("prompt", "stop", mode="before")
    @classmethod
    def one_is_a_list(cls, value: Any) -> Any:
        """Take a text where a list of texts may stand."""
        return [value] if isinstance(value, str) else [] if value is None else value

    @field_validator("prompt")
    @classmethod
    def bounded(cls, value: list[str]) -> list[str]:
        """Refuse no prompt, too many, and too long ones."""
        if not 1 <= len(value) <= MOST_PROMPTS:
            raise ValueError(f"give 1 to {MOST_PROMPTS} prompts")
        if sum(map(len, value)) > MOST_CHARACTERS:
            raise ValueError(f"the prompts are longer than {MOST_CHARACTERS:,} characters")
        return value

    @field_validator("stop")
    @classmethod
    def not_empty(cls, value: list[str]) -> list[str]:
        """Refuse an empty stop string, which would stop everything."""
        if not all(value):
            raise ValueError("a stop string must not be empty")
        return value

    def generate_settings(self) -> dict[str, Any]:
        """Return the arguments of `Predictor.generate`."""
        names = ("max_tokens", "temperature", "top_k", "top_p", "repeat_penalty", "seed", "stop")
        return {name: getattr(self, name) for name in names}


class Unsupported(ValueError):
    """A parameter that this server does not implement."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the parameter {name} is not supported by this server")
        self.name = name


class Refused(Exception):
    """An answer that is an error, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.type = status, message, param, code, type

    def body(self) -> dict[str, Any]:
        """Return {"error": {message, type, param, code}}."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def parse(body: Any) -> CompletionRequest:
    """Check a decoded body. Raises Refused that names the first parameter that is wrong."""
    try:
        return CompletionRequest.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, Unsupported):
            raise Refused(400, str(cause), param=cause.name, code="unsupported_parameter") from None
        name = str(first["loc"][0]) if first["loc"] else None
        unknown = first["type"] == "extra_forbidden"
        what = f"unknown parameter: {name}" if unknown else f"{name or 'body'}: {first['msg']}"
        raise Refused(400, what, param=name, code="unknown_parameter" if unknown else "invalid_value") from None


def choice(index: int, text: str, reason: Literal["stop", "length"] | None) -> dict[str, Any]:
    """Return one entry of `choices`."""
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def usage(prompt_tokens: int, results: list[Generation]) -> dict[str, int]:
    """Return the token counts of a request."""
    completion = sum(len(result.tokens) for result in results)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
    }


def completion(id: str, created: int, model: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Return a whole answer, or one chunk of a stream."""
    return {"id": id, "object": "text_completion", "created": created, "model": model, "choices": choices, **more}
