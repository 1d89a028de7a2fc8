"""Prove that a model folder is whole and that every runtime gives the answers of torch; write the certificate.

    {passed, family, task, checked: {items, decisions | prompts, tokens, date}, problems: [sentence …],
     receipt: {passed, files, changed, missing, unlisted}, selftest: {passed, ids_equal …},
     runtimes: {torch | onnx | node | browser | browser-2 | webgpu: {fp32 | int8 …: cell}}, versions: {…}}

A cell is {tokens_equal or decisions_equal: [equal, checked], max_abs_diff, rms_diff, tolerance, passed} or {skipped:
reason, install: line}: what was not run did not pass. fp32 must give every token and decision, and each logit within
the tolerance; a lossy dtype must keep the root mean square within it, and its agreement is reported. The browser runs
WebAssembly with one thread and with two.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lmworks import __version__
from lmworks.base.errors import FormatError, InputError, LmworksError, did_you_mean
from lmworks.base.files import read_json, write_json
from lmworks.export.receipt import RECEIPT, add_certificate, check_receipt
from lmworks.export.selftest import record_selftest
from lmworks.export.verify_js import Absent, ask_browser, ask_node
from lmworks.export.verify_record import Cell, Given, Record, check_record_form
from lmworks.models.families import TASKS, read_config, read_kind
from lmworks.runtime.base import Runtime
from lmworks.runtime.onnx_runtime import FILES
from lmworks.tasks.registry import find_task
from lmworks.tokens.tokenizer import Tokenizer

__all__ = ["KNOWN", "RUNTIMES", "check_folder", "record_selftest", "verify"]

RUNTIMES = ("torch", "onnx", "node", "browser")
KNOWN = (*RUNTIMES, "webgpu")  # the last when it is asked for: software adapters are slow
THREADS = {"browser": 1, "browser-2": 2}
ON_WEBGPU = ("fp32", "q4")  # fp16 needs what software adapters lack; whole numbers are for processors
ALIASES = {"q8": "int8"}
SELFTEST, PAGE = "selftest.json", "web/page.json"
PACKAGES = ("torch", "onnxruntime", "tokenizers", "numpy")
EXPORT_FIX = "make it with: lmworks export MODEL --to web (or onnx), or lmworks build"


def verify(
    folder: str | Path,
    *,
    runtimes: Sequence[str] = RUNTIMES,
    dtypes: Sequence[str] | None = None,
    weights: str | Path | None = None,
    node: str | Path | None = None,
    node_modules: str | Path | None = None,
    chromium: str | Path | None = None,
    timeout: float = 600,
) -> dict[str, Any]:
    """Check the folder's receipt, its self-test and each runtime; write certificate.json and return it.

    `dtypes` None: all graphs of the folder. `weights` is the checkpoint, or the adapter, that torch runs where the
    folder holds graphs alone. `timeout` (seconds) bounds each JavaScript runtime. Raises InputError for what cannot be
    asked, FormatError where selftest.json, the page or a graph's files do not belong together.
    """
    folder = Path(folder)
    task, found = check_folder(folder, runtimes=runtimes, dtypes=dtypes)
    receipt = check_receipt(folder)
    about = {"family": read_config(folder).model_type, "task": task}
    try:
        selftest = read_json(folder / SELFTEST)
        check_record_form(selftest, task)
        tokenizer = None if task == "image-classification" else Tokenizer.from_pretrained(folder)
    except LmworksError as error:
        if not (receipt["changed"] or receipt["missing"]) or selftest_of_another(folder, task):
            raise
        nothing = {"passed": False, "problem": str(error)}
        return certify(folder, receipt, nothing, {}, {**about, "checked": {"prompts": 0, "tokens": 0}})
    if {"browser", "webgpu"} & set(runtimes):
        check_page(folder, task, receipt)
    unknown = [dtype for dtype in found if dtype not in selftest["tolerance"]]
    if unknown:
        raise FormatError(
            "selftest.json allows no difference for this dtype", where=str(folder), found=", ".join(unknown),
            expected=", ".join(selftest["tolerance"]), fix="export the model again",
        )  # fmt: skip
    record = Record(folder, task, selftest, tokenizer)
    torch = Opened(lambda: open_torch(folder, task, weights))
    node_ask = partial(ask_node, folder, node=node, modules=node_modules, timeout=timeout)
    browser_ask = partial(ask_browser, folder, chromium=chromium, timeout=timeout)
    cells: dict[str, dict[str, Cell]] = {}
    for name in dict.fromkeys(runtimes):
        if name == "torch":
            cells[name] = {"fp32": python_cell(torch.get, record, "fp32")}
        elif name == "onnx":
            cells[name] = {d: python_cell(partial(open_onnx, folder, d), record, d) for d in found}
        elif name == "node":
            cells[name] = js_cells(node_ask, record, found)
        elif name == "webgpu":
            ask, short = partial(browser_ask, device="webgpu"), record.shorten()
            cells[name] = page_cells(ask, short, found, only=ON_WEBGPU)
        else:
            for row, threads in THREADS.items():
                cells[row] = page_cells(partial(browser_ask, threads=threads), record, found)
    again = record.check(torch.value)
    return certify(folder, receipt, again, cells, {**about, "checked": record.counts})


def certify(
    folder: Path,
    receipt: dict[str, Any],
    record: dict[str, Any],
    cells: dict[str, dict[str, Cell]],
    about: dict[str, Any],
) -> dict[str, Any]:
    """Write certificate.json out of what was found, and its verdicts into the receipt; return it."""
    found = problems(receipt, record, cells)
    certificate = {
        "passed": not found and any(cell.get("passed") for row in cells.values() for cell in row.values()),
        **about,
        "checked": {**about["checked"], "date": datetime.now(UTC).isoformat(timespec="seconds")},
        "problems": found,
        "receipt": receipt,
        "selftest": record,
        "runtimes": cells,
        "versions": versions(),
    }
    write_json(folder / "certificate.json", certificate)
    add_certificate(folder, certificate)
    return certificate


def check_folder(
    folder: Path, *, runtimes: Sequence[str] = RUNTIMES, dtypes: Sequence[str] | None = None
) -> tuple[str, list[str]]:
    """Return the folder's task and the dtypes to check; raise InputError or FormatError where they cannot be."""
    if not folder.is_dir():
        raise InputError("there is no such model folder", where=str(folder), fix="check the path")
    unknown = [name for name in runtimes if name not in KNOWN]
    if unknown or not runtimes:
        raise InputError(
            f"there is no runtime {unknown[0]!r}" if unknown else "no runtime was named", expected=", ".join(KNOWN),
            fix=did_you_mean(unknown[0], KNOWN).strip() if unknown else "",
        )  # fmt: skip
    if not (folder / SELFTEST).is_file():
        raise FormatError("the folder holds no selftest.json to compare with", where=str(folder), fix=EXPORT_FIX)
    held = [dtype for dtype, name in FILES.items() if (folder / "onnx" / name).is_file()]
    wanted = held if dtypes is None else [ALIASES.get(dtype, dtype) for dtype in dtypes]
    for dtype in wanted:
        if dtype not in FILES:
            near = did_you_mean(dtype, FILES).strip()
            raise InputError(f"there is no dtype {dtype!r}", expected=", ".join(FILES), fix=near)
        if dtype not in held:
            fix = f"write it: lmworks export MODEL --dtype {dtype}"
            raise InputError(f"the folder holds no {dtype} graph", where=str(folder), found=", ".join(held), fix=fix)
    config = read_json(folder / "config.json")
    announced = (config.get("transformers.js_config") or {}).get("use_external_data_format") or {}
    for dtype in wanted:
        count = announced.get(FILES[dtype], 0)
        names = [f"{FILES[dtype]}_data" + (f"_{i}" if i else "") for i in range(int(count))]
        missing = [name for name in names if not (folder / "onnx" / name).is_file()]
        if missing:
            raise FormatError(
                f"the weights of the {dtype} graph are missing", where=str(folder / "onnx"),
                found=f"no {', '.join(missing)}", expected=f"them beside {FILES[dtype]}, which only names them",
                fix="copy the whole folder, or export the model again",
            )  # fmt: skip
    return find_task(read_kind(read_config(folder))), wanted


