"""What pages take for granted: a reader's own models and texts, made once and copied into each page's folder."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from minilm_heads import MINILM, make_head
from monitored import make_news_classifier, news, write_table
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "docs/examples"
Maker = Callable[[Path, Path, dict[str, str]], object]  # the place to write, the data sets, the environment


COMMAND_OF: dict[Maker, str] = {}
SMALL = "lmworks train --layers 2 --hidden-size 64 --heads 2 --vocab-size 400 --batch-size 8 --dtype fp32"
BRIEF = "--vocab-size 400 --steps 20 --layers 1 --hidden-size 32 --context 32 --dtype fp32"


def reviews(first: int, last: int, *, named: bool = False) -> Maker:
    """Make a table of sentences from SST-2 with their labels: 0 and 1, or what those mean."""

    def write(place: Path, data: Path, environment: dict[str, str]) -> None:
        rows = [row.split("\t") for row in (data / "sst2/train.tsv").read_text("utf-8").splitlines()[first:last]]
        rows = [(text, ("negative", "positive")[int(label)] if named else label) for text, label in rows]
        with place.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *rows])

    return write


def some_news(old: tuple[int, int], new: tuple[int, int]) -> Maker:
    """Make a table of news: of World, Sports and Business so many, and of Sci/Tech; one of each in turn."""

    def write(place: Path, data: Path, environment: dict[str, str]) -> None:
        rows = [row for row in dict(news(data)).items() if len(row[0]) < 200]
        parts = [[row for row in rows if (row[1] == "Sci/Tech") is late] for late in (False, True)]
        pairs = zip_longest(parts[0][slice(*old)], parts[1][slice(*new)])
        write_table(place, [row for pair in pairs for row in pair if row])

    return write


def encoder(place: Path, data: Path, environment: dict[str, str]) -> None:
    """Save MiniLM's word vectors under one layer that has learnt nothing."""
    with TemporaryDirectory() as folder:
        made = make_news_classifier(data, Path(folder) / "news")
        transformers.AutoModel.from_pretrained(made).save_pretrained(place)
        transformers.AutoTokenizer.from_pretrained(made).save_pretrained(place)


def head(task: str) -> Maker:
    """Make MiniLM's first two layers with a head that was taught for a moment."""
    return lambda place, data, environment: make_head(task, data, place)


