"""Prove that a model folder is whole and that every runtime gives the answers of torch; write the certificate.

    {passed, checked: {prompts, tokens, date}, problems: [sentence …],
     receipt: {passed, files, changed, missing, unlisted}, selftest: {passed, ids_equal, tokens_equal …},
     runtimes: {torch | onnx | node | browser: {fp32 | int8: cell}}, versions: {…}}

A cell is {tokens_equal: [equal, checked], max_abs_diff, tolerance, passed} or {skipped: reason, install: line}: what
was not run did not pass. fp32 must give every token; a lossy dtype must keep its logits within the tolerance, and its
agreement is reported.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lmworks import __version__
from lmworks.base.errors import FormatError, InputError, LmworksError
from lmworks.base.files import read_json, write_json
from lmworks.export.receipt import RECEIPT, check_receipt
from lmworks.export.selftest import answer, check_form, check_record, compare, failed, record_selftest
from lmworks.export.verify_js import Absent, ask_browser, ask_node, judge
from lmworks.export.web import GRAPHS
from lmworks.runtime.base import Runtime
from lmworks.tokens.tokenizer import Tokenizer

__all__ = ["RUNTIMES", "record_selftest", "verify"]

RUNTIMES = ("torch", "onnx", "node", "browser")
PACKAGES = ("torch", "onnxruntime", "tokenizers", "numpy")
Cell = dict[str, Any]


def verify(
    folder: str | Path,
    *,
    runtimes: Sequence[str] = RUNTIMES,
    node: str | Path | None = None,
    node_modules: str | Path | None = None,
    chromium: str | Path | None = None,
    timeout: float = 600,
) -> dict[str, Any]:
    """Check the folder's receipt, its self-test and each runtime; write certificate.json and return it.

    Raises InputError for an unknown runtime or no folder, FormatError when selftest.json or the tokenizer cannot be
    used. `timeout` (seconds) bounds each JavaScript runtime.
    """
    folder = Path(folder)
    check_arguments(folder, runtimes)
    receipt = check_receipt(folder)
    try:
        selftest = read_json(folder / "selftest.json")
        check_form(selftest)
        tokenizer = Tokenizer.from_pretrained(folder)
    except LmworksError as error:
        if not (receipt["changed"] or receipt["missing"]):
            raise
        return certify(folder, receipt, {"passed": False, "problem": str(error)}, {}, {"prompts": 0, "tokens": 0})
    dtypes = [dtype for dtype, name in GRAPHS.items() if (folder / name).is_file()]
    torch = Opened(lambda: open_torch(folder))
    checks: dict[str, Callable[[], dict[str, Cell]]] = {
        "torch": lambda: {"fp32": python_cell(torch.get, tokenizer, selftest, "fp32")},
        "onnx": lambda: {d: python_cell(lambda d=d: open_onnx(folder, d), tokenizer, selftest, d) for d in dtypes},  # type: ignore[misc]
        "node": lambda: js_cells(
            lambda: ask_node(folder, selftest, dtypes, node=node, modules=node_modules, timeout=timeout),
            selftest,
            dtypes,
        ),
        "browser": lambda: js_cells(
            lambda: ask_browser(folder, selftest, dtypes, chromium=chromium, timeout=timeout), selftest, dtypes
        ),
    }
    cells = {name: checks[name]() for name in runtimes}
    record = check_record(selftest, tokenizer, torch.value)
    tokens = sum(len(prompt["tokens"]) for prompt in selftest["prompts"])
    return certify(folder, receipt, record, cells, {"prompts": len(selftest["prompts"]), "tokens": tokens})


def certify(
    folder: Path,
    receipt: dict[str, Any],
    record: dict[str, Any],
    cells: dict[str, dict[str, Cell]],
    checked: dict[str, Any],
) -> dict[str, Any]:
    """Write certificate.json out of what was found, and return it."""
    found = problems(receipt, record, cells)
    certificate = {
        "passed": not found and any(cell.get("passed") for row in cells.values() for cell in row.values()),
        "checked": {**checked, "date": datetime.now(UTC).isoformat(timespec="seconds")},
        "problems": found,
        "receipt": receipt,
        "selftest": record,
        "runtimes": cells,
        "versions": versions(),
    }
    write_json(folder / "certificate.json", certificate)
    return certificate


def check_arguments(folder: Path, runtimes: Sequence[str]) -> None:
    """Raise InputError for what cannot be verified."""
    if not folder.is_dir():
        raise InputError("there is no such model folder", where=str(folder), fix="check the path")
    unknown = [name for name in runtimes if name not in RUNTIMES]
    if unknown or not runtimes:
        raise InputError("verify does not know this runtime", found=", ".join(unknown), expected=", ".join(RUNTIMES))
    if not (folder / "selftest.json").is_file():
        raise FormatError(
            "the folder holds no selftest.json to compare with", where=str(folder), fix="make it with: lmworks build"
        )


class Opened:
    """A runtime that is opened when it is first needed, once."""

    def __init__(self, make: Callable[[], Runtime]) -> None:
        self.make, self.value = make, None  # type: Callable[[], Runtime], Runtime | None

    def get(self) -> Runtime:
        """Return the runtime."""
        if self.value is None:
            self.value = self.make()
        return self.value


def open_torch(folder: Path) -> Runtime:
    """Open the reference. Raises Absent."""
    if not find_spec("torch"):
        raise Absent("torch is not installed", 'pip install "lmworks[torch]"')
    from lmworks.runtime.torch_runtime import TorchRuntime

    return TorchRuntime(folder)


def open_onnx(folder: Path, dtype: str) -> Runtime:
    """Open a graph in ONNX Runtime. Raises Absent."""
    if not find_spec("onnxruntime"):
        raise Absent("onnxruntime is not installed", 'pip install "lmworks[onnx]"')
    from lmworks.runtime.onnx_runtime import OnnxRuntime

    return OnnxRuntime(folder, dtype=dtype)


def python_cell(get: Callable[[], Runtime], tokenizer: Tokenizer, selftest: Mapping[str, Any], dtype: str) -> Cell:
    """Run the prompts through a Python runtime's generation, cache included."""
    try:
        return compare(answer(get(), tokenizer, selftest["prompts"]), selftest, dtype=dtype)
    except Absent as absent:
        return {"skipped": absent.reason, "install": absent.install}
    except LmworksError as error:
        return failed(selftest, dtype, str(error))


