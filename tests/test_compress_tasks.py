"""A budget for every task, over small random models of transformers: its metric, its answers side by side, a folder."""

from __future__ import annotations

import json
import shutil
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from sklearn.metrics import accuracy_score, log_loss
from sklearn.metrics.pairwise import cosine_similarity
from tokenizers import ByteLevelBPETokenizer

sys.path.insert(0, str(Path(__file__).with_name("training")))
from tuning_models import make_body, two_languages

from lmworks.base.errors import InputError
from lmworks.compress.plain import plain_examples
from lmworks.evaluation.masked import EVERY, hide, score_masked
from lmworks.runtime.predictor import load
from lmworks.text.labelled import Labelled
from lmworks.verbs import compress_trial
from lmworks.verbs.compress_budget import compress, report_path
from lmworks.verbs.compress_trial import compare_answers, examples_to_time

pytestmark = pytest.mark.usefixtures("one_thread")
END = "<|endoftext|>"
HEADS = {
    "fill-mask": "BertForMaskedLM", "token-classification": "BertForTokenClassification",
    "question-answering": "BertForQuestionAnswering", "feature-extraction": "BertModel",
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for each task with a model and `data.*`: real texts, perturbed random weights."""
    root = tmp_path_factory.mktemp("tasks")
    lines = [text for text, _ in two_languages(data_folder, skip=0, count=60)]
    make_body(root / "body", lines)
    for task, name in HEADS.items():
        shutil.copytree(root / "body", root / task)
        config = transformers.BertConfig.from_pretrained(root / "body", num_labels=2 if "answer" in task else 3)
        if task == "token-classification":
            config.id2label = {0: "O", 1: "B-location", 2: "I-location"}
            config.label2id = {label: i for i, label in config.id2label.items()}
        torch.manual_seed(1)
        model = getattr(transformers, name)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(root / task)
    (root / "text-generation").mkdir()
    bytes_pairs = ByteLevelBPETokenizer()
    bytes_pairs.train_from_iterator(lines, vocab_size=400, special_tokens=[END], show_progress=False)
    bytes_pairs.save(str(root / "text-generation/tokenizer.json"))
    (root / "text-generation/tokenizer_config.json").write_text(json.dumps({"eos_token": END, "bos_token": END}))
    config = transformers.GPT2Config(vocab_size=bytes_pairs.get_vocab_size(), n_embd=32, n_layer=2, n_head=2,
                                     n_positions=64, bos_token_id=0, eos_token_id=0)  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(root / "text-generation")
    (root / "data.txt").write_text("\n".join(lines))
    pairs = [json.dumps({"sentence1": a, "sentence2": b, "label": i % 5 / 4})
             for i, (a, b) in enumerate(zip(lines[::2], lines[1::2], strict=True))]  # fmt: skip
    (root / "pairs.jsonl").write_text("\n".join(pairs))
    rows = []
    for text in lines[:40]:
        words = [word for word in text.split() if word.isalpha()]
        rows.append("\n".join(f"{word}\t{'B-location' if word[0].isupper() else 'O'}" for word in words))
    (root / "data.conll").write_text("\n\n".join(rows) + "\n")
    squad = json.loads((data_folder / "xquad/xquad.en.json").read_text())
    few = [part for article in squad["data"] for part in islice(article["paragraphs"], 1)][:6]
    for part in few:
        part["qas"] = part["qas"][:4]
    (root / "data.json").write_text(json.dumps({"version": "1.1", "data": [{"title": "a", "paragraphs": few}]}))
    return root


@pytest.mark.parametrize(
    ("task", "data", "budget", "metrics"),
    [
        ("fill-mask", "data.txt", "perplexity<=+50%, accuracy>=-20%, size<=0.6x", {"accuracy", "perplexity"}),
        ("token-classification", "data.conll", "agreement>=0.5, size<=0.6x", {"f1"}),
        ("question-answering", "data.json", "f1>=-50%, size<=0.6x", {"exact_match", "f1"}),
        ("feature-extraction", "pairs.jsonl", "cosine>=0.98, size<=0.6x", {"spearman", "cosine"}),
        ("text-generation", "data.txt", "perplexity<=+2%, size<=0.6x", {"perplexity"}),
    ],
)
def test_a_budget_holds_for_every_task(
    task: str, data: str, budget: str, metrics: set[str], folders: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The picked folder opens and answers; its scores are those that measuring it again gives."""
    monkeypatch.setattr(compress_trial, "weigh", lambda *args: 100.0)  # a process of its own for each: elsewhere
    monkeypatch.setattr(compress_trial, "ROUNDS", 1)
    report = compress(folders / task, tmp_path / "out", budget=budget, data=folders / data,
                      candidates="int8,onnx-int8,onnx-q4,pruned-50")  # fmt: skip
    rows = {row["name"]: row for row in report.values["candidates"]}
    assert not [row["failed"] for row in rows.values() if "failed" in row]
    assert metrics <= rows["fp32"].keys()
    assert report.values["picked"] in ("int8", "onnx-int8", "onnx-q4")
    assert rows["int8"]["size_share"] < 0.6 and rows["pruned-50"]["size_share"] == pytest.approx(1, abs=0.02)
    if task != "text-generation":
        assert rows["fp32"]["agreement"] == 1 > 0.3 < rows["onnx-int8"]["agreement"]
    load(tmp_path / "out", task)


def test_a_book_is_timed_by_its_passages(data_folder: Path) -> None:
    """A text file is one text: read whole in every turn, a megabyte of it took half an hour."""
    book = (data_folder / "books/botchan.txt").read_text(encoding="utf-8")
    found = examples_to_time(Labelled("text-generation", [book, "To be", {"prompt": "x"}], [], (), "book.txt"), seed=0)
    assert len(found) == compress_trial.TIMED and all(len(text) <= compress_trial.PASSAGE for text in found)
    assert all(text in book for text in found) and len(set(found)) == len(found)
    short = ["To be", "or not"]
    assert sorted(examples_to_time(Labelled("text-generation", short, [], (), "two.txt"), seed=0)) == sorted(short)


def test_a_refusal_shows_the_frontier(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compress_trial, "weigh", lambda *args: 100.0)
    monkeypatch.setattr(compress_trial, "ROUNDS", 1)
    report = compress(folders / "feature-extraction", tmp_path / "out", budget="cosine>=0.99999, size<=0.1x",
                      data=folders / "pairs.jsonl", candidates="int8", also=(folders / "body",))  # fmt: skip
    assert report.values["picked"] is None and not (tmp_path / "out").exists()
    assert "<svg" in report_path(tmp_path / "out").read_text() and report.values["frontier"]
    assert [row["name"] for row in report.values["candidates"]] == ["fp32", "int8", "body"]
    with pytest.raises(InputError, match="another task"):
        compress(folders / "feature-extraction", tmp_path / "out", budget="cosine>=0.9", candidates="fp32",
                 data=folders / "pairs.jsonl", also=(folders / "fill-mask",))  # fmt: skip
    with pytest.raises(InputError, match="no perplexity"):
        compress(folders / "feature-extraction", tmp_path / "out", budget="perplexity<=+1%", candidates="fp32",
                 data=folders / "pairs.jsonl")  # fmt: skip


def test_hidden_words_are_scored_as_transformers_and_scikit_learn_score_them(folders: Path) -> None:
    """The same places hidden, transformers' logits, scikit-learn's accuracy and loss."""
    predictor, texts = load(folders / "fill-mask"), (folders / "data.txt").read_text().splitlines()[:20]
    found, said = score_masked(predictor, [*texts, " ".join(texts)])  # the last in several windows
    theirs = transformers.BertForMaskedLM.from_pretrained(folders / "fill-mask").eval()
    known, rows = [], []
    for feature in hide(predictor.prepared, [*texts, " ".join(texts)]):
        with torch.no_grad():
            logits = theirs(torch.tensor([feature.inputs["input_ids"]])).logits[0]
        rows.append(logits[feature.notes["rows"]].softmax(-1).double().numpy())
        known += feature.notes["hidden"].tolist()
        hidden = [feature.encoding.ids[row] for row in feature.notes["rows"]]
        assert hidden == feature.notes["hidden"].tolist()
        assert {feature.inputs["input_ids"][row] for row in feature.notes["rows"]} == {predictor.prepared.mask_id}
        assert len(feature.inputs["input_ids"]) <= predictor.runtime.max_length
    rows = np.concatenate(rows)
    assert found["accuracy"] == pytest.approx(accuracy_score(known, rows.argmax(-1)))
    assert said == rows.argmax(-1).tolist()
    loss = log_loss(known, rows / rows.sum(1, keepdims=True), labels=range(rows.shape[1]))
    assert found["perplexity"] == pytest.approx(np.exp(loss), rel=1e-3)
    tokens = sum(len(load(folders / "fill-mask").tokenizer.encode(text)) for text in texts)
    assert 0.5 < len(known) / (2 * tokens / EVERY) < 2


def test_vectors_are_compared_by_their_angle_and_numbers_not_at_all() -> None:
    one, two = (np.random.default_rng(i).normal(size=(8, 5)) for i in range(2))
    one, two = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (one, two))
    found = compare_answers(list(one), list(two))
    assert found["cosine"] == pytest.approx(np.diag(cosine_similarity(one, two)).mean())
    assert compare_answers(list(one), list(one)) == {"cosine": pytest.approx(1.0), "agreement": 1.0}
    assert compare_answers([0.5, 0.25], [0.5, 0.25]) == {}
    assert compare_answers(["a", "b"], ["a", "c"]) == {"agreement": 0.5}
    assert plain_examples("fill-mask", ["one two three", " "], mask="<mask>") == ["one <mask> three"]
