"""From labelled examples to rows: the task's own features, and what the model should say of each.

    text-classification    labels: a class, a vector of 0 and 1 (several labels at once), or a number (regression)
    token-classification   labels (T,): the tag of a word on its first token, -100 elsewhere
    question-answering     start_positions, end_positions: tokens; the first token where a window lacks the answer
    fill-mask              words (T,): what may be hidden; the hiding itself is new in every batch
    text-generation        labels (T,): the next token; of instructions, that of the answers only

Shapes: T tokens of a feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lmworks.base.errors import FormatError, InputError
from lmworks.tasks.base import Facts, Feature, Long, Task, to_feature, too_long
from lmworks.tokens.chat import render_chat
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.training.data import IGNORED
from lmworks.training.examples import Row

CONTEXT = 1  # what an encoding's sequence_ids call the second text
Span = tuple[int, int]


def make_class_rows(
    task: Task, examples: Sequence[Any], references: Sequence[Any], labels: Sequence[str], problem: str | None
) -> list[Row]:
    """Return the rows of texts or pictures; every window of a long text has the label of the whole."""
    place = {label: i for i, label in enumerate(labels)}

    def target(reference: Any) -> Any:
        if problem == "regression":
            return float(reference)
        if problem == "multi_label_classification":
            return np.array([label in reference for label in labels], np.float32)
        return place[reference]

    if task.name == "image-classification":  # pictures are read when their batch comes: all at once would not fit
        return [
            Row(Feature({}, i), {"labels": target(reference)}, example)
            for i, (example, reference) in enumerate(zip(examples, references, strict=True))
        ]
    return [Row(feature, {"labels": target(references[feature.example])}) for feature in task.encode(examples)]


def make_tag_rows(
    task: Task,
    examples: Sequence[Sequence[str]],
    references: Sequence[Sequence[str]],
    labels: Sequence[str],
    *,
    every: bool = False,
) -> list[Row]:
    """Return the rows of sentences given as words; with `every` the later tokens of a word are scored too.

    They then have the tag of the word, an "I-" where it begins with "B-" and the labels have that. Where windows of a
    long text overlap, their common words are scored in both.
    """
    place = {label: i for i, label in enumerate(labels)}
    texts = [join_words(words) for words in examples]
    rows = []
    for feature in task.encode([text for text, _ in texts]):
        spans, tags = texts[feature.example][1], references[feature.example]
        targets, before = [IGNORED] * len(feature), -1
        scored = feature.notes["words"] = []  # the word of each scored token
        for token, word in enumerate(words_of(feature.encoding, spans)):
            if word is None:
                continue
            if word != before:
                cut = spans[word][0] < feature.encoding.offsets[token][0] and token_before(feature, token)
                targets[token] = IGNORED if cut and not every else place[tags[word]]
            elif every:
                inner = "I-" + tags[word][2:]
                targets[token] = place[inner if tags[word].startswith("B-") and inner in place else tags[word]]
            if targets[token] != IGNORED:
                scored.append(word)
            before = word
        if any(target != IGNORED for target in targets):
            rows.append(Row(feature, {"labels": targets}))
    return rows


def token_before(feature: Feature, token: int) -> bool:
    """Tell whether a window was cut just before this token: then its word began in the window before."""
    first = feature.encoding.special_tokens_mask.index(0)
    return token == int(first) and int(feature.notes.get("start", 0)) > 0


def join_words(words: Sequence[str]) -> tuple[str, list[Span]]:
    """Return the words as one text, and the characters of each: ["a", "bc"] -> "a bc", [(0, 1), (2, 4)]."""
    spans, start = [], 0
    for word in words:
        spans.append((start, start + len(word)))
        start += len(word) + 1
    return " ".join(words), spans


def words_of(encoding: Any, spans: Sequence[Span]) -> list[int | None]:
    """Return the word in which each token lies, by their characters; None for special tokens."""
    found: list[int | None] = []
    word = 0
    for (start, end), special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True):
        if special or start == end:
            found.append(None)
            continue
        while word < len(spans) - 1 and spans[word][1] <= start:
            word += 1
        inside = start < spans[word][1] and spans[word][0] < end
        found.append(word if inside else None)
    return found


def make_span_rows(task: Task, examples: Sequence[Any], references: Sequence[Any]) -> list[Row]:
    """Return the windows of (question, context); of several answers the first is taught.

    Raises InputError where an answer is not at its place in the context.
    """
    for i, ((_, context), answers) in enumerate(zip(examples, references, strict=True)):
        for text, start in answers[:1]:
            if context[start : start + len(text)] != text:
                raise InputError(
                    "an answer is not where the data say",
                    where=f"example {i + 1}",
                    found=repr(context[start : start + len(text)]),
                    expected=repr(text),
                )
    rows = []
    for feature in task.encode(examples):
        answers = references[feature.example]
        start, end = find_span(feature.encoding, *answers[0]) if answers else (None, None)
        none = first_token(task, feature)
        whole = start is not None and end is not None
        rows.append(
            Row(feature, {"start_positions": start if whole else none, "end_positions": end if whole else none})
        )
    return rows


def first_token(task: Task, feature: Feature) -> int:
    """Return the token that says no: [CLS] or <s>, wherever it stands; the very first where there is none."""
    cls_id, ids = getattr(task, "cls_id", -1), feature.inputs["input_ids"]
    return ids.index(cls_id) if cls_id in ids else 0


def find_span(encoding: Any, text: str, start: int) -> tuple[int | None, int | None]:
    """Return the first and last token of an answer that begins at this character, None where the window ends before."""
    end = start + len(text)
    inside = [i for i, sequence in enumerate(encoding.sequence_ids) if sequence == CONTEXT]
    offsets = encoding.offsets
    if not inside or offsets[inside[0]][0] > start or offsets[inside[-1]][1] < end:
        return None, None
    touched = [i for i in inside if offsets[i][0] < end and start < offsets[i][1]]
    return (touched[0], touched[-1]) if touched else (None, None)


def make_masked_rows(tokenizer: Tokenizer, texts: Sequence[str], facts: Facts) -> list[Row]:
    """Return the windows of texts, without overlap, with the word that each token belongs to (-1: never hidden)."""
    rows = []
    for i, whole in enumerate(tokenizer.encode_inputs(texts)):
        windows = [whole]
        if len(whole.ids) > facts.max_length:
            windows = tokenizer.encode_windows(texts[i], length=facts.max_length, overlap=0)
        for window in windows:
            ids = [-1 if word is None else word for word in window.word_ids]
            words = [-1 if special else word for word, special in zip(ids, window.special_tokens_mask, strict=True)]
            if any(word >= 0 for word in words):
                rows.append(Row(to_feature(window, i, facts), {"words": words}))
    return rows


def make_language_rows(tokenizer: Tokenizer, examples: Sequence[Any], facts: Facts, *, long: Long) -> list[Row]:
    """Return rows of text to go on with: a string, {"prompt", "completion"} or {"messages": […]}.

    A string ends with the end of text and is read in windows where it is longer than the model; of instructions only
    the answers are scored, and one that is longer is an error, or cut with `long` "truncate". Rows without an answer
    that is left to score are dropped.
    """
    rows, begin = [], opening(tokenizer)
    for i, example in enumerate(examples):
        ids, scored = read_language(tokenizer, example, begin)
        if isinstance(example, str):
            starts: Sequence[int] = range(0, max(1, len(ids) - 1), facts.max_length)
        else:
            if len(ids) - 1 > facts.max_length and long == "error":
                error = too_long(i, len(ids) - 1, facts.max_length)
                error.fix = "shorten it, or cut the end of the answer with --long truncate"
                raise error
            starts = (0,)
        for start in starts:
            end = min(start + facts.max_length, len(ids) - 1)
            inputs, said = ids[start:end], slice(start + 1, end + 1)
            labels = [id if score else IGNORED for id, score in zip(ids[said], scored[said], strict=True)]
            if any(label != IGNORED for label in labels):
                rows.append(Row(Feature({"input_ids": inputs}, i), {"labels": labels}))
    return rows


def opening(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that the model expects before a text, as it has them when it answers: Llama's <s>."""
    encoding = tokenizer.encode_inputs(["a"])[0]
    return list(encoding.ids[: encoding.special_tokens_mask.index(0)]) if 0 in encoding.special_tokens_mask else []