def selftest_of_another(folder: Path, task: str) -> bool:
    """Say whether selftest.json is whole and of another task: then nothing here was damaged, it was mixed up."""
    try:
        return bool(read_json(folder / SELFTEST).get("task", "text-generation") != task)
    except LmworksError:
        return False


def check_page(folder: Path, task: str, receipt: Mapping[str, Any]) -> None:
    """Raise FormatError for a page that was made over other files than the folder holds now."""
    if not (folder / PAGE).is_file() or not receipt["passed"]:
        return  # there is no page, or the receipt says what was changed
    page, listed = read_json(folder / PAGE), read_json(folder / RECEIPT)["files"]
    files = page.get("files") or {}
    stale = [name for name, entry in files.items() if listed.get(name, {}).get("sha256") != entry.get("sha256")]
    if page.get("task", task) != task:
        stale = [f"a page for {page['task']}"]
    if stale:
        raise FormatError(
            "the page is older than the files beside it and would refuse them", where=str(folder / PAGE),
            found=", ".join(stale[:4]), expected="the files that the page was made with",
            fix="export the model again with --to web, or leave the browser out: --runtimes torch,onnx,node",
        )  # fmt: skip


class Opened:
    """A runtime that is opened when it is first needed, once."""

    def __init__(self, make: Callable[[], Runtime]) -> None:
        self.make, self.value = make, None  # type: Callable[[], Runtime], Runtime | None

    def get(self) -> Runtime:
        """Return the runtime."""
        if self.value is None:
            self.value = self.make()
        return self.value


