"""`lmworks loadtest FOLDER FOLDER`: two servers in turn, against what the servers counted and what the models say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from minilm_heads import make_head

import lmworks
from lmworks.base.errors import LmworksError
from lmworks.cli import main
from lmworks.export.onnx_folder import export_graphs
from lmworks.verbs import load_comparing

COUNT = re.compile(r'lmworks_request_duration_seconds_count\{route="/classify",status="(\d+)"\} ([\d.]+)')
ROWS = 24


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> tuple[Path, Path]:
    """A classifier in two sizes."""
    place = tmp_path_factory.mktemp("sizes")
    head = make_head("text-classification", data_folder, place / "made")
    for name, dtype in (("original", "fp32"), ("quantized", "int8")):
        export_graphs(head, place / name, dtypes=[dtype])
    return place / "original", place / "quantized"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> tuple[Path, list[str], list[str]]:
    """A table of reviews with a header and its labels as the model calls them."""
    lines = (data_folder / "sst2" / "dev.tsv").read_text("utf-8").splitlines()[:ROWS]
    texts, gold = zip(*(line.rsplit("\t", 1) for line in lines), strict=True)
    names = [("negative", "positive")[int(label)] for label in gold]
    path = tmp_path_factory.mktemp("data") / "reviews.jsonl"
    path.write_text("".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in zip(texts, names, strict=True)))
    return path, list(texts), names


def test_two_models_are_served_in_turn_and_compared(
    pair: tuple[Path, Path], labelled: tuple[Path, list[str], list[str]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What it says it asked is what the servers counted; what it says of the answers is what the models say."""
    counted: list[dict[str, float]] = []
    real = load_comparing.served

    @contextmanager
    def counting(folder: Path) -> Iterator[Any]:
        with real(folder) as (target, seconds):
            yield target, seconds
            text = httpx.get(f"{target.url}/metrics").text
            counted.append({status: float(count) for status, count in COUNT.findall(text)})
            gone.append(target.url)

    gone: list[str] = []
    monkeypatch.setattr(load_comparing, "served", counting)
    path, texts, gold = labelled
    words = ["--data", str(path), "--requests", "20", "--html", str(tmp_path / "report.html"), "--json"]
    assert main(["loadtest", *map(str, pair), *words]) == 0
    values = json.loads(capsys.readouterr().out)
    said = []
    for folder, dtype in zip(pair, ("fp32", "int8"), strict=True):
        known = lmworks.predict(folder, texts, runtime="onnx", dtype=dtype)
        said.append([best.label for best, *_ in known])
    for one, counts, folder, answers in zip(values["models"], counted, pair, said, strict=True):
        assert one["name"] == folder.name and one["texts"] == ROWS
        tried = 1  # the first request, which is tried
        assert counts == {"200": tried + ROWS + sum(step["requests"] for step in one["curve"])}
        assert [step["clients"] for step in one["curve"]] == [2**i for i in range(len(one["curve"]))] and len(
            one["curve"]
        ) >= 4
        assert all((step["requests"], step["failed"]) == (20, 0) for step in one["curve"])
        assert one["one"] == one["curve"][0] and one["best"] in one["curve"]
        assert one["bytes"] == sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        assert 0 < one["weight_bytes"] < one["bytes"]
        assert one["agreement"] == sum(a == b for a, b in zip(answers, said[0], strict=True)) / ROWS
        assert one["accuracy"] == sum(a == b for a, b in zip(answers, gold, strict=True)) / ROWS
        assert one["memory_bytes_most"] > 5e7 and one["ready_seconds"] > 0.1
        busy = one["processor_seconds_a_request"]
        assert 1e-4 < busy < 1 and 0 < one["processors_used"] < 16
    assert values["models"][1]["weight_bytes"] < 0.4 * values["models"][0]["weight_bytes"]
    page = (tmp_path / "report.html").read_text()
    for name in ("Set-up", "Configuration", "Response time", "Scalability", "Resource use", "Throughput", "original"):
        assert name in page
    for url in gone:
        with pytest.raises(httpx.TransportError):
            httpx.get(url)


def test_what_cannot_be_compared_is_told(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, what in (
        ([], "one server, or model folders"),
        ([str(pair[0]), "http://127.0.0.1:1"], "one server, or model folders"),
        ([str(pair[0]), str(tmp_path / "nowhere")], "one server, or model folders"),
        ([*map(str, pair), "--rate", "5"], "more and more clients"),
        ([str(tmp_path)], "config.json is missing"),
    ):  # fmt: skip
        assert main(["loadtest", *words]) == 2, words
        assert what in capsys.readouterr().err, words


def test_a_server_that_does_not_start_says_why(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    broken = tmp_path / "broken"
    (broken / "onnx").mkdir(parents=True)
    for file in pair[0].iterdir():
        if file.is_file():
            (broken / file.name).write_bytes(file.read_bytes())
    (broken / "onnx" / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(LmworksError, match="does not answer") as told, load_comparing.served(broken):
        raise AssertionError("it was served")
    assert "model.onnx" in str(told.value)
