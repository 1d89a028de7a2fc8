"""What two small English decoders gain and forget when they learn toki pona: added tokens and LoRA, by the commands.

    python benchmarks/forgetting.py FOLDER        LMWORKS_DATA names the data; about half an hour on one core

Pre-trains a Llama-style and a GPT-2-style model on the books, adapts each to four fifths of the Tatoeba sentences, and
scores both on the other fifth and on the end of one book, which training never saw. Then asks transformers and peft for
the logits of the adapted folder, and peft for an adapter of its own, which is read back here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from lmworks.models.checkpoint import load_model
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.training.adapter_files import load_adapter, open_adapter

SHAPE = "--tokenizer bpe --vocab-size 2048 --hidden-size 128 --layers 3 --heads 4 --context 128 --batch-size 16".split()
STEPS = "--steps 600 --eval-every 600 --dtype fp32 --seed 0".split()
LORA = "--method lora --rank 16 --alpha 32 --targets all-linear --lr 2e-3 --epochs 3 --dtype fp32 --seed 0".split()
FAMILIES, ADDED, EVERY, END = ("llama", "gpt2"), "auto:300", 5, 0.95


def lmworks(*arguments: str | Path) -> None:
    """Run a command; its end is an error where it fails."""
    subprocess.run([sys.executable, "-m", "lmworks", *map(str, arguments)], check=True)


def write_texts(data: Path, folder: Path) -> None:
    """Write train.txt and held.txt, each sentence in one of them, and general.txt."""
    rows = (data / "conlang/tokipona/tatoeba-en-tp.tsv").read_text("utf-8-sig").splitlines()
    sentences = list(dict.fromkeys(row.split("\t")[3].strip() for row in rows if row.count("\t") >= 3))
    held = sentences[EVERY - 1 :: EVERY]
    kept = [sentence for i, sentence in enumerate(sentences) if i % EVERY != EVERY - 1]
    book = (data / "books/bronte.txt").read_text("utf-8")
    texts = {"train": "\n".join(kept), "held": "\n".join(held), "general": book[int(END * len(book)) :]}
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text + "\n", "utf-8")


def compare(base: Path, out: Path, text: str) -> tuple[float, float]:
    """Return the largest difference of a logit: our folder in peft, and peft's folder here."""
    import peft
    import transformers as t

    tokenizer = Tokenizer.from_pretrained(out)
    reference = t.AutoTokenizer.from_pretrained(out)
    ids = tokenizer.encode(text)
    assert ids == reference(text, add_special_tokens=False)["input_ids"]
    inputs = torch.tensor([ids[:128]])
    model = t.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(reference))
    theirs = peft.PeftModel.from_pretrained(model, out).eval()
    with torch.no_grad():
        there = float((theirs(input_ids=inputs).logits - open_adapter(out).model.eval()(inputs)).abs().max())
    fresh = t.AutoModelForCausalLM.from_pretrained(base)
    fresh.resize_token_embeddings(len(reference))
    new = list(range(load_model(base).config.vocab_size, len(reference)))
    settings: dict[str, Any] = {"r": 8, "target_modules": "all-linear", "trainable_token_indices": new}
    own = peft.get_peft_model(fresh, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    optimizer = torch.optim.AdamW([p for p in own.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(10):
        own(input_ids=inputs, labels=inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    own.eval().save_pretrained(out.with_name(f"{out.name}-peft"))
    with torch.no_grad():
        ours = load_model(base)
        load_adapter(ours, out.with_name(f"{out.name}-peft"))
        return there, float((ours(inputs) - own(input_ids=inputs).logits).abs().max())


def main(folder: Path) -> None:
    """Run everything that is not there yet, and print the table."""
    data = Path(os.environ["LMWORKS_DATA"])
    folder.mkdir(parents=True, exist_ok=True)
    write_texts(data, folder)
    for family in FAMILIES:
        base, out = folder / family, folder / f"out-{family}"
        if not base.exists():
            lmworks("train", data / "books", "-o", base, "--family", family, *SHAPE, *STEPS)
        if not out.exists():
            task = ["--task", "text-generation", "--add-tokens", ADDED]
            texts = ["--validation", folder / "held.txt", "--also-evaluate", folder / "general.txt"]
            lmworks("finetune", base, folder / "train.txt", "-o", out, *task, *texts, *LORA)
        report = json.loads((out / "report.json").read_text())
        values = report.get("values", report)
        print(family, values["added_tokens"])
        for name, now in values["after"].items():
            was = values["before"][name]
            both = ", ".join(f"{key} {was[key]:.4g} -> {now[key]:.4g}" for key in ("perplexity", "bits_per_byte"))
            print(f"  {name}: {both}")
        ours, theirs = compare(base, out, (folder / "held.txt").read_text("utf-8")[:1000])
        print(f"  largest difference of a logit: our folder in peft {ours:.1e}, peft's folder here {theirs:.1e}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
