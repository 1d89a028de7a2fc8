"""Open a model and use it: `load(folder)(["I love it"])`, `load(folder).generate("Once upon")`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, overload

import numpy as np

from lmworks.base.errors import FormatError, InputError
from lmworks.base.files import read_json
from lmworks.base.hub import find_folder
from lmworks.base.optional import require
from lmworks.base.types import Generation
from lmworks.models.config import Config
from lmworks.models.families import TASKS, find_head, read_config, read_kind
from lmworks.runtime import trace
from lmworks.runtime.base import Runtime
from lmworks.runtime.batching import run_features
from lmworks.runtime.choice import ANY, Way, choose, find_ways
from lmworks.runtime.decoding import TextStream, generate
from lmworks.runtime.onnx_runtime import FILES, OnnxRuntime
from lmworks.runtime.sampling import Sampling
from lmworks.runtime.trace import stage
from lmworks.tasks.base import Facts, Task
from lmworks.tasks.registry import check_task, find_task, make_task
from lmworks.tokens.tokenizer import Tokenizer

RUNTIMES = ("auto", "torch", "onnx")
AT_ONCE = 1024  # examples whose features and outputs are held together
NUMBERED = re.compile(r"(text|example|image) (\d+)")  # where an error lies, counted from the first of those at once


class Settings(TypedDict, total=False):
    """What `generate` may be told; the defaults are greedy."""

    max_tokens: int  # 128
    stop: str | Sequence[str]  # texts to end before
    temperature: float  # 0: greedy
    top_k: int  # 0: off
    top_p: float  # 1: off
    repeat_penalty: float  # 1: off
    repeat_last_n: int  # 64 positions
    seed: int | None  # None: different each time


class Predictor:
    """A model that answers: a runtime, its tokenizer, and the task.

    `predictor(examples)` answers a list of examples, or a single one: texts, pairs of texts, (question, context) pairs,
    images. Options of the task (`top_k`, `aggregation`, `long` …) may be given to `load` or with a call.
    """

    def __init__(
        self,
        runtime: Runtime,
        tokenizer: Tokenizer | None,
        *,
        eos_ids: Sequence[int] = (),
        task: str = "text-generation",
        make: Callable[..., Task] | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.runtime, self.eos_ids, self.task = runtime, list(eos_ids), task
        self._tokenizer, self.make, self.options = tokenizer, make, dict(options or {})
        self.prepared = None if make is None else make(**self.options)
        self.why = "as given"  # this runtime and dtype

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; an image model has none."""
        if self._tokenizer is None:
            raise InputError("this model reads images: it has no tokenizer")
        return self._tokenizer

    @property
    def pad_id(self) -> int:
        """The token that fills rows up; images have none to fill."""
        return 0 if self._tokenizer is None else self._tokenizer.pad_id or 0

    def __call__(self, examples: Any, **options: Any) -> Any:
        """Answer each of a list of examples, in order, or a single example."""
        if not isinstance(examples, list):
            return self([examples], **options)[0]
        if self.make is None:
            return [self.generate(prompt, **{**self.options, **options}) for prompt in examples]
        task = self.make(**{**self.options, **options}) if options or self.prepared is None else self.prepared
        parts = []
        for i in range(0, max(len(examples), 1), AT_ONCE):
            try:
                parts.append(self.answer(task, examples[i : i + AT_ONCE]))
            except InputError as error:
                place = NUMBERED.fullmatch(error.where)
                error.where = f"{place[1]} {int(place[2]) + i}" if place else error.where
                raise
        if isinstance(parts[0], np.ndarray):
            return np.concatenate(parts)
        return [answer for part in parts for answer in part]

    def answer(self, task: Task, examples: list[Any]) -> Any:
        """Encode, run and decode a few examples at once."""
        with stage("tokenise"):
            features = task.encode(examples)
        smaller = getattr(task, "reduce", None)  # large outputs are made small as they come
        outputs = run_features(self.runtime, features, output=task.output, pad_id=self.pad_id, reduce=smaller)
        with stage("post-process"):
            return task.decode(features, outputs, examples)

    @overload
    def generate(self, prompt: str, *, stream: Literal[False] = False, **settings: Unpack[Settings]) -> Generation: ...
    @overload
    def generate(self, prompt: str, *, stream: Literal[True], **settings: Unpack[Settings]) -> TextStream: ...
    def generate(self, prompt: str, *, stream: bool = False, **settings: Unpack[Settings]) -> Generation | TextStream:
        """Continue a text: a Generation, or with `stream` the pieces as they come, and then `.result`."""
        limits: dict[str, Any] = dict(settings)
        own = {name: limits.pop(name) for name in ("max_tokens", "stop") if name in limits}
        text = generate(self.runtime, self.tokenizer, prompt, sampling=Sampling(**limits), eos_ids=self.eos_ids, **own)
        if stream:
            return text
        for _ in text:
            pass
        return text.result


