"""Tests of training run on one thread: two threads on a busy machine wait for each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Train on one thread, and give the threads back."""
    before = torch.get_num_threads()
    monkeypatch.setenv("LMWORKS_THREADS", "1")
    yield
    torch.set_num_threads(before)
