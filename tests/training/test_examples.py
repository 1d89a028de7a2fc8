"""Rows say of each token what transformers' own preprocessing says, and batches follow from (seed, step) alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from lmworks.base.errors import FormatError, InputError
from lmworks.tasks.base import Facts, Feature
from lmworks.tasks.classify import TextClassification
from lmworks.tasks.ner import TokenClassification
from lmworks.tasks.qa import QuestionAnswering
from lmworks.text.labelled import read_labelled
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.tokens.train import train_tokenizer
from lmworks.training.data import IGNORED
from lmworks.training.examples import Examples, Masking, Row, balance, collate_rows
from lmworks.training.rows import (
    make_class_rows,
    make_language_rows,
    make_masked_rows,
    make_span_rows,
    make_tag_rows,
)

MOST = 96
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def rows_of(lengths: list[int]) -> list[Row]:
    """Return rows of these lengths that can be told apart by their first token."""
    return [Row(Feature({"input_ids": [i, *[1] * (n - 1)]}, i), {"labels": i % 3}) for i, n in enumerate(lengths)]


def facts(labels: tuple[str, ...] = (), length: int = MOST) -> Facts:
    return Facts(model_type="bert", max_length=length, labels=labels, token_types=True)


@pytest.fixture(scope="module")
def uncased(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BERT's own vocabulary in a folder."""
    folder = tmp_path_factory.mktemp("uncased")
    (folder / "vocab.txt").write_bytes((data_folder / "tokenizers/bert-base-uncased/vocab.txt").read_bytes())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    return folder


# -------------------------------------------------------------------------------------------------------------- batches


def test_a_batch_depends_on_nothing_but_seed_and_step() -> None:
    """A resumed run asks for step n first; the run before it asked for all the steps before n."""
    lengths = np.random.default_rng(0).integers(2, 40, 300).tolist()
    first, again = (Examples(rows_of(lengths), epochs=3, batch_size=8, seed=4) for _ in range(2))
    for step in (first.steps - 1, 0, 17):
        one, other = first.batch(step), again.batch(step)
        assert all(np.array_equal(one[name], other[name]) for name in one)
    other_seed = Examples(rows_of(lengths), epochs=3, batch_size=8, seed=5)
    assert not np.array_equal(first.batch(0)["labels"], other_seed.batch(0)["labels"])
    assert first.fingerprint() == again.fingerprint() != other_seed.fingerprint()
    changed = rows_of(lengths)
    changed[7].targets["labels"] = 9
    assert Examples(changed, epochs=3, batch_size=8, seed=4).fingerprint() != first.fingerprint()


