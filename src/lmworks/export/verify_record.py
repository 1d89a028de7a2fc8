"""How answers are held to a folder's selftest.json: tokens of a model that writes, decisions of one that answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from lmworks.base.errors import FormatError
from lmworks.export import selftest as writing
from lmworks.export import selftest_tasks as answering
from lmworks.runtime.base import Runtime
from lmworks.tokens.tokenizer import Tokenizer

WRITES = "text-generation"  # the task of records that name none
SHORT_TOKENS = 4  # of a check on a slow device
LONG = 32  # tokens that are read at once, from which the attention of onnxruntime-web's WebGPU is another one
Cell = dict[str, Any]
Given = dict[str, Any]  # what came back from JavaScript for one dtype: answers, texts, or error


@dataclass(frozen=True)
class Record:
    """A selftest.json, the task that it belongs to, and the folder with the tokenizer."""

    folder: Path
    task: str
    values: Mapping[str, Any]
    tokenizer: Tokenizer | None

    @property
    def writes(self) -> bool:
        """Whether the model continues texts."""
        return self.task == WRITES

    @property
    def counts(self) -> dict[str, int]:
        """How much is asked."""
        if self.writes:
            prompts = self.values["prompts"]
            return {"prompts": len(prompts), "tokens": sum(len(prompt["tokens"]) for prompt in prompts)}
        checked = answering.failed_task(self.values, "fp32", "")["decisions_equal"][1]
        return {"items": len(self.values["items"]), "decisions": checked}

    @property
    def work(self) -> dict[str, Any]:
        """What a JavaScript runtime is asked."""
        names = ("prompts",) if self.writes else ("task", "options", "items")
        return {"task": self.task, **{name: self.values[name] for name in (*names, "texts")}}

    def shorten(self) -> Record:
        """Return the same record with little to do: the first of it, and the first of the rest that is long."""
        name = "prompts" if self.writes else "items"
        first, *rest = self.values[name]
        few = [first, *([one for one in rest if len(one.get("ids", ())) >= LONG] or rest)[:1]]
        if self.writes:
            few = [{**prompt, "tokens": prompt["tokens"][:SHORT_TOKENS]} for prompt in few]
        return replace(self, values={**self.values, name: few, "texts": []})

    def run(self, runtime: Runtime, dtype: str) -> Cell:
        """Ask a Python runtime, of a model that writes its cache included, and judge what it gives."""
        if self.writes:
            answers = writing.answer(runtime, cast(Tokenizer, self.tokenizer), self.values["prompts"])
            return writing.compare(answers, self.values, dtype=dtype)
        predictor = answering.open_task(runtime, self.folder, self.task, self.values["options"])
        return answering.compare_task(answering.answer_task(predictor, self.values), self.values, dtype=dtype)

    def judge(self, given: Given, dtype: str) -> Cell:
        """Judge what a JavaScript runtime gave; the cell also counts texts whose ids are Python's."""
        if "error" in given:
            return self.failed(dtype, str(given["error"]))
        try:
            if self.writes:
                answers = [
                    writing.Answer(list(a["ids"]), list(a["tokens"]), writing.from_base64(a["logits"]))
                    for a in given["answers"]
                ]
                cell = writing.compare(answers, self.values, dtype=dtype)
            else:
                found = [answering.read_answer(one) for one in given["answers"]]
                cell = answering.compare_task(found, self.values, dtype=dtype)
            texts = self.values["texts"]
            same = [ids == known["ids"] for ids, known in zip(given["texts"], texts, strict=True)]
        except (KeyError, TypeError, ValueError) as error:
            return self.failed(dtype, f"the answers cannot be read: {type(error).__name__}: {error}"[:300])
        cell["texts_equal"] = [sum(same), len(same)]
        if not all(same):
            text = self.values["texts"][same.index(False)]["text"]
            problem = f"tokenizer.json gives other ids than in Python for {text!r}"
            cell = {**cell, "passed": False, "problem": "; ".join(filter(None, [cell.get("problem"), problem]))}
        return cell

    def failed(self, dtype: str, problem: str) -> Cell:
        """Return the cell of a runtime that gave no answers."""
        return (writing.failed if self.writes else answering.failed_task)(self.values, dtype, problem)

    def check(self, torch: Runtime | None) -> dict[str, Any]:
        """Recompute the record: ids with the tokenizer and, given torch, everything."""
        if self.writes:
            return writing.check_record(self.values, cast(Tokenizer, self.tokenizer), torch)
        options = self.values["options"]
        predictor = None if torch is None else answering.open_task(torch, self.folder, self.task, options)
        return answering.check_task_record(self.values, self.tokenizer, predictor)


def check_record_form(values: Mapping[str, Any], task: str) -> None:
    """Raise FormatError unless this can be the selftest.json of a model of this task."""
    found = values.get("task", WRITES)
    if found != task:
        raise FormatError(
            "selftest.json belongs to another task", found=str(found)[:100], expected=f"{task}, as config.json says",
            fix="export the model again",
        )  # fmt: skip
    if task == WRITES:
        writing.check_form(values)
    else:
        answering.check_task_form(values, task)
