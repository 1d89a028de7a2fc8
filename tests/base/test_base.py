"""Errors, atomic files, paths, threads, reports."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lmworks.base.chart import Chart, ticks
from lmworks.base.errors import FormatError, InputError, LmworksError, MissingExtra, did_you_mean
from lmworks.base.files import check_output, confine, new_folder, read_json, write_bytes, write_json
from lmworks.base.optional import require
from lmworks.base.report import Report, Table
from lmworks.base.threads import cpu_count, thread_count


def test_an_error_says_what_where_found_expected_fix() -> None:
    text = str(InputError("no column", where="a.csv", found="lable", expected="label", fix="rename it"))
    assert text.splitlines() == [
        "no column",
        "  where: a.csv",
        "  found: lable",
        "  expected: label",
        "  fix: rename it",
    ]
    assert did_you_mean("lable", ["text", "label"]) == ' did you mean "label"?'
    assert did_you_mean("zzz", ["text", "label"]) == ""


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    for call in ("fsync", "replace"):

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, call, refuse)
            with pytest.raises(OSError, match="No space"):
                write_bytes(path, b"new")
        assert json.loads(path.read_text()) == {"old": 1}
        assert os.listdir(tmp_path) == ["a.json"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out") as staged:
        (staged / "half").write_text("x")
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    with new_folder(tmp_path / "out") as staged:
        (staged / "whole").write_text("x")
    with new_folder(tmp_path / "out") as staged:
        (staged / "second").write_text("x")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["second"]


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "b/../../a"])
def test_names_cannot_leave_their_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError, match="outside"):
        confine(tmp_path, name)
    assert confine(tmp_path, "b/c") == (tmp_path / "b/c").resolve()


def test_a_link_cannot_leave_its_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    with pytest.raises(FormatError, match="outside"):
        confine(tmp_path / "in", "link/a")


@pytest.mark.parametrize(
    ("data", "message"), [(b"{", "not valid JSON"), (b"[1]", "object"), (b"\xff\xfe\x00", "UTF-8")]
)
def test_bad_json_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(FormatError, match=message):
        read_json(tmp_path / "config.json")


def test_an_output_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "lmworks.json").write_text("{}")
    for bad, message in (
        ("file/out", "cannot write"),
        ("file", "cannot write"),
        ("full", "did not write"),
        ("model", "already"),
    ):
        with pytest.raises(InputError, match=message):
            check_output(tmp_path / bad)
    with pytest.raises(InputError, match="not enough disk"):
        check_output(tmp_path / "new", need_bytes=10**18)
    assert check_output(tmp_path / "model", overwrite=True)
    assert not (tmp_path / "new").exists()


def test_threads_follow_the_cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C39: libraries that start a thread for each core of the machine fight each other in a container."""
    for name in ("LMWORKS_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert cpu_count(cgroup=tmp_path) == 64
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cpu_count(cgroup=tmp_path) == 1
    (tmp_path / "cpu.max").write_text("400000 100000\n")
    assert cpu_count(cgroup=tmp_path) == 4
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu_count(cgroup=tmp_path) == 64
    for said, meant in (("2", 2), ("4,2", 4), ("128", 64), ("0", 64), ("many", 64)):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert thread_count(cgroup=tmp_path) == meant and cpu_count(cgroup=tmp_path) == 64
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert thread_count(cgroup=tmp_path) == 32  # torchrun sets OMP_NUM_THREADS=1 where nobody else did
    monkeypatch.setenv("LMWORKS_THREADS", "3")
    assert cpu_count(cgroup=tmp_path) == thread_count(cgroup=tmp_path) == 3


def test_a_missing_extra_says_its_pip_line() -> None:
    with pytest.raises(MissingExtra) as caught:
        require("surely_not_installed", extra="onnx")
    assert 'pip install "lmworks[onnx]"' in str(caught.value)
    assert isinstance(caught.value, LmworksError)


def test_a_report_is_a_dict_a_table_and_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    chart = Chart("loss", "step", "nats", (("train", ((0, 4.0), (100, 2.5), (200, float("nan")))),))
    report = Report(
        "A <model>",
        {"loss": 2.5},
        tables=(Table("scores", ("name", "loss"), (("a&b", 2.5), ("c", None))),),
        charts=(chart,),
        texts=(("sample", "x < y"),),
        notes=("done",),
    )
    report.print()
    shown = capsys.readouterr().out
    assert "A <model>" in shown and "2.5" in shown and "–" in shown and "• done" in shown
    page = report.to_html()
    assert "A &lt;model&gt;" in page and "a&amp;b" in page and "x &lt; y" in page
    svg = ElementTree.fromstring(chart.to_svg())
    assert any("L" in path.attrib["d"] for path in svg.iter("path"))


def test_ticks_are_round_and_enclose_the_data() -> None:
    assert ticks([0.3, 9.1]) == [0, 2, 4, 6, 8, 10]
    assert ticks([3.0])[0] < 3.0 < ticks([3.0])[-1]
