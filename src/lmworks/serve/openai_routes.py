"""OpenAI's interface: /v1/models, /v1/completions, /v1/chat/completions, /v1/embeddings.

A stream is server-sent events that end in [DONE]; an error in the middle of one is an event of its own, which OpenAI's
client raises.
"""

from __future__ import annotations

import asyncio
import base64
import codecs
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np

from lmworks.base.errors import LmworksError
from lmworks.base.optional import require
from lmworks.serve.engine import Spelled, Written
from lmworks.serve.refusals import Refused, refusal
from lmworks.serve.schema import ChatRequest, CompletionRequest, EmbeddingRequest, Writing
from lmworks.serve.service import Service, while_connected
from lmworks.serve.supervisor import Model
from lmworks.tokens.chat import render_chat

require("fastapi", extra="serve")
from fastapi import APIRouter, Request, Response  # noqa: E402
from fastapi.responses import JSONResponse, StreamingResponse  # noqa: E402

Prompt = str | list[int]
Part = tuple[int, str, Any]  # the number of a text, "piece" | "done" | "error", what
Events = Callable[["Answering", AsyncIterator[Part]], AsyncIterator[str]]
MOST_AT_ONCE = 64  # texts of one request
LONGEST_ANSWER = 100_000  # tokens of a chat answer where no number is given: until the model's positions are used up
SSE = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class Answering:
    """One request for texts: each prompt's choices one after the other, as an answer and as a stream."""

    def __init__(self, service: Service, model: Model, wanted: Writing, prompts: Sequence[Prompt], **more: Any) -> None:
        self.service, self.model, self.wanted = service, model, wanted
        self.payloads: list[dict[str, Any]] = [
            {"prompt": prompt, "settings": wanted.settings(choice, **more)}
            for prompt in prompts
            for choice in range(wanted.n)
        ]
        self.id, self.created = secrets.token_hex(12), int(time.time())
        self.chat = isinstance(wanted, ChatRequest)

    def envelope(self, choices: list[dict[str, Any]], *, chunk: bool, **more: Any) -> dict[str, Any]:
        """Return what surrounds choices."""
        kind = ("chat.completion" + (".chunk" if chunk else "")) if self.chat else "text_completion"
        id = f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}"
        return {"id": id, "object": kind, "created": self.created, "model": self.model.spec.name,
                "choices": choices, **more}  # fmt: skip

    def choice(self, index: int, written: Written) -> dict[str, Any]:
        """Return a whole choice."""
        done = written.generation
        message = {"role": "assistant", "content": done.text}
        said: dict[str, Any] = {"message": message} if self.chat else {"text": done.text}
        logprobs = self.logprobs(written.chosen, Places())
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": done.finish_reason}

    def piece(self, index: int, text: str | None, reason: str | None, logprobs: Any = None) -> dict[str, Any]:
        """Return a part of a choice; None is the beginning of a chat's message."""
        if not self.chat:
            said: dict[str, Any] = {"text": text or ""}
        elif text is None:
            said = {"delta": {"role": "assistant", "content": ""}}
        else:
            said = {"delta": {"content": text} if text else {}}
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}

    def logprobs(self, chosen: Sequence[Spelled] | None, places: Places) -> dict[str, Any] | None:
        """Return the probabilities of the next tokens in the shape of the interface, where they were asked for."""
        if chosen is None:
            return None
        places.taken += len(chosen)
        if self.chat:
            return {"content": [
                {**token(text, p), "top_logprobs": [token(*one) for one in top]} for text, p, top in chosen
            ]}  # fmt: skip
        spelled = [text for text, _, _ in chosen]
        return {
            "tokens": [name_of(text) for text in spelled], "token_logprobs": [p for _, p, _ in chosen],
            "top_logprobs": [  # the token that was drawn is always among them, as OpenAI has it
                {name_of(text): p for text, p in ((drawn, its), *reversed(top))} for drawn, its, top in chosen
            ],
            "text_offset": [places.take(text) for text in spelled],
        }  # fmt: skip

    def error(self, error: LmworksError) -> dict[str, Any]:
        """Return the event of an error in the middle of a stream."""
        return refusal(error).body()

    def usage(self, found: Sequence[Written]) -> dict[str, Any]:
        """Return the token counts: a prompt counts once, whatever the number of its choices."""
        prompt = sum(one.prompt_tokens for one in found[:: self.wanted.n])
        reused = sum(one.reused_tokens for one in found[:: self.wanted.n])
        written = sum(len(one.generation.tokens) for one in found)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written,
                "prompt_tokens_details": {"cached_tokens": reused}}  # fmt: skip

    async def whole(self) -> dict[str, Any]:
        """Return the whole answer."""
        asked = [self.service.supervisor.get(self.model, "write", payload) for payload in self.payloads]
        tasks = [asyncio.ensure_future(one) for one in asked]
        try:
            found = list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:  # the first error ends the others
                task.cancel()
        choices = [self.choice(index, written) for index, written in enumerate(found)]
        return self.envelope(choices, chunk=False, usage=self.usage(found))

    async def streamed(self, events: Events | None = None) -> StreamingResponse:
        """Wait for the first part, so that what is wrong at the start is still an error; stream from there."""
        answers: asyncio.Queue[Part] = asyncio.Queue()
        began = time.perf_counter()

        async def work(index: int, payload: dict[str, Any]) -> None:
            try:
                async with aclosing(self.service.supervisor.ask(self.model, "write", payload)) as parts:
                    async for what, value in parts:
                        answers.put_nowait((index, what, value))
            except LmworksError as error:
                answers.put_nowait((index, "error", error))

        tasks = [asyncio.create_task(work(index, payload)) for index, payload in enumerate(self.payloads)]
        try:
            first = await answers.get()
            if first[1] == "error":
                raise refusal(first[2], "messages" if self.chat else "prompt")
        except BaseException:
            for task in tasks:
                task.cancel()
            raise
        self.service.metrics.first.labels(self.model.spec.name).observe(time.perf_counter() - began)

        async def parts() -> AsyncIterator[Part]:
            part, left = first, len(self.payloads)
            while True:
                yield part
                left -= part[1] == "done"
                if part[1] == "error" or not left:
                    return
                part = await answers.get()

        async def body() -> AsyncIterator[str]:
            try:
                with self.service.metrics.working(self.model.spec.name):
                    async for line in (events or Answering.events)(self, parts()):
                        yield line
            finally:
                for task in tasks:
                    task.cancel()

        return StreamingResponse(body(), media_type="text/event-stream", headers=SSE)

    async def events(self, parts: AsyncIterator[Part]) -> AsyncIterator[str]:
        """Yield server-sent events: parts as they come, usage if asked, [DONE]."""
        found: dict[int, Written] = {}
        places = [Places() for _ in self.payloads]
        if self.chat:
            for index in range(len(self.payloads)):
                yield event(self.envelope([self.piece(index, None, None)], chunk=True))
        async for index, what, value in parts:
            if what == "error":
                yield event(self.error(value))
                return
            if what == "piece":
                some = self.logprobs(value.chosen, places[index])
                yield event(self.envelope([self.piece(index, value.text, None, some)], chunk=True))
            else:
                found[index] = value
                rest = None if value.chosen is None else value.chosen[places[index].taken :]
                reason = value.generation.finish_reason
                last = self.piece(index, "", reason, self.logprobs(rest or None, places[index]))
                yield event(self.envelope([last], chunk=True))
        if self.wanted.wants_usage:
            yield event(self.envelope([], chunk=True, usage=self.usage([found[i] for i in sorted(found)])))
        yield "data: [DONE]\n\n"