def js_cells(
    ask: Callable[[], dict[str, dict[str, Any]]], selftest: Mapping[str, Any], dtypes: Sequence[str]
) -> dict[str, Cell]:
    """Run the prompts through a JavaScript runtime and judge each dtype."""
    try:
        given = ask()
    except Absent as absent:
        return {dtype: {"skipped": absent.reason, "install": absent.install} for dtype in dtypes}
    except LmworksError as error:
        return {dtype: failed(selftest, dtype, str(error)) for dtype in dtypes}
    return {dtype: judge(given.get(dtype, {"error": "no answer"}), selftest, dtype) for dtype in dtypes}


def problems(
    receipt: Mapping[str, Any], record: Mapping[str, Any], cells: Mapping[str, Mapping[str, Cell]]
) -> list[str]:
    """Return every failure as one sentence that names the file or the runtime."""
    found = [f"{name} was changed after the model was made" for name in receipt["changed"]]
    found += [f"{name} is missing" for name in receipt["missing"]]
    if "problem" in receipt:
        found.append(f"{RECEIPT} cannot be used: {receipt['problem']}")
    if not record["passed"]:
        found.append(str(record["problem"]))
    for runtime, row in cells.items():
        for dtype, cell in row.items():
            if not cell.get("passed", "skipped" in cell):
                found.append(f"{runtime} {dtype}: {cell['problem']}")
    return found


def versions() -> dict[str, str]:
    """Return the versions of what was checked with."""
    found = {"lmworks": __version__, "python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
