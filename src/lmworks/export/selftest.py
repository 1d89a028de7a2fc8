"""What every execution of a model is held to: prompts, their ids, the tokens and the logits that torch gives for them.

Shapes: T tokens, V vocabulary.

`selftest.json` travels with the model: the page tests itself with it on every load, `verify` holds all runtimes to it.
The tokens are greedy and computed by torch in fp32 over whole sequences, so no cache can be wrong the same way; writing
does not end at an end token, so that each prompt checks the same number of tokens.

fp32 must keep every logit: the largest difference is judged. A lossy dtype moves all of them a little, and the largest
of many such moves grows with their number (labels, tokens, the vocabulary) although the model is as good; so what is
judged there is the root mean square of the differences, against a part of the logits' standard deviation. It does not
depend on how many there are, nor on the unit that the logits are in.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import FormatError, InputError
from lmworks.runtime.base import Runtime
from lmworks.runtime.decoding import generate
from lmworks.runtime.writing import Decodes

Logits = NDArray[np.float32]

FORMAT = 2  # 1 allowed for the largest difference in every dtype
FP32_CLOSE, FP32_MOST, FP32_PART = 1e-4, 1e-3, 1e-5  # within 1e-4, or 1e-5 of the largest logit, never more than 1e-3
PARTS = {  # of the standard deviation of the logits: the root mean square of what a lossy dtype may move them by
    "fp16": 0.02, "int8": 0.2, "uint8": 0.2, "q4": 0.4, "bnb4": 0.4, "q4f16": 0.4,
}  # fmt: skip
PROBES = (  # texts that tell tokenizers apart; every runtime must give the ids that Python gives
    "",
    " ",
    "  two  spaces   and\ttabs\n\n\nnew lines \n",
    "don't we'll I'M They've 'quoted' \"double\"",
    "1234567890 3.14 1,000,000 x86_64",
    "naïve café — “quotes” … ½ ™ ﬁ",
    "Ünïcödé e\u0301 n\u0303 \u00c5\u212b",
    "Здравствуй, мир! Γειά σου Κόσμε",
    "日本語のテキスト。中文文本，没有空格",
    "مرحبا بالعالم שלום עולם",
    "👩‍👩‍👧 🇪🇺 👍🏽 ☕️",
    "a\u200bzero\u00a0width\ufeffmark\u2028line",
    "<|endoftext|>text<|pad|>",
    "MixedCASE camelCase snake_case http://example.org/?q=a&b=c#d",
    "\r\nwindows\r\nlines\r",
)


@dataclass(frozen=True)
class Answer:
    """What a runtime gave for one prompt: ids, greedy tokens, and the logits (V,) after the prompt."""

    ids: list[int]
    tokens: list[int]
    logits: Logits


def record_selftest(
    runtime: Runtime, tokenizer: Decodes, prompts: Sequence[str], *, tokens: int = 32, texts: Sequence[str] = ()
) -> dict[str, Any]:
    """Compute the record with the torch runtime in fp32; the dict is selftest.json.

    `texts`, for instance of the corpus, join PROBES: every runtime must give the ids that Python gives for them. Raises
    InputError when a prompt has no token, or no room for `tokens` more.
    """
    entries, spreads, largest = [], [], 0.0
    for text in prompts:
        ids = tokenizer.encode_prompt(text)
        if not 1 <= len(ids) <= runtime.max_length - tokens + 1:
            raise InputError(
                "a prompt of the self-test does not fit the model",
                found=f"{len(ids)} tokens and {tokens} to write",
                expected=f"1 to {runtime.max_length - tokens + 1} tokens in the prompt",
            )
        written, logits, margin = reference(runtime, ids, tokens)
        spreads.append(float(logits.std()))
        largest = max(largest, float(np.abs(logits).max()))
        entries.append(
            {
                "text": text,
                "ids": ids,
                "tokens": written,
                "continuation": tokenizer.decode(written),
                "margin": margin,
                "logits": to_base64(logits),
            }
        )
    return {
        "format": FORMAT,
        "reference": f"{runtime.name} {runtime.dtype}, whole sequences without a cache, greedy",
        "tolerance": tolerances(largest, float(np.mean(spreads))),
        "prompts": entries,
        "texts": [{"text": text, "ids": tokenizer.encode_prompt(text)} for text in (*PROBES, *texts)],
    }


def tolerances(largest: float, spread: float) -> dict[str, float]:
    """Return what each dtype may differ by, given the largest logit and the logits' standard deviation.

    fp32 by so much in every logit, the others in root mean square, and no less than fp32.
    """
    exact = min(FP32_MOST, max(FP32_CLOSE, FP32_PART * largest))
    return {"fp32": exact, **{dtype: max(part * spread, exact) for dtype, part in PARTS.items()}}


def reference(runtime: Runtime, ids: Sequence[int], tokens: int) -> tuple[list[int], Logits, float]:
    """Return greedy tokens, the logits (V,) after the prompt, and the smallest lead of a chosen token over the next."""
    row, first, margin = list(ids), None, np.inf
    for _ in range(tokens):
        batch = np.array([row], np.int64)  # (1, T)
        logits = runtime.run({"input_ids": batch, "attention_mask": np.ones_like(batch)})["logits"][0, -1]  # (V,)
        first = logits.astype(np.float32) if first is None else first
        second, best = np.partition(logits, -2)[-2:]
        margin = min(margin, float(best - second))
        row.append(int(logits.argmax()))
    assert first is not None
    return row[len(ids) :], first, margin


def answer(runtime: Runtime, tokenizer: Decodes, prompts: Sequence[Mapping[str, Any]]) -> list[Answer]:
    """Run the recorded prompts through a runtime's own way of generating, its cache included."""
    answers = []
    for prompt in prompts:
        ids = tokenizer.encode_prompt(prompt["text"])
        logits = runtime.prefill([0], [ids])[0].copy()  # (V,)
        stream = generate(runtime, tokenizer, ids, max_tokens=len(prompt["tokens"]), eos_ids=[])
        for _ in stream:
            pass
        answers.append(Answer(ids, stream.result.tokens, logits))
    return answers


