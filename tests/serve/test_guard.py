"""Who may ask, how often and how much."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from serving import Running, server
from tiny_page import made_folder

from lmworks.base.errors import InputError
from lmworks.serve.app import make_app
from lmworks.serve.guard import CLIENTS, MOST_BYTES, Rates, digest, read_keys
from lmworks.serve.service import describe

KEY = "a-right-key-of-some-length"


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    """A server with two keys."""
    with server(made_folder(), keys=[digest("another-right-key-here"), digest(KEY)], ready=False) as one:
        one.wait()
        yield one


def routes() -> list[tuple[str, str]]:
    """Return every route of the application, with a path that it takes."""
    app = make_app([describe(made_folder())])
    found = []
    for context in app.routes:
        for route in getattr(getattr(context, "original_router", None), "routes", [context]):
            for method in getattr(route, "methods", None) or []:
                found.append(
                    (method, route.path.replace("{text:path}", "a").replace("{name}", "a").replace("{path:path}", ""))
                )
    return sorted(set(found))


@pytest.mark.parametrize(("method", "path"), routes())
def test_every_route_needs_a_key_but_the_probes(method: str, path: str, locked: Running) -> None:
    def status(**headers: str) -> int:
        return httpx.request(method, locked.base + path, headers=headers, timeout=30).status_code

    if path in ("/health/live", "/health/ready", "/", "/playground/"):
        assert status() in ((200, 307) if method in ("GET", "HEAD") else (405,))
        return
    for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"X-Api-Key": KEY + "x"},
                  {"Authorization": "Bearer"}, {"Authorization": "Basic " + KEY}):  # fmt: skip
        assert status(**wrong) == 401
    assert status(Authorization=f"Bearer {KEY}") != 401
    assert status(**{"X-Api-Key": KEY}) != 401


def test_there_are_routes() -> None:
    assert len(routes()) > 20
    assert ("POST", "/v1/chat/completions") in routes()


def test_keys_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# the page's\n{KEY}\n\n  another-right-key-here \n")
    assert read_keys(path) == [digest(KEY), digest("another-right-key-here")]
    path.write_text(f"{KEY}\r\n", "utf-8-sig", newline="")
    assert read_keys(path) == [digest(KEY)], "as Windows writes it"
    for text, problem in (("", "no key"), ("short", "cannot be used"), (KEY + " two words", "cannot be used")):
        path.write_text(text)
        with pytest.raises(InputError, match=problem):
            read_keys(path)
    with pytest.raises(InputError, match="no such file"):
        read_keys(tmp_path / "none")


def test_a_rate_is_kept_by_each_client(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    rates = Rates(2.0)
    assert [rates.wait("a") for _ in range(3)] == [0, 0, 0.5]
    assert rates.wait("b") == 0
    now[0] += 0.5
    assert rates.wait("a") == 0
    assert rates.wait("a") > 0
    for number in range(CLIENTS + 50):
        rates.wait(str(number))
    assert len(rates.buckets) == CLIENTS


def test_too_many_requests_are_told_to_come_back() -> None:
    with server(made_folder(), rate=0.7) as one:
        found = [httpx.get(f"{one.base}/info") for _ in range(5)]
        assert 429 in {answer.status_code for answer in found}
        turned = next(answer for answer in found if answer.status_code == 429)
        assert int(turned.headers["retry-after"]) == 2, "1.4 s are not over after 1"
        assert turned.json()["error"]["code"] == "rate_limit_exceeded"
        assert all(httpx.get(f"{one.base}/health/live").status_code == 200 for _ in range(5))


def test_a_large_body_is_refused_before_it_is_read(locked: Running) -> None:
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    started = time.monotonic()
    sent = 0

    def parts() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += MOST_BYTES
            yield b" " * MOST_BYTES

    try:
        content = httpx.post(
            f"{locked.base}/classify", content=parts(), headers={**headers, "Content-Length": str(10**8)}
        )
        assert content.status_code == 413
    except httpx.TransportError:
        pass  # hung up on in the middle
    assert time.monotonic() - started < 5
    assert sent < 10**8
    many = httpx.get(f"{locked.base}/info", headers={**headers, **{f"x-{i}": "1" for i in range(80)}})
    assert many.status_code == 431
