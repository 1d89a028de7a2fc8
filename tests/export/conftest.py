"""A browser for the tests of pages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from page_browser import launch
from playwright.sync_api import Browser, sync_playwright


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One Chromium for the file."""
    with sync_playwright() as driver:
        chromium = launch(driver)
        yield chromium
        chromium.close()
