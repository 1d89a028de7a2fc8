"""`lmworks serve`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from lmworks.cli.output import Model


def serve(
    model: Model,
    /,
    *,
    port: Annotated[int, Parameter(help="The port to listen on.")] = 8000,
    host: Annotated[str, Parameter(help="The address to listen on; loopback by default.")] = "127.0.0.1",
) -> int:
    """Serve the page of a model folder, POST /v1/completions and GET /health/ready."""
    from lmworks.serve.app import serve as run

    run(model, host=host, port=port)
    return 0
