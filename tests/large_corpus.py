"""A corpus of any size in the built-in language, with known duplicates; and the memory that a command needs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from lmworks.text.grammar import Uniform
from lmworks.text.sample import Language

SENTENCES = 1_000
REPEATS, NEARLY = 0.05, 0.05  # shares of documents that repeat an earlier one exactly, or but for a word


@dataclass(frozen=True)
class Made:
    """How many documents there are, and how many of them repeat an earlier one."""

    documents: int
    exact: int
    near: int


def make_corpus(path: Path, n_bytes: int, *, seed: int = 0) -> Made:
    """Write documents of 5 to 40 sentences as .jsonl until they are `n_bytes` long."""
    rng = random.Random(seed)
    language, uniform = Language(), Uniform(seed)
    sentences = [language.sentence(uniform).text for _ in range(SENTENCES)]
    recent: list[str] = []
    size = documents = exact = near = 0
    with path.open("w", encoding="utf-8") as file:
        while size < n_bytes:
            draw = rng.random()
            if recent and draw < REPEATS + NEARLY:
                text = rng.choice(recent)
                if draw < REPEATS:
                    exact += 1
                else:
                    text, near = f"{text} {documents}.", near + 1
            else:
                text = "\n".join(rng.choices(sentences, k=rng.randint(5, 40)))
                recent.append(text)
                if len(recent) > 500:
                    recent.pop(rng.randrange(500))
            line = json.dumps({"text": text, "id": documents}, ensure_ascii=False) + "\n"
            size += file.write(line)
            documents += 1
    return Made(documents, exact, near)


def run_measured(*command: str, environment: dict[str, str] | None = None) -> tuple[int, str, float]:
    """Run a command; return its exit code, its output, and the most memory that all its processes held, in MB.

    Pages that processes share count once for each (resident set sizes are added up), so this is an upper bound.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
    )
    most = 0
    root = psutil.Process(process.pid)
    while process.poll() is None:
        size = 0
        try:
            for one in [root, *root.children(recursive=True)]:
                size += one.memory_info().rss
        except psutil.Error:
            pass
        most = max(most, size)
        time.sleep(0.05)
    out, error = process.communicate()
    return process.returncode, out + error, most / 1e6
