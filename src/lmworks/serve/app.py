"""The server of model folders: every task, OpenAI's interface, health, metrics, and the page of the first model.

    GET  /health/live  /health/ready         200 while the process answers; 200 while requests are answered, else 503
    GET  /metrics  /info  /openapi.json      for Prometheus; what is served; the description of every route
    GET  /drift                              the latest traffic beside the reference of a monitor
    POST /feedback                           what would have been right, where the server keeps it
    GET  /challenger  POST … /switch /back   another folder in the shadow of a model, and in its place
    POST /predict … /v1/chat/completions     see task_routes, hub_routes, openai_routes and kserve_routes (/v2)
    GET  /                                   the page and the files of the first model, for the browser to run itself
    GET  /playground/                        a page that asks this server; / leads there where there is no page, or keys

The models run in a process of their own (engine.py), in ONNX Runtime where there is a graph: no torch. Errors are
{"error": {message, type, param, code}}.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from lmworks import __version__
from lmworks.base.errors import InputError, LmworksError, from_os_error
from lmworks.base.optional import require
from lmworks.export.web import HEADERS, find_served, headers_for
from lmworks.serve import feedback_routes, hub_routes, kserve_routes, monitor_routes, openai_routes, task_routes
from lmworks.serve.engine import Spec
from lmworks.serve.guard import Guard, Rates, Scope
from lmworks.serve.monitor import Watching
from lmworks.serve.playground_files import PAGE, PUBLIC, add_playground
from lmworks.serve.protocol import Protocol
from lmworks.serve.refusals import Refused, refusal
from lmworks.serve.schema import Unsupported
from lmworks.serve.service import Service
from lmworks.serve.supervisor import QUEUE, SECONDS
from lmworks.serve.telemetry import NATIVE, Tracing

require("fastapi", extra="serve")
from fastapi import APIRouter, FastAPI, Request, Response  # noqa: E402
from fastapi.exceptions import RequestValidationError  # noqa: E402
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse  # noqa: E402
from fastapi.routing import APIRoute  # noqa: E402
from starlette.exceptions import HTTPException  # noqa: E402
from starlette.routing import Match  # noqa: E402

GRACE = 30  # seconds that requests have to end once the server is told to
LINGER = 0.3  # seconds in which connections that were made before that are still taken in
ASKING, TELLING = ("GET", "HEAD"), ("POST", "PUT", "PATCH", "DELETE", "OPTIONS")
CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


def make_app(
    specs: Sequence[Spec], *, keys: list[bytes] | None = None, rate: float | None = None, most: int = QUEUE,
    seconds: float = SECONDS, watching: Watching | None = None, exporter: Any = None,
    feedback: str | Path | None = None, challengers: str | Path | None = None, admin: list[bytes] | None = None,
) -> FastAPI:  # fmt: skip
    """Return the application for some models (`lmworks.serve.service.describe`).

    `keys` are digests (`read_keys`); `rate` is the requests a second of each key or address; at most `most` requests
    wait; a request may take `seconds`. `watching` says what is done with strange inputs and with drift; `exporter`
    is given OpenTelemetry's spans; answers and feedback are kept in the database `feedback`, else no text is. Who has
    one of the keys `admin` may put a folder of `challengers` in a model's place. Raises InputError for two models of
    one name, FormatError for a stale monitor.
    """
    names = [spec.name for spec in specs]
    if not names or len(set(names)) < len(names):
        raise InputError("each served model needs a name of its own", found=", ".join(names) or "no model",
                         fix="rename a folder: a model's name is its folder's")  # fmt: skip
    service = Service(specs, most=most, seconds=seconds, watching=watching)
    if feedback is not None:
        from lmworks.serve.feedback_writer import Recorder

        service.recorder = Recorder(feedback, specs, service.metrics.registry)
    tracing = None if exporter is None else Tracing(exporter)
    service.supervisor.on_end = None if tracing is None else tracing.question
    if (challengers is None) is not (admin is None):
        raise InputError("--challengers and --admin-key-file need each other")
    if challengers is not None:
        from lmworks.serve.challenger_counts import Counts
        from lmworks.serve.challengers import Challengers

        counts = Counts(service.metrics.registry)
        service.challengers = Challengers(challengers, service.supervisor, service.watches, counts)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if service.recorder is not None:
            service.recorder.writer.start()
        await service.supervisor.start()
        if service.challengers is not None:
            await service.challengers.open()
        yield
        if service.challengers is not None:
            await service.challengers.close()
        await service.supervisor.close()
        if service.recorder is not None:
            await asyncio.to_thread(service.recorder.writer.close)
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    app = FastAPI(title="lmworks", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
                  telemetry=NATIVE)  # fmt: skip
    app.state.service = service
    add_errors(app)
    routers = [
        one.make_router(service)
        for one in (openai_routes, task_routes, hub_routes, kserve_routes, monitor_routes, feedback_routes)
    ]
    if admin is not None:
        from lmworks.serve import challenger_routes

        routers.append(challenger_routes.make_router(service, admin))
        keys = None if keys is None else [*keys, *admin]
    for router in routers:
        add_heads(router)
        app.include_router(router)
    add_own(app, service)
    add_playground(app)
    add_heads(app.router)
    add_page(app, Path(specs[0].folder), locked=keys is not None)

    rates = None if rate is None else Rates(rate)
    app.add_middleware(
        Guard, keys=keys, rates=rates, refuse=answer_refused, done=service.metrics.done,
        leaving=lambda: service.supervisor.leaving, public=PUBLIC, most=most,
        waiting=lambda: sum(len(one.tickets) for one in service.engines),
        down=lambda: any(one.down for one in service.engines), headers=HEADERS,
        trace=None if tracing is None else tracing.request,
    )  # fmt: skip
    return app


async def answer_refused(scope: Scope, receive: Any, send: Any, refused: Refused, headers: dict[str, str]) -> None:
    """Answer before the application is asked."""
    await to_response(refused, scope["path"], headers)(scope, receive, send)


def to_response(refused: Refused, path: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """Return the answer of an error to who asked for `path`."""
    return JSONResponse(refused.body(path), refused.status, {**HEADERS, **refused.headers, **(headers or {})})


def add_heads(router: APIRouter) -> None:
    """Answer HEAD wherever GET is answered; uvicorn leaves the body away."""
    for route in list(router.routes):
        if isinstance(route, APIRoute) and route.methods == {"GET"}:
            path = route.path.removeprefix(router.prefix)
            router.add_api_route(path, route.endpoint, methods=["HEAD"], include_in_schema=False, response_model=None)


def add_errors(app: FastAPI) -> None:
    """Answer every error in one shape."""

    @app.exception_handler(Refused)
    async def refuse(request: Request, error: Refused) -> JSONResponse:
        return to_response(error, request.url.path)

    @app.exception_handler(LmworksError)
    async def ours(request: Request, error: LmworksError) -> JSONResponse:
        return to_response(refusal(error), request.url.path)

    @app.exception_handler(HTTPException)
    async def not_here(request: Request, error: HTTPException) -> JSONResponse:
        refused = Refused(error.status_code, str(error.detail), code=CODES.get(error.status_code))
        return to_response(refused, request.url.path, dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return to_response(name_the_wrong(error), request.url.path)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        problem = Refused(500, f"the server failed: {type(error).__name__}", type="server_error")
        return to_response(problem, request.url.path)


def name_the_wrong(error: RequestValidationError) -> Refused:
    """Return the answer that names the first parameter that is wrong."""
    found = error.errors()
    same = [one for one in found if one["loc"][:2] == found[0]["loc"][:2]]  # of a union: the branch of the right kind
    first = next((one for one in same if not one["type"].endswith("_type")), found[0])
    cause = (first.get("ctx") or {}).get("error")
    if isinstance(cause, Unsupported):
        return Refused(400, str(cause), param=cause.name, code="unsupported_parameter")
    if first["type"] == "json_invalid":
        return Refused(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', '')}", code="invalid_json")
    names = [str(part) for part in first["loc"][1:] if isinstance(part, str)]
    name = names[0] if names else None
    if name is None and isinstance(first.get("input"), str | bytes):
        return Refused(415, "send the body as JSON, with Content-Type: application/json", code="invalid_content_type")
    unknown = first["type"] == "extra_forbidden"
    what = f"unknown parameter: {first['loc'][-1]}" if unknown else f"{name or 'body'}: {first['msg']}"
    return Refused(400, what, param=name, code="unknown_parameter" if unknown else "invalid_value")


def add_own(app: FastAPI, service: Service) -> None:
    """Add health, metrics and what is served."""

    @app.get("/health/live", tags=["operation"])
    async def live() -> dict[str, str]:
        """Say that the process answers."""
        return {"status": "live"}

    @app.get("/health/ready", tags=["operation"])
    async def ready() -> JSONResponse:
        """Say whether requests are answered now."""
        problem = service.problem
        if not problem:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready", "reason": problem}, 503, {"Retry-After": "1"})

    @app.get("/metrics", tags=["operation"], response_model=None)
    async def metrics() -> Response:
        """Return the counts for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/info", tags=["operation"])
    async def info() -> dict[str, Any]:
        """Say what is served, and its limits."""
        models = service.models
        first = next(iter(models.values()))
        return {
            "version": __version__, "model_id": first.spec.name, **first.facts,
            "max_concurrent_requests": service.supervisor.most,
            "page": find_served(Path(first.spec.folder), "") is not None,
            "models": [
                {"name": name, "task": model.spec.task, "state": model.state, **model.facts}
                for name, model in models.items()
            ],
        }  # fmt: skip


