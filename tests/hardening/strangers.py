"""A small good folder of every kind that lmworks reads; the mutations start from these."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from tokenizers import models, pre_tokenizers, processors, trainers
from transformers import logging

from lmworks.base.files import write_json
from lmworks.evaluation import monitor
from lmworks.export.onnx import export_onnx
from lmworks.export.receipt import write_receipt
from lmworks.models.checkpoint import load_model
from lmworks.training.adapter_files import save_adapter
from lmworks.training.lora import add_lora
from lmworks.training.state import State, save_checkpoint
from lmworks.verbs.ngrams import train as train_ngram

logging.set_verbosity_error()
logging.disable_progress_bar()
TEXTS = ["a small cat sat on the mat", "the dog ran to the house", "it is a fine day", "a cat and a dog"] * 3
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CHATML = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
COMMIT = "a" * 40


def wordpiece(folder: Path) -> None:
    """Write a tokenizer.json and its companions, as BERT has them."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=64, special_tokens=names, show_progress=False))
    ids = [("[CLS]", 2), ("[SEP]", 3)]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    made.save(str(folder / "tokenizer.json"))
    words = sorted(made.get_vocab().items(), key=lambda item: item[1])
    (folder / "vocab.txt").write_text("\n".join(word for word, _ in words) + "\n")
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 64, "unk_token": "[UNK]",
        "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]", "mask_token": "[MASK]",
    })  # fmt: skip
    write_json(folder / "special_tokens_map.json", {"cls_token": "[CLS]", "sep_token": "[SEP]"})


def bert(folder: Path, head: str = "SequenceClassification", **settings: Any) -> Path:
    """Write a classifier, or another head, of BERT."""
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=64, max_position_embeddings=64, num_labels=3, **SIZES)
    getattr(transformers, f"Bert{head}" if head == "Model" else f"BertFor{head}")(config).save_pretrained(
        folder, **settings
    )
    wordpiece(folder)
    return folder


def shards(folder: Path) -> Path:
    return bert(folder, max_shard_size="12KB")


def older(folder: Path) -> Path:
    """A classifier whose tokenizer is a vocab.txt."""
    bert(folder)
    (folder / "tokenizer.json").unlink()
    return folder


def gpt2(folder: Path) -> Path:
    """Write a language model with a byte-level tokenizer and a chat template."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    made.model.save(str(folder))
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "chat_template": CHATML},
    )
    return folder


def older_gpt2(folder: Path) -> Path:
    """A language model with vocab.json and merges.txt."""
    gpt2(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def llama(folder: Path) -> Path:
    """A language model with SentencePiece's tokenizer.model."""
    folder.mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(folder / "tokenizer"), vocab_size=280, model_type="bpe",
        byte_fallback=True, minloglevel=5, hard_vocab_limit=False,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=320, max_position_embeddings=32, num_key_value_heads=1, **SIZES)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True})
    return folder


def pickled(folder: Path, *, zipped: bool = True, parts: int = 1) -> Path:
    """A classifier whose weights are pickles."""
    bert(folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if parts == 1:
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        return folder
    places = {name: f"pytorch_model-{i % parts + 1:05d}-of-{parts:05d}.bin" for i, name in enumerate(state)}
    for file in sorted(set(places.values())):
        torch.save({name: t for name, t in state.items() if places[name] == file}, folder / file)
    write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": places})
    return folder


def graph(folder: Path, *, external: bool = False, causal: bool = False) -> Path:
    """A folder that runs without torch."""
    (gpt2 if causal else bert)(folder)
    export_onnx(folder, folder, dtypes=("fp32",), external=external)
    (folder / "model.safetensors").unlink()
    return folder


def adapter(folder: Path) -> Path:
    """A LoRA adapter beside its base."""
    base = bert(folder.with_name(f"{folder.name}-base"))
    model = load_model(base, "SequenceClassification")
    add_lora(model, rank=2)
    save_adapter(model, folder, base=str(base))
    return folder


def embedder(folder: Path) -> Path:
    """A model of sentence-transformers."""
    bert(folder, "Model")
    for place in ("1_Pooling", "2_Normalize"):
        (folder / place).mkdir()
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True})
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 64, "do_lower_case": False})
    write_json(folder / "config_sentence_transformers.json", {"prompts": {}, "default_prompt_name": None})
    rows = [(0, "", "Transformer"), (1, "1_Pooling", "Pooling"), (2, "2_Normalize", "Normalize")]
    listed = [{"idx": i, "name": str(i), "path": p, "type": f"sentence_transformers.models.{t}"} for i, p, t in rows]
    (folder / "modules.json").write_text(json.dumps(listed))
    return folder


