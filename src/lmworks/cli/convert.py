"""`lmworks convert`."""

from __future__ import annotations

from lmworks.cli.output import Json, Model, Out, Overwrite, Revision, show


def convert(
    model: Model, /, *, out: Out, revision: Revision = None, overwrite: Overwrite = False, json: Json = False
) -> int:
    """Turn pytorch_model.bin into model.safetensors without running anything in it; `out` is whole or absent."""
    from lmworks.verbs.converting import convert as run

    return show(run(model, out, revision=revision, overwrite=overwrite), json=json)
