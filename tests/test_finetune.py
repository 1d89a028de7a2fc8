"""Fine-tuning from data to folder: it learns, transformers and peft read what it leaves, a kill changes nothing."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from seqeval.metrics import f1_score

sys.path.insert(0, str(Path(__file__).with_name("training")))
from tuning_models import make_body, make_languages, write_rows

from lmworks.base.errors import FormatError, InputError, Interrupted, LmworksError
from lmworks.export.receipt import check_receipt
from lmworks.runtime.predictor import load
from lmworks.tokens.train import train_tokenizer
from lmworks.training.log import read_history
from lmworks.training.state import hold
from lmworks.verbs.finetuning import evaluate_task, finetune

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = Path(__file__).with_name("training") / "kill_finetune.py"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LMWORKS_THREADS": "1"}
QUICK = {"epochs": 4, "lr": 2e-3, "batch_size": 8, "dtype": "fp32"}


@pytest.fixture(scope="module")
def languages(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a body without a head, and English and German sentences to tell apart."""
    root = tmp_path_factory.mktemp("languages")
    make_languages(root, data_folder, 200)
    named = [block for block in re.split(r"\n\s*\n", (data_folder / "wnut17/train.conll").read_text()) if "B-" in block]
    (root / "names.conll").write_text("\n\n".join(named[:60]) + "\n")
    return root


