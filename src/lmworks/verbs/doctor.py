"""What this machine and this installation offer, what is wrong with them, and the line that mends it.

Packages are read from their metadata; torch and onnxruntime are imported only in processes of their own, so that a
broken one is a finding instead of the end. No token is ever printed.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, NamedTuple

from lmworks import __version__
from lmworks.base.files import free_bytes
from lmworks.base.hub import OFFLINE, is_true, redact
from lmworks.base.hub_cache import cache_folder, home_folder
from lmworks.base.report import Report, Table
from lmworks.base.threads import CGROUP, read_memory, read_quota, thread_count

PACKAGES = (
    "numpy safetensors torch torchvision onnxruntime onnx tokenizers sentencepiece huggingface_hub pillow jinja2 "
    "transformers fastapi"
).split()
FEATURES = {  # as Linux spells them: what they speed up
    **dict.fromkeys(("amx_bf16", "avx512_bf16", "bf16", "svebf16"), "bf16"),
    **dict.fromkeys(("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp"), "int8"),
    **dict.fromkeys(("avx2", "fma", "avx512f", "asimd", "sve"), "fp32"),
}
LITTLE_MEMORY, LITTLE_DISK = 2e9, 2e9  # bytes
ASK_TORCH = """
import json, torch
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
print(json.dumps({"threads": torch.get_num_threads(), "cuda": names}))
"""
ASK_ONNX = "import json, onnxruntime; print(json.dumps({'providers': onnxruntime.get_available_providers()}))"


class Finding(NamedTuple):
    """One thing that was looked at; `status` is ok, absent (and not needed), warning or broken."""

    name: str
    status: str
    found: str
    fix: str = ""


def examine(*, here: str | Path = ".") -> Report:
    """Look at the installation and the machine; `values["passed"]` is False where something is broken."""
    findings = [
        Finding("lmworks", "ok", f"{__version__}, Python {platform.python_version()}, {platform.platform()}"),
        *look_at_packages(),
        *look_at_torchvision(),
        *look_at_extras(),
        *look_at_processors(),
        *look_at_memory(),
        *look_at_cache(),
        look_at_disk("disk here", Path(here).absolute()),
        *look_at_settings(),
        *look_at_javascript(),
    ]
    values = {
        "passed": not any(finding.status == "broken" for finding in findings),
        "versions": {"lmworks": __version__, "python": platform.python_version(), **read_versions()},
        "findings": [finding._asdict() for finding in findings],
    }
    rows = tuple((finding.name, finding.status, finding.found) for finding in findings)
    notes = tuple(f"{finding.name}: {finding.fix}" for finding in findings if finding.fix)
    wrong = sum(finding.status in ("warning", "broken") for finding in findings)
    title = f"lmworks doctor: {'nothing is wrong' if not wrong else f'{wrong} to look at'}"
    return Report(title, values, tables=(Table("Findings", ("what", "status", "found"), rows),), notes=notes)


def read_version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def read_versions() -> dict[str, str]:
    """Return the versions of all packages that decide results."""
    return {package: found for package in PACKAGES if (found := read_version(package))}


def look_at_packages() -> Iterator[Finding]:
    """Import torch and onnxruntime in processes of their own."""
    for package, code in (("torch", ASK_TORCH), ("onnxruntime", ASK_ONNX)):
        if (installed := read_version(package)) is None:
            continue
        told, problem = ask(code)
        if problem:
            again = f"pip install --force-reinstall {package}"
            yield Finding(package, "broken", f"{installed} cannot be imported: {problem}", again)
        elif package == "torch":
            cuda = ", ".join(told["cuda"]) or "no CUDA device is seen"
            yield Finding(package, "ok", f"{installed}, {told['threads']} threads of its own accord, {cuda}")
        else:
            yield Finding(package, "ok", f"{installed}, {', '.join(told['providers'])}")


def ask(code: str) -> tuple[dict[str, Any], str]:
    """Run code in a new process; return what it printed as JSON, and a problem or an empty string."""
    try:
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {}, type(error).__name__
    try:
        return json.loads(run.stdout.splitlines()[-1]), ""
    except (ValueError, IndexError):
        lines = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
        return {}, redact(lines[-1])[:300]


def look_at_torchvision() -> Iterator[Finding]:
    """Compare torchvision's requirement with torch, from metadata only: a wrong one breaks whatever imports it."""
    torchvision, torch = read_version("torchvision"), read_version("torch")
    if torchvision is None:
        return
    pins = (re.match(r"torch\s*\(?==\s*([\w.]+)", line) for line in requires("torchvision") or ())
    wanted = next((pin[1] for pin in pins if pin), "")
    fits = torch is not None and wanted in ("", torch.partition("+")[0])
    if torch is not None and fits and torch.partition("+")[2] == torchvision.partition("+")[2]:
        yield Finding("torchvision", "ok", f"{torchvision} (lmworks does not use it)")
    else:
        found = f"{torchvision} was built for torch {wanted}, and torch is {torch}" if not fits else (
            f"{torchvision} and torch {torch} are of different builds"
        )  # fmt: skip
        fix = "pip uninstall torchvision (lmworks does not need it), or install the one that belongs to your torch"
        yield Finding("torchvision", "warning", found, fix)