def test_an_epoch_visits_every_row_once_in_an_order_of_its_own() -> None:
    lengths = np.random.default_rng(1).integers(2, 60, 403).tolist()
    data = Examples(rows_of(lengths), epochs=2, batch_size=16)
    assert data.steps == 2 * -(-403 // 16)
    seen = [data.batch(step)["input_ids"][:, 0].tolist() for step in range(data.steps)]
    half = data.steps // 2
    for epoch in (seen[:half], seen[half:]):
        assert sorted(row for batch in epoch for row in batch) == list(range(403))
    assert seen[:half] != seen[half:]
    sizes = [max(lengths[row] for row in batch) for batch in seen[:half]]
    assert sizes != sorted(sizes) and sizes != sorted(sizes, reverse=True)  # not from the longest to the shortest


def test_rows_of_like_length_share_a_batch() -> None:
    """Padding: under a tenth where random batches have about half."""
    lengths = np.random.default_rng(2).integers(2, 100, 512).tolist()
    data = Examples(rows_of(lengths), epochs=1, batch_size=16)
    padded = sum(data.batch(step)["input_ids"].size for step in range(data.steps))
    assert padded < 1.1 * sum(lengths)


def test_batches_are_bounded_by_tokens() -> None:
    lengths = [*np.random.default_rng(3).integers(2, 50, 200).tolist(), 300]
    data = Examples(rows_of(lengths), epochs=1, batch_size=32, batch_tokens=256)
    shapes = [data.batch(step)["input_ids"].shape for step in range(data.steps)]
    assert all(rows * length <= 256 or rows == 1 for rows, length in shapes)
    assert max(rows for rows, _ in shapes) <= 32
    assert sum(rows for rows, _ in shapes) == 201


def test_balanced_rows_and_weights_count_classes_alike() -> None:
    classes = [0] * 90 + [1] * 9 + [2]
    weights = balance(classes)
    assert weights.mean() == pytest.approx(1.0)
    assert np.bincount(classes, weights=weights) == pytest.approx([100 / 3] * 3)
    rows = [Row(Feature({"input_ids": [5]}, i), {"labels": c}) for i, c in enumerate(classes)]
    data = Examples(rows, epochs=20, batch_size=10, sampling=weights)
    drawn = np.concatenate([data.batch(step)["labels"] for step in range(data.steps)])
    assert np.bincount(drawn) / len(drawn) == pytest.approx([1 / 3] * 3, abs=0.04)


def test_validation_reads_every_row_once_and_masks_only_padding() -> None:
    rows = rows_of([3, 9, 4, 9, 9])
    data = Examples(rows, rows, epochs=1, batch_size=2, pad_id=7)
    batches = list(data.validation())
    assert sorted(int(row) for batch in batches for row in batch["input_ids"][:, 0]) == list(range(5))
    assert "attention_mask" not in batches[0]  # two rows of nine tokens: nothing to hide
    ragged = collate_rows(rows[:2], pad_id=7)
    assert ragged["attention_mask"].sum(1).tolist() == [3, 9]
    assert (ragged["input_ids"][0, 3:] == 7).all()


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to train on"):
        Examples([], epochs=1, batch_size=2)


# -------------------------------------------------------------------------------------------------------------- masking


@pytest.mark.parametrize("whole", [False, True])
def test_masking_follows_bert(whole: bool, uncased: Path, data_folder: Path) -> None:
    """15 % of the tokens or words, of them 80 / 10 / 10; special tokens never; each batch and seed its own."""
    tokenizer = Tokenizer.from_pretrained(uncased)
    texts = (data_folder / "tinyshakespeare/input.txt").read_text()[:120_000].split("\n\n")
    rows = make_masked_rows(tokenizer, texts, facts())
    assert max(len(row.feature) for row in rows) <= MOST
    masking = Masking(103, 30522, whole_words=whole)
    data = Examples(rows, rows[:5], epochs=2, batch_size=16, masking=masking, seed=1)
    plain = Examples(rows, epochs=2, batch_size=16, seed=1)
    chosen = special = total = masked = same = parted = 0
    for step in range(data.steps // 2):
        batch, before = data.batch(step), plain.batch(step)
        hidden = batch["labels"] != IGNORED
        assert (batch["labels"][hidden] == before["input_ids"][hidden]).all()
        assert (batch["input_ids"][~hidden] == before["input_ids"][~hidden]).all()
        special += int((hidden & (before["words"] < 0)).sum())
        chosen, total = chosen + int(hidden.sum()), total + int((before["words"] >= 0).sum())
        masked += int((batch["input_ids"][hidden] == 103).sum())
        same += int((batch["input_ids"][hidden] == batch["labels"][hidden]).sum())
        for words, row in zip(before["words"], hidden, strict=True):
            parts = [row[words == word] for word in set(words[words >= 0].tolist())]
            parted += sum(bool(part.any() != part.all()) for part in parts)
    assert special == 0
    assert chosen / total == pytest.approx(0.15, abs=0.01)
    assert masked / chosen == pytest.approx(0.8, abs=0.02)
    assert same / chosen == pytest.approx(0.1, abs=0.02)
    assert (parted == 0) is whole
    assert np.array_equal(data.batch(3)["input_ids"], data.batch(3)["input_ids"])
    assert not np.array_equal(data.batch(3)["labels"], data.batch(3 + data.steps // 2)["labels"])
    held = [next(data.validation())["labels"] for _ in range(2)]
    assert np.array_equal(*held)


def test_a_batch_always_has_something_to_guess() -> None:
    """A loss over nothing would be 0 / 0."""
    words = np.array([[IGNORED, 0, IGNORED]])
    for number in range(50):
        batch = Masking(9, 10)({"input_ids": np.array([[1, 2, 3]]), "words": words}, seed=0, number=number, stream=0)
        assert batch["labels"].tolist() == [[IGNORED, 2, IGNORED]]


# --------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("every", [False, True])
def test_tags_stand_where_transformers_puts_them(every: bool, uncased: Path, data_folder: Path) -> None:
    """WNUT-17: words given to transformers as words, to us as a text, have the same tokens and the same labels."""
    data = read_labelled(data_folder / "wnut17/dev.conll", "token-classification")
    tokenizer, theirs = Tokenizer.from_pretrained(uncased), AutoTokenizer.from_pretrained(uncased)
    task = TokenClassification(tokenizer, facts(data.labels, 512))
    rows = make_tag_rows(task, data.examples[:300], data.references[:300], data.labels, every=every)
    place = {label: i for i, label in enumerate(data.labels)}
    compared = 0
    for row in rows:
        words, tags = (part[row.feature.example] for part in (data.examples, data.references))
        encoding = theirs(list(words), is_split_into_words=True)
        assert row.feature.inputs["input_ids"] == encoding["input_ids"]
        expected, before = [], None
        for word in encoding.word_ids():
            if word is None or (word == before and not every):
                expected.append(IGNORED)
            else:
                tag = tags[word]
                inner = "I-" + tag[2:] if word == before and tag.startswith("B-") else tag
                expected.append(place[inner if inner in place else tag])
            before = word
        assert row.targets["labels"] == expected
        compared += len(expected)
    assert compared > 5000


def test_windows_score_the_words_that_begin_in_them(uncased: Path, data_folder: Path) -> None:
    """A word that a window's edge cuts is taught where it begins, never in the middle."""
    data = read_labelled(data_folder / "wnut17/dev.conll", "token-classification")
    task = TokenClassification(Tokenizer.from_pretrained(uncased), facts(data.labels, 16), long="window", overlap=0)
    rows = make_tag_rows(task, data.examples[:60], data.references[:60], data.labels)
    taught: dict[int, list[int]] = {}
    for row in rows:
        assert len(row.feature.notes["words"]) == sum(label != IGNORED for label in row.targets["labels"])
        taught.setdefault(row.feature.example, []).extend(row.feature.notes["words"])
        labels = [data.labels[label] for label in row.targets["labels"] if label != IGNORED]
        assert labels == [data.references[row.feature.example][word] for word in row.feature.notes["words"]]
    assert len(rows) > 90
    for example, words in taught.items():
        assert words == list(range(len(data.examples[example])))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_answers_are_the_tokens_that_hold_them(language: str, uncased: Path, data_folder: Path) -> None:
    """XQuAD: positions equal those of the usual preprocessing with transformers' tokenizer, windows and all."""
    data = read_labelled(data_folder / f"xquad/xquad.{language}.json", "question-answering")
    examples, references = data.examples[:150], data.references[:150]
    task = QuestionAnswering(Tokenizer.from_pretrained(uncased), facts(length=384), max_length=160, overlap=48)
    rows = make_span_rows(task, examples, references)
    theirs = AutoTokenizer.from_pretrained(uncased)(
        [question for question, _ in examples],
        [context for _, context in examples],
        truncation="only_second",
        max_length=160,
        stride=48,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    assert len(rows) == len(theirs["input_ids"]) > 150
    outside = 0
    for i, row in enumerate(rows):
        assert row.feature.inputs["input_ids"] == theirs["input_ids"][i]
        (text, start), *_ = references[theirs["overflow_to_sample_mapping"][i]]
        end, offsets, sequence = start + len(text), theirs["offset_mapping"][i], theirs.sequence_ids(i)
        first, last = sequence.index(1), len(sequence) - 1 - sequence[::-1].index(1)
        if offsets[first][0] > start or offsets[last][1] < end:
            expected, outside = (0, 0), outside + 1
        else:
            begins = max(k for k in range(first, last + 1) if offsets[k][0] <= start)
            ends = min(k for k in range(first, last + 1) if offsets[k][1] >= end)
            expected = (begins, ends)
        assert (row.targets["start_positions"], row.targets["end_positions"]) == expected
    assert outside > 10


def test_an_answer_in_the_wrong_place_is_refused(uncased: Path) -> None:
    task = QuestionAnswering(Tokenizer.from_pretrained(uncased), facts())
    with pytest.raises(InputError, match="not where the data say") as error:
        make_span_rows(task, [("who?", "Ada wrote it.")], [(("Bob", 0),)])
    assert error.value.where == "example 1"
    unanswerable = make_span_rows(task, [("who?", "Ada wrote it.")], [()])
    assert unanswerable[0].targets == {"start_positions": 0, "end_positions": 0}


def test_labels_of_texts(uncased: Path) -> None:
    task = TextClassification(Tokenizer.from_pretrained(uncased), facts(("a", "b", "c"), 8), long="window", overlap=0)
    rows = make_class_rows(task, ["one", "one two three four five six seven"], ["b", "c"], ("a", "b", "c"), None)
    assert [row.targets["labels"] for row in rows] == [1, 2, 2]  # every window of the long text
    several = make_class_rows(task, ["one"], [("a", "c")], ("a", "b", "c"), "multi_label_classification")
    assert several[0].targets["labels"].tolist() == [1, 0, 1]
    assert make_class_rows(task, ["one"], [2.5], (), "regression")[0].targets == {"labels": 2.5}


# --------------------------------------------------------------------------------------------------------- instructions


@pytest.fixture(scope="module")
def writer(data_folder: Path) -> Tokenizer:
    """A byte-level tokenizer with the marks of a chat."""
    texts = [(data_folder / "tinyshakespeare/input.txt").read_text()[:60_000]]
    tokenizer = train_tokenizer(texts, kind="bpe", vocab_size=600)
    tokenizer.backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.config["chat_template"] = CHATML
    return tokenizer


def said(tokenizer: Tokenizer, row: Row) -> str:
    """Return what the model is taught to say."""
    return tokenizer.decode([i for i in row.targets["labels"] if i != IGNORED], skip_special_tokens=False)


def test_only_the_answers_of_instructions_are_scored(writer: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who art thou?"},
        {"role": "assistant", "content": "A king."},
        {"role": "user", "content": "Of what?"},
        {"role": "assistant", "content": "Of shreds and patches."},
    ]
    examples: list[Any] = [{"prompt": "Who art thou?", "completion": " A king."}, {"messages": messages}, "To be"]
    pair, chat, text = make_language_rows(writer, examples, facts(length=200), long="error")
    end = writer.token(writer.eos_id or 0) or ""
    assert said(writer, pair) == f" A king.{end}"
    assert said(writer, chat) == "A king.<|im_end|>\nOf shreds and patches.<|im_end|>\n"
    assert said(writer, text) == writer.decode(writer.encode("To be")[1:]) + end
    for row in (pair, chat, text):
        assert len(row.targets["labels"]) == len(row.feature)
        ids, labels = row.feature.inputs["input_ids"], row.targets["labels"]
        assert all(label in (IGNORED, following) for label, following in zip(labels, ids[1:], strict=False))


def test_what_is_learned_begins_as_what_is_answered(writer: Tokenizer) -> None:
    """Llama's tokenizers put <s> before a prompt: a model that was trained without it would be asked with it."""
    backend = tokenizers.Tokenizer.from_str(writer.backend.to_str())
    mark = "<|im_start|>"
    backend.post_processor = TemplateProcessing(
        single=f"{mark} $A", pair=f"{mark} $A $B", special_tokens=[(mark, backend.token_to_id(mark))]
    )
    marked = Tokenizer(backend, config=writer.config)
    examples: list[Any] = [{"prompt": "Who art thou?", "completion": " A king."}, "To be"]
    pair, text = make_language_rows(marked, examples, facts(length=200), long="error")
    assert pair.feature.inputs["input_ids"] == marked.encode_prompt("Who art thou?") + marked.encode(" A king.")
    assert text.feature.inputs["input_ids"] == marked.encode_prompt("To be")
    assert said(marked, text) == "To be" + (marked.token(marked.eos_id or 0) or "")


def test_long_texts_are_read_in_windows_and_long_instructions_refused(writer: Tokenizer, data_folder: Path) -> None:
    text = (data_folder / "tinyshakespeare/input.txt").read_text()[:2000]
    rows = make_language_rows(writer, [text], facts(length=50), long="error")
    read = [i for row in rows for i in row.feature.inputs["input_ids"]]
    taught = [i for row in rows for i in row.targets["labels"]]
    assert read == writer.encode(text)  # every token is read once, and every one but the first predicted once
    assert taught == [*writer.encode(text)[1:], writer.eos_id]
    example = {"prompt": "Who art thou?", "completion": text}
    with pytest.raises(InputError, match="longer than the model"):
        make_language_rows(writer, [example], facts(length=50), long="error")
    (cut,) = make_language_rows(writer, [example], facts(length=50), long="truncate")
    assert len(cut.feature) == 50


def test_a_book_as_one_text_takes_time_in_proportion(writer: Tokenizer) -> None:
    """Each window is cut out of the tokens alone: copying the rest for each took a novel's worth of minutes."""

    def seconds(words: int) -> float:
        began = time.perf_counter()
        make_language_rows(writer, ["the cat sat " * (words // 3)], facts(length=8), long="error")
        return time.perf_counter() - began

    seconds(300)
    assert seconds(80_000) < 24 * min(seconds(10_000) for _ in range(3))  # eight times as long; 64 times if squared


def test_a_template_that_rewrites_the_past_is_refused(writer: Tokenizer) -> None:
    """Some templates drop earlier thoughts once the conversation goes on: then nobody can say what was answered."""
    rewriting = Tokenizer(writer.backend, config={**writer.config, "chat_template": "{{ messages|length }}" + CHATML})
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(FormatError, match="rewrites earlier messages"):
        make_language_rows(rewriting, [{"messages": messages}], facts(), long="error")
