"""Make an environment of its own for a peer, under build/peers/NAME, with the versions of requirements/NAME.txt.

    python benchmarks/peers/prepare.py NAME…    (all: every peer)

Torch is installed first and pinned, as in the Makefile; llama-cpp-python is compiled for this processor.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[1]))
from llama_cpp_build import cmake_arguments

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "peers"
MARK = "requirements.sha256"  # written last
PEERS = tuple(sorted(path.stem for path in (HERE / "requirements").glob("*.txt")))


def main() -> int:
    """Prepare the peers that are named, one after the other; what cannot be installed is told and left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=(*PEERS, "all"))
    names = parser.parse_args().names
    failed = [name for name in (PEERS if "all" in names else names) if not prepare(name)]
    if failed:
        print(f"not installed: {', '.join(failed)}; see above", file=sys.stderr)
    return 1 if failed else 0


def prepare(name: str) -> bool:
    """Install a peer unless it is there as its requirements say; return whether it is there."""
    if is_prepared(name):
        return True
    requirements = HERE / "requirements" / f"{name}.txt"
    folder = BUILD / name
    venv.create(folder, with_pip=True, clear=True)
    pip = [str(python(name)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    settings = {"CMAKE_ARGS": " ".join(cmake_arguments()), **os.environ}
    lines = requirements.read_text(encoding="utf-8").splitlines()
    torch = [line for line in lines if line.startswith("torch==")]
    for arguments in ([*torch], ["--requirement", str(requirements)]):
        if arguments and subprocess.run([*pip, *arguments], env=settings).returncode:
            return False
    (folder / MARK).write_text(fingerprint(name))
    return True


def is_prepared(name: str) -> bool:
    """Say whether a peer is installed as its requirements say now."""
    mark = BUILD / name / MARK
    return mark.is_file() and mark.read_text() == fingerprint(name)


def fingerprint(name: str) -> str:
    """Return the hash of what a peer's requirements say."""
    return hashlib.sha256(
        b"".join(path.read_bytes() for path in sorted(HERE.glob(f"requirements/{name}.*")))
    ).hexdigest()


def python(name: str) -> Path:
    """Return the interpreter of a peer's environment."""
    return BUILD / name / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


if __name__ == "__main__":
    sys.exit(main())