def load(
    model: str | Path,
    task: str | None = None,
    *,
    runtime: str = "auto",
    dtype: str = "auto",
    slots: int = 1,
    threads: int | None = None,
    revision: str | None = None,
    code: Sequence[Any] = (),
    once: bool = False,
    **options: Any,
) -> Predictor:
    """Open a model folder, or a model of the Hub by its name.

    `task` is a pipeline name ("text-classification", "feature-extraction" …); None: what the checkpoint was made for.
    runtime "auto" is the fastest on this machine of those that keep the answers: fp32, and what the certificate says
    keeps every decision; it is measured once and remembered (runtime/choice.py; `.why` says it). dtype "any" lets any
    lossy way stand for choice. With a runtime that is named, dtype "auto" is fp32, or the best graph that there is.
    `code` is that of layers of its maker's own: classes, or "FILE.py:Name". `once`: for a few short texts, a graph
    opens sooner and runs slower. `options` are the task's. Raises InputError or FormatError that names the path.
    """
    if task is not None:
        check_task(task)
    folder = find_folder(model, revision=revision)
    config = read_config(folder)
    task = task or find_task(read_kind(config))
    find_head(config, TASKS[task])  # an InputError where the family has no such head
    if config.vision and task != "image-classification":
        raise InputError(
            f"this model reads images, not text: it cannot do {task}", where=str(folder / "config.json"),
            fix="use image-classification, or AutoModel.from_pretrained(folder)(pixel_values) for its states",
        )  # fmt: skip
    if task == "text-generation" and not config.causal:
        raise InputError(
            "this model reads both ways: it cannot write or score a text from left to right", where=str(folder),
            found=f"{config.model_type}, is_decoder false", fix="use it for fill-mask or feature-extraction",
        )  # fmt: skip
    if slots < 1:
        raise InputError("there must be a slot", found=f"slots={slots}", expected="1 or more")
    tokenizer = None if config.vision else Tokenizer.from_pretrained(folder)
    with stage("load"):
        engine, why = open_runtime(folder, runtime, dtype, slots, threads, head=TASKS[task], code=code, once=once)
    predictor = make_predictor(engine, folder, config, task, tokenizer, options)
    predictor.why = why
    return predictor


def make_predictor(
    engine: Runtime, folder: Path, config: Config, task: str, tokenizer: Tokenizer | None, options: dict[str, Any]
) -> Predictor:
    """Put the parts of a predictor together."""
    if tokenizer is not None:
        tokenizer.check_fits(engine.vocab_size, where=str(folder))
    if task == "text-generation":
        assert tokenizer is not None
        return Predictor(engine, tokenizer, eos_ids=read_eos_ids(folder, tokenizer), options=options)
    facts = read_facts(config, tokenizer, before=config.max_tokens - engine.max_length)

    def make(**chosen: Any) -> Task:
        return make_task(task, folder, tokenizer, facts, **chosen)

    return Predictor(engine, tokenizer, task=task, make=make, options=options)


def read_facts(config: Config, tokenizer: Tokenizer | None, *, before: int = 0) -> Facts:
    """Return what tasks must know about a model; its length is the shorter of the model's and the tokenizer's.

    `before`: positions of the model that a prefix takes.
    """
    stated = None if tokenizer is None else tokenizer.model_max_length
    room = config.max_tokens - before
    return Facts(
        model_type=config.model_type,
        max_length=min(room, stated or room),
        labels=config.labels,
        problem_type=config.problem_type,
        token_types=config.type_vocab_size > 1,
    )


def open_runtime(
    folder: Path, runtime: str, dtype: str, slots: int, threads: int | None, *, head: str = "CausalLM",
    code: Sequence[Any] = (), once: bool = False,
) -> tuple[Runtime, str]:  # fmt: skip
    """Open the runtime of this name over a folder, with a head; return it and why it is this one."""
    if runtime not in RUNTIMES:
        raise InputError("there is no such runtime", found=runtime, expected=", ".join(RUNTIMES))
    graphs = [name for name, file in FILES.items() if (folder / "onnx" / file).is_file()]
    made = read_kind(read_config(folder)) if graphs else head
    if made != head:
        if runtime == "onnx":
            raise InputError(
                "the graph was made for another task", where=f"{folder}/config.json", found=made, expected=head,
                fix='use runtime="torch", or export the model with this head',
            )  # fmt: skip
        graphs = []

    def open_way(way: Way, once: bool = False) -> Runtime:
        if way.runtime == "onnx":
            return OnnxRuntime(folder, dtype=way.dtype, slots=slots, threads=threads, once=once)
        require("torch", extra="torch")
        from lmworks.runtime.torch_runtime import TorchRuntime, limit_threads

        limit_threads(threads)
        return TorchRuntime(folder, head=head, dtype=way.dtype, slots=slots, code=code)

    ways = find_ways(folder, graphs, dtype)
    if runtime != "auto":
        ways = [way for way in ways if way.runtime == runtime] if dtype == ANY else []
    if not ways:  # what was named, or nothing that is here: opening it says what is missing
        lossy = bool(graphs) and dtype in FILES and dtype != "fp32"  # a graph's: torch does not read it
        named = runtime if runtime != "auto" else "onnx" if lossy else "torch"
        default = graphs[0] if named == "onnx" and graphs else "fp32"
        return open_way(Way(named, default if dtype in ("auto", ANY) else dtype), once), "as asked"
    with trace.paused():  # what is measured is no part of the answer; it is not `once`, as it is remembered for all
        choice = choose(folder, ways, open_way, head=head, threads=threads)
    return open_way(choice.way, once), choice.why


def read_eos_ids(folder: Path, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that end a text: those of generation_config.json, else config.json, else the tokenizer's."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            value = read_json(folder / name).get("eos_token_id")
            if isinstance(value, int):
                return [value]
            if isinstance(value, list):
                if not all(type(item) is int for item in value):
                    raise FormatError(f"{name}: eos_token_id is no token", where=str(folder), found=str(value)[:100])
                return value
    return [] if tokenizer.eos_id is None else [tokenizer.eos_id]
