"""Batches made ahead are the same, in the same order; errors are the original ones and nothing is left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small import make_data, make_trainer

from lmworks.base.errors import InputError, Interrupted
from lmworks.base.types import Batch
from lmworks.training.prefetch import AHEAD, Prefetch


def running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_batches_are_those_of_the_source(workers: int) -> None:
    data, made = make_data(), []

    def make(step: int) -> Batch:
        made.append(step)
        time.sleep(0.003 * (step % 3))
        return data.batch(step)

    with Prefetch(make, workers=workers, last=9) as batches:
        for step in [*range(4, 9), 9, 0]:  # a step that was not expected, too
            batch, expected = batches(step), data.batch(step)
            assert all(np.array_equal(batch[name], expected[name]) for name in expected)
        assert len(batches.coming) <= AHEAD * workers
    assert not running()
    if workers == 0:
        assert made == [4, 5, 6, 7, 8, 9, 0]
    else:
        assert set(made) >= {0, 4, 5, 6, 7, 8, 9}


def test_nothing_is_made_beyond_the_last_step() -> None:
    made = []

    def make(step: int) -> Batch:
        made.append(step)
        return {}

    with Prefetch(make, workers=2, last=5) as batches:
        for step in range(5):
            batches(step)
    assert sorted(made) == [0, 1, 2, 3, 4]


def test_an_error_is_the_original_one_at_its_step() -> None:
    def make(step: int) -> Batch:
        if step == 3:
            raise InputError("this is no picture", where="cat.png")
        return {"step": np.array([step])}

    with Prefetch(make, workers=2) as batches:
        for step in range(3):
            assert batches(step)["step"][0] == step
        with pytest.raises(InputError, match=r"this is no picture") as caught:
            batches(3)
    assert caught.value.where == "cat.png"
    assert not running()


def test_a_run_with_workers_ends_with_the_same_bits_also_when_interrupted(tmp_path: Path) -> None:
    plain, ahead = make_trainer(tmp_path / "plain", dropout=0.1), make_trainer(tmp_path / "ahead", dropout=0.1)
    plain.fit()

    def interrupt(step: int) -> Batch:
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain.data.batch(step)

    ahead.batches = Prefetch(interrupt, workers=2, last=12)
    with pytest.raises(Interrupted):
        ahead.fit()
    assert not running()
    resumed = make_trainer(tmp_path / "ahead", dropout=0.1)
    resumed.batches = Prefetch(resumed.data.batch, workers=2, last=12)
    resumed.fit()
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), resumed.model.parameters(), strict=True))


def test_nothing_outlives_a_killed_run(tmp_path: Path) -> None:
    """Threads die with their process: after SIGKILL the run's whole session is empty."""
    code = (
        "import sys, time\n"
        "from lmworks.training.prefetch import Prefetch\n"
        "def make(step):\n    time.sleep(0.05)\n    return {}\n"
        "with Prefetch(make, workers=2) as batches:\n"
        "    for step in range(10000):\n        batches(step)\n        print(step, flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert child.stdout is not None
    assert child.stdout.readline() == b"0\n"
    child.kill()
    child.wait()
    child.stdout.close()
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)
