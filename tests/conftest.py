"""Fixtures for every test: the real data beside the project, and a rule that it may not be skipped where it is set."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# the same examples in every run of `make test`; `make test-long` draws new ones
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.load_profile("fixed")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # tests run beside servers and browsers
os.environ.setdefault("LMWORKS_CACHE", tempfile.mkdtemp(prefix="lmworks-choices-"))  # what is fastest, as measured
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data sets named by LMWORKS_DATA; tests that need it are skipped only where it is not set."""
    value = os.environ.get("LMWORKS_DATA")
    if not value:
        pytest.skip("LMWORKS_DATA is not set")
    folder = Path(value)
    assert folder.is_dir(), f"LMWORKS_DATA names {folder}, which is not a folder"
    return folder


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Train on one thread, as two on a busy machine wait for each other, and give the threads back."""
    import torch

    before = torch.get_num_threads()
    monkeypatch.setenv("LMWORKS_THREADS", "1")
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Any]:
    """A PostgreSQL of our own."""
    from databases import Server

    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def playwright() -> Iterator[Any]:
    """The driver of browsers."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        yield driver


@pytest.fixture(scope="module")
def browser(playwright: Any) -> Iterator[Any]:
    """One Chromium for the file."""
    from page_browser import launch

    chromium = launch(playwright)
    yield chromium
    chromium.close()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    """Turn a skip into a failure where LMWORKS_DATA is set, so that a missing tool cannot hide a test."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("LMWORKS_DATA") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped although LMWORKS_DATA is set: {report.longrepr}"