def add_page(app: FastAPI, folder: Path, *, locked: bool) -> None:
    """Serve the page of a model folder; it comes last, as it takes every other address and method.

    A browser cannot send a key with an address: where the server is `locked`, or has no page, / is the playground.
    """
    others = list(app.router.routes)

    @app.api_route("/{path:path}", methods=[*ASKING, *TELLING], response_model=None, include_in_schema=False)
    async def file(request: Request, path: str) -> Response:
        found = find_served(folder, path)
        if request.method in ASKING and not path and (locked or found is None):
            return RedirectResponse(PAGE.lstrip("/"), headers=HEADERS)
        if request.method in TELLING or found is None:
            known = [
                method for method in (*ASKING, "POST")
                if any(one.matches({**request.scope, "method": method})[0] is Match.FULL for one in others)
            ] or list(ASKING if found is not None or not path else ())  # fmt: skip
            if known:
                raise HTTPException(405, "Method Not Allowed", headers={"Allow": ", ".join(known)})
            raise HTTPException(404, f"there is no {'file' if request.method in ASKING else 'route'} {path}")
        headers = headers_for(found, versioned="v" in request.query_params)
        answer = FileResponse(found, headers=headers, stat_result=found.stat())
        if request.headers.get("if-none-match") == answer.headers["etag"]:
            return Response(status_code=304, headers={**headers, "etag": answer.headers["etag"]})
        return answer


