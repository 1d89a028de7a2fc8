"""The playground: the views of the export's page over the models of this server. Its files hold nothing of a user's.

    GET /playground/            the page; it asks for a key where the server wants one, and keeps it in memory
    GET /playground/NAME        its two scripts, and those of the export's page that show a task

The page may load and ask nothing but this server, and nothing may frame it.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from lmworks.base.optional import require
from lmworks.export.web import ASSETS, HEADERS, TYPES

require("fastapi", extra="serve")
from fastapi import FastAPI, Request, Response  # noqa: E402
from starlette.exceptions import HTTPException  # noqa: E402

OWN = Path(__file__).parent / "playground"
PAGE = "/playground/"
FILES = {path.name: path for path in (*ASSETS.glob("view*.js"), ASSETS / "dom.js", ASSETS / "style.css",
                                      ASSETS / "icon.svg", *OWN.glob("*.js"))}  # fmt: skip
PUBLIC = frozenset({"/", PAGE, *(PAGE + name for name in FILES)})
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@cache
def version() -> str:
    """Return a hash of everything that the playground is made of."""
    digest = hashlib.sha256((OWN / "index.html").read_bytes())
    for name in sorted(FILES):
        digest.update(FILES[name].read_bytes())
    return digest.hexdigest()[:16]


def add_playground(app: FastAPI) -> None:
    """Serve the playground."""

    @app.get(PAGE + "{name}", response_class=Response, tags=["operation"])
    @app.get(PAGE, response_class=Response, tags=["operation"])
    async def playground(request: Request, name: str = "") -> Response:
        """Return the playground's page, or one of its files."""
        if name and name not in FILES:
            raise HTTPException(404, f"there is no file {name} in the playground")
        path = FILES[name] if name else OWN / "index.html"
        body = path.read_bytes()
        if not name:
            body = body.replace(b"{{version}}", version().encode())
        kept = "public, max-age=31536000, immutable" if request.query_params.get("v") == version() else "no-cache"
        headers = {**HEADERS, "Content-Security-Policy": POLICY, "Cache-Control": kept}
        return Response(body, media_type=TYPES[path.suffix], headers=headers)