def look_at_extras() -> Iterator[Finding]:
    """Compare what lmworks asks for, in each of its extras, with what is installed."""
    groups: dict[str, list[str]] = {}
    for line in (requires("lmworks") or ()) if read_version("lmworks") else ():
        marker = re.search(r"extra == ['\"](\w+)['\"]", line)
        groups.setdefault(marker[1] if marker else "", []).append(line.partition(";")[0])
    for extra, lines in groups.items():
        parts = [found.groups() for line in lines if (found := re.match(r"([\w.-]+)(?:.*>=\s*([\w.]+))?", line))]
        wanted = {package: least for package, least in parts if package != "lmworks"}
        if extra == "dev" or not wanted:  # an extra of extras says nothing new
            continue
        installed = {package: read_version(package) for package in wanted}
        lacking = ", ".join(package for package in wanted if installed[package] is None)
        old = ", ".join(f"{p} {installed[p]}" for p, least in wanted.items() if is_older(installed[p], least))
        name, pip = (f"extra {extra}", f'"lmworks[{extra}]"') if extra else ("core", "lmworks")
        if lacking:
            yield Finding(name, "absent" if extra else "broken", f"without {lacking}", f"pip install {pip}")
        elif old:
            yield Finding(name, "warning", f"too old: {old}", f"pip install -U {pip}")
        else:
            yield Finding(name, "ok", ", ".join(f"{package} {found}" for package, found in installed.items()))


def is_older(found: str | None, wanted: str | None) -> bool:
    """Compare the numbers of two versions."""
    if found is None or wanted is None:
        return False
    ours, theirs = ([int(n) for n in re.findall(r"\d+", text.partition("+")[0])[:3]] for text in (found, wanted))
    return ours < theirs


def look_at_processors() -> Iterator[Finding]:
    """Say how many processors may be used, and which of their abilities count."""
    machine, usable = os.cpu_count() or 1, thread_count()
    quota = read_quota(CGROUP)
    limits = [f"a quota of {quota:g}"] if quota is not None and quota < machine else []
    limits += [f"{name}={os.environ[name]}" for name in ("LMWORKS_THREADS", "OMP_NUM_THREADS") if os.environ.get(name)]
    yield Finding("processors", "ok", f"{usable} of {machine} may be used{': ' if limits else ''}{', '.join(limits)}")
    flags = read_flags()
    if flags:
        found = {
            kind: [name for name in FEATURES if FEATURES[name] == kind and name in flags]
            for kind in ("fp32", "bf16", "int8")
        }
        yield Finding("instructions", "ok", "; ".join(f"{k}: {' '.join(v) or 'none'}" for k, v in found.items()))


def read_flags(path: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Return the abilities that Linux lists for the processor; empty elsewhere."""
    try:
        line = re.search(r"^(?:flags|Features)\s*:(.*)$", path.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        return set()
    return set(line[1].split()) if line else set()


def look_at_memory() -> Iterator[Finding]:
    """Say how much memory is free, within the limit of the container."""
    found = read_memory()
    if found is None:
        return
    total, free = found
    status, fix = ("ok", "") if free > LITTLE_MEMORY else ("warning", "close other programs, or choose a smaller model")
    yield Finding("memory", status, f"{free / 1e9:.1f} of {total / 1e9:.1f} GB are free", fix)


def look_at_cache() -> Iterator[Finding]:
    """Say where the Hub's cache is, what it holds, and whether it can be written."""
    cache = cache_folder()
    blobs = (*cache.glob("models--*/blobs/*"), *cache.glob("blobs/*/*"))
    size = sum(path.stat().st_size for path in blobs if path.is_file() and not path.is_symlink())
    held = f"{cache}: {sum(1 for _ in cache.glob('models--*'))} models, {size / 1e9:.2f} GB"
    parent = next(p for p in (cache, *cache.absolute().parents) if p.exists())
    if parent.is_dir() and os.access(parent, os.W_OK | os.X_OK):
        yield Finding("cache", "ok", held)
    else:
        yield Finding("cache", "warning", f"{held}; it cannot be written", "set HF_HOME to a folder you may write to")
    yield look_at_disk("disk of the cache", cache.absolute())


def look_at_disk(name: str, path: Path) -> Finding:
    """Say how much room there is."""
    free = free_bytes(path)
    status, fix = ("ok", "") if free > LITTLE_DISK else ("warning", "free some disk space")
    return Finding(name, status, f"{free / 1e9:.1f} GB are free", fix)


def look_at_settings() -> Iterator[Finding]:
    """Say which variables change where models come from; of a token only whether there is one."""
    offline = [name for name in OFFLINE if is_true(name)]
    if offline:
        yield Finding("network", "ok", f"{', '.join(offline)} forbids to ask the Hub")
    elif os.environ.get("HF_ENDPOINT"):
        yield Finding("network", "ok", f"HF_ENDPOINT={redact(os.environ['HF_ENDPOINT'])}")
    file = Path(os.environ.get("HF_TOKEN_PATH") or home_folder() / "token")
    where = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "a file" if file.is_file() else ""
    status, found = ("ok", f"from {where}") if where else ("absent", "none: only public models can be read")
    yield Finding("token", status, found)


def look_at_javascript() -> Iterator[Finding]:
    """Find what `verify` uses to run models in Node and in a browser."""
    from lmworks.export.verify_js import Absent, find_chromium, find_modules, find_node

    tools: dict[str, Callable[[], Path]] = {
        "node": find_node,
        "npm packages": lambda: find_modules(find_node()),
        "chromium": find_chromium,
    }
    for name, find in tools.items():
        try:
            yield Finding(name, "ok", str(find()))
        except Absent as absent:
            yield Finding(name, "absent", absent.reason, absent.install)
