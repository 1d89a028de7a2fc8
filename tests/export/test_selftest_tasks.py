"""Proof for every task: records of the real MiniLM are transformers' answers, and whatever answers otherwise fails."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from minilm_heads import HEADS, MINILM, POSITIONS, make_head
from onnx import numpy_helper

import lmworks
from lmworks.base.errors import FormatError, InputError
from lmworks.cli import main
from lmworks.export import selftest_items
from lmworks.export.onnx_folder import export_graphs
from lmworks.export.receipt import write_receipt
from lmworks.export.selftest import from_base64, to_base64
from lmworks.export.selftest_items import built_in, draw, from_data_url, read_items, to_data_url, to_inputs
from lmworks.export.selftest_tasks import compare_task, match, read_answer
from lmworks.export.verify import verify

TASKS = (*HEADS, "feature-extraction")


@pytest.fixture(scope="module")
def weights(data_folder: Path, tmp_path_factory) -> dict[str, Path]:
    """MiniLM with each head."""
    place = tmp_path_factory.mktemp("weights")
    return {task: make_head(task, data_folder, place / task) for task in TASKS}


@pytest.fixture(scope="module")
def graphs(weights, data_folder: Path, tmp_path_factory) -> dict[str, Path]:
    """Their graphs, each with the answers of torch to real examples."""
    place, data = tmp_path_factory.mktemp("graphs"), make_data(data_folder, tmp_path_factory.mktemp("data"))
    for task in TASKS:
        export_graphs(weights[task], place / task, dtypes=["fp32", "int8"], data=data[task])
    return {task: place / task for task in TASKS}


def make_data(data: Path, place: Path) -> dict[str, Path]:
    """Return a file of real examples for each task."""
    (place / "names.conll").write_text("\n\n".join((data / "wnut17/dev.conll").read_text().split("\n\n")[:40]))
    return {
        "text-classification": data / "sst2/dev.tsv", "token-classification": place / "names.conll",
        "question-answering": data / "xquad/xquad.en.json", "fill-mask": data / "sst2/dev.tsv",
        "feature-extraction": data / "udhr/ell_monotonic.txt",
    }  # fmt: skip


def read_record(folder: Path) -> dict[str, Any]:
    """Return a folder's selftest.json."""
    return json.loads((folder / "selftest.json").read_text())


