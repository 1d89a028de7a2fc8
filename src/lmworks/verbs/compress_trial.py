"""What a smaller model is worth: scores on held-out examples, and time, memory and size beside the original's.

accuracy, f1, spearman …   the task's own, of labelled examples
perplexity                 of plain texts, for a model that writes; of one that fills gaps accuracy as well
agreement                  share of answers that are those of the model as it is
cosine                     of vectors with those of the model as it is
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmworks.base.errors import InputError, LmworksError
from lmworks.compress.candidates import Candidate, time_in_turn
from lmworks.compress.plain import plain_examples
from lmworks.evaluation.metrics import score
from lmworks.text.labelled import Labelled

if TYPE_CHECKING:
    from lmworks.runtime.predictor import Predictor

MAIN = ("accuracy", "f1", "exact_match", "spearman", "mrr", "mse", "perplexity")  # the first that there is decides
WEIGHTS = ("*.safetensors", "onnx/*")
ONE, BATCHES, MANY, ROUNDS = 12, 2, 32, 5  # texts one at a time, batches of many, and how often each
COMPARED = 256  # texts whose vectors are compared
TIMED = 48  # examples that are drawn for it
PASSAGE = 1000  # characters of a text to go on with
NEW_TOKENS = 16  # that a model which writes is timed for
WINDOWS = 8  # of text that it reads at once


def judge(predictor: Predictor, data: Labelled, problem: str | None) -> tuple[dict[str, float], list[Any]]:
    """Return the metrics of a predictor on labelled examples, and what it said; of plain text its perplexity.

    A model that makes vectors is taken to say the vectors (n, D) of the first texts.
    """
    if data.task == "fill-mask" or getattr(predictor.prepared, "name", "") == "fill-mask":
        from lmworks.evaluation.masked import score_masked

        return score_masked(predictor, [text for text in data.examples if isinstance(text, str)])
    if predictor.prepared is None:
        from lmworks.evaluation.perplexity import token_logprobs
        from lmworks.tokens.batch import make_stream

        texts = [text for text in data.examples if isinstance(text, str)]
        if not texts:
            raise InputError("a budget for a model that writes is judged on plain texts", where=data.where,
                             fix="give a text file, or jsonl rows of text")  # fmt: skip
        stream = make_stream(predictor.tokenizer, texts)
        scores = token_logprobs(predictor.runtime, stream, context=predictor.runtime.max_length)
        return {"perplexity": scores.perplexity}, []
    from lmworks.training.measure import answer

    said = answer(predictor, data, problem=problem)
    found = score(data.task, said, data.references, labels=data.labels)
    if data.task == "feature-extraction":
        from lmworks.tasks.embed import unit

        said = list(unit(predictor(plain_examples(data.task, data.examples[:COMPARED]))))
    return {name: value for name, value in found.items() if isinstance(value, int | float)}, said


def compare_answers(said: Sequence[Any], known: Sequence[Any]) -> dict[str, float]:
    """Return the share of equal answers; of vectors their cosine, and the share whose nearest other text is the same.

    Numbers have none: they are never equal.
    """
    if not said or isinstance(said[0], float):
        return {}
    if not isinstance(said[0], np.ndarray):
        return {"agreement": sum(a == b for a, b in zip(said, known, strict=True)) / len(said)}
    one, two = np.stack(list(said)), np.stack(list(known))  # (n, D), of length 1
    nearest = [(x @ x.T - 2 * np.eye(len(x))).argmax(1) for x in (one, two)]
    return {"cosine": float((one * two).sum(1).mean()), "agreement": float((nearest[0] == nearest[1]).mean())}


def main_score(scores: dict[str, float]) -> str:
    """Return the metric that candidates are compared by."""
    return next((name for name in MAIN if name in scores), next(iter(scores)))


def folder_bytes(folder: Path) -> int:
    """Return the bytes of a folder's weights; of its graphs where it has no others."""
    found = [sum(path.stat().st_size for path in folder.glob(pattern)) for pattern in WEIGHTS]
    return next(filter(None, found), 0)


def examples_to_time(data: Labelled, seed: int) -> list[Any]:
    """Return some examples, of every length; of a text to go on with, which may be a whole book, passages."""
    examples: Sequence[Any] = data.examples
    if data.task == "text-generation":
        texts = [example for example in examples if isinstance(example, str)]
        examples = [text[i : i + PASSAGE] for text in texts for i in range(0, len(text), PASSAGE)]
    return random.Random(seed).sample(examples, min(len(examples), TIMED))


