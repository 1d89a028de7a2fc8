"""The server of one model folder.

    GET  /                      the page and the files of the model, with the headers that WebAssembly threads need
    GET  /health/live           200 while the process answers
    GET  /health/ready          200 {"status": "ready"} once the model has written a token, 503 before
    POST /v1/completions        OpenAI's completions: whole, or streamed as server-sent events that end in [DONE]

The model runs in ONNX Runtime: no torch. Errors are {"error": {message, type, param, code}}.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from lmworks.base.errors import InputError, LmworksError, from_os_error
from lmworks.base.optional import require
from lmworks.base.types import Generation
from lmworks.export.web import HEADERS, find_served, headers_for
from lmworks.runtime.base import Runtime
from lmworks.runtime.predictor import Predictor, load, read_eos_ids
from lmworks.serve.schema import CompletionRequest, Refused, choice, completion, parse, usage
from lmworks.serve.worker import Full, Worker
from lmworks.tokens.tokenizer import Tokenizer

require("fastapi", extra="serve")
from fastapi import FastAPI, Request, Response  # noqa: E402
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse  # noqa: E402
from starlette.exceptions import HTTPException  # noqa: E402

MOST_BYTES = 1_000_000  # of a request's body
T = TypeVar("T")


class Model:
    """The model behind the server: loading, ready, or failed with a reason."""

    def __init__(self, folder: Path, runtime: Runtime | None) -> None:
        self.folder, self.runtime, self.name = folder, runtime, folder.resolve().name
        self.worker: Worker | None = None
        self.ready = False
        self.problem = "the model is loading"

    async def start(self) -> None:
        """Load the model in a thread and let it write one token."""
        try:
            self.worker = Worker(await asyncio.to_thread(self.load))
            async with aclosing(self.worker.run("", {"max_tokens": 1})) as pieces:
                async for _ in pieces:
                    pass
            self.ready = True
        except LmworksError as error:
            self.problem = f"the model cannot be used: {error.what}"

    def load(self) -> Predictor:
        """Open the runtime and the tokenizer."""
        if self.runtime is None:
            return load(self.folder, "text-generation", runtime="onnx")
        tokenizer = Tokenizer.from_pretrained(self.folder)
        return Predictor(self.runtime, tokenizer, eos_ids=read_eos_ids(self.folder, tokenizer))

    def get(self) -> Worker:
        """Return the worker. Raises Refused (503) before the model is ready."""
        if self.worker is None or not self.ready:
            raise Refused(503, self.problem, type="server_error", code="not_ready")
        return self.worker


def make_app(folder: str | Path, runtime: Runtime | None = None) -> FastAPI:
    """Return the application for a model folder; without `runtime`, its ONNX graph is loaded in the background.

    Raises InputError when there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError("there is no such model folder", where=str(folder), fix="check the path")
    model = Model(folder, runtime)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(model.start())
        yield
        starting.cancel()
        if model.worker is not None:
            await asyncio.to_thread(model.worker.close)

    app = FastAPI(title="lmworks", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(Refused)
    async def refuse(_: Request, error: Refused) -> JSONResponse:
        return JSONResponse(error.body(), error.status, HEADERS)

    @app.exception_handler(HTTPException)
    async def not_here(_: Request, error: HTTPException) -> JSONResponse:
        refused = Refused(error.status_code, str(error.detail), code="not_found" if error.status_code == 404 else None)
        return JSONResponse(refused.body(), error.status_code, {**HEADERS, **(error.headers or {})})

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        refused = Refused(500, f"the server failed: {type(error).__name__}", type="server_error")
        return JSONResponse(refused.body(), 500, HEADERS)

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/health/ready")
    async def ready() -> JSONResponse:
        if model.ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready", "reason": model.problem}, 503)

    @app.post("/v1/completions", response_model=None)
    async def completions(request: Request) -> Response:
        wanted = parse(await read_body(request))
        worker = model.get()
        try:
            if wanted.stream:
                return await stream(wanted, worker, model.name)
            return JSONResponse(await while_connected(request, complete(wanted, worker, model.name)))
        except Full as error:
            raise Refused(429, str(error), type="server_error", code="busy") from None
        except InputError as error:
            code = "context_length_exceeded" if "does not fit" in error.what else "invalid_value"
            what = f"{error.what}: found {error.found}, expected {error.expected}"
            raise Refused(400, what, param="prompt", code=code) from None

    @app.api_route("/{path:path}", methods=["GET", "HEAD"], response_model=None)
    async def file(request: Request, path: str) -> Response:
        found = find_served(folder, path)
        if found is None:
            raise HTTPException(404, f"there is no file {path}")
        headers = headers_for(found, versioned="v" in request.query_params)
        answer = FileResponse(found, headers=headers, stat_result=found.stat())
        if request.headers.get("if-none-match") == answer.headers["etag"]:
            return Response(status_code=304, headers={**headers, "etag": answer.headers["etag"]})
        return answer

    return app


async def read_body(request: Request) -> Any:
    """Return the decoded JSON body. Raises Refused for another type, too many bytes, and what is not JSON."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise Refused(415, "send the body as JSON, with Content-Type: application/json", code="invalid_content_type")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise Refused(413, f"the body is larger than {MOST_BYTES:,} bytes", code="request_too_large")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not valid JSON: {error}", code="invalid_json") from None


async def complete(wanted: CompletionRequest, worker: Worker, name: str) -> dict[str, Any]:
    """Answer the prompts one after the other."""
    results = []
    for prompt in wanted.prompt:
        async with aclosing(worker.run(prompt, wanted.generate_settings())) as pieces:
            results += [item async for item in pieces if isinstance(item, Generation)]
    choices = [choice(i, result.text, result.finish_reason) for i, result in enumerate(results)]
    counted = usage(count_tokens(wanted, worker), results)
    return completion(make_id(), int(time.time()), name, choices, usage=counted)


async def stream(wanted: CompletionRequest, worker: Worker, name: str) -> StreamingResponse:
    """Start the first prompt, so that what is wrong with it is still an error, and stream from there."""
    pieces = worker.run(wanted.prompt[0], wanted.generate_settings())
    first = await anext(pieces)
    return StreamingResponse(
        events(wanted, worker, name, first, pieces),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def events(
    wanted: CompletionRequest,
    worker: Worker,
    name: str,
    first: str | Generation,
    pieces: AsyncGenerator[str | Generation, None],
) -> AsyncIterator[str]:
    """Yield server-sent events: a chunk for each piece, one with the reason for each prompt, usage if asked, [DONE]."""
    id, created, results = make_id(), int(time.time()), list[Generation]()

    def chunk(choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {json.dumps(completion(id, created, name, choices, **more))}\n\n"

    def show(index: int, item: str | Generation) -> str:
        if isinstance(item, str):
            return chunk([choice(index, item, None)])
        results.append(item)
        return chunk([choice(index, "", item.finish_reason)])

    try:
        for index, prompt in enumerate(wanted.prompt):
            if index:
                pieces = worker.run(prompt, wanted.generate_settings())
                first = await anext(pieces)
            yield show(index, first)
            if isinstance(first, str):
                async for item in pieces:
                    yield show(index, item)
        if wanted.stream_options and wanted.stream_options.include_usage:
            yield chunk([], usage=usage(count_tokens(wanted, worker), results))
    except LmworksError as error:  # the status is sent already: say it in the stream
        yield f"data: {json.dumps(Refused(500, error.what, type='server_error').body())}\n\n"
    finally:
        await pieces.aclose()
    yield "data: [DONE]\n\n"


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns; cancel it when the client goes away."""
    task = asyncio.ensure_future(work)
    while not (await asyncio.wait({task}, timeout=0.5))[0]:
        if await request.is_disconnected():
            task.cancel()
            break
    try:
        return await task
    except asyncio.CancelledError:
        raise Refused(499, "the client went away") from None


def count_tokens(wanted: CompletionRequest, worker: Worker) -> int:
    """Return the tokens of all prompts."""
    return sum(len(ids) for ids in worker.predictor.tokenizer.encode_batch(wanted.prompt))


def make_id() -> str:
    """Return an identifier for an answer."""
    return f"cmpl-{secrets.token_hex(12)}"


def serve(folder: str | Path, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve a model folder until Ctrl-C. Raises InputError for a folder or an address that cannot be used."""
    uvicorn = require("uvicorn", extra="serve")
    runtime = load(
        folder, "text-generation", runtime="onnx"
    ).runtime  # whatever is wrong with the folder is said before anything listens
    listening = listen(host, port)
    app = make_app(folder, runtime)
    shown = f"[{host}]" if ":" in host else host
    sys.stderr.write(f"Serving {folder} at http://{shown}:{listening.getsockname()[1]}/   (Ctrl-C ends)\n")
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=3, lifespan="on"
    )
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:  # some versions of uvicorn raise it again after a clean end
        pass
    finally:
        listening.close()


def listen(host: str, port: int) -> socket.socket:
    """Return a bound socket; an address in use or not ours is an InputError with the fix."""
    if not 0 <= port <= 65535:
        raise InputError("there is no such port", found=str(port), expected="0 to 65535 (0: any free one)")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror:
        raise InputError("there is no such address to listen on", found=host, fix="use --host 127.0.0.1") from None
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()  # a second server on the same port is refused now, not when the loop starts
    except OSError as error:
        listening.close()
        problem = from_os_error(error, f"cannot listen on {host}:{port}")
        problem.fix = problem.fix or "choose another port: --port 8001"
        raise problem from None
    return listening
