"""The package itself as a wheel, and the exact versions of what it needs, both from what is installed here."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import lmworks
from lmworks.base.errors import InputError, LmworksError
from lmworks.base.optional import require

LEFT_OUT = ("__pycache__", "node_modules")
EPOCH = (1980, 1, 1, 0, 0, 0)  # the same package gives the same bytes
LINUX = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}  # what images and servers run


def write_wheel(place: Path) -> Path:
    """Write lmworks-VERSION-py3-none-any.whl into the folder `place`, also from a checkout; return its path.

    The format is that of the packaging specifications (binary distribution format 1.0).
    """
    known, root = distribution("lmworks"), Path(lmworks.__file__).parent
    check_current(known, root)
    info = f"lmworks-{known.version}.dist-info"
    files = {
        path.relative_to(root.parent).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not set(path.parts) & set(LEFT_OUT)
    }
    for name in ("METADATA", "entry_points.txt"):
        files[f"{info}/{name}"] = (known.read_text(name) or "").encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: lmworks\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    rows = [f"{name},sha256={digest(data)},{len(data)}" for name, data in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,", ""]).encode()
    path = place / f"lmworks-{known.version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            wheel.writestr(entry, data)
    return path


def check_current(known: Distribution, root: Path) -> None:
    """Raise LmworksError where a checkout has changed what it needs since it was installed."""
    project = root.parent.parent / "pyproject.toml"
    read = known.locate_file(f"lmworks-{known.version}.dist-info/METADATA")
    stale = project.is_file() and project.stat().st_mtime > Path(str(read)).stat().st_mtime
    if known.version != lmworks.__version__ or stale:
        raise LmworksError("what is installed of lmworks is older than its files", where=str(root),
                           found=known.version, expected=lmworks.__version__,
                           fix="install it again, in a checkout by make install")  # fmt: skip


def digest(data: bytes) -> str:
    """Return SHA-256 as a wheel's RECORD writes it."""
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def pin(*extras: str, **environment: str) -> list[str]:
    """Return "name==version" of everything that lmworks with these extras needs on Linux, as it is installed here.

    `environment` overrides markers: python_version, platform_machine. What this system has no use for and Linux needs
    is named without its version. Raises InputError for an extra whose packages are not installed.
    """
    require("packaging", extra="serve")
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [("lmworks", extra) for extra in ("", *extras)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        known = find(name)
        if known is None:
            found[name] = name
            continue
        if name != "lmworks":
            found[name] = f"{name}=={known.version}"
        for line in known.requires or ():
            wanted = Requirement(line)
            there = wanted.marker is None or wanted.marker.evaluate({**LINUX, **environment, "extra": extra})
            if not there:
                continue
            other = canonicalize_name(wanted.name)
            if find(other) is None and (wanted.marker is None or wanted.marker.evaluate({"extra": extra})):
                raise InputError(f"the package {other} is not installed, so its version is not known",
                                 fix=f'pip install "lmworks[{",".join(extras)}]"')  # fmt: skip
            waiting += [(other, more) for more in ("", *wanted.extras)]
    return [found[name] for name in sorted(found)]


def find(name: str) -> Distribution | None:
    """Return an installed package's description, or None."""
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None
