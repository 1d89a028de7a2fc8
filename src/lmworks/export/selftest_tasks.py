"""The self-test of a model that answers: its inputs, and the ids, logits and answers that torch gives for them.

    {format, task, reference, tolerance: {dtype: number}, options: {the task's}, items: [{input, ids, logits, output}],
     texts: [{text, ids}]}

`logits` are those of an item's first window: of a class (L,), of each token (T, L), of where an answer starts and ends
(T, 2), of the masks alone (M, V), of states (T, D), in base64 as float32. `options` are what the page begins with.

Decisions are what people act on: the label, or the labels above a half; entities with their places; the answer's text
and place; the likeliest token of each mask; for each text of several the nearest of the others.

Shapes: T tokens, L labels, M masks, V vocabulary, D hidden_size, N texts of an item.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmworks.base.errors import FormatError, InputError
from lmworks.export.selftest import (
    FORMAT,
    PROBES,
    Logits,
    distance,
    find_problems,
    from_base64,
    judged,
    measure_gaps,
    no_answer,
    to_base64,
    tolerances,
)
from lmworks.export.selftest_items import built_in, from_data_url, lengthen, read_items
from lmworks.models.config import Config
from lmworks.models.families import read_config
from lmworks.runtime.base import Runtime
from lmworks.runtime.batching import run_features
from lmworks.runtime.predictor import Predictor, make_predictor
from lmworks.tokens.tokenizer import Tokenizer

WINDOWED = 512  # tokens at most of a model whose self-test has a text longer than the model
LEAST = 0.02  # of the mean logit: a lone number, say a price, may be nearly the same for every text of the record
HALF = 0.5  # of several labels that may hold at once, those above it do


@dataclass(frozen=True)
class TaskAnswer:
    """What a runtime gave for one item: the first window's ids and logits, and the task's answer as JSON has it."""

    ids: list[int]
    logits: Logits
    output: Any


def open_task(runtime: Runtime, folder: Path, task: str, options: Mapping[str, Any] | None = None) -> Predictor:
    """Return the predictor of a task over a runtime; `options` None: those that the page begins with."""
    config = read_config(folder)
    tokenizer = None if config.vision else Tokenizer.from_pretrained(folder)
    predictor = make_predictor(runtime, folder, config, task, tokenizer, dict(options or {}))
    if options is not None:
        return predictor
    chosen = choose_options(predictor.prepared, task, config)
    return make_predictor(runtime, folder, config, task, tokenizer, chosen)


def choose_options(task: Any, name: str, config: Config) -> dict[str, Any]:
    """Return the options of a page and its self-test: what "auto" means for this model is spelled out."""
    if name in ("text-classification", "image-classification"):
        single = len(config.labels) == 1 or config.problem_type == "multi_label_classification"
        scores = "none" if config.problem_type == "regression" else "sigmoid" if single else "softmax"
        return {"top_k": None, "scores": scores, **({"long": "window"} if name.startswith("text") else {})}
    if name == "token-classification":
        return {"aggregation": "first", "words": task.words, "long": "window"}
    if name == "question-answering":
        return {"top_k": 1, "max_answer_length": task.max_answer_length}
    if name == "fill-mask":
        return {"top_k": task.top_k, "long": "window"}
    long = "window" if task.pooling in ("mean", "max") else "truncate"
    return {"pooling": task.pooling, "normalize": task.normalize, "long": long}


def record_task(runtime: Runtime, folder: Path, task: str, *, data: str | Path | None = None) -> dict[str, Any]:
    """Compute the record of a task with the torch runtime in fp32; `folder` holds config and tokenizer.

    `data` is a file of real examples in place of the built-in ones. Raises InputError where none fits the model.
    """
    predictor = open_task(runtime, folder, task)
    tokenizer = None if task == "image-classification" else predictor.tokenizer
    mask = str(getattr(predictor.prepared, "mask", ""))

    def fits(given: Mapping[str, Any]) -> bool:
        """Say whether an input is read at once."""
        examples = to_examples(task, given)
        try:
            features = predictor.make(**{**predictor.options, **strict}).encode(examples)  # type: ignore[misc]
        except InputError:
            return False
        return len(features) == len(examples)

    strict = {"long": "error"} if "long" in predictor.options else {}
    inputs = built_in(task, mask) if data is None else read_items(data, task, mask, fits)
    inputs = [given for given in inputs if tokenizer is None or fits(given)]
    if not inputs:
        raise InputError("the model is too short to read the self-test's texts", fix="give short ones with --data")
    if tokenizer is not None and runtime.max_length <= WINDOWED:
        inputs.append(lengthen(task, inputs[-1], mask, fits))
    answers = [ask(predictor, task, given) for given in inputs]
    numbers = np.concatenate([answer.logits.ravel() for answer in answers])
    spread = float(numbers.std())
    if all(answer.logits.shape[-1] == 1 for answer in answers):
        spread = max(spread, LEAST * float(abs(numbers.mean())))
    return {
        "format": FORMAT,
        "task": task,
        "reference": f"{runtime.name} {runtime.dtype}, one text at a time",
        "tolerance": tolerances(float(np.abs(numbers).max()), spread),
        "options": predictor.options,
        "items": [to_item(given, answer) for given, answer in zip(inputs, answers, strict=True)],
        "texts": [] if tokenizer is None else [{"text": t, "ids": tokenizer.encode_prompt(t)} for t in PROBES],
    }


def to_item(given: dict[str, Any], answer: TaskAnswer) -> dict[str, Any]:
    """Return an entry of the record."""
    ids = {} if "image" in given else {"ids": answer.ids}
    return {"input": given, **ids, "logits": to_base64(answer.logits), "output": answer.output}


def to_examples(task: str, given: Mapping[str, Any]) -> list[Any]:
    """Return an item's input as the task's examples: one, or several texts of feature-extraction."""
    if task == "question-answering":
        return [(given["question"], given["context"])]
    if task == "feature-extraction":
        return list(given["texts"])
    return [from_data_url(given["image"]) if task == "image-classification" else given["text"]]


def ask(predictor: Predictor, task: str, given: Mapping[str, Any]) -> TaskAnswer:
    """Answer one input, each of its windows alone."""
    engine: Any = predictor.prepared
    examples = to_examples(task, given)
    features = engine.encode(examples)
    outputs = [run_features(predictor.runtime, [feature], output=engine.output)[0] for feature in features]
    first = outputs[0][features[0].notes["rows"]] if task == "fill-mask" else outputs[0]
    output = to_plain(engine.decode(features, outputs, examples))
    return TaskAnswer(
        ids=[int(i) for i in features[0].inputs.get("input_ids", ())],
        logits=np.asarray(first, np.float32),
        output={"embeddings": output} if task == "feature-extraction" else output[0],
    )


def to_plain(value: Any) -> Any:
    """Return answers as JSON has them."""
    if isinstance(value, list):
        return [to_plain(one) for one in value]
    if isinstance(value, np.ndarray):
        return [[float(f"{x:.8g}") for x in row] for row in value.tolist()]
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def answer_task(predictor: Predictor, selftest: Mapping[str, Any]) -> list[TaskAnswer]:
    """Answer every recorded input with a predictor that has the record's options."""
    return [ask(predictor, selftest["task"], item["input"]) for item in selftest["items"]]


