"""Build hook: put the page's JavaScript library into the package. Also run by hand: `python hatch_build.py`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ModuleNotFoundError:  # run by hand, without the build tool
    BuildHookInterface = object

EXPORT = Path(__file__).parent / "src" / "lmworks" / "export"


def load_vendor() -> ModuleType:
    """Load export/vendor.py by its path: the package itself cannot be imported while it is being built."""
    spec = importlib.util.spec_from_file_location("lmworks_vendor", EXPORT / "vendor.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class VendorHook(BuildHookInterface):
    """Vendor before packing. Without npm the package is still built; writing a page then says what is missing."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Fill src/lmworks/export/web/vendor, or warn."""
        module = load_vendor()
        try:
            module.vendor()
        except module.Missing as problem:
            self.app.display_warning(f"the web page will be missing its library: {problem}")


if __name__ == "__main__":
    raise SystemExit(load_vendor().main())
