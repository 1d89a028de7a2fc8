"""Names instead of folders, against a Hub on this machine and huggingface_hub's own readers of the cache."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import scan_cache_dir, snapshot_download, try_to_load_from_cache
from tests.hub_server import HubServer
from transformers import BertConfig, BertForSequenceClassification

from lmworks.base import hub
from lmworks.base.errors import InputError, MissingExtra

NAME = "some-org/tiny-bert"
SETTINGS = (
    *hub.OFFLINE,
    "HF_HOME",
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "XDG_CACHE_HOME",
    "HF_TOKEN",
    "HF_ENDPOINT",
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny published classifier: shards, a tokenizer, and files that nobody should fetch."""
    folder = tmp_path_factory.mktemp("checkpoint")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertForSequenceClassification(BertConfig(vocab_size=50, **sizes)).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", *map(chr, range(97, 123))]))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "README.md").write_text("# A card")
    for unwanted in (
        "pytorch_model.bin",
        "modeling_evil.py",
        "tf_model.h5",
        "onnx/model.onnx",
        "runs/model.safetensors",
    ):
        (folder / unwanted).parent.mkdir(exist_ok=True)
        (folder / unwanted).write_bytes(b"unwanted")
    return folder


@pytest.fixture
def server(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub with that checkpoint, an empty cache, and no setting but those two."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # read when it is imported
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with HubServer() as server:
        server.add_folder(NAME, checkpoint)
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server
        huggingface_hub.close_session()


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every address that a socket of this process is told to reach."""
    reached: list[object] = []
    for method in ("connect", "connect_ex"):
        real = getattr(socket.socket, method)

        def noted(self: socket.socket, address: object, real: Any = real) -> object:
            reached.append(address)
            return real(self, address)

        monkeypatch.setattr(socket.socket, method, noted)
    return reached


def message(name: str | Path, **options: Any) -> str:
    """Return what find_folder complains about."""
    with pytest.raises(InputError) as caught:
        hub.find_folder(name, **options)
    return str(caught.value)


# ---- without the Hub


def test_a_local_folder_comes_first_and_opens_no_socket(
    server: HubServer, connections: list[object], tmp_path: Path
) -> None:
    """C16: offline flag ignored, cache missed."""
    (tmp_path / NAME).mkdir(parents=True)
    assert hub.find_folder(NAME) == Path(NAME)
    assert hub.find_folder(tmp_path) == tmp_path
    assert "has no revisions" in message(NAME, revision="main")
    assert not connections


def test_a_home_folder_is_found(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    assert hub.find_folder("~/models") == tmp_path / "models"


@pytest.mark.parametrize("name", ["./absent", "/absent/folder", "../x", "~/absent", "a/b/c", "dir\\model", ".", "a//b"])
def test_what_looks_like_a_path_is_never_asked_for(server: HubServer, connections: list[object], name: str) -> None:
    if name == ".":
        assert hub.find_folder(name) == Path()
    else:
        assert "there is no such model folder" in message(name)
    assert not connections


BAD_NAMES = ["", "  ", "a\nb", "a\0b", "org/", "org/..", "..org/x", "a--b", "x.git", "-x", "org/na me", "ø/x", "x" * 97]


@pytest.mark.parametrize("name", [*BAD_NAMES, "https://example.org/x", "hf://org/name", "org/name?x=1", "org/%2e%2e"])
def test_what_cannot_be_a_name_is_never_asked_for(server: HubServer, connections: list[object], name: str) -> None:
    assert "\n" not in message(name).splitlines()[0]
    assert not connections


@pytest.mark.parametrize(
    "revision", ["", "..", "a/../b", "/main", "-x", "a b", "a\n", "refs/", "x" * 300, "a@{1}", "a//b"]
)
def test_what_cannot_be_a_revision_is_never_asked_for(
    server: HubServer, connections: list[object], revision: str
) -> None:
    assert "not a revision" in message(NAME, revision=revision)
    assert not connections


def test_a_file_is_not_a_folder(server: HubServer, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "a file is not a model folder" in message("model.safetensors")


@pytest.mark.parametrize("setting", hub.OFFLINE)
def test_offline_opens_no_socket_and_says_where_it_looked(
    server: HubServer, connections: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    """C16: offline flag ignored, cache missed."""
    monkeypatch.setenv(setting, "1")
    said = message(NAME)
    assert str(tmp_path / "home" / "hub" / "models--some-org--tiny-bert") in said
    assert setting in said
    assert f"lmworks pull {NAME}" in said
    assert not connections
    assert not server.log


@pytest.mark.parametrize(
    "settings",
    [
        {"HF_HUB_CACHE": "{}/a"},
        {"HUGGINGFACE_HUB_CACHE": "{}/b"},
        {"HF_HOME": "{}/c"},
        {"XDG_CACHE_HOME": "{}/d"},
        {"HOME": "{}/e"},
        {"HF_HOME": "~/f", "HOME": "{}/g"},
        {"HF_HOME": "$BASE/h", "BASE": "{}"},
        {"HF_HUB_CACHE": "{}/i", "HF_HOME": "{}/j", "XDG_CACHE_HOME": "{}/k"},
    ],
    ids=str,
)
def test_the_cache_is_where_huggingface_hub_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.strip()
    assert str(hub.cache_folder()) == theirs


# ---- from the Hub


def test_a_name_becomes_a_folder_with_what_a_model_needs(server: HubServer, checkpoint: Path) -> None:
    folder = hub.find_folder(NAME)
    wanted = {path.name for path in checkpoint.iterdir() if path.is_file()}
    wanted -= {"pytorch_model.bin", "modeling_evil.py", "tf_model.h5"}
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == wanted
    assert all((folder / name).read_bytes() == (checkpoint / name).read_bytes() for name in wanted)
    assert server.fetched() == sorted(wanted)
    kinds = {request.path.split("/")[1 if request.path.startswith("/api") else 3] for request in server.log}
    assert kinds == {"api", "resolve"}  # no telemetry, no other address


def test_what_is_cached_is_found_without_a_socket_as_huggingface_hub_finds_it(
    server: HubServer, connections: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """C16: offline flag ignored, cache missed."""
    commit = server.add("gpt-like", {"config.json": b"{}", "model.safetensors": b"x", "tokenizer.json": b"{}"})
    pulled = {name: hub.find_folder(name) for name in (NAME, "gpt-like")}
    connections.clear()
    asked = len(server.log)
    for name, folder in pulled.items():
        assert hub.find_folder(name) == hub.find_folder(name, revision="main") == folder
        theirs = try_to_load_from_cache(name, "config.json", cache_dir=hub.cache_folder())
        assert theirs == str(folder / "config.json")
        assert snapshot_download(
            name, cache_dir=hub.cache_folder(), local_files_only=True, allow_patterns="config.json"
        ) == str(folder)
    assert hub.find_folder("gpt-like", revision=commit) == hub.pull("gpt-like", revision=commit) == pulled["gpt-like"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.find_folder(NAME) == pulled[NAME]
    assert not connections
    assert len(server.log) == asked
    scanned = scan_cache_dir(hub.cache_folder())
    assert {repo.repo_id for repo in scanned.repos} == {NAME, "gpt-like"}
    assert not scanned.warnings


def test_what_huggingface_hub_fetched_is_used(server: HubServer, connections: list[object]) -> None:
    theirs = snapshot_download(NAME, cache_dir=hub.cache_folder(), endpoint=server.address)
    connections.clear()
    assert hub.find_folder(NAME) == Path(theirs)
    assert not connections


def test_a_cache_of_older_libraries_is_judged_without_a_listing(
    server: HubServer, connections: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wrote no trees/; a missing shard, pooling, config or tokenizer is seen all the same."""
    server.add(
        "st",
        {"config.json": b"{}", "vocab.txt": b"a", "model.safetensors": b"x", "1_Pooling/config.json": b"{}",
         "modules.json": json.dumps([{"path": "", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"},
                                     {"path": "2_Normalize", "type": "x.Normalize"}]).encode()},
    )  # fmt: skip
    monkeypatch.setattr("lmworks.base.hub_cache.read_listing", lambda snapshot: None)
    for name, parts in {
        NAME: ("config.json", "model-00002-of-00004.safetensors", "vocab.txt"),
        "st": ("model.safetensors", "1_Pooling/config.json", "vocab.txt"),
    }.items():
        folder = hub.find_folder(name)
        connections.clear()
        assert hub.find_folder(name) == folder
        assert not connections
        for part in parts:
            target = (folder / part).readlink()
            (folder / part).unlink()
            monkeypatch.setenv("HF_HUB_OFFLINE", "1")
            said = message(name)
            assert "an incomplete copy without" in said
            assert (part if part != "vocab.txt" else "tokenizer.json") in said
            monkeypatch.delenv("HF_HUB_OFFLINE")
            (folder / part).symlink_to(target)


def test_a_file_that_was_cut_short_is_missed_and_fetched_again(server: HubServer, checkpoint: Path) -> None:
    folder = hub.find_folder(NAME)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text("{")
    assert hub.list_missing(folder) == ["config.json"]
    (folder / "config.json").unlink()
    assert hub.find_folder(NAME) == folder
    assert (folder / "config.json").read_bytes() == (checkpoint / "config.json").read_bytes()


def test_only_what_is_new_is_fetched_and_a_branch_moves_when_all_is_there(server: HubServer, checkpoint: Path) -> None:
    old = hub.find_folder(NAME)
    files = dict(server.commits[NAME][old.name])
    server.add(NAME, {**files, "config.json": files["config.json"] + b" "})
    server.log.clear()
    assert hub.find_folder(NAME) == old  # whole, so nobody is asked
    assert not server.log
    server.status = 500
    with pytest.raises(InputError):
        hub.pull(NAME)
    assert hub.find_folder(NAME) == old
    server.status = 200
    new = hub.pull(NAME)
    assert new != old
    assert server.fetched() == ["config.json"]
    assert hub.find_folder(NAME) == new
    assert hub.find_folder(NAME, revision=old.name) == old


def test_revisions(server: HubServer) -> None:
    main = hub.find_folder(NAME)
    files = dict(server.commits[NAME][main.name])
    commit = server.add(NAME, {**files, "vocab.txt": b"other"}, branch="refs/pr/1")
    folder = hub.find_folder(NAME, revision="refs/pr/1")
    assert (folder.name, (folder / "vocab.txt").read_text()) == (commit, "other")
    server.log.clear()
    assert hub.find_folder(NAME, revision="refs/pr/1") == hub.find_folder(NAME, revision=commit) == folder
    assert not server.log
    assert hub.find_folder(NAME) == main
    assert "has no revision v9" in message(NAME, revision="v9")
    assert "has no revision" in message(NAME, revision="0" * 40)


def test_chosen_files_replace_the_usual_ones(server: HubServer) -> None:
    folder = hub.find_folder(NAME, files=["vocab.txt", "onnx/*"])
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == ["model.onnx", "vocab.txt"]
    server.log.clear()
    assert hub.find_folder(NAME, files=["onnx/*"]) == folder
    assert not server.log
    assert hub.find_folder(NAME) == folder  # the rest is fetched
    assert (folder / "config.json").is_file()
    assert "holds none of the files" in message(NAME, files=["*.gguf"])


def test_pickled_weights_are_not_fetched(server: HubServer) -> None:
    server.add("old/model", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    said = message("old/model")
    assert "no weights that can be read safely" in said
    assert "pytorch_model.bin" in said
    assert not server.fetched()


def test_a_connection_that_breaks_is_taken_up_where_it_broke(
    server: HubServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 512)  # what is kept is a multiple of this
    name = "model-00001-of-00004.safetensors"
    server.drops[name] = 2
    folder = hub.find_folder(NAME)
    content = (checkpoint / name).read_bytes()
    assert (folder / name).read_bytes() == content
    ranges = [request.range for request in server.log if request.path.endswith(name) and request.method == "GET"]
    starts = [int(value.removeprefix("bytes=").rstrip("-")) for value in ranges[1:] if value]
    assert (ranges[0], len(starts)) == (None, 2)
    assert 0 <= len(content) // 2 - starts[0] < 512
    assert 0 <= (starts[0] + len(content)) // 2 - starts[1] < 512


def test_a_download_that_was_stopped_keeps_what_arrived(
    server: HubServer, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second try asks only for what the first did not finish; until then the copy counts as incomplete."""
    name = "model-00002-of-00004.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.http_get", refuse(name))
        said = message(NAME)
        assert "could not be fetched" in said
        assert hub.AGAIN in said
        patch.setenv("HF_HUB_OFFLINE", "1")
        assert f"an incomplete copy without {name}" in message(NAME, revision=next(iter(server.commits[NAME])))
        assert "other revisions, but not main" in message(NAME)
    server.log.clear()
    folder = hub.find_folder(NAME)
    assert (folder / name).read_bytes() == (checkpoint / name).read_bytes()
    assert name in server.fetched()
    assert len(server.fetched()) < len(list(folder.iterdir()))


def refuse(name: str) -> Any:
    """Return huggingface_hub's own download, but for one file, whose connection fails."""
    import httpx2

    real = huggingface_hub.file_download.http_get

    def get(url: str, *arguments: Any, **options: Any) -> None:
        if url.endswith(name):
            raise httpx2.ReadError("the connection was reset")
        real(url, *arguments, **options)

    return get


# ---- every refusal is one message


def test_no_such_model(server: HubServer) -> None:
    said = message("some-org/absent")
    assert "there is no folder some-org/absent, and the Hub has no some-org/absent" in said
    assert "check the spelling" in said


def test_a_gated_model_asks_for_its_terms_and_takes_the_token_unseen(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.gated = "hf_abcdefghijklmnop"
    assert f"accept them at {server.address}/{NAME}" in message(NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    said = message(NAME)
    assert "terms" in said
    assert "wrongwrong" not in said
    monkeypatch.setenv("HF_TOKEN", server.gated)
    assert hub.find_folder(NAME).is_dir()
    assert {request.token for request in server.log} == {None, "hf_wrongwrongwrong", server.gated}


REFUSALS = {401: "check the spelling", 403: "HF_TOKEN", 404: "HF_ENDPOINT", **dict.fromkeys((429, 500, 503), "wait")}


@pytest.mark.parametrize(("status", "says"), REFUSALS.items())
def test_a_hub_that_refuses(server: HubServer, status: int, says: str) -> None:
    server.status = status
    said = message(NAME)
    assert says in said
    assert str(status) in said


def test_a_hub_that_is_not_there(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://user:secret@127.0.0.1:{free.getsockname()[1]}")
        said = message(NAME)
    assert "could not be fetched" in said
    assert "check the connection, HF_ENDPOINT and the proxy variables" in said
    assert "secret" not in said
    monkeypatch.setenv("HF_ENDPOINT", "127.0.0.1:80")
    assert "check the connection, HF_ENDPOINT" in message(NAME)


def test_a_commit_that_is_a_path_is_refused(server: HubServer, tmp_path: Path) -> None:
    evil = "../../../evil"
    server.commits["x/y"], server.branches["x/y", "main"] = {evil: {"config.json": b"{}"}}, evil
    assert "not an answer of a Hub" in message("x/y")
    assert not server.fetched()


@pytest.mark.parametrize(("number", "says"), [(errno.ENOSPC, "free some disk space"), (errno.EROFS, "set HF_HOME")])
def test_a_disk_that_refuses(server: HubServer, monkeypatch: pytest.MonkeyPatch, number: int, says: str) -> None:
    def move(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("huggingface_hub.file_download._chmod_and_move", move)
    said = message(NAME)
    assert says in said
    assert str(hub.cache_folder()) in said


def test_a_token_in_a_message_of_others_is_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "my-own-secret")
    text = "Illegal header value b'Bearer my-own-secret' for hf_abcdefgh at https://me:pass@proxy:80/x"
    cleaned = hub.redact(text)
    assert not any(secret in cleaned for secret in ("my-own-secret", "abcdefgh", "me:pass"))
    assert cleaned.endswith("@proxy:80/x")


def test_without_huggingface_hub_the_line_that_installs_it_is_given(
    server: HubServer, connections: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra) as caught:
        hub.find_folder(NAME)
    assert f"there is no folder {NAME}" in str(caught.value)
    assert 'pip install "lmworks[hub]"' in str(caught.value)
    assert not connections


# ---- as a user runs it


def test_the_verbs_pull_and_inspect(server: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    from lmworks.cli.hub import inspect, pull

    assert pull(NAME, json=True) == 0
    pulled = json.loads(capsys.readouterr().out)
    folder = Path(pulled["folder"])
    assert (pulled["commit"], pulled["revision"]) == (server.branches[NAME, "main"], "main")
    assert pulled["files"] == {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    server.log.clear()
    assert inspect(NAME, json=True) == 0
    assert json.loads(capsys.readouterr().out)["architecture"] == "BertForSequenceClassification"
    assert inspect(NAME) == 0
    assert capsys.readouterr().out.startswith(f"{NAME}: BertForSequenceClassification, text-classification, ")
    assert not server.log


PULL = "import sys; from lmworks.base.hub import find_folder; print(find_folder(sys.argv[1]))"


def user(server: HubServer, tmp_path: Path, **settings: str) -> dict[str, str]:
    """Return a clean environment."""
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return {**kept, "HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "user"), **settings}


def test_a_pull_shows_progress_only_on_a_terminal_and_the_cache_needs_no_library(
    server: HubServer, tmp_path: Path
) -> None:
    import pty
    import termios

    run = [sys.executable, "-c", PULL, NAME]
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    shown = subprocess.run(
        run, env=user(server, tmp_path, TERM="xterm"), stdout=subprocess.PIPE, stderr=theirs, check=True
    )
    os.close(theirs)
    drawn = b""
    with contextlib.suppress(OSError):  # a terminal that is closed at its other end raises
        while piece := os.read(ours, 100_000):
            drawn += piece
    os.close(ours)
    assert b"100%" in drawn
    piped = user(server, tmp_path, HF_HOME=str(tmp_path / "piped"))
    quiet = subprocess.run(run, env=piped, capture_output=True, check=True)
    assert quiet.stderr == b""
    assert Path(quiet.stdout.decode().strip()).name == Path(shown.stdout.decode().strip()).name
    code = (
        "import sys; sys.modules['huggingface_hub'] = None; reached = []\n"
        "sys.addaudithook(lambda event, _: reached.append(event) if event.startswith('socket.') else None)\n"
        + PULL
        + "; assert not reached, reached"
    )
    cached = subprocess.run([sys.executable, "-c", code, NAME], env=piped, capture_output=True, text=True)
    assert cached.returncode == 0, cached.stderr
    assert cached.stdout == quiet.stdout.decode()