def read_language(tokenizer: Tokenizer, example: Any, begin: list[int]) -> tuple[list[int], list[bool]]:
    """Return the tokens of a text or of an instruction, and which of them the model should learn to say.

    A text or prompt follows `begin`; a conversation begins as its template says.
    """
    eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    if isinstance(example, str):
        ids = tokenizer.encode(example) + eos
        return begin + ids, [False] * len(begin) + [True] * len(ids)
    if "messages" in example:
        return read_chat(tokenizer, example["messages"])
    prompt, answer = begin + tokenizer.encode(example["prompt"]), tokenizer.encode(example["completion"]) + eos
    return prompt + answer, [False] * len(prompt) + [True] * len(answer)


def read_chat(tokenizer: Tokenizer, messages: Sequence[dict[str, Any]]) -> tuple[list[int], list[bool]]:
    """Return the tokens of a conversation as the template writes it; the assistant's answers are to be learned.

    Raises FormatError for a template that writes the start of a conversation otherwise once it goes on.
    """
    whole = render_chat(tokenizer, messages, add_generation_prompt=False)
    answers = []
    for i, message in enumerate(messages):
        if message.get("role") == "assistant":
            opened = render_chat(tokenizer, messages[:i])
            closed = render_chat(tokenizer, messages[: i + 1], add_generation_prompt=False)
            if not (closed.startswith(opened) and whole.startswith(closed)):
                raise FormatError(
                    "the chat template rewrites earlier messages, so the answers cannot be told apart",
                    found=f"message {i}",
                    fix="give prompt and completion instead",
                )
            answers.append((len(opened), len(closed)))
    encoding = tokenizer.backend.encode(whole, add_special_tokens=False)
    scored = [any(start < end and low <= start < high for low, high in answers) for start, end in encoding.offsets]
    return list(encoding.ids), scored
