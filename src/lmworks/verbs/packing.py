"""A bundle for a machine without a network: the model, every wheel that serving it needs, and the sums of all of it."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

from lmworks.base.errors import InputError, LmworksError
from lmworks.base.files import sha256, write_text
from lmworks.base.optional import require
from lmworks.base.report import Report
from lmworks.deploy.folder import fill
from lmworks.deploy.wheel import pin, write_wheel
from lmworks.export.receipt import list_files
from lmworks.verbs.deploying import Values, check_port, write

MACHINES = ("x86_64", "aarch64")
GLIBC = (5, 12, 17, 24, 26, 27, 28)  # of manylinux tags: Debian 10, RHEL 8 and whatever is newer
SUMS = "SHA256SUMS"


def pack(
    model: str | Path, out: str | Path, *, dtype: str = "auto", name: str | None = None, machine: str | None = None,
    python: str | None = None, port: int = 8000, overwrite: bool = False,
) -> Report:  # fmt: skip
    """Write a folder that installs and serves a model on a Linux machine that no network reaches.

    `machine` is "x86_64" or "aarch64", `python` a version such as "3.12": those of this machine by default. Wheels come
    from the package index that pip is set up for. Raises InputError where one cannot be fetched.
    """
    check_port(port)
    machine, python = machine or platform.machine(), python or f"{sys.version_info.major}.{sys.version_info.minor}"
    if machine not in MACHINES:
        raise InputError("there are no wheels for this machine", found=machine, expected=" or ".join(MACHINES),
                         fix="name the one that the bundle is for with --machine")  # fmt: skip
    if python not in (f"3.{minor}" for minor in range(11, 20)):
        raise InputError("lmworks does not run on this Python", found=python, expected="3.11 or later")

    def bundle(folder: Path, values: Values) -> None:
        wheels = folder / "wheels"
        wheels.mkdir()
        values |= {"port": str(port), "python": python, "machine": machine, "wheel": write_wheel(wheels).name}
        pins = pin("serve", python_version=python, python_full_version=f"{python}.0", platform_machine=machine)
        fetch(pins, wheels, machine, python)
        fill("bundle", folder, values)
        lines = [f"{sha256(folder / file)}  {file}\n" for file in list_files(folder, (SUMS,))]
        write_text(folder / SUMS, "".join(lines))

    return write("machines without a network", model, out, dtype, name, overwrite, bundle)


def fetch(pins: list[str], wheels: Path, machine: str, python: str) -> None:
    """Fetch exactly these packages as wheels. Raises InputError with what pip says last."""
    require("pip", extra="serve")
    tags = [f"manylinux_2_{number}_{machine}" for number in GLIBC] + [f"manylinux2014_{machine}"]
    platforms = [word for tag in tags for word in ("--platform", tag)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *platforms,
               "--python-version", python, "--implementation", "cp", "--dest", str(wheels), *pins]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise InputError("a package could not be fetched", found=(said or ["nothing"])[-1].removeprefix("ERROR: "),
                         fix="check the network, or pip's settings: pip config list")  # fmt: skip
    if len(list(wheels.glob("*.whl"))) != len(pins) + 1:
        raise LmworksError("pip fetched other packages than it was asked for", where=str(wheels))
