"""`lmworks monitor fit`: on torch and on a graph, what it writes, what it refuses, and what becomes of it."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import transformers
from monitored import TOPICS, german, make_news_classifier
from serving import server
from sklearn.metrics import roc_auc_score
from tiny_page import copy_folder

from lmworks.base.errors import FormatError, InputError
from lmworks.base.files import read_json
from lmworks.cli import main
from lmworks.evaluation.monitor import attach, check_runtime, read_monitor
from lmworks.export.onnx_folder import export_graphs
from lmworks.export.receipt import check_receipt
from lmworks.runtime.predictor import Predictor, load
from lmworks.verbs.monitoring import fit_monitor, passages

RATE = 0.1


@pytest.fixture(scope="module")
def place(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `news`, which has a monitor, and `graphs`, its export."""
    found = tmp_path_factory.mktemp("monitored")
    make_news_classifier(data_folder, found / "news")
    fit_monitor(found / "news", found / "known.csv", validation=found / "held.csv", out_of_scope=found / "odd.txt",
                false_alarms=RATE)  # fmt: skip
    export_graphs(found / "news", found / "graphs", dtypes=("fp32",))
    return found


def opened(folder: Path) -> Predictor:
    """Open a folder with its monitor."""
    predictor = load(folder, runtime="onnx" if (folder / "onnx").is_dir() else "torch")
    attach(predictor, read_monitor(folder))
    return predictor


def rows(path: Path) -> list[tuple[str, str]]:
    """Return texts and labels."""
    return [tuple(line.rsplit(",", 1)) for line in path.read_text("utf-8").splitlines()[1:]]  # type: ignore[misc]


def test_what_was_fitted(place: Path) -> None:
    facts = read_json(place / "news/monitor.json")
    odd = len((place / "odd.txt").read_text("utf-8").splitlines())
    known = {"file": "known.csv", "known": 900, "held_out": 400, "out_of_scope": odd}
    assert {name: facts["data"][name] for name in known} == known
    assert facts["score"] == max(facts["auroc"], key=facts["auroc"].get), "the out-of-scope texts choose"
    assert facts["auroc"][facts["score"]] > 0.9 and facts["recall"][facts["score"]] > 0.6
    assert facts["accuracy"] > 0.6 and sum(facts["reference"]["classes"].values()) == 400
    assert list(facts["reference"]["classes"]) == list(TOPICS)
    page = (place / "news/monitor.html").read_text()
    assert page.count("<svg") == 2 and "Reliability" in page
    kept = (place / "news/monitor.json").read_text() + page
    assert not any(text[:40] in kept for text, _ in rows(place / "held.csv")), "no text is kept"


def test_features_are_what_the_published_models_last_matrix_reads(place: Path, data_folder: Path) -> None:
    """Scores made of transformers' own features are those that the monitor gives, by torch and by the graph."""
    reference = transformers.AutoModelForSequenceClassification.from_pretrained(place / "news").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "news")
    read: list[np.ndarray] = []
    reference.classifier.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].numpy()))
    texts = [text for text, _ in rows(place / "held.csv")[:12]] + german(data_folder)[:6]
    logits = []
    with torch.no_grad():
        for text in texts:
            inputs = tokenizer(text, truncation=True, max_length=128, return_tensors="pt", return_token_type_ids=False)
            logits.append(reference(**inputs).logits[0].numpy())
    monitor = read_monitor(place / "news")
    assert monitor is not None
    known = monitor.score(np.stack(logits), np.concatenate(read))
    warm = np.exp(np.stack(logits) / monitor.facts["temperature"])
    for folder in ("news", "graphs"):
        found = opened(place / folder)(texts, check=True)
        np.testing.assert_allclose([one.ood_score for one in found], known, rtol=1e-3, atol=2e-4)
        np.testing.assert_allclose(
            [one.confidence for one in found], (warm / warm.sum(1, keepdims=True)).max(1), atol=1e-4
        )
        assert [one.ood for one in found] == (known > monitor.threshold).tolist()
        assert [TOPICS[one.label] for one in found] == [one.labels[0].label for one in found]
        plain = load(place / folder, runtime="onnx" if folder == "graphs" else "torch")(texts)
        assert [one.labels[0].label for one in found] == [labels[0].label for labels in plain], "no answer changes"


