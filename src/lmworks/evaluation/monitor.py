"""What a model folder knows of its own limits: monitor.json and monitor.safetensors, and the answers that carry them.

monitor.json         the temperature, the score and its threshold, what was measured, the reference for drift without
                     its samples, and the SHA-256 of the files that all of it belongs to
monitor.safetensors  what the score reads (known, or whiten and means), and samples of the reference: confidence (M,),
                     score (M,), length (M,), features (M', D)

No text is kept. A monitor whose files have changed since is stale: it is refused, never used.

Shapes: N texts, L labels, D features, M texts of the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import FormatError, InputError
from lmworks.base.files import confine, read_json, sha256, write_bytes, write_json
from lmworks.base.safetensors_header import check_header
from lmworks.base.types import Batch, Label
from lmworks.evaluation.calibration import confidence
from lmworks.evaluation.ood import Mahalanobis, energy_score, nearest_score, softmax_score
from lmworks.evaluation.perplexity import token_logprobs
from lmworks.runtime.base import Runtime
from lmworks.runtime.onnx_runtime import FILES
from lmworks.runtime.predictor import Predictor
from lmworks.tasks.base import Feature, Task
from lmworks.tokens.batch import make_stream

FORMAT, FACTS, ARRAYS = 1, "monitor.json", "monitor.safetensors"
CLASSIFY, WRITE = "text-classification", "text-generation"
AGAIN = "fit it again: lmworks monitor fit MODEL DATA"
BELONGS = ("config.json", "tokenizer.json")  # beside the weights
LAST = 512  # tokens of a prompt
Numbers = NDArray[Any]


@dataclass(frozen=True)
class Seen:
    """An answer and what the monitor makes of it; of a model that writes, its prompt. `features` only feed drift."""

    labels: list[Label]
    label: int  # the likeliest one's place
    confidence: float | None
    ood_score: float
    ood: bool
    tokens: int
    features: NDArray[np.float32] | None


@dataclass(frozen=True)
class Monitor:
    """A fitted monitor."""

    facts: dict[str, Any]
    arrays: dict[str, Numbers]

    @property
    def threshold(self) -> float:
        """The score above which an input is flagged."""
        return float(self.facts["threshold"])

    @property
    def reads_features(self) -> bool:
        """Whether the model's features are needed."""
        return "features" in self.arrays

    def score(self, logits: Numbers, features: Numbers | None) -> NDArray[np.float64]:
        """Return how strange each text is (N,), by the score that was chosen."""
        kind = self.facts["score"]
        if kind in ("softmax", "energy"):
            return (softmax_score if kind == "softmax" else energy_score)(logits)
        assert features is not None
        if kind == "nearest":
            return nearest_score(features, self.arrays["known"])
        return self.mahalanobis.score(features)

    @cached_property
    def mahalanobis(self) -> Mahalanobis:
        """The class means."""
        return Mahalanobis(self.arrays["whiten"], self.arrays["means"])

    def write(self, folder: Path) -> None:
        """Write both files, monitor.json last: it holds the hash of the other."""
        from safetensors.numpy import save

        write_bytes(folder / ARRAYS, save({name: np.ascontiguousarray(x) for name, x in self.arrays.items()}))
        write_json(folder / FACTS, {**self.facts, "arrays": sha256(folder / ARRAYS)})


def files_of(folder: Path, runtime: str, dtype: str) -> list[str]:
    """Return the files that a runtime's answers come from."""
    if runtime == "onnx":
        graph = FILES[dtype]
        found = [f"onnx/{graph}", *(path.relative_to(folder).as_posix() for path in folder.glob(f"onnx/{graph}_data*"))]
    else:
        names = ("*.safetensors", "*.bin", "adapter_config.json")
        found = [path.name for name in names for path in folder.glob(name) if path.name != ARRAYS]
    return sorted([*found, *(name for name in BELONGS if (folder / name).is_file())])


