"""Every command and program of the documentation runs, in its order, in a fresh folder, and prints what is shown.

`LMWORKS_PIN=1 python -m pytest tests/docs -k NAME` writes what is printed into the page.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fork_server import CLIENT
from hub_server import HubServer
from material import COMMANDS, MAKERS, make
from minilm_heads import MINILM
from pages import REMARKS, RUN, SHOWN, Block, Page, all_pages, is_like

PAGES = {page.name: page for page in all_pages()}
ELSEWHERE = {"docs/tour"}  # tests/test_readme.py runs it, and looks at more than what is printed
DATABASE = "postgresql://lmworks@db.internal/feedback"  # what pages call a PostgreSQL of the reader's
SECONDS = 300


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `lmworks` and `python`, which start at once."""
    place = tmp_path_factory.mktemp("bin")
    address = str(place / "socket")
    for program in ("lmworks", "python"):
        (place / program).write_text(CLIENT.format(python=sys.executable, address=address, program=program))
        (place / program).chmod(0o755)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([sys.executable, str(Path(__file__).with_name("fork_server.py")), address],
                              env=environment)  # fmt: skip
    for _ in range(1200):
        if server.poll() is not None or Path(address).exists():
            break
        time.sleep(0.05)
    yield place
    server.terminate()
    server.wait()


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """A Hub on this machine, with the one model that the pages fetch; its weights are the published ones."""
    with HubServer() as server:
        server.add_folder("sentence-transformers/all-MiniLM-L6-v2", MINILM)
        yield server.address


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where material lies that several pages share."""
    return tmp_path_factory.mktemp("material")


class Reader:
    """Somebody who types a page's commands."""

    def __init__(self, page: Page, place: Path, environment: dict[str, str], database: str) -> None:
        self.page, self.place, self.environment, self.database = page, place, environment, database
        self.server: subprocess.Popen[bytes] | None = None
        self.port = "8000"
        self.pins: list[tuple[tuple[int, int], str]] = []

    def follow(self) -> None:
        """Do what every block says."""
        try:
            for block in self.page.blocks:
                at = f"{self.page.name}.md:{block.line}"
                if block.remark in ("no", "made"):
                    continue
                if block.remark == "file":
                    (self.place / block.value).parent.mkdir(parents=True, exist_ok=True)
                    (self.place / block.value).write_text(block.text)
                elif block.remark == "server":
                    self.serve(block, at)
                else:
                    self.type(block, at)
        finally:
            self.stop()
            lines = self.page.path.read_text("utf-8").splitlines()
            for (first, last), text in reversed(self.pins):
                lines[first + 1 : last - 1] = text.strip("\n").splitlines()
            if self.pins:
                self.page.path.write_text("\n".join(lines) + "\n", "utf-8")

    def type(self, block: Block, at: str) -> None:
        """Run a block, and compare what it prints."""
        text = block.text.replace(":8000", f":{self.port}").replace(DATABASE, self.database)
        if block.language == "python":
            (self.place / ".block.py").write_text(text)
            text = "python .block.py"
        words = ["bash", "-eo", "pipefail", "-c", text]
        if block.remark == "typed":
            done = at_a_terminal(words, block.value, self.place, self.environment)
        else:
            done = subprocess.run(words, cwd=self.place, env=self.environment, capture_output=True, text=True,
                                  timeout=SECONDS, stdin=subprocess.DEVNULL)  # fmt: skip
        expected = int(block.value) if block.remark == "exit" else 0
        said = done.stdout[-2000:] + done.stderr[-4000:]
        assert done.returncode == expected, f"{at} ended with {done.returncode}:\n{said}"
        if block.output is not None:
            printed = done.stdout + (done.stderr if expected else "")
            printed = printed.replace(f":{self.port}", ":8000").replace(str(self.place.parent), "…")
            printed = printed.replace(self.database, DATABASE)
            if "LMWORKS_PIN" in os.environ and not is_like(printed, block.output):
                self.pins.append((block.shown, "\n".join(line.rstrip() for line in printed.splitlines())))
                return
            assert is_like(printed, block.output), f"{at} prints\n{printed}\nand is said to print\n{block.output}"

    def serve(self, block: Block, at: str) -> None:
        """Run a block whose last command, or each of them, is a server that goes on; what came before it ends."""
        for command in block.text.replace("\\\n", " ").splitlines():
            if "lmworks serve" in command:
                self.start(command.partition(" # ")[0].strip(), at)
            else:
                self.type(replace(block, text=command, remark="", output=None), at)

    def start(self, command: str, at: str) -> None:
        """Start a server on a free port, and wait until it answers."""
        self.stop()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = str(free.getsockname()[1])
        command = re.sub(r" --port \d+", "", command).replace(DATABASE, self.database) + f" --port {self.port}"
        real = {**self.environment, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        with (self.place / ".server.log").open("wb") as log:
            self.server = subprocess.Popen(["bash", "-c", f"exec {command}"], cwd=self.place, env=real, stdout=log,
                                           stderr=log)  # fmt: skip
        until = time.monotonic() + 90
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}/health/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            said = (self.place / ".server.log").read_text()
            assert self.server.poll() is None and time.monotonic() < until, f"{at} is not ready:\n{said}"
            time.sleep(0.05)

    def stop(self) -> None:
        """End the server, if there is one."""
        if self.server:
            self.server.terminate()
            self.server.wait()
        self.server = None


