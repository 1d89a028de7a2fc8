"""What every route needs: the models, their tokenizers, the counts, and a way to ask while a client is there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lmworks.base.errors import InputError, LmworksError
from lmworks.base.optional import require
from lmworks.models.families import read_config, read_kind
from lmworks.runtime.onnx_runtime import FILES, find_graph
from lmworks.serve.engine import Spec
from lmworks.serve.metrics import Metrics
from lmworks.serve.monitor import Watches, Watching
from lmworks.serve.refusals import Refused, refusal
from lmworks.serve.supervisor import Model, Supervisor
from lmworks.tasks.registry import check_task, find_task
from lmworks.tokens.tokenizer import Tokenizer

require("fastapi", extra="serve")
from fastapi import Request  # noqa: E402

if TYPE_CHECKING:
    from lmworks.serve.challengers import Challengers
    from lmworks.serve.feedback_writer import Recorder

T = TypeVar("T")


class Service:
    """The models behind the routes."""

    def __init__(self, specs: Sequence[Spec], *, most: int, seconds: float, watching: Watching | None = None) -> None:
        self.supervisor = Supervisor(specs, most=most, seconds=seconds)
        self.metrics = Metrics(self)
        self.watches = Watches(specs, watching or Watching(), self.metrics.registry)
        self.recorder: Recorder | None = None  # where answers and feedback are kept (`--feedback`)
        self.challengers: Challengers | None = None  # what may take a model's place (`--challengers`)
        self.started = int(time.time())

    @property
    def models(self) -> dict[str, Model]:
        """The version of each model that answers now."""
        models = self.supervisor.models
        return models if self.challengers is None else {
            name: self.challengers.current(model) for name, model in models.items()
        }  # fmt: skip

    @property
    def versions(self) -> list[Model]:
        """All that answers, or can at once."""
        found = [*self.models.values(), *(self.challengers.standing if self.challengers is not None else ())]
        return list({id(model): model for model in found}.values())

    @property
    def engines(self) -> list[Supervisor]:
        """Whoever answers now."""
        found = {id(model.home): model.home for model in self.models.values()}
        return [one for one in found.values() if one is not None]

    @property
    def problem(self) -> str:
        """Return why requests are not answered now, or nothing."""
        ending = self.supervisor.leaving or self.supervisor.closing
        first = [self.supervisor] if ending else self.engines
        return next((found for one in first if (found := one.problem)), "")

    def find(self, name: str | None, *tasks: str) -> Model:
        """Return the model that was named, or the first that does one of the tasks. Raises Refused (404)."""
        try:
            found = self.supervisor.find(name, tasks)
            return found if self.challengers is None else self.challengers.current(found)
        except InputError as error:
            code = "model_not_found" if name is not None else "task_not_served"
            raise Refused(404, refusal(error).message, param="model", code=code) from None

    async def ask(self, request: Request, model: Model, kind: str, *, param: str | None = None, **payload: Any) -> Any:
        """Return the engine's answer; give up when the client goes away. Raises Refused."""
        with self.metrics.working(model.spec.name):
            try:
                return await while_connected(request, (model.home or self.supervisor).get(model, kind, payload))
            except LmworksError as error:
                raise refusal(error, param) from None

    async def answers(self, request: Request, model: Model, examples: Sequence[Any], **options: Any) -> list[Any]:
        """Return the answers of a task, one an example; options that are None are left to the model."""
        given = {name: value for name, value in options.items() if value is not None}
        began = time.perf_counter()
        found = list(await self.ask(request, model, "answer", examples=list(examples), options=given))
        if self.challengers is not None:
            self.challengers.shadow(model, examples, given, found, time.perf_counter() - began)
        return found

    def tokenizer(self, model: Model) -> Tokenizer:
        """Return the tokenizer of a model, for its chat template."""
        return read_tokenizer(model.spec.folder)


@cache
def read_tokenizer(folder: str) -> Tokenizer:
    """Read a tokenizer once."""
    return Tokenizer.from_pretrained(folder)


def describe(folder: str | Path, task: str | None = None, **settings: Any) -> Spec:
    """Return what to serve, with the task that the folder was made for. Raises InputError for no model's folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError("there is no such model folder", where=str(folder), fix="check the path")
    doing = check_task(task) if task else find_task(read_kind(read_config(folder)))
    exported = any((folder / "onnx" / name).is_file() for name in FILES.values())
    if exported and settings.get("dtype", "auto") != "auto":
        find_graph(folder, settings["dtype"])
    runtime = {"runtime": "onnx" if exported else "torch"}  # a server measures nothing: it answers as it did yesterday
    name = folder.name if folder.name.strip(".") else folder.resolve().name  # a link's own: where it leads may change
    return Spec(name, str(folder), doing, **{**runtime, **settings})


def labels_of(spec: Spec) -> tuple[str, ...]:
    """Return the labels of a classifier that gives each text one; of others none."""
    if spec.task != "text-classification":
        return ()
    config = read_config(Path(spec.folder))
    single = config.problem_type in (None, "single_label_classification")
    return tuple(config.labels) if single and len(config.labels) > 1 else ()


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns; cancel it as soon as the client goes away."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refused(499, "the client went away")
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def disconnected(request: Request) -> None:
    """Return when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
