"""Answers that are errors, in OpenAI's shape: {"error": {message, type, param, code}}."""

from __future__ import annotations

from typing import Any

from lmworks.base.errors import InputError, LmworksError
from lmworks.serve.slots import LateError
from lmworks.serve.supervisor import Down, Full

WAIT = 1  # seconds after which a client that was turned away may come back


class Refused(Exception):
    """An answer that is an error."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        type: str = "invalid_request_error",
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.type = status, message, param, code, type

    def body(self, path: str = "") -> dict[str, Any]:
        """Return {"error": {message, type, param, code}}; to who asks under /v2, what that protocol has."""
        if path == "/v2" or path.startswith("/v2/"):
            return {"error": self.message}
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Return Retry-After where coming back may help."""
        return {"Retry-After": str(WAIT)} if self.status in (429, 503) else {}


BUSY = Refused(429, "the server is busy", code="busy", type="server_error")
AWAY = Refused(503, "the engine is not ready", code="not_ready", type="server_error")


def refusal(error: LmworksError, param: str | None = None) -> Refused:
    """Return the answer for an error of ours: 429 full, 503 not now, 504 late, 400 bad input, 500 otherwise."""
    if isinstance(error, Full):
        return BUSY
    if isinstance(error, Down):
        return Refused(503, error.what, code="not_ready", type="server_error")
    if isinstance(error, LateError):  # no 503: a proxy would put it to the next server, for as long
        return Refused(504, error.what, code="timeout", type="server_error")
    if isinstance(error, InputError):
        too_long = "fit the model" in error.what or "longer than the model" in error.what
        details = ", ".join(f"{name} {value}" for name, value in (("found", error.found), ("expected", error.expected))
                            if value)  # fmt: skip
        message = f"{error.where}: {error.what}" if error.where else error.what
        code = "context_length_exceeded" if too_long else "invalid_value"
        return Refused(400, f"{message} ({details})" if details else message, param=param, code=code)
    return Refused(500, error.what, type="server_error")
