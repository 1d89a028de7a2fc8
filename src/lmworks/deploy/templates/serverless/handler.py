"""$name as a function: handler(event, context). Made by lmworks $version."""

from pathlib import Path

from lmworks.deploy.function import make_handler

handler = make_handler(Path(__file__).parent / "model", dtype="$dtype", name="$name")