def at_a_terminal(words: list[str], keys: str, place: Path, environment: dict[str, str]) -> Any:
    """Run a command at a terminal of its own, and answer each question (`… ? `) by the next key."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(words, cwd=place, env=environment, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        said, left = b"", list(keys)
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(ours, 1 << 16):
                said += part
                if said.endswith(b"? ") and left:
                    os.write(ours, f"{left.pop(0)}\n".encode())
    os.close(ours)
    plain = re.sub(r"\x1b\[[\d;]*m", "", said.decode().replace("\r\n", "\n"))
    return subprocess.CompletedProcess(words, process.returncode, plain, "")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if page.slow else name
        for name, page in PAGES.items()
        if name not in ELSEWHERE and page.blocks
    ],
)
def test_page(
    name: str, programs: Path, hub: str, store: Path, data_folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    page, database = PAGES[name], DATABASE
    if any(DATABASE in block.text for block in page.blocks):
        database = request.getfixturevalue("postgres").make().url
    environment = {
        **os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / ".hub"), "LMWORKS_CACHE": str(store / "choices"), "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1", "COLUMNS": "80", "LMWORKS_THREADS": "1",
    }  # fmt: skip
    place = tmp_path / "here"
    place.mkdir()
    for need in page.needs:
        make(need, store, data_folder, place, environment)
    Reader(page, place, environment, database).follow()


def test_blocks_are_of_a_known_kind() -> None:
    """What is not run is output, or says why; no command hides in a block that nobody runs."""
    for page in PAGES.values():
        for block in page.blocks:
            at = f"{page.name}.md:{block.line}"
            assert block.language in RUN | SHOWN, f"{at}: a block in {block.language!r}"
            assert block.remark in REMARKS, f"{at}: {block.remark}"
            if block.remark == "made":
                command = " ".join(block.text.replace("\\\n", " ").splitlines()[-1].split())
                made = COMMANDS[block.value].replace(" minilm ", " sentence-transformers/all-MiniLM-L6-v2 ")
                assert set(command.split()) == set(f"{made} -o {block.value}".split()), at
            assert block.remark not in ("no", "unlike") or len(block.value.split()) >= 3, f"{at}: say why"
        for need in page.needs:
            assert need.rpartition("=")[2] in MAKERS, f"{page.name}: {need}"


def test_few_blocks_are_left_out() -> None:
    """Those that need what a test has not: Docker, a cluster, other programs."""
    left_out = [f"{p.name}.md:{b.line}: {b.value}" for p in PAGES.values() for b in p.blocks if b.remark == "no"]
    print("\n".join(["not run:", *left_out]))
    run = sum(b.language in RUN and b.remark not in ("no", "file") for p in PAGES.values()
              for b in p.blocks)  # fmt: skip
    assert len(left_out) <= 28 < run / 4


def test_output_is_compared() -> None:
    """Decimals may differ by two percent, `…` stands for what changes, and nothing else may differ."""
    assert is_like("a 0.995\nb\n", "a 0.991\nb")
    assert is_like("a 12 s\nb\nc\nd\n", "a … s\n…\nd")
    for other in ("a 0.90\nb", "a 0.99\nc", "a 0.99", "a 0.99\nb\nc", "a 1\nb"):
        assert not is_like("a 0.995\nb\n", other)