def by(command: str, *needs: str) -> Maker:
    """Make a model folder by a command of ours."""

    def make_by(place: Path, data: Path, environment: dict[str, str]) -> None:
        for need in needs:
            if not (place.parent / need).exists():
                MAKERS[need](place.parent / need, data, environment)
        done = subprocess.run(["bash", "-c", f"{command} -o {place.name}"], cwd=place.parent, env=environment,
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr

    COMMAND_OF[make_by] = command
    return make_by


def tuned(task: str, source: str, options: str) -> Maker:
    """Fine-tune MiniLM as the guide of the task says."""
    return by(f"lmworks finetune minilm {source} --task {task} {options} --dtype fp32 --seed 1", "minilm", source)


def example(name: str) -> Maker:
    """Copy a file that the site hands out."""
    return lambda place, data, environment: shutil.copy(EXAMPLES / name, place)


def lines(*rows: str) -> Maker:
    """Write some lines."""
    return lambda place, data, environment: place.write_text("".join(f"{row}\n" for row in rows), "utf-8")


def sentences(place: Path, data: Path, environment: dict[str, str]) -> None:
    """Write sentences in a constructed language, a row each; as .gz packed, as .json with a split."""
    rows = [row.split("\t")[3] for row in
            (data / "conlang/tokipona/tatoeba-en-tp.tsv").read_text("utf-8-sig").splitlines()[:60]]  # fmt: skip
    texts = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    if place.suffix == ".json":
        texts = json.dumps({"train": [{"text": row} for row in rows]})
    place.write_bytes(gzip.compress(texts.encode()) if place.suffix == ".gz" else texts.encode())


def books(place: Path, data: Path, environment: dict[str, str]) -> None:
    """Copy the beginning of a book, enough for 8,000 tokens."""
    place.mkdir()
    (place / "bronte.txt").write_text((data / "books/bronte.txt").read_text("utf-8")[:1_000_000], "utf-8")


def declarations(place: Path, data: Path, environment: dict[str, str]) -> None:
    """Copy the Universal Declaration of Human Rights in two languages."""
    place.mkdir()
    for name in ("eng", "epo"):
        shutil.copy(data / f"udhr/{name}.txt", place / f"{name}.txt")


def few(place: Path, data: Path, environment: dict[str, str]) -> None:
    """Copy some lines of SST-2, which has no header."""
    place.write_text("".join((data / "sst2/train.tsv").read_text("utf-8").splitlines(keepends=True)[:60]), "utf-8")


def old_checkpoint(place: Path, data: Path, environment: dict[str, str]) -> None:
    """Write a folder as torch.save left it."""
    model = transformers.BertModel.from_pretrained(MINILM, num_hidden_layers=1)
    place.mkdir()
    model.config.save_pretrained(place)
    torch.save(model.state_dict(), place / "pytorch_model.bin")


def rooms(place: Path, data: Path, environment: dict[str, str]) -> None:
    """Run the program that the site hands out; it writes two files."""
    subprocess.run([sys.executable, EXAMPLES / "rooms.py"], cwd=place.parent, check=True)


def toki_pona(place: Path, data: Path, environment: dict[str, str]) -> None:
    """Write sentences in a constructed language."""
    rows = (data / "conlang/tokipona/tatoeba-en-tp.tsv").read_text("utf-8-sig").splitlines()
    place.mkdir()
    (place / "tp.txt").write_text("".join(row.split("\t")[3] + "\n" for row in rows[:3000]), "utf-8")


def digits(place: Path, data: Path, environment: dict[str, str]) -> None:
    """Write pictures of MNIST, a folder for each label."""
    images = gzip.decompress((data / "mnist/train-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((data / "mnist/train-labels-idx1-ubyte.gz").read_bytes())[8:]
    for i in range(1200):
        path = place / ("train" if i < 1000 else "test") / str(labels[i]) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("L", (28, 28), images[i * 784 : (i + 1) * 784]).convert("RGB").save(path)


def small_vit(place: Path, data: Path, environment: dict[str, str]) -> None:
    """Write a ViT of random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    transformers.ViTModel(
        transformers.ViTConfig(**sizes, image_size=28, patch_size=7), add_pooling_layer=False
    ).save_pretrained(place)
    transformers.ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(place)


def texts(source: str, first: int, last: int) -> Maker:
    """Copy some characters of a text."""
    return lambda place, data, environment: place.write_text((data / source).read_text("utf-8")[first:last], "utf-8")


MAKERS: dict[str, Maker] = {
    "minilm": lambda place, data, environment: shutil.copytree(MINILM, place),
    "my_embedder": lambda place, data, environment: shutil.copytree(MINILM, place),
    "my_classifier": head("text-classification"),
    "my_tagger": head("token-classification"),
    "my_reader": head("question-answering"),
    "my_encoder": head("fill-mask"),
    "my_model": by(f"{SMALL} --steps 20 --context 64"),
    "longer_model": by(f"{SMALL} --steps 5 --context 128"),
    "reviews.csv": reviews(0, 120),
    "held_out.csv": reviews(240, 300),
    "tickets.csv": example("tickets.csv"),
    "orders.conll": example("orders.conll"),
    "rooms.json": rooms,
    "rooms.txt": rooms,
    "tickets": tuned("text-classification", "tickets.csv", "--epochs 6 --lr 3e-4 --batch-size 8"),
    "orders": tuned("token-classification", "orders.conll",
                    "--validation orders.conll --epochs 15 --lr 5e-4 --batch-size 4"),
    "rooms": tuned("question-answering", "rooms.json", "--epochs 2 --lr 3e-4 --batch-size 8 --max-length 96"),
    "gaps": by("lmworks train rooms.txt --objective masked-lm --tokenizer word --layers 2 --hidden-size 64 --heads 2 "
               "--context 32 --batch-size 16 --steps 400 --lr 4e-3 --dtype fp32 --seed 1", "rooms.txt"),
    "book.txt": texts("books/botchan.txt", 20_000, 80_000),
    "held_out.txt": texts("books/botchan.txt", 80_000, 100_000),
    "short.txt": texts("books/botchan.txt", 20_000, 30_000),
    "brief.txt": texts("books/botchan.txt", 100_000, 104_000),
    "adapter": by("lmworks finetune my_model short.txt --task text-generation --method lora --epochs 1 --dtype fp32",
                  "my_model", "short.txt"),
    "old_checkpoint": old_checkpoint,
    "declarations": declarations,
    "dump.gz": sentences,
    "corpus.jsonl": sentences,
    "sentences.jsonl": sentences,
    "clinic.json": sentences,
    "books": books,
    "word_tokenizer": by("lmworks tokenizer train book.txt --kind word --vocab-size 1000", "book.txt"),
    "char_tokenizer": by("lmworks tokenizer train book.txt --kind char --vocab-size 1000", "book.txt"),
    "words.txt": lines("kijetesantakalu", "schoolmaster"),
    "few.tsv": few,
    "pairs.jsonl": lines(*(json.dumps({"prompt": f"{a} ", "completion": b}) for a, b in
                           [("It was", "late"), ("He said", "nothing"), ("The sea", "was calm")] * 4)),
    "lstm": by(f"lmworks train book.txt --arch lstm {BRIEF}", "book.txt"),
    "transformer": by(f"lmworks train book.txt --heads 2 {BRIEF}", "book.txt"),
    "counts": by("lmworks ngram train book.txt --order 3 --kind bpe", "book.txt"),
    "my_texts": toki_pona,
    "digits": digits,
    "small_vit": small_vit,
    "named_reviews.csv": reviews(240, 300, named=True),
    "many_reviews.csv": reviews(0, 400, named=True),
    "more_reviews.csv": reviews(500, 900, named=True),
    "my_graph": by("lmworks export my_model --to onnx", "my_model"),
    "classifier_graph": by("lmworks export my_classifier --to onnx", "my_classifier"),
    "classifier_int8": by("lmworks export my_classifier --to onnx --dtype int8", "my_classifier"),
    "encoder": encoder,
    "train.csv": some_news((0, 400), (0, 6)),
    "held_news.csv": some_news((400, 700), (6, 12)),
    "yesterday.csv": some_news((700, 900), (0, 0)),
    "week.csv": some_news((900, 960), (20, 260)),
    "today.csv": some_news((1000, 1150), (300, 450)),
    "news_weights": by("lmworks finetune encoder train.csv --task text-classification --epochs 3 --lr 3e-3 "
                       "--dtype fp32 --seed 1", "encoder", "train.csv"),
    "news": by("lmworks export news_weights --to onnx --dtype fp32", "news_weights"),
    "faq.txt": lambda place, data, environment: place.write_text("It snows.\nThe shop opens at nine.\n"),
}  # fmt: skip
COMMANDS = {name: COMMAND_OF[maker] for name, maker in MAKERS.items() if maker in COMMAND_OF}


def make(name: str, store: Path, data: Path, place: Path, environment: dict[str, str]) -> None:
    """Put a thing into a page's folder, perhaps under another name; make it first if no page had it yet."""
    called, _, name = name.rpartition("=")
    made, to = store / name, place / (called or name)
    if not made.exists():
        MAKERS[name](made, data, environment)
    to.parent.mkdir(parents=True, exist_ok=True)
    if made.is_dir():
        shutil.copytree(made, to)
    else:
        shutil.copy(made, to)
