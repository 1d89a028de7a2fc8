"""A small classifier of real news that can know its limits: MiniLM's word vectors, one layer, a fitted head."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import torch
import transformers
from minilm_heads import MINILM
from sklearn.linear_model import LogisticRegression

TOPICS = ("World", "Sports", "Business", "Sci/Tech")
SIZE, LENGTH, TRAINED, HELD = 96, 128, 900, 400


def news(data: Path) -> list[tuple[str, str]]:
    """Return news and their true topics."""
    with (data / "ag_news/train_10k_noisy.csv").open(newline="", encoding="utf-8") as file:
        rows = [(" ".join(row["text"].split()[:24]), TOPICS[int(row["gt"])]) for row in csv.DictReader(file)]
    return rows[:3000]


def german(data: Path) -> list[str]:
    """Return sentences in German."""
    lines = (data / "udhr/deu.txt").read_text("utf-8").splitlines()
    return [" ".join(line.split()[:16]) for line in lines if len(line.split()) > 8]


def write_table(path: Path, rows: list[tuple[str, str]]) -> Path:
    """Write texts and labels as csv."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def make_news_classifier(data: Path, folder: Path) -> Path:
    """Save a classifier as transformers does, with `known.csv` (learnt) and `held.csv` beside its folder."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    config = transformers.ModernBertConfig(
        vocab_size=len(tokenizer), hidden_size=SIZE, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=LENGTH, local_attention=32, classifier_pooling="mean", pad_token_id=0, bos_token_id=101,
        cls_token_id=101, eos_token_id=102, sep_token_id=102, problem_type="single_label_classification",
        id2label=dict(enumerate(TOPICS)), label2id={name: i for i, name in enumerate(TOPICS)},
    )  # fmt: skip
    model = transformers.ModernBertForSequenceClassification(config).eval()
    words = transformers.AutoModel.from_pretrained(MINILM, num_hidden_layers=0).embeddings.word_embeddings.weight
    projection = torch.randn(words.shape[1], SIZE) / SIZE**0.5
    model.model.embeddings.tok_embeddings.weight.data = words.detach() @ projection
    read: list[np.ndarray] = []
    hook = model.classifier.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].numpy().copy()))
    rows = news(data)
    with torch.no_grad():
        for i in range(0, TRAINED, 100):
            texts = [text for text, _ in rows[i : min(i + 100, TRAINED)]]
            model(**tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt",
                              return_token_type_ids=False))  # fmt: skip
    hook.remove()
    features = np.concatenate(read)
    middle, spread = features.mean(0), features.std(0)
    fitted = LogisticRegression(C=0.03, max_iter=2000).fit((features - middle) / spread, [y for _, y in rows[:TRAINED]])
    order = [list(fitted.classes_).index(name) for name in TOPICS]
    model.classifier.weight.data = torch.tensor(fitted.coef_[order] / spread, dtype=torch.float32)
    shift = fitted.coef_[order] @ (middle / spread)
    model.classifier.bias.data = torch.tensor(fitted.intercept_[order] - shift, dtype=torch.float32)
    tokenizer.model_max_length = LENGTH
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_table(folder.parent / "known.csv", rows[:TRAINED])
    write_table(folder.parent / "held.csv", rows[TRAINED : TRAINED + HELD])
    (folder.parent / "odd.txt").write_text("\n".join(german(data)), encoding="utf-8")
    return folder