def read_answer(given: Mapping[str, Any]) -> TaskAnswer:
    """Return an answer that came as JSON."""
    return TaskAnswer(list(given.get("ids") or ()), from_base64(given["logits"]), given["output"])


def compare_task(answers: Sequence[TaskAnswer], selftest: Mapping[str, Any], *, dtype: str) -> dict[str, Any]:
    """Hold answers to the record; return a cell of the certificate.

    decisions_equal [equal, checked], max_abs_diff, rms_diff and tolerance of the logits, score_diff of what the answers
    say, and passed: the same ids, logits within the tolerance and, in fp32, every decision equal and every score as
    near as the logits. Of a lossy dtype decisions and scores are reported, not judged.
    """
    task, multiple = selftest["task"], selftest["options"].get("scores") == "sigmoid"
    tolerance = float(selftest["tolerance"][dtype])
    equal = checked = 0
    same_ids, moved, rows = True, 0.0, []
    for given, item in zip(answers, selftest["items"], strict=True):
        known = read_answer(item)
        same_ids &= given.ids == known.ids
        rows.append((given.logits.ravel(), known.logits.ravel()))
        try:
            pairs = match(task, given.output, known.output, multiple=multiple)
            moved = max(moved, score_distance(task, given.output, known.output))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            pairs, moved = [False], float("inf")  # no answer of this task at all
        equal, checked = equal + sum(pairs), checked + len(pairs)
    gaps = measure_gaps(rows)
    problems = find_problems(same_ids, gaps, tolerance, dtype=dtype)
    if dtype == "fp32" and equal != checked:
        problems.append(f"{checked - equal} of {checked} decisions differ")
    elif dtype == "fp32" and not moved <= tolerance:
        problems.append(f"a score differs by {moved:.3g} although the decisions are the same")
    cell = {"decisions_equal": [equal, checked], **gaps, "score_diff": moved, "tolerance": tolerance}
    return judged(cell, problems)


