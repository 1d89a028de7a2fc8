"""The command line: fast, with pinned options, honest exit codes and one clear message for bad input."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from lmworks.cli import VERBS, main

OPTIONS = Path(__file__).with_name("options.txt")


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "lmworks", *words], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_help_is_immediate_and_loads_neither_torch_nor_onnxruntime() -> None:
    """C37: slow import."""
    code = (
        "import sys; from lmworks.cli import main; main(['--help']);"
        "sys.stderr.write(' '.join(m for m in ('torch', 'onnxruntime', 'tokenizers', 'numpy') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "build" in done.stdout
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(5):
        assert run("--help").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 5 < 0.3  # processor seconds


@pytest.mark.parametrize("verb", VERBS)
def test_every_help_page_has_two_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert sum(line.strip().startswith("lmworks ") for line in shown.split("Examples:")[1].splitlines()) >= 2


def test_the_option_list_is_pinned(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag is a promise: adding or dropping one must be meant. Rewrite options.txt with LMWORKS_PIN=1."""
    monkeypatch.setenv("COLUMNS", "200")
    lines = []
    for verb in VERBS:
        main([*verb.split(), "--help"])
        words = capsys.readouterr().out.replace("│", " ").split()
        flags = sorted({word.strip("[],.") for word in words if word.startswith("--")} - {"--help", "--version"})
        lines.append(f"{verb}: {' '.join(flags)}")
    found = "\n".join(lines) + "\n"
    if os.environ.get("LMWORKS_PIN"):
        OPTIONS.write_text(found)
    assert found == OPTIONS.read_text()


def test_the_module_is_the_command() -> None:
    assert (
        run("--version").stdout
        == subprocess.run(
            [str(Path(sys.executable).with_name("lmworks")), "--version"], capture_output=True, text=True, check=True
        ).stdout
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("biuld", "-o", "x"), 'Did you mean "build"'),
        (("build", "--sise", "tiny", "-o", "x"), "--size"),
        (("build", "missing.txt", "-o", "x"), "missing.txt"),
        (("build", "-o", "x", "--runtimes", "torch,nod"), "did you mean"),
        (("build", "-o", "x", "--hidden-size", "100", "--heads", "3"), "multiple of --heads"),
        (("build", "-o", "x", "--validation", "0.9"), "--validation"),
        (("generate", "missing", "a"), "missing"),
        (("verify", "missing"), "missing"),
        (("evaluate", "missing", "missing.txt"), "missing"),
        (("serve", "missing"), "missing"),
    ],
)
def test_bad_words_end_in_one_message_and_code_2(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    """C32 and its kin: one clear message, no traceback."""
    done = subprocess.run(
        [sys.executable, "-m", "lmworks", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["build", "train"])
def test_texts_that_cannot_be_used_leave_nothing_behind(verb: str, tmp_path: Path) -> None:
    """An empty folder, a binary file, ten bytes, an OUT below a file: exit 2 and no half-written folder."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 64)
    (tmp_path / "small.txt").write_bytes(b"ten bytes.")
    (tmp_path / "good.txt").write_text("A sentence that is long enough, again and again.\n" * 200)
    before = sorted(tmp_path.rglob("*"))
    for texts, out in (("empty", "out"), ("binary.txt", "out"), ("small.txt", "out"), ("good.txt", "small.txt/out")):
        done = run(verb, str(tmp_path / texts), "-o", str(tmp_path / out))
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("lmworks: ")
        assert "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) <= 6
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_that_is_too_small_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (tmp_path / "good.txt").write_text("A sentence that is long enough, again and again.\n" * 200)
    monkeypatch.setattr("lmworks.base.files.free_bytes", lambda _: 10_000_000)
    assert main(["build", str(tmp_path / "good.txt"), "-o", str(tmp_path / "out")]) == 2
    assert "not enough disk space" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["good.txt"]


def test_a_dry_run_counts_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.txt").write_text("A sentence that is long enough, again and again.\n" * 200)
    words = ["build", str(tmp_path / "good.txt"), "-o", str(tmp_path / "out"), "--dry-run", "--json"]
    assert main([*words, "--layers", "1", "--hidden-size", "32", "--heads", "2", "--context", "16"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["parameters"] > 512 * 32
    assert values["train_seconds"] >= 0 and values["memory_bytes"] > 1e8 and values["disk_bytes"] > 1e6
    assert not (tmp_path / "out").exists()