def open_torch(folder: Path, task: str, weights: str | Path | None) -> Runtime:
    """Open the reference. Raises Absent."""
    if not find_spec("torch"):
        raise Absent("torch is not installed", 'pip install "lmworks[torch]"')
    from lmworks.export.onnx_folder import merged
    from lmworks.runtime.torch_runtime import TorchRuntime

    if weights is None and not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        line = f"name the checkpoint: lmworks verify {folder} --weights MODEL"
        raise Absent("the folder holds graphs, not the weights that torch reads", line)
    with merged(Path(weights or folder)) as place:
        return TorchRuntime(place, head=TASKS[task])


def open_onnx(folder: Path, dtype: str) -> Runtime:
    """Open a graph in ONNX Runtime. Raises Absent."""
    if not find_spec("onnxruntime"):
        raise Absent("onnxruntime is not installed", 'pip install "lmworks[onnx]"')
    from lmworks.runtime.onnx_runtime import OnnxRuntime

    return OnnxRuntime(folder, dtype=dtype)


def python_cell(get: Callable[[], Runtime], record: Record, dtype: str) -> Cell:
    """Ask a Python runtime what was recorded."""
    try:
        return record.run(get(), dtype)
    except Absent as absent:
        return {"skipped": absent.reason, "install": absent.install}
    except LmworksError as error:
        return record.failed(dtype, str(error))


def js_cells(
    ask: Callable[[Path | Mapping[str, Any], Sequence[str]], dict[str, Given]], record: Record, dtypes: Sequence[str]
) -> dict[str, Cell]:
    """Ask a JavaScript runtime what was recorded and judge each dtype."""
    try:
        given = ask(record.work, dtypes)
    except Absent as absent:
        return {dtype: {"skipped": absent.reason, "install": absent.install} for dtype in dtypes}
    except LmworksError as error:
        return {dtype: record.failed(dtype, str(error)) for dtype in dtypes}
    return {dtype: record.judge(given.get(dtype, {"error": "no answer"}), dtype) for dtype in dtypes}


def page_cells(
    ask: Callable[..., dict[str, Given]], record: Record, dtypes: Sequence[str], *, only: Sequence[str] | None = None
) -> dict[str, Cell]:
    """Ask through the folder's page, in the dtypes that it offers and, of those, in `only` these."""
    cells: dict[str, Cell] = {}
    if not (record.folder / PAGE).is_file():
        skipped = {"skipped": "the folder holds no page", "install": "lmworks export MODEL --to web"}
        return {dtype: dict(skipped) for dtype in dtypes}
    offered = read_json(record.folder / PAGE).get("dtypes") or {}
    for dtype in dtypes:
        if dtype not in offered:
            cells[dtype] = {"skipped": "the page does not offer this dtype", "install": "lmworks export MODEL --to web"}
        elif only is not None and dtype not in only:
            cells[dtype] = {"skipped": f"here only {' and '.join(only)} are checked", "install": "a graphics card"}
    rest = [dtype for dtype in dtypes if dtype not in cells]
    given = js_cells(ask, record, rest) if rest else {}
    return {dtype: cells.get(dtype) or given[dtype] for dtype in dtypes}


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