def test_the_rate_holds_on_texts_that_nobody_fitted_on(place: Path, data_folder: Path) -> None:
    from monitored import HELD, TRAINED, news

    predictor = opened(place / "graphs")
    fresh = predictor([text for text, _ in news(data_folder)[TRAINED + HELD : TRAINED + HELD + 600]], check=True)
    odd = predictor(german(data_folder), check=True)
    assert np.mean([one.ood for one in fresh]) == pytest.approx(RATE, abs=0.05)
    scores = [one.ood_score for one in (*fresh, *odd)]
    assert roc_auc_score([0] * len(fresh) + [1] * len(odd), scores) > 0.9
    tokens = [one.tokens for one in fresh[:5]]
    assert tokens == [
        len(e.ids) for e in predictor.tokenizer.encode_inputs([t for t, _ in news(data_folder)[1300:1305]])
    ]


def test_an_export_takes_the_monitor_along_or_says_why_not(place: Path, tmp_path: Path) -> None:
    facts = read_json(place / "graphs/monitor.json")
    assert (facts["runtime"], facts["dtype"]) == ("onnx", "fp32") and "onnx/model.onnx" in facts["files"]
    assert check_receipt(place / "graphs")["passed"] and check_receipt(place / "graphs")["unlisted"] == []
    report = export_graphs(place / "news", tmp_path / "int8", dtypes=("int8",))
    assert "stays behind" in report.notes[-1] and not (tmp_path / "int8/monitor.json").exists()
    shutil.copytree(place / "news", tmp_path / "changed")
    weights = tmp_path / "changed/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    with pytest.raises(FormatError, match="another model") as error:
        read_monitor(tmp_path / "changed")
    assert "model.safetensors" in error.value.found and "lmworks monitor fit" in error.value.fix
    assert "stays behind" in export_graphs(tmp_path / "changed", tmp_path / "out", dtypes=("fp32",)).notes[-1]


def test_damage_and_other_forms_are_refused(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "graphs", tmp_path / "one")
    arrays = tmp_path / "one/monitor.safetensors"
    arrays.write_bytes(arrays.read_bytes()[:-1] + b"\x01")
    with pytest.raises(FormatError, match=r"monitor\.safetensors"):
        read_monitor(tmp_path / "one")
    monitor, runtime = read_monitor(place / "graphs"), load(place / "graphs", runtime="onnx").runtime
    assert monitor is not None
    check_runtime(monitor, place / "graphs", runtime)
    other = replace(monitor, facts={**monitor.facts, "dtype": "int8"})
    with pytest.raises(InputError, match="another form"):
        check_runtime(other, place / "graphs", runtime)
    (tmp_path / "one/monitor.json").write_text('{"format": 1}')
    with pytest.raises(FormatError, match="incomplete"):
        read_monitor(tmp_path / "one")


