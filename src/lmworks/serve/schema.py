"""What OpenAI's clients send: completions, chat completions, embeddings, as far as they mean something here.

A parameter that this server cannot honour is refused by name, never ignored; the value that changes nothing is taken,
and null stands for the default.
Every number, list and text has a bound. `top_k` and `repeat_penalty` are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MOST_TEXTS, MOST_CHARACTERS, MOST_STOPS, MOST_TOKENS = 64, 200_000, 4, 100_000
MOST_INPUTS = 2048  # of embeddings, as OpenAI allows
MOST_CHOICES, MOST_LOGPROBS, MOST_TOP_LOGPROBS, MOST_MESSAGES = 8, 5, 20, 256  # as OpenAI's, but for choices
MOST_IN_ADDRESS = 8_000  # characters; servers and proxies refuse longer lines
Name = Annotated[str, Field(max_length=200)]
Text = Annotated[str, Field(max_length=MOST_CHARACTERS)]
Texts = Annotated[list[Text], Field(min_length=1, max_length=MOST_TEXTS)]
Id = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[Id], Field(min_length=1, max_length=MOST_TOKENS)]


class Unsupported(ValueError):
    """A parameter that this server does not implement."""

    def __init__(self, name: str) -> None:
        super().__init__(f"the parameter {name} is not supported by this server")
        self.name = name


class Asked(BaseModel):
    """The body of a request; what it does not name is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)
    neutral: ClassVar[Mapping[str, Any]] = {}  # known to clients, not implemented here, and what changes nothing

    @model_validator(mode="before")
    @classmethod
    def refuse_the_unsupported(cls, body: Any) -> Any:
        """Drop known parameters that ask for nothing, and null; refuse them when they ask for something."""
        if not isinstance(body, dict):
            raise ValueError("this must be a JSON object")
        for name, value in cls.neutral.items():
            if name in body and body[name] not in (value, None, "", [], {}):
                raise Unsupported(name)
        fields = cls.model_fields
        return {
            name: value for name, value in body.items() if name not in cls.neutral
            and (value is not None or name not in fields or fields[name].is_required())
        }  # fmt: skip


class StreamOptions(BaseModel):
    """`include_usage` adds a last chunk with the token counts."""

    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class Writing(Asked):
    """How a text is written."""

    model: Name | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=2**31)
    repeat_penalty: float = Field(1.0, gt=0, le=10)
    stop: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(default_factory=list, max_length=MOST_STOPS)
    seed: int | None = Field(None, ge=0, lt=2**63)
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Name | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def one_is_a_list(cls, value: Any) -> Any:
        """Take a text where a list of texts may stand."""
        return [value] if isinstance(value, str) else value

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends in a chunk with the counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def settings(self, number: int, **more: Any) -> dict[str, Any]:
        """Return how the engine writes choice `number`: with one seed, each choice has its own."""
        names = ("temperature", "top_k", "top_p", "repeat_penalty", "stop")
        seed = None if self.seed is None else (self.seed + number) % 2**63
        return {name: getattr(self, name) for name in names} | {"seed": seed} | more


class CompletionRequest(Writing):
    """The body of POST /v1/completions."""

    neutral: ClassVar[Mapping[str, Any]] = {
        "best_of": 1, "echo": False, "suffix": None, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": None,
    }  # fmt: skip

    prompt: Text | Texts | Ids | Annotated[list[Ids], Field(min_length=1, max_length=MOST_TEXTS)]
    max_tokens: int = Field(16, ge=1, le=MOST_TOKENS)
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Return a list of texts, or of token ids."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]


class Part(BaseModel):
    """A part of a message; only texts are read here."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: Text


class Message(Asked):
    """One turn of a conversation; an answer's message can be sent back as the client gives it."""

    neutral: ClassVar[Mapping[str, Any]] = dict.fromkeys(
        ("refusal", "annotations", "audio", "function_call", "tool_calls", "tool_call_id", "reasoning")
    )

    role: Annotated[str, Field(min_length=1, max_length=40)]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=MOST_TEXTS)]
    name: Name | None = None


class ChatRequest(Writing):
    """The body of POST /v1/chat/completions."""

    neutral: ClassVar[Mapping[str, Any]] = {
        "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": None, "tools": None, "tool_choice": "none",
        "functions": None, "response_format": {"type": "text"}, "store": False, "modalities": ["text"],
        "metadata": None, "parallel_tool_calls": True, "service_tier": "auto", "reasoning_effort": None,
    }  # fmt: skip

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)

    @field_validator("top_logprobs")
    @classmethod
    def not_in_vain(cls, value: int | None, info: Any) -> int | None:
        """Refuse alternatives where no probabilities are asked for, as OpenAI does."""
        if value and not info.data.get("logprobs"):
            raise ValueError("it needs logprobs: true")
        return value

    def turns(self) -> list[dict[str, str]]:
        """Return what a chat template reads."""
        return [
            {"role": one.role, "content": one.content if isinstance(one.content, str)
             else "".join(part.text for part in one.content)} | ({"name": one.name} if one.name else {})
            for one in self.messages
        ]  # fmt: skip


class EmbeddingRequest(Asked):
    """The body of POST /v1/embeddings."""

    input: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_INPUTS)]
    dimensions: int | None = Field(None, ge=1, le=MOST_TOKENS)  # those of the model and no others
    model: Name | None = None
    encoding_format: Literal["float", "base64"] = "float"
    user: Name | None = None
