"""Import an optional package, or say the line that installs it."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from lmworks.base.errors import MissingExtra

TORCH_HINT = "a CPU-only build is enough; see README.md, Install"


def is_installed(package: str) -> bool:
    """Say whether a package is there, without importing it; an import hook that refuses it counts as not."""
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def require(module: str, *, extra: str) -> ModuleType:
    """Return the module, e.g. `require("onnxruntime", extra="onnx")`; raise MissingExtra with its pip line."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name and error.name.partition(".")[0] != package:
            raise
        hint = f" ({TORCH_HINT})" if package == "torch" else ""
        raise MissingExtra(
            f"this needs the package {package}, which is not installed", fix=f'pip install "lmworks[{extra}]"{hint}'
        ) from None
