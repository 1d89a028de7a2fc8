"""Every test of training runs on one thread."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def train_on_one_thread(one_thread: None) -> None:
    """Ask for the shared fixture in every test below."""