def vision(folder: Path) -> Path:
    """A ViT that classifies a picture that lies beside it."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=16, patch_size=8, num_labels=3, **SIZES)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", {
        "do_resize": True, "size": {"height": 16, "width": 16}, "resample": 2, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    })  # fmt: skip
    Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)).save(folder / "picture.png")
    return folder


def receipt(folder: Path) -> Path:
    bert(folder)
    write_receipt(folder, {"made_by": "lmworks"})
    return folder


def monitored(folder: Path) -> Path:
    """A classifier that knows its limits."""
    bert(folder)
    files = monitor.hash_files(folder, monitor.files_of(folder, "torch", "fp32"))
    facts = {"format": monitor.FORMAT, "score": "nearest", "threshold": 1.0, "temperature": 1.0, "runtime": "torch",
             "dtype": "fp32", "files": files, "reference": {"texts": 4}}  # fmt: skip
    draw = np.random.default_rng(0)
    arrays = {"known": draw.normal(size=(4, 16)).astype("f4"), "features": draw.normal(size=(4, 16)).astype("f4"),
              "confidence": np.ones(4, "f4"), "score": np.ones(4, "f4"), "length": np.ones(4, "i4")}  # fmt: skip
    monitor.Monitor(facts, arrays).write(folder)
    return folder


def ngram(folder: Path, *, arpa: bool = False) -> Path:
    """An n-gram model: the folder of ours, or an ARPA file alone."""
    texts = folder.with_suffix(".txt")
    texts.write_text("\n".join(TEXTS))
    train_ngram(texts, folder, order=3)
    if arpa:
        for path in folder.iterdir():
            if path.suffix != ".arpa":
                path.unlink()
    return folder


def checkpoint(folder: Path) -> Path:
    """What a stopped run leaves."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    folder.mkdir()
    save_checkpoint(folder, model, optimizer, State(step=1))
    return folder


def cached(folder: Path) -> Path:
    """The Hub's cache with one model in it."""
    repository = folder / "models--org--name"
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    made = bert(folder.with_name("cached-bert"))
    for place in (snapshot, blobs, repository / "refs", repository / "trees"):
        place.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    listing = {}
    for i, path in enumerate(sorted(made.iterdir())):
        shutil.copyfile(path, blobs / f"{i:04d}")
        (snapshot / path.name).symlink_to(f"../../blobs/{i:04d}")
        listing[path.name] = {"size": path.stat().st_size}
    write_json(repository / "trees" / f"{COMMIT}.json", {"files": listing})
    return folder


KINDS: dict[str, Callable[[Path], Path]] = {
    "classifier": bert, "shards": shards, "vocab.txt": older, "language model": gpt2, "vocab.json": older_gpt2,
    "tokenizer.model": llama, "inspected": bert, "pickle": pickled, "old pickle": lambda f: pickled(f, zipped=False),
    "pickle shards": lambda f: pickled(f, parts=2), "graph": graph,
    "graph with data": lambda f: graph(f, external=True),
    "graph that writes": lambda f: graph(f, causal=True), "adapter": adapter, "embedder": embedder, "vision": vision,
    "receipt": receipt, "monitor": monitored, "n-grams": ngram, "ARPA": lambda f: ngram(f, arpa=True),
    "checkpoint": checkpoint, "cache": cached,
}  # fmt: skip
