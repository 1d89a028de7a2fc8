"""Extractive question answering: the span of a context that answers a question.

    score(i, j) = p(start = i) p(end = j),  i <= j < i + max_answer_length

Shapes: T tokens of a window.

The probabilities run over the tokens of the context and the token at the very start ([CLS], <s>), where a model that
was trained on unanswerable questions says no. A long context is read in windows, each after the question, and each
window has probabilities of its own; the best span over all windows is the answer. The numbers are those of the
question-answering pipeline of transformers 4, before it added up the scores of equal answers (a sum that passes 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmworks.base.errors import InputError
from lmworks.base.types import Answer
from lmworks.tasks.base import Facts, Feature, softmax, to_feature
from lmworks.tokens.tokenizer import Tokenizer

WINDOW, OVERLAP = 384, 128  # tokens; what the published checkpoints were trained with
CONTEXT = 1  # what an encoding's sequence_ids call the second text


class QuestionAnswering:
    """Answers (question, context) pairs."""

    name, output = "question-answering", "logits"

    def __init__(
        self,
        tokenizer: Tokenizer,
        facts: Facts,
        *,
        top_k: int = 1,
        max_answer_length: int = 15,
        max_length: int | None = None,
        overlap: int | None = None,
        no_answer: bool = False,
        align_to_words: bool = True,
    ) -> None:
        """Choose how to answer.

        A window has `max_length` tokens (384, or the model's length where that is less) and shares `overlap` of them
        with the next (128, or half of it). An answer has `max_answer_length` tokens at most. `no_answer` lets ""
        compete, as SQuAD 2 models learned it. `align_to_words` widens an answer to whole words; turn it off for scripts
        without spaces. Raises InputError for a value that makes no sense, and for `no_answer` where there is no [CLS].
        """
        self.tokenizer, self.facts, self.top_k, self.no_answer = tokenizer, facts, top_k, no_answer
        self.max_answer_length, self.overlap = max_answer_length, overlap
        self.length = min(WINDOW, facts.max_length) if max_length is None else max_length
        self.align = align_to_words and bool(tokenizer.pre_tokenizer)  # else all of a text counts as one word
        cls_id = tokenizer.find("cls_token", "[CLS]")
        self.cls_id = -1 if cls_id is None else cls_id
        for name, value in (("top_k", top_k), ("max_answer_length", max_answer_length), ("max_length", self.length)):
            if value < 1:
                raise InputError(f"{name} must be at least 1", found=str(value))
        if self.length > facts.max_length:
            raise InputError("max_length is longer than the model", found=f"{max_length} of {facts.max_length} tokens")
        if overlap is not None and overlap < 0:
            raise InputError("overlap must not be negative", found=str(overlap))
        if no_answer and cls_id is None:
            raise InputError(
                "this model cannot say that there is no answer",
                found="a tokenizer without a cls_token, which carries that score",
                fix="leave no_answer out",
            )

    def encode(self, examples: Sequence[tuple[str, str]]) -> list[Feature]:
        """Return the windows of each (question, context); raise InputError where a text is empty or has no room."""
        features = []
        for index, example in enumerate(examples):
            question, context = _pair(example, index)
            windows = self._windows(question, context, index)
            if CONTEXT not in windows[0].sequence_ids:
                raise InputError("the context has no tokens", where=_name(index), found=repr(context[:60]))
            features += [to_feature(window, index, self.facts) for window in windows]
        return features

    def _windows(self, question: str, context: str, index: int) -> list[Any]:
        overlap = self.overlap
        if overlap is None:
            special = self.tokenizer.backend.num_special_tokens_to_add(True)
            room = self.length - special - len(self.tokenizer.encode(question))
            usual = min(OVERLAP, self.length // 2)
            overlap = usual if usual < room else max(room // 2, 0)  # a long question leaves less to share
        try:
            return self.tokenizer.encode_windows(context, before=question, length=self.length, overlap=overlap)
        except InputError as error:
            error.where = _name(index)
            raise

    def decode(
        self, features: Sequence[Feature], outputs: Sequence[NDArray[Any]], examples: Sequence[tuple[str, str]]
    ) -> list[Answer] | list[list[Answer]]:
        """Return the answer of each example, or its `top_k` best, each span once; outputs are (T, 2): start, end."""
        found: list[dict[tuple[int, int], float]] = [{} for _ in examples]  # score by characters of the context
        nothing = [1.0] * len(examples)
        for feature, logits in zip(features, outputs, strict=True):
            spans, none = self._spans(feature.encoding, logits)
            best = found[feature.example]
            for span, score in spans.items():
                best[span] = max(score, best.get(span, 0.0))
            nothing[feature.example] = min(none, nothing[feature.example])
        answers = []
        for (_, context), best, none in zip(examples, found, nothing, strict=True):
            rows = [Answer(context[start:end], score, start, end) for (start, end), score in best.items()]
            if self.no_answer or not rows:
                rows.append(Answer("", none if self.no_answer else 0.0, 0, 0))
            answers.append(sorted(rows, key=lambda answer: -answer.score)[: self.top_k])
        return answers if self.top_k > 1 else [rows[0] for rows in answers]

    def _spans(self, encoding: Any, logits: NDArray[Any]) -> tuple[dict[tuple[int, int], float], float]:
        """Return a window's `top_k` best spans (characters: score), and the score of no answer."""
        inside = np.array([text == CONTEXT for text in encoding.sequence_ids])  # (T,)
        counted = inside | (np.array(encoding.ids) == self.cls_id)
        start, end = softmax(np.where(counted[:, None], logits, -np.inf).T)  # (T,) each
        none = float(start[0] * end[0])
        start, end = start * inside, end * inside
        scores = np.zeros((len(inside), self.max_answer_length))  # the span of tokens i … i + more at [i, more]
        for more in range(min(scores.shape)):
            scores[: len(end) - more, more] = start[: len(start) - more] * end[more:]
        spans: dict[tuple[int, int], float] = {}
        for place in np.argsort(-scores, axis=None, kind="stable"):
            first, more = divmod(int(place), self.max_answer_length)
            if len(spans) == self.top_k or scores[first, more] == 0:
                break
            spans.setdefault(self._characters(encoding, first, first + more), float(scores[first, more]))
        return spans, none

    def _characters(self, encoding: Any, first: int, last: int) -> tuple[int, int]:
        """Return where in the context the tokens first … last are, or the words that they belong to."""
        start, end = encoding.offsets[first][0], encoding.offsets[last][1]
        words = encoding.token_to_word(first), encoding.token_to_word(last)
        if self.align and None not in words:
            left, right = (encoding.word_to_chars(word, CONTEXT) for word in words)
            start, end = left[0], right[1]
        return start, end


def _name(index: int) -> str:
    return f"example {index + 1}"


def _pair(example: Any, index: int) -> tuple[str, str]:
    """Return the question and the context, both with something in them."""
    if not isinstance(example, (tuple, list)) or [type(text) for text in example] != [str, str]:
        raise InputError("an example must be (question, context)", where=_name(index), found=repr(example)[:80])
    question, context = example
    for name, text in (("question", question), ("context", context)):
        if not text.strip():
            raise InputError(f"the {name} is empty", where=_name(index))
    return question, context