def compare(answers: Sequence[Answer], selftest: Mapping[str, Any], *, dtype: str) -> dict[str, Any]:
    """Hold answers to the record; return a cell of the certificate.

    tokens_equal [equal, checked], max_abs_diff, rms_diff and tolerance of the logits, and passed: the same prompt ids,
    logits within the tolerance and, in fp32, every token equal. A lossy dtype's tokens are reported, not judged.
    """
    prompts = selftest["prompts"]
    equal = sum(a == b for given, known in zip(answers, prompts, strict=True) for a, b in pairs(given, known))
    checked = sum(len(known["tokens"]) for known in prompts)
    rows = ((given.logits, from_base64(known["logits"])) for given, known in zip(answers, prompts, strict=True))
    gaps = measure_gaps(rows)
    same_ids = all(given.ids == known["ids"] for given, known in zip(answers, prompts, strict=True))
    tolerance = float(selftest["tolerance"][dtype])
    cell = {"tokens_equal": [equal, checked], **gaps, "tolerance": tolerance}
    problems = find_problems(same_ids, gaps, tolerance, dtype=dtype)
    if dtype == "fp32" and equal != checked:
        problems.append(f"{checked - equal} of {checked} greedy tokens differ")
    return judged(cell, problems)


def measure_gaps(rows: Iterable[tuple[Logits, Logits]]) -> dict[str, float]:
    """Return max_abs_diff and rms_diff of logits and recorded logits; infinite where they cannot be compared."""
    largest = squares = 0.0
    count = 0
    for given, known in rows:
        largest = max(largest, distance(given, known))
        if not np.isfinite(largest):
            return {"max_abs_diff": largest, "rms_diff": largest}
        squares += float(np.square(given.astype(np.float64) - known).sum())
        count += known.size
    return {"max_abs_diff": largest, "rms_diff": float(np.sqrt(squares / max(count, 1)))}


def find_problems(same_ids: bool, gaps: Mapping[str, float], tolerance: float, *, dtype: str) -> list[str]:
    """Return what is wrong in any task: other ids, or logits too far away."""
    problems = [] if same_ids else ["tokenizer.json gives other ids for the recorded texts"]
    name, words = ("max_abs_diff", "a logit differs") if dtype == "fp32" else ("rms_diff", "logits differ")
    if not gaps[name] <= tolerance:
        square = "" if dtype == "fp32" else " in root mean square"
        problems.append(f"{words} by {gaps[name]:.3g}{square}, more than {tolerance:.3g}")
    return problems


