"""GET and POST /challenger: what shadows a model; POST /challenger/switch, /back and /stop; with the admin's key."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from lmworks.base.optional import require
from lmworks.serve.guard import ADMIN, read_key
from lmworks.serve.refusals import Refused
from lmworks.serve.schema import Asked, Name
from lmworks.serve.service import Service

require("fastapi", extra="serve")
from fastapi import APIRouter, Depends, Request  # noqa: E402

if TYPE_CHECKING:
    from lmworks.serve.challengers import Challengers


class Wanted(Asked):
    """Which model is meant; none: the first that can be challenged."""

    model: Name | None = None


class ChallengeRequest(Wanted):
    """The body of POST /challenger: a folder among the challengers, and the share of requests that it is asked."""

    folder: Annotated[str, Field(min_length=1, max_length=200)]
    share: Annotated[float, Field(ge=0, le=1)] = 0.1


def make_router(service: Service, keys: Sequence[bytes]) -> APIRouter:
    """Return the routes; `keys` are digests."""

    def check(request: Request) -> None:
        found = read_key(request.scope["headers"])
        right = [hmac.compare_digest(found, known) for known in keys]
        if not any(right):
            raise Refused(401, "this needs the admin's key: Authorization: Bearer KEY", code="invalid_api_key")

    router = APIRouter(tags=["operation"], prefix=ADMIN, dependencies=[Depends(check)])
    assert service.challengers is not None
    all: Challengers = service.challengers

    def named(wanted: Wanted) -> str:
        name = wanted.model or next(iter(all.contests))
        if name not in all.contests:
            raise Refused(404, f"{name} cannot be challenged", param="model", code="model_not_found")
        return name

    def told(name: str) -> dict[str, Any]:
        return {"model": name, **all.state(name)}

    @router.get("")
    async def show() -> dict[str, Any]:
        """Say which version of each model answers, and what its challenger would have said."""
        return {"models": {name: all.state(name) for name in all.contests}}

    @router.post("")
    async def challenge(wanted: ChallengeRequest) -> dict[str, Any]:
        """Load a folder and let it shadow the model; the answer comes once it does."""
        name = named(wanted)
        await all.challenge(name, wanted.folder, wanted.share)
        return told(name)

    @router.post("/switch")
    async def switch(wanted: Wanted) -> dict[str, Any]:
        """Let the challenger answer: whatever is asked after this answer gets its answers."""
        name = named(wanted)
        await all.exchange(name, back=False)
        return told(name)

    @router.post("/back")
    async def back(wanted: Wanted) -> dict[str, Any]:
        """Let the version before the switch answer again."""
        name = named(wanted)
        await all.exchange(name, back=True)
        return told(name)

    @router.post("/stop")
    async def stop(wanted: Wanted) -> dict[str, Any]:
        """Let go of the version that does not answer."""
        name = named(wanted)
        await all.stop(name)
        return told(name)

    return router