def event(value: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(value)}\n\n"


def token(text: bytes, logprob: float) -> dict[str, Any]:
    """Return a token's probability as a chat answer shows it."""
    return {"token": name_of(text), "logprob": logprob, "bytes": list(text)}


def name_of(text: bytes) -> str:
    """Return a token as text; a part of a character as OpenAI writes it, bytes:\\xe2\\x98."""
    try:
        return text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


class Places:
    """How many tokens of a text were told, and where each begins in it."""

    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.taken = self.place = 0  # tokens, characters

    def take(self, token: bytes) -> int:
        """Return where the next token begins, in characters; one that goes on with a character begins at it."""
        cut = self.decoder.getstate()[0] and token[:1] and token[0] & 0xC0 != 0x80  # a character that just ends
        start = self.place + bool(cut)
        self.place += len(self.decoder.decode(token))
        return start


def make_router(service: Service) -> APIRouter:
    """Return the routes."""
    router = APIRouter(prefix="/v1", tags=["openai"])

    @router.get("/models")
    async def models() -> dict[str, Any]:
        """List the models."""
        return {"object": "list", "data": [card(name) for name in service.supervisor.models]}

    @router.get("/models/{name}")
    async def one_model(name: str) -> dict[str, Any]:
        """Say whether a model is served."""
        return card(service.find(name).spec.name)

    def card(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": service.started, "owned_by": "lmworks"}

    async def answer(
        request: Request, model: Model, wanted: Writing, prompts: Sequence[Prompt], **more: Any
    ) -> Response:
        if len(prompts) * wanted.n > MOST_AT_ONCE:
            raise Refused(400, f"n times the prompts is more than {MOST_AT_ONCE}", param="n", code="invalid_value")
        one = Answering(service, model, wanted, prompts, **more)
        if wanted.stream:
            return await one.streamed()
        with service.metrics.working(model.spec.name):
            try:
                return JSONResponse(await while_connected(request, one.whole()))
            except LmworksError as error:
                raise refusal(error, "messages" if one.chat else "prompt") from None

    @router.post("/completions", response_model=None)
    async def completions(wanted: CompletionRequest, request: Request) -> Response:
        """Go on with a text."""
        model = service.find(wanted.model, "text-generation")
        more = {"max_tokens": wanted.max_tokens, "logprobs": wanted.logprobs}
        return await answer(request, model, wanted, wanted.prompts, **more)

    @router.post("/chat/completions", response_model=None)
    async def chat(wanted: ChatRequest, request: Request) -> Response:
        """Go on with a conversation, by the model's own chat template."""
        model = service.find(wanted.model, "text-generation")
        prompt = await asyncio.to_thread(render, service, model, wanted)
        most = wanted.max_completion_tokens or wanted.max_tokens or LONGEST_ANSWER
        noted = (wanted.top_logprobs or 0) if wanted.logprobs else None
        return await answer(request, model, wanted, [prompt], max_tokens=most, logprobs=noted)

    @router.post("/embeddings")
    async def embeddings(wanted: EmbeddingRequest, request: Request) -> dict[str, Any]:
        """Turn texts into vectors."""
        model = service.find(wanted.model, "feature-extraction")
        texts = [wanted.input] if isinstance(wanted.input, str) else wanted.input
        vectors = await service.answers(request, model, texts)
        if wanted.dimensions not in (None, size := len(vectors[0])):
            raise Refused(400, f"the vectors of {model.spec.name} have {size} dimensions", param="dimensions",
                          code="invalid_value")  # fmt: skip
        tokens = sum(await service.ask(request, model, "tokenize", texts=texts, count=True))
        data = [
            {"object": "embedding", "index": index, "embedding": shown(vector, wanted.encoding_format)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": model.spec.name, "usage": usage}

    return router


def shown(vector: Any, form: str) -> str | list[float]:
    """Return a vector as little-endian float32 in base64, or as numbers."""
    array = np.asarray(vector, "<f4")
    return base64.b64encode(array.tobytes()).decode() if form == "base64" else array.tolist()


def render(service: Service, model: Model, wanted: ChatRequest) -> list[int]:
    """Return the token ids of a conversation. Raises Refused where there is no template, or it refuses."""
    tokenizer = service.tokenizer(model)
    if tokenizer.chat_template is None:
        raise Refused(400, f"{model.spec.name} has no chat template: use /v1/completions", param="messages",
                      code="no_chat_template")  # fmt: skip
    try:
        return tokenizer.encode(render_chat(tokenizer, wanted.turns()))
    except LmworksError as error:
        raise refusal(error, "messages") from None