def judged(cell: dict[str, Any], problems: Sequence[str]) -> dict[str, Any]:
    """Return a cell with its verdict; a number that JSON cannot hold is None."""
    finite = {key: None if isinstance(value, float) and not np.isfinite(value) else value
              for key, value in cell.items()}  # fmt: skip
    return {**finite, "passed": not problems} | ({"problem": "; ".join(problems)} if problems else {})


def failed(selftest: Mapping[str, Any], dtype: str, problem: str) -> dict[str, Any]:
    """Return the cell of a runtime that gave no answers."""
    checked = sum(len(known["tokens"]) for known in selftest["prompts"])
    return {"tokens_equal": [0, checked], **no_answer(selftest, dtype, problem)}


def no_answer(selftest: Mapping[str, Any], dtype: str, problem: str) -> dict[str, Any]:
    """Return what the cells of all tasks say where there were no answers."""
    tolerance = float(selftest["tolerance"][dtype])
    return {"max_abs_diff": None, "rms_diff": None, "tolerance": tolerance, "passed": False, "problem": problem}


def check_record(selftest: Mapping[str, Any], tokenizer: Decodes, runtime: Runtime | None) -> dict[str, Any]:
    """Recompute the record: prompt and probe ids with the tokenizer and, given torch, every token and logit.

    Returns ids_equal and tokens_equal as [equal, checked], max_abs_diff, rms_diff, passed.
    """
    prompts, texts = selftest["prompts"], [*selftest["prompts"], *selftest["texts"]]
    same = [tokenizer.encode_prompt(entry["text"]) == entry["ids"] for entry in texts]
    result: dict[str, Any] = {"ids_equal": [sum(same), len(same)], "passed": all(same)}
    if not all(same):
        result["problem"] = f"tokenizer.json gives other ids than recorded for {texts[same.index(False)]['text']!r}"
    if runtime is not None and all(same):
        cell = compare(
            [Answer(known["ids"], *reference(runtime, known["ids"], len(known["tokens"]))[:2]) for known in prompts],
            selftest,
            dtype="fp32",
        )
        result = {**result, **cell}
        if not cell["passed"]:
            result["problem"] = f"model.safetensors does not give what selftest.json records: {cell['problem']}"
    return result


def check_form(selftest: Mapping[str, Any]) -> None:
    """Raise FormatError unless this can be a selftest.json."""
    needs: dict[str, Callable[[Any], bool]] = {
        "prompts": lambda value: isinstance(value, list) and bool(value) and all(is_prompt(entry) for entry in value),
        "texts": lambda value: isinstance(value, list),
        "tolerance": lambda value: isinstance(value, dict) and {"fp32", "int8"} <= value.keys(),
    }
    for name, valid in needs.items():
        if not valid(selftest.get(name)):
            raise FormatError(f"selftest.json holds no usable {name}", fix="build the model again")


def is_prompt(entry: Any) -> bool:
    """Say whether an entry has everything that a prompt needs."""
    return isinstance(entry, dict) and {"text", "ids", "tokens", "logits"} <= entry.keys() and bool(entry["tokens"])


def pairs(given: Answer, known: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Return the tokens side by side; what is missing is not equal to anything."""
    return list(zip(given.tokens, known["tokens"], strict=False))


def distance(a: Logits, b: Logits) -> float:
    """Return the largest difference of two rows of logits; infinite when they cannot be compared."""
    if a.shape != b.shape:
        return float("inf")
    difference = float(np.abs(a - b).max(initial=0))
    return difference if np.isfinite(difference) else float("inf")


def to_base64(logits: Logits) -> str:
    """Return float32 values as text, exactly."""
    return base64.b64encode(np.ascontiguousarray(logits, dtype="<f4").tobytes()).decode("ascii")


def from_base64(text: str) -> Logits:
    """Return the float32 values that `to_base64` wrote."""
    return np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32)
