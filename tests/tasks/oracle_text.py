"""What the tests of question answering, filling masks and vectors share: a transformers model run as our runtime.

Models compute in float64, so that only a real difference can move a score.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from oracle import shake
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from lmworks.tasks.base import Facts, collate

ROBERTA = {"bos_token": "<s>", "cls_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "sep_token": "</s>"}


class Oracle:
    """A runtime: `run(batch)` gives {"logits": …} or {"hidden_states": …}."""

    def __init__(self, model) -> None:
        self.model = model

    def run(self, batch):
        with torch.no_grad():
            found = self.model(**{name: torch.from_numpy(row) for name, row in batch.items()})
        if "start_logits" in found:
            return {"logits": torch.stack([found.start_logits, found.end_logits], -1).numpy()}
        if "logits" in found:
            return {"logits": found.logits.numpy()}
        return {"hidden_states": found.last_hidden_state.numpy()}


def answers(task, examples, model, *, size=8, pad_id=0, early=False):
    """Encode, run in padded batches, cut the padding, decode; `early` reduces each output when its batch has run."""
    features, outputs = task.encode(examples), []
    for start in range(0, len(features), size):
        part = features[start : start + size]
        rows = Oracle(model).run(collate(part, pad_id=pad_id))[task.output]
        outputs += [row[: len(feature)] for row, feature in zip(rows, part, strict=True)]
        if early:
            outputs[start:] = [task.reduce(feature, row) for feature, row in zip(part, outputs[start:], strict=True)]
    return task.decode(features, outputs, examples)


def roberta_tokenizer(data_folder: Path, folder: Path, *, trim_offsets: bool = True, length: int = 512) -> Path:
    """Write a byte-level BPE tokenizer with GPT-2's merges and RoBERTa's special tokens into a folder."""
    source = data_folder / "tokenizers" / "gpt2"
    vocab = json.loads((source / "encoder.json").read_text(encoding="utf-8"))
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocab = dict(zip(special, range(4), strict=True)) | {token: id + 4 for token, id in vocab.items()}
    lines = (source / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]
    merges = [tuple(line.split(" ")) for line in lines if line]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([*special, AddedToken("<mask>", lstrip=True)])
    backend.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=trim_offsets, add_prefix_space=False
    )
    backend.save(str(folder / "tokenizer.json"))
    mask = {"__type": "AddedToken", "content": "<mask>", "lstrip": True, "normalized": False, "special": True}
    config = ROBERTA | {"unk_token": "<unk>", "mask_token": mask, "model_max_length": length}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def make(name: str, tokenizer, *, seed: int = 0, **settings):
    """Return a small model of a class such as "BertForMaskedLM" with shaken weights, as large as the tokenizer."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    kind = getattr(transformers, name)
    torch.manual_seed(seed)
    return shake(kind(kind.config_class(vocab_size=len(tokenizer), **sizes, **settings)), seed)


def facts_of(model, *, max_length: int = 512) -> Facts:
    token_types = getattr(model.config, "type_vocab_size", 0) > 1
    return Facts(model_type=model.config.model_type, max_length=max_length, token_types=token_types)


def scale(head, factor: float) -> None:
    """Make a head's decisions sharper."""
    with torch.no_grad():
        head.weight *= factor


def questions(data_folder: Path, language: str, count: int) -> list[tuple[str, str]]:
    """Return real (question, context) pairs, at most two from a paragraph, spread over the whole file."""
    articles = json.loads((data_folder / "xquad" / f"xquad.{language}.json").read_text(encoding="utf-8"))["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    pairs = [(qa["question"], paragraph["context"]) for paragraph in paragraphs for qa in paragraph["qas"][:2]]
    return pairs[:: max(1, len(pairs) // count)][:count]


def utterances(data_folder: Path, part: str = "val") -> list[str]:
    """Return CLINC150's texts."""
    rows = json.loads((data_folder / "clinc150" / "data_full.json").read_text(encoding="utf-8"))[part]
    return [text for text, _ in rows]


def reviews(data_folder: Path, count: int) -> list[str]:
    lines = (data_folder / "sst2" / "test.tsv").read_text(encoding="utf-8").splitlines()
    return [line.split("\t")[0] for line in lines[:count]]


def near(found, wanted, tolerance: float = 1e-5) -> bool:
    return bool(np.max(np.abs(np.asarray(found) - np.asarray(wanted))) <= tolerance)
