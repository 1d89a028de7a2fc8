"""`lmworks new` and `lmworks add playground`: every named command runs, the project around it stays as it was."""

from __future__ import annotations

import hashlib
import io
import json
import os
import py_compile
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from hub_server import HubServer
from minilm_heads import MINILM

import lmworks
from lmworks.base.errors import InputError
from lmworks.cli import main
from lmworks.scaffold import playground
from lmworks.scaffold.playground import COMMANDS, make_playground

MODELS = {  # what the examples name: the class, and its labels
    "nateraw/bert-base-uncased-emotion": ("BertForSequenceClassification", ["sadness", "joy", "love"]),
    "cardiffnlp/twitter-roberta-base-sentiment-latest": ("RobertaForSequenceClassification", ["negative", "positive"]),
    "lxyuan/distilbert-base-multilingual-cased-sentiments-student":
        ("DistilBertForSequenceClassification", ["positive", "neutral", "negative"]),
    "dslim/bert-base-NER": ("BertForTokenClassification", ["O", "B-PER", "I-PER"]),
    "distilbert-base-cased-distilled-squad": ("DistilBertForQuestionAnswering", ["a", "b"]),
}  # fmt: skip
SECONDS = 30.0


@pytest.fixture(scope="module", autouse=True)
def current() -> Iterator[None]:
    """Take this checkout's metadata as they are: whether they are fresh is another test's matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmworks.deploy.wheel.check_current", lambda known, root: None)
        yield


def hashes(folder: Path) -> dict[str, str]:
    """Return the hash of every file, and the time of its last change."""
    return {
        path.relative_to(
            folder
        ).as_posix(): f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_mtime_ns}"
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native playground."""
    place = tmp_path_factory.mktemp("new") / "demo"
    start = time.monotonic()
    assert main(["new", str(place), "--native"]) == 0
    assert time.monotonic() - start < SECONDS
    return place


def make_model(kind: str, labels: list[str], folder: Path) -> Path:
    """Write a small model of this class with MiniLM's tokenizer."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 30522, "num_labels": len(labels), "id2label": dict(enumerate(labels))}
    if kind.startswith("Distil"):
        sizes |= {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}
    else:
        sizes |= {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = getattr(transformers, f"{kind.partition('For')[0]}Config")(**sizes)
    getattr(transformers, kind)(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(MINILM).save_pretrained(folder)
    return folder


def run(place: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command of a playground from another folder."""
    environment = {**os.environ, **more}
    return subprocess.run(
        [sys.executable, str(place / "play"), *words], env=environment, capture_output=True, text=True,
        cwd=place.parent, input=more.get("INPUT", ""),
    )  # fmt: skip


ANSWERS = {
    "classify": "joy", "bert": "sadness", "roberta-sentiment": "positive", "distilbert-sentiment": "neutral", "ner": "",
    "qa": "(0.",
}  # fmt: skip


@pytest.mark.parametrize(
    "commands",
    [pytest.param(["roberta-sentiment"], id="one"), pytest.param([*ANSWERS], id="all", marks=pytest.mark.slow)],
)
def test_every_named_command_works(demo: Path, tmp_path: Path, commands: list[str]) -> None:
    """R193: with a Hub of small models on this machine; the first run fetches, the second asks nobody."""
    with HubServer() as server:
        for name, (kind, labels) in MODELS.items():
            server.add_folder(name, make_model(kind, labels, tmp_path / name.replace("/", "-")))
        online = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        offline = {**online, "HF_HUB_OFFLINE": "1"}
        for command in commands:
            done = run(demo, command, **online)
            assert done.returncode == 0 and ANSWERS[command] in done.stdout, (command, done.stdout, done.stderr)
        asked = len(server.log)
        done = run(demo, "roberta-sentiment", "one text", "another", **offline)
        assert done.stdout.count("positive") == 2 and "another" in done.stdout
        assert len(server.log) == asked
    done = run(demo, "classify", "a text", "no/such-model", **offline)
    assert done.returncode == 2 and done.stderr.startswith("lmworks: ") and "Traceback" not in done.stderr
    done = run(demo, "shell", INPUT="print(lmworks.__version__ * 2)\n")
    assert lmworks.__version__ * 2 in done.stdout and done.returncode == 0
    done = run(demo, "check")
    assert f"lmworks {lmworks.__version__} in " in done.stdout and "6 examples" in done.stdout
    assert set(COMMANDS) >= {
        "classify",
        "bert",
        "roberta-sentiment",
        "distilbert-sentiment",
        "ner",
        "qa",
        "check",
        "shell",
    }
    assert run(demo, "nothing").returncode == 2
    assert all(command in run(demo).stdout for command in COMMANDS)