def test_the_command_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A copy of the folder by -o; without out-of-scope texts the score is the documented default."""
    words = ["monitor", "fit", str(place / "graphs"), str(place / "held.csv"), "--false-alarms", "0.2", "--json"]
    assert main([*words, "-o", str(tmp_path / "copy")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["score"], facts["data"]["known"], facts["data"]["held_out"]) == ("nearest", 360, 40)
    assert read_json(tmp_path / "copy/monitor.json")["threshold"] == facts["threshold"]
    assert check_receipt(tmp_path / "copy")["passed"] and read_monitor(tmp_path / "copy") is not None
    for more, said in (
        (["--false-alarms", "0.001"], "too few held-out texts"), (["--false-alarms", "2"], "out of range"),
        (["--label-column", "text"], "not one of the model's"),
    ):  # fmt: skip
        assert main([*words[:4], *more]) == 2
        assert said in capsys.readouterr().err


def test_kserve_names_what_a_model_with_a_monitor_returns(place: Path) -> None:
    with server(place / "graphs") as one:
        named = httpx.get(f"{one.base}/v2/models/graphs").json()["outputs"]
        text = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a team won"]}
        found = one.post("/v2/models/graphs/infer", {"inputs": [text]}).json()["outputs"]
    assert {"confidence", "ood_score", "ood"} <= {row["name"] for row in found}
    assert [(row["name"], row["datatype"]) for row in named] == [(row["name"], row["datatype"]) for row in found]


def test_a_graph_without_features_has_scores_of_its_logits_alone(place: Path, tmp_path: Path) -> None:
    """What earlier versions exported: no drift of vectors, and no score that would need them."""
    import onnx

    shutil.copytree(place / "graphs", tmp_path / "old")
    graph = onnx.load(tmp_path / "old/onnx/model.onnx")
    del graph.graph.output[1]
    onnx.save(graph, tmp_path / "old/onnx/model.onnx")
    report = fit_monitor(tmp_path / "old", place / "held.csv", false_alarms=RATE)
    assert report.values["score"] == "energy" and set(report.values["thresholds"]) == {"softmax", "energy"}
    assert opened(tmp_path / "old")(["a text"], check=True)[0].features is None
    with pytest.raises(InputError, match="does not give"):
        fit_monitor(tmp_path / "old", place / "held.csv", score="nearest")


def test_data_may_number_labels_that_have_no_names(place: Path, tmp_path: Path) -> None:
    """As `evaluate` takes them."""
    shutil.copytree(place / "news", tmp_path / "plain")
    names = {str(i): f"LABEL_{i}" for i in range(4)}
    config = {**read_json(tmp_path / "plain/config.json"), "id2label": names}
    config["label2id"] = {name: int(i) for i, name in names.items()}
    (tmp_path / "plain/config.json").write_text(json.dumps(config))
    with (
        (place / "held.csv").open(encoding="utf-8", newline="") as read,
        (tmp_path / "held.csv").open("w", encoding="utf-8", newline="") as file,
    ):
        numbered = ((row["text"], TOPICS.index(row["label"])) for row in csv.DictReader(read))
        csv.writer(file).writerows([("text", "label"), *numbered])
    found = fit_monitor(tmp_path / "plain", tmp_path / "held.csv", validation=tmp_path / "held.csv").values
    assert found["accuracy"] == read_json(place / "news/monitor.json")["accuracy"]
    assert list(found["reference"]["classes"]) == list(names.values())


def test_tasks_without_a_monitor_are_refused(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "news", tmp_path / "many")
    config = read_json(tmp_path / "many/config.json")
    for kind, said in (("multi_label_classification", "exclude each other"), (None, "no monitor for")):
        changed = {**config, "problem_type": kind} if kind else {**config, "architectures": ["ModernBertForMaskedLM"]}
        (tmp_path / "many/config.json").write_text(json.dumps(changed))
        with pytest.raises(InputError, match=said):
            fit_monitor(tmp_path / "many", place / "held.csv")


def test_a_model_that_writes_is_surprised_by_what_it_has_not_seen(tmp_path: Path) -> None:
    """Its score is the log-perplexity, held to torch's own cross-entropy."""
    from tiny_page import sentences

    folder = copy_folder(tmp_path / "writer")
    lines = sentences(400)
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    (tmp_path / "odd.txt").write_text("\n".join("".join(reversed(line)) for line in lines[:40]))
    report = fit_monitor(folder, tmp_path / "data.jsonl", out_of_scope=tmp_path / "odd.txt", false_alarms=RATE)
    assert report.values["auroc"]["perplexity"] > 0.95 and report.values["recall"]["perplexity"] > 0.9
    monitor, predictor = read_monitor(folder), load(folder, runtime="onnx")
    assert monitor is not None and set(monitor.arrays) == {"score", "length"}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    from lmworks.evaluation.monitor import prompt_scores

    [score], [tokens] = prompt_scores(predictor, [lines[0]])
    ids = torch.tensor([[predictor.tokenizer.eos_id, *predictor.tokenizer.encode(lines[0])]])
    with torch.no_grad():
        assert score == pytest.approx(float(model(ids, labels=ids).loss), abs=1e-3)
    assert tokens == ids.shape[1] - 1
    assert len(passages(predictor, [" ".join(lines)])) > 1