def tune(root: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Fine-tune on the languages; return the report's values."""
    settings = {"validation": root / "validation.jsonl", "task": "text-classification", **QUICK, **changes}
    return finetune(root / "body", root / "train.jsonl", out, **settings).values


def texts_and_labels(path: Path) -> tuple[list[str], list[str]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row["text"] for row in rows], [row["label"] for row in rows]


# ------------------------------------------------------------------------------------------------ it learns, it is read


def test_full_fine_tuning_learns_and_transformers_reads_the_folder(languages: Path, tmp_path: Path) -> None:
    """Better than always the same label; transformers' own pipeline gets the same accuracy from the folder."""
    out = tmp_path / "out"
    values = tune(languages, out)
    assert values["new_head"] and values["trainable"] == values["parameters"]
    assert values["accuracy"] >= 0.9 > values["baselines"]["majority"]["accuracy"] == 0.5
    texts, labels = texts_and_labels(languages / "validation.jsonl")
    pipe = transformers.pipeline("text-classification", model=str(out), device="cpu")
    said = [answer["label"] for answer in pipe(texts)]
    assert sum(a == b for a, b in zip(said, labels, strict=True)) / len(labels) == values["accuracy"]
    scored = evaluate_task(out, languages / "validation.jsonl").values
    assert {name: scored[name] for name in values["metrics"]} == values["metrics"]
    assert [row["label"] for row in values["classes"]] == values["labels"] == ["en", "de"]
    assert check_receipt(out)["passed"]
    receipt = json.loads((out / "lmworks.json").read_text())
    assert receipt["task"] == "text-classification" and receipt["scores"]["metrics"] == values["metrics"]
    assert json.loads((out / "report.json").read_text())["accuracy"] == values["accuracy"]
    page = (out / "report.html").read_text()
    assert all(part in page for part in ("frozen features", "gap of the last losses", receipt["data_sha256"]))
    history = read_history(out / "training")
    assert values["gap"] == history.validation[-1][1] - history.train[-1][1]
    assert not list(out.rglob("last.*")) and not out.with_name("out.partial").exists()


def test_the_same_seed_gives_the_same_bits(languages: Path, tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tune(languages, tmp_path / name, epochs=1, seed=seed)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_the_head_alone_leaves_the_body_as_it_was(languages: Path, tmp_path: Path) -> None:
    values = tune(languages, tmp_path / "out", method="head", epochs=2)
    assert values["trainable"] < 0.1 * values["parameters"]
    before = transformers.BertModel.from_pretrained(languages / "body").encoder.state_dict()
    after = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out").bert.encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_leaves_an_adapter_that_peft_reads(languages: Path, tmp_path: Path) -> None:
    """C28: peft and transformers get the same answers from the adapter, and so do we."""
    import peft

    out = tmp_path / "out"
    values = tune(languages, out, method="lora", rank=4, lr=1e-2)
    assert values["trainable"] < 0.2 * values["parameters"]
    assert values["accuracy"] > values["baselines"]["majority"]["accuracy"]
    base = transformers.BertForSequenceClassification.from_pretrained(languages / "body", num_labels=2)
    model = peft.PeftModel.from_pretrained(base, str(out)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    texts, labels = texts_and_labels(languages / "validation.jsonl")
    said = []
    for text in texts:
        with torch.no_grad():
            said.append(values["labels"][int(model(**tokenizer(text, return_tensors="pt")).logits.argmax())])
    assert sum(a == b for a, b in zip(said, labels, strict=True)) / len(labels) == values["accuracy"]
    assert evaluate_task(out, languages / "validation.jsonl").values["accuracy"] == values["accuracy"]
    assert not (out / "model.safetensors").exists()


def test_names_are_learned_and_scored_as_seqeval_scores_them(data_folder: Path, tmp_path: Path) -> None:
    """WNUT-17, a slice to overfit: the report's F1 is seqeval's on what the folder then answers."""
    lines = re.split(r"\n\s*\n", (data_folder / "wnut17/train.conll").read_text())
    named = [block for block in lines if "B-" in block][:40]
    (tmp_path / "train.conll").write_text("\n\n".join(named) + "\n")
    rows = [[line.split("\t") for line in block.splitlines() if line.strip()] for block in named]
    words = [[row[0] for row in block] for block in rows]
    make_body(tmp_path / "body", (" ".join(sentence) for sentence in words))
    values = finetune(
        tmp_path / "body", tmp_path / "train.conll", tmp_path / "out", validation=tmp_path / "train.conll",
        task="token-classification", **{**QUICK, "epochs": 25, "lr": 5e-3},
    ).values  # fmt: skip
    assert values["f1"] > 0.5 and values["baselines"]["majority"]["f1"] == 0
    predictor = load(tmp_path / "out")
    said = []
    for sentence in words:
        starts = {sum(len(word) + 1 for word in sentence[:i]): i for i in range(len(sentence))}
        tags = ["O"] * len(sentence)
        for token in predictor([" ".join(sentence)], aggregation="tokens")[0]:
            if token.attends and token.start in starts:
                tags[starts[token.start]] = token.label
        said.append(tags)
    expected = f1_score([[row[1] for row in block] for block in rows], said)
    assert values["f1"] == pytest.approx(expected, abs=1e-12)
    assert evaluate_task(tmp_path / "out", tmp_path / "train.conll").values["f1"] == values["f1"]


def test_answers_are_learned(data_folder: Path, tmp_path: Path) -> None:
    """XQuAD, a few questions to overfit: far above random spans of the same length, and the folder answers so."""
    article = json.loads((data_folder / "xquad/xquad.en.json").read_text())["data"][0]
    article["paragraphs"] = article["paragraphs"][:2]
    for paragraph in article["paragraphs"]:
        paragraph["qas"] = paragraph["qas"][:4]
    (tmp_path / "train.json").write_text(json.dumps({"data": [article]}))
    make_body(tmp_path / "body", (paragraph["context"] for paragraph in article["paragraphs"]))
    values = finetune(
        tmp_path / "body", tmp_path / "train.json", tmp_path / "out", validation=tmp_path / "train.json",
        task="question-answering", **{**QUICK, "epochs": 40, "lr": 5e-3},
    ).values  # fmt: skip
    assert values["f1"] > values["baselines"]["random span"]["f1"] + 0.3
    scored = evaluate_task(tmp_path / "out", tmp_path / "train.json").values
    assert (scored["exact_match"], scored["f1"]) == (values["exact_match"], values["f1"])


def test_a_head_for_the_same_labels_is_kept_and_another_replaced(languages: Path, tmp_path: Path) -> None:
    tune(languages, tmp_path / "first")
    again = finetune(
        tmp_path / "first", languages / "train.jsonl", tmp_path / "second", validation=languages / "validation.jsonl",
        **{**QUICK, "epochs": 1, "lr": 1e-6},
    ).values  # fmt: skip
    assert not again["new_head"] and again["task"] == "text-classification" and again["accuracy"] >= 0.9
    renamed = [(text, {"en": "English", "de": "German"}[label]) for text, label in zip(
        *texts_and_labels(languages / "train.jsonl"), strict=True)]  # fmt: skip
    write_rows(tmp_path / "renamed.jsonl", renamed)
    other = finetune(tmp_path / "first", tmp_path / "renamed.jsonl", tmp_path / "third", **{**QUICK, "epochs": 1})
    assert other.values["new_head"] and other.values["labels"] == ["English", "German"]


def test_text_goes_on_training_a_language_model(data_folder: Path, tmp_path: Path) -> None:
    """Domain-adaptive pre-training: hidden words of a new domain, with a head that the body lacked."""
    text = (data_folder / "tinyshakespeare/input.txt").read_text()[:20_000]
    (tmp_path / "plays.txt").write_text(text)
    make_body(tmp_path / "body", [text])
    (tmp_path / "more.txt").write_text(text[:3000])
    values = finetune(
        tmp_path / "body", tmp_path / "plays.txt", tmp_path / "out", validation=tmp_path / "more.txt",
        task="fill-mask", **{**QUICK, "epochs": 8},
    ).values  # fmt: skip
    losses = [row["step"] for row in values["history"]]
    words = len((tmp_path / "body/vocab.txt").read_text().splitlines())
    assert values["perplexity"] < words / 2 and len(losses) == 8
    assert transformers.BertForMaskedLM.from_pretrained(tmp_path / "out") is not None


def test_a_decoder_learns_instructions_and_text(data_folder: Path, tmp_path: Path) -> None:
    """Prompts with completions, and one plain text whose end is held out: transformers reads what is left."""
    text = (data_folder / "tinyshakespeare/input.txt").read_text()[:30_000]
    tokenizer = train_tokenizer([text], kind="bpe", vocab_size=400)
    body = tmp_path / "body"
    tokenizer.save(body, max_length=64)
    ends = {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id}
    sizes = {"vocab_size": tokenizer.vocab_size, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**sizes, **ends)
    transformers.GPT2LMHeadModel(config).save_pretrained(body)
    (tmp_path / "play.txt").write_text(text)
    values = finetune(body, tmp_path / "play.txt", tmp_path / "text", **QUICK).values
    assert values["task"] == "text-generation" and not values["new_head"]
    assert values["perplexity"] < 0.6 * tokenizer.vocab_size
    pairs = [{"prompt": f"Say {word}:", "completion": f" {word}!"} for word in ("king", "queen", "fool", "lord") * 10]
    (tmp_path / "say.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    said = finetune(
        tmp_path / "text", tmp_path / "say.jsonl", tmp_path / "said", validation=tmp_path / "say.jsonl",
        **{**QUICK, "epochs": 30, "lr": 5e-3},
    ).values  # fmt: skip
    assert said["perplexity"] < 1.1
    assert load(tmp_path / "said").generate("Say fool:", max_tokens=12).text == " fool!"
    transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "said")


def test_a_decoder_learns_to_classify(languages: Path, data_folder: Path, tmp_path: Path) -> None:
    """GPT-2 judges by its last token: transformers needs a pad token in config.json to find it in a batch."""
    texts, labels = texts_and_labels(languages / "validation.jsonl")
    tokenizer = train_tokenizer(texts, kind="bpe", vocab_size=500)
    tokenizer.save(tmp_path / "body", max_length=160)
    config = transformers.GPT2Config(vocab_size=tokenizer.vocab_size, n_positions=160, n_embd=32, n_layer=2, n_head=2)
    transformers.GPT2Model(config).save_pretrained(tmp_path / "body")
    out = tmp_path / "out"
    values = finetune(
        tmp_path / "body", languages / "train.jsonl", out, validation=languages / "validation.jsonl",
        task="text-classification", **QUICK,
    ).values  # fmt: skip
    assert values["accuracy"] >= 0.9
    pipe = transformers.pipeline("text-classification", model=str(out), device="cpu", batch_size=8)
    said = [answer["label"] for answer in pipe(texts)]
    assert sum(a == b for a, b in zip(said, labels, strict=True)) / len(labels) == values["accuracy"]


def test_pictures_are_learned(data_folder: Path, tmp_path: Path) -> None:
    """MNIST, ones and zeros, as PNG files in a table."""
    with gzip.open(data_folder / "mnist/t10k-images-idx3-ubyte.gz") as file:
        pictures = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(data_folder / "mnist/t10k-labels-idx1-ubyte.gz") as file:
        digits = np.frombuffer(file.read(), np.uint8, offset=8)
    chosen = np.flatnonzero(digits < 2)[:360]
    rows = []
    for i in chosen.tolist():
        Image.fromarray(pictures[i]).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "label": "one" if digits[i] else "zero"})
    for name, part in (("train", rows[:300]), ("validation", rows[300:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=28, patch_size=7
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "body")
    prepared = {"image_processor_type": "ViTImageProcessor", "size": {"height": 28, "width": 28}}
    (tmp_path / "body/preprocessor_config.json").write_text(json.dumps(prepared))
    values = finetune(
        tmp_path / "body", tmp_path / "train.jsonl", tmp_path / "out", validation=tmp_path / "validation.jsonl",
        task="image-classification", **QUICK,
    ).values  # fmt: skip
    assert values["accuracy"] >= 0.9 > values["baselines"]["majority"]["accuracy"]
    assert evaluate_task(tmp_path / "out", tmp_path / "validation.jsonl").values["accuracy"] == values["accuracy"]
    assert load(tmp_path / "out")(str(tmp_path / f"{chosen[0]}.png"))[0].label == rows[0]["label"]


def test_running_out_of_memory_says_what_to_halve(languages: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def fail(self: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("lmworks.training.trainer.Trainer.train_step", fail)
    with pytest.raises(LmworksError, match="out of memory") as error:
        tune(languages, tmp_path / "out")
    assert "double --accumulation (1)" in error.value.fix


# --------------------------------------------------------------------------------------------------------- kill, resume


@pytest.mark.parametrize(
    ("method", "kills"),
    [
        *(("full", 2), ("lora", 1), ("tasks", 1)),
        *(pytest.param(m, 10, marks=pytest.mark.slow) for m in ("full", "head", "lora", "adapter", "prefix", "tasks")),
    ],
)
def test_killed_runs_end_with_the_same_bits(languages: Path, tmp_path: Path, method: str, kills: int) -> None:
    """C26: weights, adapter, scores and loss log equal those of a run that nobody killed."""
    for name in ("body", "train.jsonl", "validation.jsonl", "names.conll"):
        (tmp_path / name).symlink_to(languages / name)
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(kills), "0", method]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ONE_THREAD})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["different"] == [] and found["kills"] == kills


def test_a_resumed_run_keeps_its_settings(languages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted run is not thrown away, continued with other settings, or started again by accident."""
    out = tmp_path / "out"
    monkeypatch.setattr("lmworks.training.trainer.StopRequest", StopAfterTheFirstStep)
    with pytest.raises(Interrupted, match="everything is saved"):
        tune(languages, out)
    monkeypatch.undo()
    monkeypatch.setenv("LMWORKS_THREADS", "1")
    assert not out.exists()
    with pytest.raises(InputError, match="interrupted run is here already"):
        tune(languages, out)
    with pytest.raises(InputError, match="must keep its settings") as error:
        tune(languages, out, resume=True, lr=1e-3)
    assert error.value.found == "lr=0.001"
    assert tune(languages, out, resume=True)["accuracy"] >= 0.9


class StopAfterTheFirstStep:
    """Ctrl-C that comes at once."""

    def __enter__(self) -> bool:
        return True

    def __exit__(self, *_: Any) -> None:
        return None


def hold_for(folder: Path, ready: Any, done: Any) -> None:
    """Be the process that trains in a folder."""
    with hold(folder):
        ready.set()
        done.wait(60)


def test_a_second_process_is_kept_out(languages: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "work").write_text("of the first process")
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold_for, args=(partial, ready, done))
    other.start()
    try:
        assert ready.wait(60)
        for choice in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(InputError, match="another process is training"):
                tune(languages, tmp_path / "out", **choice)
        assert (partial / "work").exists()
    finally:
        done.set()
        other.join()


# ------------------------------------------------------------------------------------------------ what it says, refuses


def test_a_dry_run_counts_and_writes_nothing(languages: Path, tmp_path: Path) -> None:
    full = tune(languages, tmp_path / "out", dry_run=True)
    lora = tune(languages, tmp_path / "out", dry_run=True, method="lora")
    assert list(tmp_path.iterdir()) == []
    theirs = transformers.BertForSequenceClassification.from_pretrained(languages / "body").num_parameters()
    assert full["parameters"] == full["trainable"] == theirs
    assert lora["trainable_share"] < 0.2 and lora["memory_bytes"] < full["memory_bytes"]
    assert full["steps"] == 4 * 50 and full["train_seconds"] >= 0
    rows = languages / "train.jsonl"
    report = finetune(
        languages / "body", rows, tmp_path / "out", validation=rows, dry_run=True, **QUICK, task="text-classification"
    )
    assert len(report.notes) == 1 and "are also in the training data" in report.notes[0]


def test_overfitting_is_said_and_the_best_weights_are_restored(languages: Path, tmp_path: Path) -> None:
    """Labels without a pattern: the training loss falls, the validation loss rises."""
    texts, labels = texts_and_labels(languages / "train.jsonl")
    generator = torch.Generator().manual_seed(0)
    random = [labels[i] for i in torch.randint(0, len(labels), (len(labels),), generator=generator).tolist()]
    write_rows(tmp_path / "train.jsonl", list(zip(texts, random, strict=True))[80:160])
    write_rows(tmp_path / "validation.jsonl", list(zip(texts, random, strict=True))[:80])
    report = finetune(
        languages / "body", tmp_path / "train.jsonl", tmp_path / "out", validation=tmp_path / "validation.jsonl",
        task="text-classification", **{**QUICK, "epochs": 12},
    )  # fmt: skip
    assert report.values["overfitting"] and any("Overfitting" in note for note in report.notes)
    best = max(report.values["history"], key=lambda row: row["accuracy"])
    assert report.values["best_step"] < report.values["steps"]
    scored = evaluate_task(tmp_path / "out", tmp_path / "validation.jsonl").values
    assert scored["accuracy"] == best["accuracy"]


def change(path: Path, number: int, label: str) -> None:
    """Change one label of a file of rows."""
    lines = path.read_text().splitlines()
    lines[number] = json.dumps({**json.loads(lines[number]), "label": label})
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "lorra"}, "did you mean"),
        ({"task": "text-clasification"}, "did you mean"),
        ({"task": None}, "no head that says what to learn"),
        ({"task": "multiple-choice"}, "no fine-tuning for the task"),
        ({"task": "text-generation"}, "sees what follows a word"),
        ({"lr": 0.0}, "--lr is out of range"),
        ({"epochs": 0}, "--epochs is out of range"),
        ({"max_length": 4000}, "--max-length is out of range"),
        ({"freeze": ("transformer.layer",)}, "no parameter is called"),
        ({"freeze": ("*",)}, "nothing is left to be trained"),
        ({"learning_rate": 1.0}, "no knob"),
        ({"validation": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"max_length": 8}, "longer than the model"),
        ({"rank": 4}, "--rank belongs to lora"),
        ({"prefix_length": 4}, "--prefix-length belongs to prefix"),
        ({"bottleneck": 4}, "--bottleneck belongs to adapter"),
        ({"momentum": 0.5}, "--momentum belongs to sgd"),
        ({"decay": 0.5}, "--decay belongs to wsd"),
        ({"init": "random"}, "--init is for new tokens"),
        ({"every_token": True}, "--every-token is for words with tags"),
        ({"whole_words": True}, "--whole-words is for hidden words"),
        ({"symmetric": True}, "--symmetric is for vectors of texts"),
        ({"triplet_loss": True}, "--triplet-loss is for vectors of texts"),
        ({"temperature": 0.5}, "--temperature is for texts that are compared"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    settings: dict[str, Any], message: str, languages: Path, tmp_path: Path
) -> None:
    """B15 among them: nothing is cut in silence. Nothing is left behind."""
    with pytest.raises(InputError, match=message):
        tune(languages, tmp_path / "out", **settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ("text,label\n" + "a,0\n" * 20, {}, "all examples have the same label"),
        ("text,label\na,0.5\nb,1.5\nc,2.5\n", {"balanced": True}, "--balanced is for rows with one label each"),
        ("tokens,tags\na b,O O\nc,O\nd,B-X\n", {"balanced": True, "task": "token-classification"}, "--balanced is for"),
    ],
)  # fmt: skip
def test_labels_that_a_knob_cannot_use_are_refused(
    content: str, settings: dict[str, Any], message: str, languages: Path, tmp_path: Path
) -> None:
    """One class teaches nothing; rows can be drawn by class only where each has one."""
    (tmp_path / "data.csv").write_text(content)
    settings = {"task": "text-classification", **settings}
    with pytest.raises(InputError, match=message):
        finetune(languages / "body", tmp_path / "data.csv", tmp_path / "out", dry_run=True, **settings)


def test_two_examples_are_enough_to_begin_with(languages: Path, tmp_path: Path) -> None:
    """One is trained on, one held out: the frozen features' spread over one row is no number."""
    (tmp_path / "two.csv").write_text("text,label\ngood,0\nbad,1\n")
    report = finetune(
        languages / "body", tmp_path / "two.csv", tmp_path / "out", task="text-classification", **QUICK
    )  # fmt: skip
    assert np.isfinite(report.values["baselines"]["frozen features"]["accuracy"])


@pytest.mark.parametrize(
    ("file", "label", "message"),
    [
        ("validation.jsonl", "enn", 'did you mean "en"'),
        ("train.jsonl", "enn", 'no validation example has the label "enn"'),
    ],
)
def test_labels_that_one_split_lacks_are_refused(
    file: str, label: str, message: str, languages: Path, tmp_path: Path
) -> None:
    """A slip of the pen in either file is found before hours of training."""
    for name in ("train.jsonl", "validation.jsonl"):
        (tmp_path / name).write_text((languages / name).read_text())
    change(tmp_path / file, 3, label)
    with pytest.raises(InputError) as error:
        finetune(
            languages / "body", tmp_path / "train.jsonl", tmp_path / "out", task="text-classification",
            validation=tmp_path / "validation.jsonl",
        )  # fmt: skip
    assert message in str(error.value) and 'did you mean "en"' in str(error.value)


def test_a_tokenizer_that_is_larger_than_the_embedding_is_refused(languages: Path, tmp_path: Path) -> None:
    for path in (languages / "body").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    words = (tmp_path / "vocab.txt").read_text()
    (tmp_path / "vocab.txt").write_text(words + "more\nwords\n")
    with pytest.raises(FormatError) as error:
        finetune(tmp_path, languages / "train.jsonl", tmp_path / "out", task="text-classification", **QUICK)
    size = len(words.splitlines())
    assert f"{size + 2} tokens in the tokenizer" in str(error.value) and f"at most {size}," in str(error.value)


def test_a_tenth_is_held_out_by_label(languages: Path, tmp_path: Path) -> None:
    values = finetune(
        languages / "body", languages / "train.jsonl", tmp_path / "out", task="text-classification",
        **{**QUICK, "epochs": 1},
    ).values  # fmt: skip
    assert (values["train_examples"], values["validation_examples"]) == (360, 40)
    assert [row["support"] for row in values["classes"]] == [20, 20]


def test_several_labels_and_numbers_are_learned(languages: Path, tmp_path: Path) -> None:
    """Multi-label and regression: scores above the baseline, and transformers' problem type in config.json."""
    texts, labels = texts_and_labels(languages / "train.jsonl")
    several = [
        {"text": text, "label": [label, *(["long"] if len(text) > 60 else [])]}
        for text, label in zip(texts, labels, strict=True)
    ]
    numbers = [
        {"text": text, "label": 2.0 if label == "en" else -1.5} for text, label in zip(texts, labels, strict=True)
    ]
    for name, rows, kind in (("m", several, "multi_label_classification"), ("r", numbers, "regression")):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = finetune(
            languages / "body", tmp_path / f"{name}.jsonl", tmp_path / name, task="text-classification",
            **{**QUICK, "epochs": 4},
        ).values  # fmt: skip
        assert json.loads((tmp_path / name / "config.json").read_text())["problem_type"] == kind
        scored = evaluate_task(tmp_path / name, tmp_path / f"{name}.jsonl").values
        if name == "m":
            assert values["accuracy"] > values["baselines"]["majority"]["accuracy"] and scored["accuracy"] > 0.55
        else:
            assert values["mse"] < 0.5 * values["baselines"]["majority"]["mse"] and scored["spearman"] > 0.7


def test_an_instruction_model_is_scored_on_its_answers(tmp_path: Path) -> None:
    """The perplexity of the answers alone, as transformers' loss gives it one example at a time."""
    from lmworks import api

    rows = [{"prompt": f"What is {a} and {b}? ", "completion": f"It is {a + b}."} for a in range(5) for b in range(5)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = tmp_path / "decoder"
    tokenizer = train_tokenizer([row["prompt"] + row["completion"] for row in rows], vocab_size=300)
    tokenizer.save(base)
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=tokenizer.vocab_size, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(base)
    report = api.evaluate(base, tmp_path / "sums.jsonl")
    theirs, total, count = transformers.GPT2LMHeadModel.from_pretrained(base).eval(), 0.0, 0
    for row in rows:
        prompt, answer = tokenizer.encode(row["prompt"]), [*tokenizer.encode(row["completion"]), tokenizer.eos_id]
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
        count += len(answer)
    assert report.values["answer_tokens"] == count
    assert report.values["loss"] == pytest.approx(total / count, abs=1e-5)

    rows[0]["prompt"] = "so long " * 200  # its answer is cut off, and that is said
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tuned = finetune(
        base, tmp_path / "sums.jsonl", tmp_path / "out", validation=tmp_path / "sums.jsonl", epochs=1, dtype="fp32",
        long="truncate",
    )  # fmt: skip
    assert tuned.values["left_out"] == 1
    assert any("1 training example had nothing to learn" in note for note in tuned.notes)


def test_an_adapter_is_opened_by_load_and_not_trained_further(languages: Path, tmp_path: Path) -> None:
    import lmworks

    tune(languages, tmp_path / "adapter", method="lora", epochs=1)
    assert lmworks.load(tmp_path / "adapter")("Ein kleiner Hund.")[0].label in ("de", "en")
    with pytest.raises(InputError, match="adapter cannot be fine-tuned further"):
        finetune(tmp_path / "adapter", languages / "train.jsonl", tmp_path / "more", task="text-classification")