def test_it_wants_its_own_version(demo: Path, tmp_path: Path) -> None:
    """Another version in this Python is no use: the message names the command that installs this one."""
    other = tmp_path / "other"
    make_playground(other, docker=False)
    script = other / "play"
    script.write_text(script.read_text().replace(f'"{lmworks.__version__}"', '"9.9"'))
    done = run(other, "check")
    assert done.returncode == 1 and "./play install" in done.stderr and "9.9" in done.stderr
    assert run(other, "bert").returncode == 2


def test_what_is_in_the_folder(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """R192, R201: pinned, with the wheel of this very version; one file an example; the flavors are explained."""
    held = {path.relative_to(demo).as_posix() for path in demo.rglob("*") if path.is_file()}
    wheel = f"wheels/lmworks-{lmworks.__version__}-py3-none-any.whl"
    assert {wheel, "play", "README.md", "requirements.txt", ".gitignore", "examples/qa.py"} <= held
    assert not held & {"Dockerfile", ".dockerignore"}
    pins = f"./{wheel}[torch,text,hub]\ntorch=={torch.__version__.partition('+')[0]}\n"
    assert (demo / "requirements.txt").read_text() == pins
    with zipfile.ZipFile(demo / wheel) as archive:
        assert "lmworks/scaffold/template/play" in archive.namelist()
    assert os.access(demo / "play", os.X_OK)
    for path in [demo / "play", *sorted((demo / "examples").iterdir())]:
        py_compile.compile(str(path), cfile=str(demo.parent / "compiled"), doraise=True)
        assert "$" not in path.read_text()
    readme = (demo / "README.md").read_text()
    assert all(f"./play {name}" in readme for name in COMMANDS)
    assert all(flavor in readme for flavor in ("full", "vision only", "offline", "serving"))


def test_a_project_stays_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """R194: the files of the host, their times and their folder hold; the playground is one new folder."""
    host = tmp_path / "host"
    (host / "src").mkdir(parents=True)
    for name in ("pyproject.toml", "requirements.txt", "Dockerfile", "README.md", "src/own.py", ".gitignore", "play"):
        (host / name).write_text(f"# {name} of the host\n")
    before = hashes(host)
    monkeypatch.chdir(host)
    assert main(["add", "playground", "--docker", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    after = hashes(host)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"playground"}
    assert sorted(said["files"]) == sorted(name.removeprefix("playground/") for name in after.keys() - before.keys())
    assert main(["add", "playground", "--native"]) == 2
    assert hashes(host) == after


def test_docker(tmp_path: Path) -> None:
    """R195: what an image is built from, and the commands that play gives to Docker, by a stand-in for it."""
    place = tmp_path / "demo"
    make_playground(place, docker=True)
    lines = (place / "Dockerfile").read_text().splitlines()
    assert lines[0].startswith("FROM python:3.") and "USER player" in lines and "COPY wheels wheels" in lines
    assert (place / ".dockerignore").is_file()
    for line in lines:  # what is copied is there
        if line.startswith("COPY "):
            assert all((place / name).exists() for name in line.split()[1:-1])
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "docker").write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    (tools / "docker").chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    image = f"lmworks-playground:{lmworks.__version__}"
    assert json.loads(run(place, "build", PATH=path).stdout) == ["build", "-t", image, "."]
    said = json.loads(run(place, "ner", "Ada", PATH=path, HF_TOKEN="secret").stdout)
    assert said[:2] == ["run", "--rm"] and said[-2:] == ["examples/ner.py", "Ada"]
    assert said[said.index(image) + 1 :][:2] == ["python", "-c"]
    assert "HF_TOKEN" in said and "secret" not in " ".join(said)
    done = run(place, "ner", PATH=str(tmp_path / "empty"))
    assert done.returncode == 2 and "--native" in done.stderr


def test_the_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """R196: on a terminal it is asked, elsewhere a flag is needed; nothing is half there."""
    monkeypatch.setattr(playground, "write_wheel", lambda place: place / "none")
    for answer, engine in {"": "native", "native": "native", "D": "docker", "docker\n": "docker"}.items():
        report = make_playground(tmp_path / f"demo {answer.strip()}", ask=lambda question, answer=answer: answer)
        assert report.values["engine"] == engine
    with pytest.raises(InputError, match="neither native nor docker"):
        make_playground(tmp_path / "x", ask=lambda question: "podman")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["new", str(tmp_path / "x")]) == 2
    assert "add --native or --docker" in capsys.readouterr().err
    assert main(["new", str(tmp_path / "x"), "--native", "--docker"]) == 2
    assert main(["new", str(tmp_path / ".hidden"), "--native"]) == 2
    monkeypatch.setattr(playground, "write_wheel", lambda place: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_playground(tmp_path / "x", docker=False)
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob("*.staged"))
