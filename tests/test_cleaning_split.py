"""`lmworks split` and `lmworks stats`: seeded shares without leaks, and the figures of a corpus."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmworks.base.errors import InputError
from lmworks.cli import main
from lmworks.text.split import share_out
from lmworks.verbs.cleaning_split import split
from lmworks.verbs.cleaning_stats import quantiles


def read_parts(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.glob("*.jsonl"))
    }


def make_file(path: Path) -> list[dict[str, Any]]:
    """Write 600 rows of three labels, a fifth of them near duplicates of others."""
    rng = random.Random(0)
    words = [f"word{i}" for i in range(300)]
    rows: list[dict[str, Any]] = []
    for i in range(600):
        text = " ".join(rng.choices(words, k=30))
        family = i
        if i % 5 == 4:
            family = rows[rng.randrange(len(rows))]["family"]
            text = rows[family]["text"] + " more"
        label = rng.choices("abc", [0.6, 0.3, 0.1])[0] if family == i else rows[family]["label"]
        rows.append({"text": text, "label": label, "family": family})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def test_shares_labels_and_near_duplicates(tmp_path: Path) -> None:
    rows = make_file(tmp_path / "in.jsonl")
    report = split([tmp_path / "in.jsonl"], tmp_path / "out", stratify="label", seed=3)
    parts = read_parts(tmp_path / "out")
    assert sorted(json.dumps(r) for part in parts.values() for r in part) == sorted(json.dumps(r) for r in rows)
    families = [{row["family"] for row in part} for part in parts.values()]
    assert not families[0] & families[1] and not families[0] & families[2] and not families[1] & families[2]
    for label, count in Counter(row["label"] for row in rows).items():
        for name, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
            assert abs(sum(row["label"] == label for row in parts[name]) - share * count) <= 4
    assert report.values["documents"] == {name: len(parts[name]) for name in ("train", "validation", "test")}
    assert report.values["documents_with_near_duplicates"] >= 200
    again = split([tmp_path / "in.jsonl"], tmp_path / "again", stratify="label", seed=3)
    assert read_parts(tmp_path / "again") == parts and again.values["documents"] == report.values["documents"]
    split([tmp_path / "in.jsonl"], tmp_path / "again", stratify="label", seed=4, overwrite=True)
    assert read_parts(tmp_path / "again")["test"] != parts["test"]
    with pytest.raises(InputError, match="holds a split already"):
        split([tmp_path / "in.jsonl"], tmp_path / "again")


def test_rare_labels_are_shared_out_in_all() -> None:
    """Each label once: a label cannot be shared out, but the documents can."""
    n = 1000
    keys = np.random.default_rng(0).integers(0, 2**63, n).astype(np.uint64)
    places = share_out(np.arange(n), keys, np.arange(n), [0.8, 0.1, 0.1])
    assert np.bincount(places).tolist() == pytest.approx([800, 100, 100], abs=25)
    one = share_out(np.arange(n), keys, np.zeros(n, np.int64), [0.9, 0.1])
    assert np.bincount(one).tolist() == [900, 100]
    order = np.random.default_rng(1).permutation(n)
    assert (share_out(np.arange(n), keys[order], np.zeros(n, np.int64), [0.9, 0.1]) == one[order]).mean() > 0.99


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--shares", "0.5,0.6"), "these are no shares"),
        (("--shares", "1"), "these are no shares"),
        (("--shares", "a,b"), "these are no shares"),
        (("--stratify", "lable"), r'no column "lable"[\s\S]*did you mean "label"'),
        (("--shares", "0.999,0.0005,0.0005"), "a share would be empty"),
    ],
)
def test_bad_splits(words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    make_file(source)
    assert main(["split", str(source), "-o", str(tmp_path / "out"), "--workers", "1", *words]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("change", [1, -1])
def test_files_that_change_while_they_are_split(change: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More or fewer documents at the second reading: said in one message, and nothing is written."""
    source = tmp_path / "in.jsonl"
    make_file(source)
    lines = source.read_text("utf-8").splitlines(keepends=True)

    def share_out_later(*given: Any, **more: Any) -> Any:
        source.write_text("".join(lines[:change] if change < 0 else [*lines, lines[0]]), "utf-8")
        return share_out(*given, **more)

    monkeypatch.setattr("lmworks.verbs.cleaning_split.share_out", share_out_later)
    with pytest.raises(InputError, match="the files changed while they were split"):
        split([source], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_other_folders_and_standard_input_are_refused(tmp_path: Path) -> None:
    make_file(tmp_path / "in.jsonl")
    with pytest.raises(InputError, match="did not write"):
        split([tmp_path / "in.jsonl"], tmp_path, overwrite=True)
    with pytest.raises(InputError, match="only once"):
        split(["-"], tmp_path / "out")
    (tmp_path / "a.txt").write_text("plain text\n")
    with pytest.raises(InputError, match="plain text"):
        split([tmp_path / "a.txt"], tmp_path / "out", stratify="label")


def test_stats(data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, page = data_folder / "udhr", tmp_path / "report.html"
    words = [str(folder / "eng.txt"), str(folder / "epo.txt"), "--languages", "--unit", "paragraph"]
    sample = tmp_path / "sample.txt"
    sample.write_text("Robots dream of sheep. " * 50)
    assert main(["stats", *words, "--sample", str(sample), "--report", str(page), "--workers", "1", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert {"en", "eo"} <= set(values["languages"]) and values["common"]["the"] > 100
    assert values["characters"] < values["bytes"]
    assert 0.7 < values["zipf"]["exponent"] < 1.3 and values["distinct"]["1"] < values["distinct"]["3"]
    assert values["sample"]["representative"] is False and values["sample"]["jsd"]["p"] < 0.01
    assert len(values["sample"]["unlike"]) == 10
    text = page.read_text("utf-8")
    assert text.count("<svg") == 2 and "is not a random part" in text
    assert main(["stats", str(tmp_path / "missing.txt")]) == 2


def test_stats_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text(" ... \n")
    assert main(["stats", str(tmp_path), "--workers", "1"]) == 2
    assert "there is no text here" in capsys.readouterr().err


def test_quantiles_are_those_of_the_list() -> None:
    lengths = [1, 1, 2, 3, 5, 8, 13, 21, 34, 100]
    found = quantiles(Counter(lengths))
    assert (found["mean"], found["median"], found["longest"]) == (18.8, 5, 100)
    assert found["5%"] == np.quantile(lengths, 0.05, method="inverted_cdf")
    assert found["75%"] == np.quantile(lengths, 0.75, method="inverted_cdf")
