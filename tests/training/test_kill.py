"""A run that is killed at any instant, also inside a save, and resumed ends with the same bits and no stray files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kill_runs.py")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "LMWORKS_THREADS": "1"}


@pytest.mark.parametrize("kills", [6, pytest.param(40, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_killed_runs_end_with_the_same_bits(tmp_path: Path, kills: int) -> None:
    """C26: weights, moments, best weights, state and loss log equal those of a run that nobody killed."""
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(kills), "0"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ONE_THREAD})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["different"] == []
    assert found["kills"] == kills
    assert found["inside"] >= kills // 4