def hash_files(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of each file."""
    return {name: sha256(folder / name) for name in names}


def read_monitor(folder: Path) -> Monitor | None:
    """Return the monitor of a folder, None where it has none; raise FormatError for one that is stale or damaged."""
    if not (folder / FACTS).is_file():
        return None
    facts = read_json(folder / FACTS)
    where = str(folder / FACTS)
    if facts.get("format") != FORMAT:
        raise FormatError("this monitor was made by another version", where=where,
                          found=f"format {facts.get('format')}", expected=f"format {FORMAT}", fix=AGAIN)  # fmt: skip
    try:
        known = {str(name): str(value) for name, value in facts["files"].items()}
        paths = {name: confine(folder, name, by=FACTS) for name in known}
        changed = [name for name, value in known.items() if not paths[name].is_file() or sha256(paths[name]) != value]
        whole = (folder / ARRAYS).is_file() and sha256(folder / ARRAYS) == facts["arrays"]
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError("monitor.json is incomplete", where=where, found=f"no {error}", fix=AGAIN) from None
    if changed:
        raise FormatError("the monitor belongs to another model than this one", where=where,
                          found=f"changed since it was fitted: {', '.join(changed)}", fix=AGAIN)  # fmt: skip
    if not whole:
        raise FormatError(f"{ARRAYS} is not the one that {FACTS} belongs to", where=where, fix=AGAIN)
    check_header(folder / ARRAYS)
    from safetensors.numpy import load_file

    return Monitor(facts, load_file(folder / ARRAYS))


def check_runtime(monitor: Monitor, folder: Path, runtime: Runtime) -> None:
    """Raise InputError where a monitor was fitted on other numbers than this runtime gives."""
    fitted = f"{monitor.facts['runtime']} {monitor.facts['dtype']}"
    read = files_of(folder, runtime.name, runtime.dtype)
    if not set(read) <= set(monitor.facts["files"]) or runtime.dtype != monitor.facts["dtype"]:
        raise InputError("the monitor was fitted for another form of this model", where=str(folder), found=fitted,
                         expected=f"{runtime.name} {runtime.dtype}",
                         fix=f"{AGAIN} --dtype {runtime.dtype}")  # fmt: skip


def carry(source: Path, staged: Path, dtypes: Sequence[str]) -> str:
    """Give the graphs in `staged` the monitor of the checkpoint in `source`; say what became of it, "" for none.

    The graph in fp32 gives torch's numbers, so what was fitted in fp32 holds for it; no other graph's are known.
    """
    try:
        monitor = read_monitor(source)
    except FormatError as error:
        return f"The monitor stays behind ({error.what}): lmworks monitor fit {source} DATA."
    if monitor is None:
        return ""
    if monitor.facts["dtype"] != "fp32" or "fp32" not in dtypes:
        return "The monitor stays behind, it was not fitted for these graphs: lmworks monitor fit OUT DATA."
    files = hash_files(staged, files_of(staged, "onnx", "fp32"))
    Monitor({**monitor.facts, "runtime": "onnx", "files": files}, monitor.arrays).write(staged)
    return "The monitor came along; it holds for the fp32 graph."


def attach(predictor: Predictor, monitor: Monitor | None) -> None:
    """Let a classifier's predictor answer with `check=True` as well: a `Seen` for each example.

    `monitor` None: only what the model says is kept, for one that is being fitted.
    """
    make, runtime = predictor.make, predictor.runtime
    assert make is not None
    if monitor is None or monitor.reads_features:
        runtime = cast(Runtime, Joined(runtime))
        predictor.runtime = runtime

    def checked(*, check: bool = False, **options: Any) -> Any:
        return Checked(make(**options), monitor, check=check)

    predictor.make = checked
    predictor.prepared = checked(**predictor.options)


class Joined:
    """A runtime whose logits (B, L) have the features (B, D) behind them, where the model gives features."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        if runtime.name == "torch":
            runtime.gives_features = True  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runtime, name)

    def run(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """Run whole sequences: logits (B, L + D)."""
        found = self.runtime.run(batch)
        features = found.pop("features", None)
        return found if features is None else {"logits": np.concatenate([found["logits"], features], axis=1)}


class Checked:
    """A classification task that can look at its answers with a monitor."""

    output = "logits"

    def __init__(self, task: Task, monitor: Monitor | None, *, check: bool) -> None:
        self.task, self.monitor, self.check = task, monitor, check

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def encode(self, examples: Sequence[Any]) -> list[Feature]:
        """Return the features of texts or pairs."""
        return self.task.encode(examples)

    def decode(self, features: Sequence[Feature], outputs: Sequence[NDArray[Any]], examples: Sequence[Any]) -> Any:
        """Return the labels of each example; with `check` a Seen, or without a monitor (logits, features, tokens).

        The windows of a long text count by the tokens that are new in each, as for its labels.
        """
        size = len(self.task.facts.labels)  # type: ignore[attr-defined]
        labels = self.task.decode(features, [row[:size] for row in outputs], examples)
        if not self.check:
            return labels
        rows, tokens = join_windows(features, outputs, len(examples), size)
        logits, states = rows[:, :size], rows[:, size:].astype(np.float32, copy=False) if rows.shape[1] > size else None
        if self.monitor is None:
            return [(logits[i], None if states is None else states[i], int(n)) for i, n in enumerate(tokens)]
        if not len(rows):
            return []
        confident = confidence(logits, self.monitor.facts["temperature"])
        scores = self.monitor.score(logits, states)
        flags = scores > self.monitor.threshold
        return [
            Seen(labels[i], int(logits[i].argmax()), float(confident[i]), float(scores[i]), bool(flags[i]),
                 int(tokens[i]), None if states is None else states[i])
            for i in range(len(rows))
        ]  # fmt: skip


def join_windows(
    features: Sequence[Feature], outputs: Sequence[NDArray[Any]], examples: int, size: int
) -> tuple[NDArray[Any], list[int]]:
    """Return what the model gave of each example, the mean of its windows, and its tokens."""
    if len(features) == examples and features:
        return np.stack(outputs), [len(feature) for feature in features]
    rows, weights, tokens = (
        np.zeros((examples, len(outputs[0]) if outputs else size)),
        np.zeros(examples),
        [0] * examples,
    )
    for feature, row in zip(features, outputs, strict=True):
        new = feature.notes.get("new_tokens", 1)
        rows[feature.example] += new * row.astype(np.float64)
        weights[feature.example] += new
        tokens[feature.example] += feature.notes.get("new_tokens", len(feature))
    return rows / np.maximum(weights, 1e-12)[:, None], tokens


def prompt_scores(predictor: Predictor, texts: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return how much each text surprises a model that writes, the log of its perplexity (N,), and its tokens (N,).

    The last LAST tokens are read, or those that the model has room for. Raises InputError for a text without a token.
    """
    scores, lengths = np.empty(len(texts)), np.empty(len(texts), np.int64)
    room = min(predictor.runtime.max_length, LAST)
    for i, text in enumerate(texts):
        stream = make_stream(predictor.tokenizer, [text])[:-1][-room:]  # the text may go on: its end is no surprise
        if len(stream) < 2:
            raise InputError("a text without a token cannot be scored", where=f"text {i + 1}")
        scores[i] = -token_logprobs(predictor.runtime, stream, context=room).logprobs.mean()
        lengths[i] = len(stream) - 1
    return scores, lengths
