"""Many questions answered at once by one model: dynamic batching.

Each request's examples become features at once; a turn runs the oldest feature with others of like length, up to a
budget of tokens. A request is answered when the last of its features has run.

An int8 graph scales its numbers over all rows of a call; there each feature runs alone, so that nobody's answer depends
on who else asks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic, time_ns
from typing import Any

from lmworks.runtime.batching import BATCH_TOKENS, MAX_ROWS, MOST_PADDING, run_features
from lmworks.runtime.predictor import Predictor
from lmworks.serve.slots import ALONE, LATE, LateError, Tell, Took
from lmworks.tasks.base import Feature, Task

LOOKED_AT = 256  # waiting features among which those of like length are found


@dataclass
class Question:
    """One request: its examples as features, and the outputs that are there already."""

    request: int
    task: Task
    examples: list[Any]
    features: list[Feature]
    outputs: list[Any]
    missing: int
    until: float
    took: Took = field(default_factory=lambda: Took(facts={"batches": 0, "rows": 0, "tokens": 0}))


class Batches:
    """Questions in line."""

    def __init__(self, predictor: Predictor, tell: Tell) -> None:
        self.predictor, self.tell = predictor, tell
        self.line: list[tuple[Question, int]] = []  # a question and the number of one of its features, by arrival
        self.batches = self.rows = self.tokens = 0
        self.budget: int = getattr(predictor.runtime, "batch_tokens", BATCH_TOKENS)

    def add(self, request: int, examples: list[Any], options: dict[str, Any], until: float) -> None:
        """Encode the examples and put them in line. Raises InputError for what cannot be encoded."""
        assert self.predictor.make is not None
        task = self.predictor.make(**{**self.predictor.options, **options})
        features = task.encode(examples)
        question = Question(request, task, examples, features, [None] * len(features), len(features), until)
        question.took.facts["tokens"] = sum(map(len, features))
        if not features:
            self._finish(question)
        self.line += [(question, number) for number in range(len(features))]

    def cancel(self, request: int) -> None:
        """Forget a request."""
        self.line = [(question, number) for question, number in self.line if question.request != request]

    @property
    def active(self) -> int:
        """How many requests wait."""
        return len({question.request for question, _ in self.line})

    def turn(self) -> bool:
        """Run one batch; say whether there was one."""
        now = monotonic()
        for request in {question.request for question, _ in self.line if question.until < now}:
            self.tell(request, "error", LateError(LATE, fix="try again later, or ask for less"))
            self.cancel(request)
        if not self.line:
            return False
        chosen = self._choose()
        taken = set(chosen)
        batch = [self.line[place] for place in chosen]
        self.line = [row for place, row in enumerate(self.line) if place not in taken]
        try:
            self._run(batch)
        except Exception as error:
            for request in {question.request for question, _ in batch}:
                self.tell(request, "error", error)
                self.cancel(request)
        return True

    def _choose(self) -> list[int]:
        """Return the places of a batch in the line: the oldest feature's and those of like length."""
        first, number = self.line[0]
        if self.predictor.runtime.dtype in ALONE:
            return [0]
        output, length = first.task.output, len(first.features[number])
        places, longest, real = [0], length, length
        others = [
            (abs(len(question.features[n]) - length), place)
            for place, (question, n) in enumerate(self.line[1:LOOKED_AT], 1)
            if question.task.output == output
        ]
        for _, place in sorted(others):
            question, n = self.line[place]
            tokens = len(question.features[n])
            most = max(longest, tokens)
            padded = (len(places) + 1) * most
            if len(places) == MAX_ROWS or padded > self.budget or padded - real - tokens > MOST_PADDING * padded:
                break
            places.append(place)
            longest, real = most, real + tokens
        return places

    def _run(self, batch: list[tuple[Question, int]]) -> None:
        features = [question.features[number] for question, number in batch]
        task = batch[0][0].task
        for took in {id(question): question.took for question, _ in batch}.values():
            took.began = took.began or time_ns()
            took.facts["batches"] += 1
            took.facts["rows"] = max(took.facts["rows"], len(batch))  # of the largest
        smaller = {id(question.features[n]): getattr(question.task, "reduce", None) for question, n in batch}

        def reduce(feature: Feature, output: Any) -> Any:
            make = smaller[id(feature)]
            return output if make is None else make(feature, output)

        found = run_features(
            self.predictor.runtime, features, output=task.output, pad_id=self.predictor.pad_id, reduce=reduce,
            batch_tokens=max(self.budget, sum(map(len, features)) * 2),
        )  # fmt: skip
        self.batches += 1
        self.rows += len(batch)
        self.tokens += sum(map(len, features))
        for (question, number), output in zip(batch, found, strict=True):
            question.outputs[number] = output
            question.missing -= 1
            if question.missing == 0:
                self._finish(question)

    def _finish(self, question: Question) -> None:
        try:
            answers = question.task.decode(question.features, question.outputs, question.examples)
        except Exception as error:  # the others of the batch have nothing to do with it
            self.tell(question.request, "error", error)
        else:
            question.took.ended = time_ns()
            question.took.began = question.took.began or question.took.ended
            self.tell(question.request, "done", answers, question.took)