def serve(app: FastAPI, *, host: str = "127.0.0.1", port: int = 8000, grace: float = GRACE) -> None:
    """Serve until Ctrl-C or SIGTERM; requests then have `grace` seconds to end.

    Raises InputError for an address that cannot be used, and what is wrong with a model that cannot be loaded.
    """
    uvicorn = require("uvicorn", extra="serve")
    listening = listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    names = ", ".join(app.state.service.supervisor.models)
    sys.stderr.write(f"Serving {names} at http://{shown}:{listening.getsockname()[1]}/   (Ctrl-C ends)\n")

    class Server(uvicorn.Server):  # type: ignore[name-defined,misc]
        """Says that it is no longer ready before it closes its door, and ends with exit code 0."""

        @contextmanager
        def capture_signals(self) -> Any:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self.told_to_end)
            yield

        def told_to_end(self) -> None:
            if app.state.service.supervisor.closing:
                self.force_exit = True
            app.state.service.supervisor.leaving = True
            asyncio.get_running_loop().call_later(LINGER, self.end)

        def end(self) -> None:
            self.should_exit = True

    server, supervisor = Server(configure(app, grace=grace)), app.state.service.supervisor
    supervisor.on_failure = server.end
    try:
        server.run(sockets=[listening])
    finally:
        listening.close()
    for model in supervisor.models.values():
        if model.problem is not None and model.spec.warm:
            raise model.problem


def configure(app: FastAPI, *, grace: float = GRACE) -> Any:
    """Return uvicorn's settings; uvloop runs the loop where it is installed."""
    return require("uvicorn", extra="serve").Config(
        app, http=Protocol, ws="none", lifespan="on", log_level="warning", access_log=False, server_header=False,
        timeout_graceful_shutdown=grace,
    )  # fmt: skip


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