def time_pair(other: Predictor, base: Predictor, examples: Sequence[Any]) -> dict[str, float]:
    """Return how long one example, and many, take both, in turn; milliseconds, and how many times as fast."""

    def one(predictor: Predictor, turn: int) -> Any:
        example = examples[turn % len(examples)]
        if predictor.prepared is not None:
            return predictor([example])
        room = max(1, min(NEW_TOKENS, predictor.runtime.max_length // 4))
        start = predictor.tokenizer.encode(example)[:room] or [0]
        return predictor.generate(predictor.tokenizer.decode(start), max_tokens=room)

    def many(predictor: Predictor, turn: int) -> Any:
        some = [examples[(turn * MANY + i) % len(examples)] for i in range(MANY)]
        if predictor.prepared is not None:
            return predictor(some)
        return read_texts(predictor, some)

    mine, theirs = time_in_turn(lambda i: one(other, i), lambda i: one(base, i), inputs=ONE, rounds=ROUNDS)
    more, most = time_in_turn(lambda i: many(other, i), lambda i: many(base, i), inputs=BATCHES, rounds=ROUNDS)
    found = {"latency": 1000 * mine, "latency_gain": theirs / mine, "many": 1000 * more, "throughput": most / more}
    return {**found, "speed": min(found["latency_gain"], found["throughput"])}


def read_texts(predictor: Predictor, texts: Sequence[str]) -> None:
    """Run a model that writes over texts, in windows, and look at none of the numbers: what they are worth costs more
    than a small model itself."""
    from lmworks.tokens.batch import make_stream

    stream = np.asarray(make_stream(predictor.tokenizer, texts), np.int64)  # (N,)
    length = min(len(stream), predictor.runtime.max_length)
    rows = stream[: len(stream) // length * length].reshape(-1, length)
    for start in range(0, len(rows), WINDOWS):
        predictor.runtime.run({"input_ids": rows[start : start + WINDOWS]})


def weigh(folder: Path, task: str, dtype: str, examples: Sequence[Any]) -> float:
    """Return the most memory, in MB, that a process of its own needed to open a folder and answer a few examples."""
    asked = json.dumps({"folder": str(folder), "task": task, "dtype": dtype, "examples": list(examples)})
    code = "from lmworks.verbs.compress_trial import weighed; weighed()"
    done = subprocess.run([sys.executable, "-c", code], input=asked,
                          capture_output=True, text=True, check=False)  # fmt: skip
    if done.returncode:
        raise LmworksError("a process of its own could not open the model", where=str(folder),
                           found=done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "")  # fmt: skip
    return float(done.stdout.strip().splitlines()[-1])


def weighed() -> None:
    """Do what `weigh` asks for on standard input; write the megabytes to standard output."""
    from lmworks.runtime.predictor import load

    asked = json.load(sys.stdin)
    predictor = load(asked["folder"], asked["task"], dtype=asked["dtype"])
    examples = [tuple(one) if isinstance(one, list) else one for one in asked["examples"]]
    if predictor.prepared is None:
        predictor.generate(str(examples[0])[:100], max_tokens=4)
    else:
        predictor(examples)
    sys.stdout.write(f"{peak_memory() / 1e6:.1f}\n")


def peak_memory() -> int:
    """Return the most bytes that this process has had in memory."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage counts what the parent had as well
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_candidate(
    one: Candidate, base: Candidate | None, *, task: str, held_out: Labelled, problem: str | None,
    known: Sequence[Any] = (), seed: int = 0,
) -> tuple[Candidate, list[Any]]:  # fmt: skip
    """Return a candidate with everything that is measured of it beside the model as it is, and what it said.

    `base` None: it is that model; its ratios are 1. `known` is what that model said.
    """
    from lmworks.runtime.predictor import load

    assert one.folder is not None
    predictor = load(one.folder, task, dtype=one.dtype)
    scores, said = judge(predictor, held_out, problem)
    scores |= compare_answers(said, known or said)
    examples = plain_examples(task, examples_to_time(held_out, seed), mask=getattr(predictor.prepared, "mask", ""))
    size = folder_bytes(one.folder) / 1e6
    memory = weigh(one.folder, task, one.dtype, examples[:MANY])
    if base is None:
        times = time_pair(predictor, predictor, examples)
        times |= {"latency_gain": 1.0, "throughput": 1.0, "speed": 1.0}
        shares = {"size_share": 1.0, "memory_share": 1.0}
    else:
        assert base.folder is not None
        times = time_pair(predictor, load(base.folder, task, dtype=base.dtype), examples)
        times["latency"] = base.found["latency"] / times["latency_gain"]  # at the pace of the first measurement: the
        times["many"] = base.found["many"] / times["throughput"]  # machine may be busier now
        shares = {"size_share": size / base.found["size"], "memory_share": memory / base.found["memory"]}
    return replace(one, found={**scores, "size": size, "memory": memory, **times, **shares}), said