def short(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the items that are read at once: all but the last."""
    return record["items"][:-1]


# -- the record ------------------------------------------------------------------------------------------------------


def test_labels_are_those_of_the_pipeline(weights, graphs) -> None:
    answer = transformers.pipeline("text-classification", str(weights["text-classification"]), top_k=None)
    record = read_record(graphs["text-classification"])
    assert len(short(record)) == 8
    for item in record["items"]:
        known = answer([item["input"]["text"]], truncation=True)[0]
        if item is not record["items"][-1]:  # the pipeline cuts the long one, the record reads it in windows
            assert [one["label"] for one in item["output"]] == [one["label"] for one in known]
            np.testing.assert_allclose([o["score"] for o in item["output"]], [o["score"] for o in known], atol=1e-5)


def test_entities_are_those_of_the_pipeline(weights, graphs) -> None:
    answer = transformers.pipeline(
        "token-classification", str(weights["token-classification"]), aggregation_strategy="first"
    )
    found = 0
    for item in short(read_record(graphs["token-classification"])):
        known = [(e["entity_group"], e["start"], e["end"], e["word"]) for e in answer(item["input"]["text"])]
        assert [(e["label"], e["start"], e["end"], e["word"]) for e in item["output"]] == known
        found += len(known)
    assert found


def test_answers_are_those_of_the_networks_best_span(weights, graphs) -> None:
    """The pipeline of transformers 5 is gone: the span with the highest product of its own model's probabilities."""
    place = weights["question-answering"]
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(place).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    for item in short(read_record(graphs["question-answering"])):
        given = item["input"]
        inputs = tokenizer(given["question"], given["context"], return_offsets_mapping=True, return_tensors="pt")
        offsets = inputs.pop("offset_mapping")[0].tolist()
        assert inputs["input_ids"][0].tolist() == item["ids"]
        with torch.inference_mode():
            output = model(**inputs)
        logits = torch.stack((output.start_logits[0], output.end_logits[0]), -1)
        np.testing.assert_allclose(from_base64(item["logits"]).reshape(-1, 2), logits.numpy(), atol=1e-4)
        inside = torch.tensor([s == 1 or i == 0 for i, s in enumerate(inputs.sequence_ids(0))])
        p = logits.masked_fill(~inside[:, None], -torch.inf).softmax(0)
        p[0] = 0
        spans = torch.triu(p[:, :1] * p[:, 1]) - torch.triu(p[:, :1] * p[:, 1], 15)
        first, last = divmod(int(spans.argmax()), len(offsets))
        left, right = inputs.token_to_word(0, first), inputs.token_to_word(0, last)
        start, end = inputs.word_to_chars(0, left, 1).start, inputs.word_to_chars(0, right, 1).end
        known = {"text": given["context"][start:end], "start": start, "end": end}
        assert {key: item["output"][key] for key in known} == known
        assert item["output"]["score"] == pytest.approx(float(spans.max()), abs=1e-5)


def test_fills_are_those_of_the_pipeline(weights, graphs) -> None:
    answer = transformers.pipeline("fill-mask", str(weights["fill-mask"]))
    record = read_record(graphs["fill-mask"])
    several = 0
    for item in short(record):
        known, given = answer(item["input"]["text"]), item["output"]
        several += isinstance(given[0], list)
        pairs = zip(given, known, strict=True) if isinstance(given[0], list) else [(given, known)]
        for ours, theirs in pairs:
            assert [one["token"] for one in ours] == [one["token"] for one in theirs]
            assert [one["sequence"] for one in ours] == [one["sequence"] for one in theirs]
    assert several == 1
    assert (graphs["fill-mask"] / "selftest.json").stat().st_size < 3e6  # the rows of the masks, not of all tokens


def test_vectors_are_the_mean_of_the_networks_states(graphs) -> None:
    model = transformers.AutoModel.from_pretrained(MINILM).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    record = read_record(graphs["feature-extraction"])
    assert record["options"] == {"pooling": "mean", "normalize": True, "long": "window"}
    for item in short(record):
        vectors = []
        for text in item["input"]["texts"]:
            with torch.inference_mode():
                states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            vectors.append(torch.nn.functional.normalize(states.mean(0), dim=0).numpy())
            if len(vectors) == 1:
                np.testing.assert_allclose(from_base64(item["logits"]).reshape(-1, 384), states.numpy(), atol=1e-4)
        np.testing.assert_allclose(item["output"]["embeddings"], vectors, atol=1e-5)


def test_a_record_holds_a_text_longer_than_the_model_and_real_examples(graphs, data_folder) -> None:
    for task, folder in graphs.items():
        record = read_record(folder)
        assert record["task"] == task
        assert set(record["tolerance"]) == {"fp32", "fp16", "int8", "uint8", "q4", "q4f16", "bnb4"}
        assert task == "feature-extraction" or len(record["items"][-1]["ids"]) == POSITIONS
    reviews = (data_folder / "sst2/dev.tsv").read_text("utf-8")
    texts = [item["input"]["text"] for item in short(read_record(graphs["text-classification"]))]
    assert all(f"{text}\t" in reviews for text in texts)


# -- the same answers in every runtime -------------------------------------------------------------------------------


@pytest.mark.node
@pytest.mark.parametrize("task", TASKS)
def test_every_runtime_gives_torchs_decisions(weights, graphs, task) -> None:
    certificate = verify(graphs[task], runtimes=("torch", "onnx", "node"), weights=weights[task])
    assert certificate["problems"] == []
    assert (certificate["family"], certificate["task"]) == ("bert", task)
    for runtime, row in certificate["runtimes"].items():
        cell = row["fp32"]
        assert cell["decisions_equal"][0] == cell["decisions_equal"][1] == certificate["checked"]["decisions"] > 0
        assert cell["max_abs_diff"] <= 1e-4, runtime
        assert cell["score_diff"] <= 1e-4, runtime
        assert all(row[dtype]["passed"] for dtype in row)
    assert set(certificate["runtimes"]["node"]) == {"fp32", "int8"}
    assert certificate["selftest"]["ids_equal"] == [15, 15]
    assert certificate["passed"]


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("task", TASKS)
def test_the_page_gives_torchs_decisions(weights, data_folder, tmp_path, task) -> None:
    export_graphs(weights[task], tmp_path / "page", to="web")
    certificate = verify(tmp_path / "page", runtimes=("browser",))
    assert certificate["passed"], certificate["problems"]
    assert set(certificate["runtimes"]) == {"browser", "browser-2"}
    for row in certificate["runtimes"].values():
        assert row["fp32"]["decisions_equal"][0] == certificate["checked"]["decisions"]


def test_a_perturbed_weight_fails_and_exits_1(graphs, tmp_path, capsys) -> None:
    folder = Path(shutil.copytree(graphs["text-classification"], tmp_path / "m"))
    path = folder / "onnx" / "model.onnx"
    graph = onnx.load(path)
    largest = max(graph.graph.initializer, key=lambda item: np.prod(item.dims))
    values = numpy_helper.to_array(largest).copy()
    values[:, ::2] += 0.05  # a layer norm would not see the same step everywhere
    largest.CopyFrom(numpy_helper.from_array(values, largest.name))
    onnx.save(graph, path)
    write_receipt(folder, {})
    assert main(["verify", str(folder), "--runtimes", "onnx", "--json"]) == 1
    certificate = json.loads(capsys.readouterr().out)
    assert certificate["runtimes"]["onnx"]["fp32"]["passed"] is False
    assert certificate["runtimes"]["onnx"]["int8"]["passed"] is True
    assert certificate["problems"][0].startswith("onnx fp32: a logit differs by")


def test_several_folders_make_one_table(graphs, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    folders = [str(graphs["text-classification"]), str(graphs["question-answering"])]
    assert main(["verify", *folders, "--runtimes", "onnx", "--dtype", "fp32"]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:4] for line in shown if line[:1] == ["bert"]] == [
        ["bert", "text-classification", "fp32", "onnx"],
        ["bert", "question-answering", "fp32", "onnx"],
    ]
    report = lmworks.verify(folders, runtimes=["onnx"], dtypes=["fp32"]).values
    assert report["passed"] and set(report["folders"]) == set(folders)


# -- what is held to what --------------------------------------------------------------------------------------------

LABELS = [{"label": "a", "score": 0.7}, {"label": "b", "score": 0.3}]
NAME = {"label": "PER", "score": 0.9, "word": "ada", "start": 0, "end": 3}
PLACE = {"label": "LOC", "score": 0.8, "word": "rome", "start": 7, "end": 11}
ANSWER = {"text": "Rome", "score": 0.5, "start": 7, "end": 11}
FILLS = [{"token_str": "x", "token": 5, "score": 0.5, "sequence": "x"}]


def swap(one: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a copy with other values."""
    return {**one, **changes}


@pytest.mark.parametrize(("task", "given", "known", "multiple", "expected"), [
    ("text-classification", LABELS, LABELS, False, [True]),
    ("text-classification", LABELS[::-1], LABELS, False, [False]),
    ("text-classification", [swap(LABELS[0], score=0.4), LABELS[1]], LABELS, True, [False]),
    ("image-classification", [swap(LABELS[0], score=0.6), LABELS[1]], LABELS, True, [True]),
    ("token-classification", [], [], False, [True]),
    ("token-classification", [NAME], [NAME, PLACE], False, [False, True]),
    ("token-classification", [NAME, swap(PLACE, end=10)], [NAME, PLACE], False, [False, False, True]),
    ("token-classification", [swap(NAME, label="LOC")], [NAME], False, [False, False]),
    ("question-answering", swap(ANSWER, score=0.1), ANSWER, False, [True]),
    ("question-answering", swap(ANSWER, start=8), ANSWER, False, [False]),
    ("fill-mask", FILLS, FILLS, False, [True]),
    ("fill-mask", [FILLS, [swap(FILLS[0], token=6)]], [FILLS, FILLS], False, [False, True]),
    ("feature-extraction", {"embeddings": [[1, 0], [1, 0.1], [0, 1]]},
     {"embeddings": [[1, 0], [1, 0.2], [0, 1]]}, False, [True] * 3),
    ("feature-extraction", {"embeddings": [[1, 0], [0.1, 1], [0, 1]]},
     {"embeddings": [[1, 0], [1, 0.2], [0, 1]]}, False, [False, True, True]),
])  # fmt: skip
def test_decisions_are_what_people_act_on(task, given, known, multiple, expected) -> None:
    assert sorted(match(task, given, known, multiple=multiple)) == expected


def change(item: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return an answer that differs from a recorded one in one way."""
    answer = copy.deepcopy(item)
    logits = from_base64(item["logits"]).copy()
    if kind == "logit":
        logits[0] += 0.001
    elif kind == "nan":
        logits[0] = np.nan
    elif kind == "shape":
        logits = logits[:-1]
    elif kind == "id":
        answer["ids"][1] += 1
    elif kind == "label":
        answer["output"].reverse()
    elif kind == "score":
        answer["output"][0]["score"] += 0.01
    elif kind == "form":
        answer["output"] = {"text": "?"}
    return {**answer, "logits": to_base64(logits)}


@pytest.mark.parametrize(("kind", "fp32", "int8"), [
    ("none", True, True), ("logit", False, True), ("nan", False, False), ("shape", False, False),
    ("id", False, False), ("label", False, True), ("score", False, True), ("form", False, True),
])  # fmt: skip
def test_fp32_is_held_to_everything_and_int8_to_its_logits(graphs, kind, fp32, int8) -> None:
    record = read_record(graphs["text-classification"])
    answers = [read_answer(item) for item in record["items"]]
    answers[3] = read_answer(change(record["items"][3], kind))
    for dtype, passed in (("fp32", fp32), ("int8", int8)):
        cell = compare_task(answers, record, dtype=dtype)
        assert cell["passed"] is passed, (dtype, cell)
        assert ("problem" in cell) is not passed
        json.dumps(cell, allow_nan=False)


# -- the items -------------------------------------------------------------------------------------------------------


def test_pictures_are_the_same_each_time_and_exact() -> None:
    for given, (width, height) in zip(built_in("image-classification"), selftest_items.SIZES, strict=True):
        picture = np.asarray(from_data_url(given["image"]))
        np.testing.assert_array_equal(picture, draw(width, height))
        assert given["image"] == to_data_url(picture)
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50


def test_masks_take_the_place_of_words() -> None:
    found = [one["text"] for one in to_inputs("fill-mask", ["It was fine.", "Yes.", "…", "a b c"], "[MASK]")]
    assert found == ["It [MASK] fine.", "[MASK].", "… [MASK]", "[MASK] [MASK] c"]


def test_real_examples_are_spread_over_the_file_and_fit(tmp_path) -> None:
    (tmp_path / "t.txt").write_text("\n".join(f"line {i} " + "x" * i for i in range(100)) + "\n\n")
    items = read_items(tmp_path / "t.txt", "text-classification", "", lambda given: len(given["text"]) < 60)
    texts = [item["text"] for item in items]
    assert len(texts) == 8 and texts[0] == "line 0" and texts[-1].startswith("line 5")
    groups = read_items(tmp_path / "t.txt", "feature-extraction", "", lambda given: True)
    assert [len(item["texts"]) for item in groups] == [4, 4]
    with pytest.raises(InputError, match="fits the model"):
        read_items(tmp_path / "t.txt", "text-classification", "", lambda given: False)
    (tmp_path / "t.csv").write_text("review,stars\nfine,5\nbad,1\n")
    with pytest.raises(InputError, match="column"):
        read_items(tmp_path / "t.csv", "question-answering", "", lambda given: True)


# -- bad input: one message, exit code 2 -----------------------------------------------------------------------------


@pytest.fixture
def folder(graphs, tmp_path) -> Path:
    """A copy of the classifier's graphs."""
    return Path(shutil.copytree(graphs["text-classification"], tmp_path / "m"))


def refused(capsys, *words: str) -> str:
    """Return the message of a command that ends with 2."""
    assert main(["verify", *words]) == 2
    return capsys.readouterr().err


def test_a_selftest_of_another_task_is_refused(folder, graphs, capsys) -> None:
    (folder / "selftest.json").write_text((graphs["question-answering"] / "selftest.json").read_text())
    message = refused(capsys, str(folder), "--runtimes", "onnx")
    assert "selftest.json belongs to another task" in message
    assert "question-answering" in message and "text-classification" in message
    write_receipt(folder, {})
    assert "another task" in refused(capsys, str(folder), "--runtimes", "onnx")


def test_missing_weights_beside_a_graph_are_refused(weights, tmp_path, capsys) -> None:
    export_graphs(weights["text-classification"], tmp_path / "m", dtypes=["int8"], external=True)
    assert main(["verify", str(tmp_path / "m"), "--runtimes", "onnx"]) == 0
    capsys.readouterr()
    (tmp_path / "m" / "onnx" / "model_quantized.onnx_data").unlink()
    message = refused(capsys, str(tmp_path / "m"), "--runtimes", "onnx")
    assert "no model_quantized.onnx_data" in message


@pytest.mark.parametrize(("words", "text"), [
    (["--runtimes", "onx"], 'did you mean "onnx"?'),
    (["--dtype", "int9"], 'did you mean "int8"?'),
    (["--dtype", "q4"], "no q4 graph"),
    (["--against", "transformers", "--dtype", "fp32"], "--against"),
    (["--head", "Model"], "--against"),
])  # fmt: skip
def test_unknown_words_are_refused(folder, capsys, words, text) -> None:
    assert text in refused(capsys, str(folder), *words)


def test_one_bad_folder_stops_all_before_anything_runs(folder, tmp_path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    (folder / "certificate.json").unlink(missing_ok=True)
    assert "no selftest.json" in refused(capsys, str(folder), str(tmp_path / "empty"), "--runtimes", "onnx")
    assert not (folder / "certificate.json").exists()
    assert "no such model folder" in refused(capsys, str(tmp_path / "nothing"))


def test_damaged_records_are_refused(folder) -> None:
    record = read_record(folder)
    for name, value in (("items", []), ("items", [{"input": {}}]), ("options", []), ("tolerance", {}), ("texts", [1])):
        (folder / "selftest.json").write_text(json.dumps({**record, name: value}))
        write_receipt(folder, {})
        with pytest.raises(FormatError, match=name):
            verify(folder, runtimes=("onnx",))


def test_data_that_fits_no_task_is_refused(weights, tmp_path, capsys) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    words = ["export", str(weights["text-classification"]), "-o", str(tmp_path / "o")]
    assert main([*words, "--to", "onnx", "--data", str(tmp_path / "empty.txt")]) == 2
    assert "no text" in capsys.readouterr().err
    assert main([*words, "--to", "hf", "--data", str(tmp_path / "empty.txt")]) == 2
    assert "--data" in capsys.readouterr().err
    assert main([*words, "--to", "onnx", "--single-file"]) == 2
    assert "page" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
