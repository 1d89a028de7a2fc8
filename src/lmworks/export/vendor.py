"""Copy the page's JavaScript library from node_modules to web/vendor, which a wheel carries and a model folder gets.

Standard library only: the build hook loads this file before the package can be imported.
Command line: `python -m lmworks.export.vendor` (once, after an install without npm).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

WEB = Path(__file__).parent / "web"
LIBRARY, RUNTIME = "@huggingface/transformers", "onnxruntime-web"
VARIANTS = ("", ".jspi")  # of ONNX Runtime: everywhere; where WebAssembly can wait for promises. Also there: .asyncify
INSTALL = ("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
FIX = "install Node.js with npm, then run: python -m lmworks.export.vendor"


class Missing(Exception):
    """What is needed to vendor the library is not there; the message says what to do."""


def vendor(web: Path = WEB, *, variants: tuple[str, ...] = VARIANTS) -> Path:
    """Fill `web/vendor` with the versions that `web/package-lock.json` pins; npm fetches what is not there yet.

    Returns the folder. Raises Missing when npm is not there or fails. Nothing is copied when the folder is up to date.
    """
    target = web / "vendor"
    pins = lock_hash(web)
    if is_current(target, pins, variants):
        return target
    modules = web / "node_modules"
    if installed_version(modules, LIBRARY) != pinned_version(web, LIBRARY):
        install(web)
    staged = web / "vendor.staged"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    for source, name in sources(modules, variants):
        shutil.copyfile(source, staged / name)
    for notice in sorted((web / "licenses").iterdir()):
        shutil.copyfile(notice, staged / notice.name)
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(staged.iterdir())}
    versions = {package: installed_version(modules, package) for package in (LIBRARY, RUNTIME)}
    record = {"lock": pins, "versions": versions, "files": files}
    (staged / "vendor.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    staged.rename(target)
    return target


def sources(modules: Path, variants: tuple[str, ...]) -> list[tuple[Path, str]]:
    """Return (file, name in web/vendor) for the library, its WASM pairs and its licence."""
    library = modules / LIBRARY
    files = [
        (library / "dist" / "transformers.min.js", "transformers.min.js"),
        (library / "LICENSE", "LICENSE.transformers.js.txt"),
    ]
    for variant in variants:
        for suffix in ("mjs", "wasm"):
            name = f"ort-wasm-simd-threaded{variant}.{suffix}"
            files.append((modules / RUNTIME / "dist" / name, name))
    return files


def install(web: Path) -> None:
    """Run npm in `web`: exact versions with their integrity hashes, no scripts."""
    npm = shutil.which("npm")
    if npm is None:
        raise Missing(f"npm was not found; {FIX}")
    done = subprocess.run([npm, *INSTALL[1:]], cwd=web, capture_output=True, text=True, check=False)
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if "error" in line.lower()][:3]
        raise Missing(f"npm could not install the page's JavaScript library: {' '.join(last)}")


def lock_hash(web: Path) -> str:
    """Return what the vendored files depend on: the pinned versions, and the licence texts beside them."""
    digest = hashlib.sha256((web / "package-lock.json").read_bytes())
    for notice in sorted((web / "licenses").iterdir()):
        digest.update(notice.read_bytes())
    return digest.hexdigest()


def is_current(target: Path, pins: str, variants: tuple[str, ...]) -> bool:
    """Say whether `target` was made from these pins, holds these variants, and is undamaged."""
    try:
        record = json.loads((target / "vendor.json").read_text(encoding="utf-8"))
        files: dict[str, str] = record["files"]
        wanted = {f"ort-wasm-simd-threaded{variant}.wasm" for variant in variants}
        return (
            record["lock"] == pins
            and wanted <= files.keys()
            and all(hashlib.sha256((target / name).read_bytes()).hexdigest() == known for name, known in files.items())
        )
    except (OSError, ValueError, KeyError):
        return False


def pinned_version(web: Path, package: str) -> str:
    """Return the version in package-lock.json."""
    lock = json.loads((web / "package-lock.json").read_text(encoding="utf-8"))
    return str(lock["packages"][f"node_modules/{package}"]["version"])


def installed_version(modules: Path, package: str) -> str | None:
    """Return the version in node_modules, or None."""
    try:
        return str(json.loads((modules / package / "package.json").read_text(encoding="utf-8"))["version"])
    except (OSError, ValueError, KeyError):
        return None


def main(web: Path = WEB) -> int:
    """Vendor the library and say so; an optional argument names more variants, e.g. `.asyncify`."""
    try:
        folder = vendor(web, variants=(*VARIANTS, *sys.argv[1:]))
    except Missing as problem:
        sys.stderr.write(f"The web page will be missing its library: {problem}\n")
        return 2
    sys.stderr.write(f"{folder.name}: {sum(f.stat().st_size for f in folder.iterdir()) / 1e6:.1f} MB\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