def match(task: str, given: Any, known: Any, *, multiple: bool) -> list[bool]:
    """Return for each decision whether it is the recorded one; what one side alone has decided counts as different."""
    if task == "token-classification":
        ours, theirs = ({(e["label"], e["start"], e["end"]) for e in entities} for entities in (given, known))
        return [entity in ours and entity in theirs for entity in ours | theirs] or [True]
    if task == "question-answering":
        return [all(given[key] == known[key] for key in ("text", "start", "end"))]
    if task == "fill-mask":
        pairs = zip(by_mask(given), by_mask(known), strict=True)
        return [a[0]["token"] == b[0]["token"] for a, b in pairs]
    if task == "feature-extraction":
        return [bool(same) for same in np.equal(nearest(given["embeddings"]), nearest(known["embeddings"]))]
    if multiple:
        one, two = ({label["label"] for label in labels if label["score"] > HALF} for labels in (given, known))
        return [one == two]
    return [bool(given[0]["label"] == known[0]["label"])]


def by_mask(fills: Any) -> list[Any]:
    """Return a list of fills for each mask; a text with one mask has no outer list."""
    return fills if isinstance(fills[0], list) else [fills]


def nearest(embeddings: Any) -> Any:
    """Return for each of N vectors which other one has the largest cosine (N,)."""
    vectors = np.asarray(embeddings, np.float64)
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return (vectors @ vectors.T - 2 * np.eye(len(vectors))).argmax(1)


def score_distance(task: str, given: Any, known: Any) -> float:
    """Return the largest difference of the scores (of feature-extraction: of the vectors' numbers) that both give."""
    if task == "feature-extraction":
        return distance(*(np.asarray(one["embeddings"], np.float32) for one in (given, known)))
    one, two = scores(task, given), scores(task, known)
    found = [abs(one[key] - two[key]) for key in one.keys() & two.keys()]
    return float(max(found, default=0.0)) if np.isfinite(found).all() else float("inf")


def scores(task: str, output: Any) -> dict[Any, float]:
    """Return the score of everything that an answer names."""
    if task == "question-answering":
        return {(output["start"], output["end"]): float(output["score"])}
    if task == "fill-mask":
        masks = enumerate(by_mask(output))
        return {(place, fill["token"]): float(fill["score"]) for place, fills in masks for fill in fills}
    return {(one["label"], one.get("start"), one.get("end")): float(one["score"]) for one in output}


def failed_task(selftest: Mapping[str, Any], dtype: str, problem: str) -> dict[str, Any]:
    """Return the cell of a runtime that gave no answers."""
    known = [item["output"] for item in selftest["items"]]
    multiple = selftest["options"].get("scores") == "sigmoid"
    checked = sum(len(match(selftest["task"], one, one, multiple=multiple)) for one in known)
    return {"decisions_equal": [0, checked], **no_answer(selftest, dtype, problem)}


def check_task_record(
    selftest: Mapping[str, Any], tokenizer: Tokenizer | None, torch: Predictor | None
) -> dict[str, Any]:
    """Recompute the record: the ids with the tokenizer and, given torch, every logit and decision.

    Returns ids_equal and decisions_equal as [equal, checked], max_abs_diff, rms_diff, passed.
    """
    same = [tokenizer.encode_prompt(entry["text"]) == entry["ids"] for entry in selftest["texts"]] if tokenizer else []
    result: dict[str, Any] = {"ids_equal": [sum(same), len(same)], "passed": all(same)}
    if not all(same):
        text = selftest["texts"][same.index(False)]["text"]
        result["problem"] = f"tokenizer.json gives other ids than recorded for {text!r}"
    elif torch is not None:
        cell = compare_task(answer_task(torch, selftest), selftest, dtype="fp32")
        result = {**result, **cell}
        if not cell["passed"]:
            result["problem"] = f"the weights do not give what selftest.json records: {cell['problem']}"
    return result


def check_task_form(selftest: Mapping[str, Any], task: str) -> None:
    """Raise FormatError unless this can be the selftest.json of this task."""
    needs: dict[str, Callable[[Any], bool]] = {
        "items": lambda value: isinstance(value, list) and bool(value) and all(is_item(item) for item in value),
        "texts": lambda value: isinstance(value, list) and all({"text", "ids"} <= entry.keys() for entry in value),
        "tolerance": lambda value: isinstance(value, dict) and "fp32" in value,
        "options": lambda value: isinstance(value, dict),
    }
    for name, valid in needs.items():
        try:
            usable = valid(selftest.get(name))
        except AttributeError:
            usable = False
        if not usable:
            raise FormatError(f"selftest.json holds no usable {name}", fix="export the model again")
    try:
        for item in selftest["items"]:
            match(task, item["output"], item["output"], multiple=False)
            to_examples(task, item["input"])
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        found = json.dumps(selftest["items"][0])[:200]
        raise FormatError(
            f"selftest.json holds no items of {task}", found=f"{type(error).__name__} in {found}",
            fix="export the model again",
        ) from None  # fmt: skip


def is_item(item: Any) -> bool:
    """Say whether an entry has everything that an item needs."""
    return isinstance(item, dict) and {"input", "logits", "output"} <= item.keys() and isinstance(item["input"], dict)
