"""The proof: it holds for an honest folder, and every kind of tampering makes it fail and name the file."""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import numpy_helper
from tiny_page import PROMPTS, copy_folder, facts, made_folder

from lmworks.base.errors import FormatError, InputError
from lmworks.export.receipt import check_receipt, write_receipt
from lmworks.export.selftest import Answer, compare, from_base64, record_selftest, to_base64
from lmworks.export.verify import verify
from lmworks.export.verify_js import Broken, ask_browser, ask_node
from lmworks.export.web import write_page
from lmworks.runtime.torch_runtime import TorchRuntime
from lmworks.tokens.tokenizer import Tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the tiny model, to change."""
    return copy_folder(tmp_path / "model")


def perturb_graph(folder: Path, name: str = "model.onnx") -> None:
    """Change one weight of a graph a little."""
    path = folder / "onnx" / name
    graph = onnx.load(path)
    largest = max(graph.graph.initializer, key=lambda item: np.prod(item.dims))
    values = numpy_helper.to_array(largest).copy()
    values.flat[: values.size // 2] += 60 if values.dtype == np.int8 else 0.05
    largest.CopyFrom(numpy_helper.from_array(values, largest.name))
    onnx.save(graph, path)


def swap_merge(folder: Path) -> None:
    """Exchange two merges of the tokenizer that a prompt needs in their order."""
    path = folder / "tokenizer.json"
    honest = path.read_text()
    known = [Tokenizer.from_file(path).encode(text) for text in PROMPTS]
    for one, other in combinations(range(len(json.loads(honest)["model"]["merges"])), 2):  # a few are enough
        value = json.loads(honest)
        merges = value["model"]["merges"]
        merges[one], merges[other] = merges[other], merges[one]
        path.write_text(json.dumps(value, ensure_ascii=False))
        if [Tokenizer.from_file(path).encode(text) for text in PROMPTS] != known:
            return
    raise AssertionError("no exchange of two merges changes the ids")


def change_asset(folder: Path) -> None:
    """Change the page."""
    path = folder / "web" / "engine.js"
    path.write_text(path.read_text().replace("do_sample: temperature > 0", "do_sample: true"))


# -- the record ------------------------------------------------------------------------------------------------------


def test_the_record_is_what_transformers_generates() -> None:
    """C12: the same model, other text. transformers' own greedy loop over our folder is the independent reference."""
    selftest = json.loads((made_folder() / "selftest.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(made_folder(), dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(made_folder())
    assert [entry["text"] for entry in selftest["prompts"]] == list(PROMPTS)
    for entry in selftest["prompts"]:
        ids = tokenizer(entry["text"])["input_ids"]
        assert ids == entry["ids"]
        row = torch.tensor([ids])
        for token in entry["tokens"]:
            with torch.inference_mode():
                logits = model(row, use_cache=False).logits[0, -1]
            assert int(logits.argmax()) == token
            row = torch.cat([row, logits.argmax().view(1, 1)], dim=1)
        assert len(entry["tokens"]) == 32
        assert entry["continuation"] == tokenizer.decode(entry["tokens"], skip_special_tokens=True)
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1]
        np.testing.assert_allclose(from_base64(entry["logits"]), logits.numpy(), atol=1e-5)


def test_a_prompt_that_does_not_fit_is_refused() -> None:
    runtime, tokenizer = TorchRuntime(made_folder()), Tokenizer.from_pretrained(made_folder())
    with pytest.raises(InputError, match="does not fit"):
        record_selftest(runtime, tokenizer, ["The small bird sees the river. " * 20])
    with pytest.raises(InputError, match="does not fit"):
        record_selftest(runtime, tokenizer, [""])


def test_logits_survive_the_file_exactly() -> None:
    values = np.array([0.1, -3e38, 1e-40, 7.0], np.float32)
    assert from_base64(to_base64(values)).tobytes() == values.tobytes()


def one_prompt() -> dict[str, object]:
    """Return a record of one prompt."""
    logits = to_base64(np.array([0.0, 1.0, 2.0], np.float32))
    prompts = [{"text": "a", "ids": [1], "tokens": [2, 1, 0, 2], "logits": logits}]
    return {"prompts": prompts, "tolerance": {"fp32": 1e-4, "int8": 0.5}}


@pytest.mark.parametrize(
    ("answer", "dtype", "passed", "tokens_equal"),
    [
        (Answer([1], [2, 1, 0, 2], np.array([0, 1, 2], np.float32)), "fp32", True, [4, 4]),
        (Answer([1], [2, 1, 0, 2], np.array([0, 1, 2.0002], np.float32)), "fp32", False, [4, 4]),
        (Answer([1], [2, 1, 0, 1], np.array([0, 1, 2], np.float32)), "fp32", False, [3, 4]),
        (Answer([1], [2, 1, 0], np.array([0, 1, 2], np.float32)), "fp32", False, [3, 4]),
        (Answer([1], [2, 1, 1, 1], np.array([0, 1, 2.4], np.float32)), "int8", True, [2, 4]),
        (Answer([1], [2, 1, 0, 2], np.array([0, 1, 2.8], np.float32)), "int8", True, [4, 4]),
        (Answer([1], [2, 1, 0, 2], np.array([0, 1, 2.9], np.float32)), "int8", False, [4, 4]),
        (Answer([0], [2, 1, 0, 2], np.array([0, 1, 2], np.float32)), "int8", False, [4, 4]),
        (Answer([1], [2, 1, 0, 2], np.array([0, np.nan, 2], np.float32)), "int8", False, [4, 4]),
        (Answer([1], [2, 1, 0, 2], np.array([0, 1], np.float32)), "int8", False, [4, 4]),
    ],
)
def test_fp32_is_held_to_every_token_and_int8_to_its_logits(
    answer: Answer, dtype: str, passed: bool, tokens_equal: list[int]
) -> None:
    """C20: an export with large differences must fail, not warn."""
    cell = compare([answer], one_prompt(), dtype=dtype)
    assert cell["passed"] is passed
    assert cell["tokens_equal"] == tokens_equal
    assert ("problem" in cell) is not passed
    json.dumps(cell, allow_nan=False)


# -- an honest folder ------------------------------------------------------------------------------------------------


def test_an_honest_folder_passes(folder: Path) -> None:
    certificate = verify(folder, runtimes=("torch", "onnx"))
    assert certificate["passed"] is True
    assert certificate["problems"] == []
    assert certificate["checked"]["prompts"] == 8
    assert certificate["runtimes"]["torch"]["fp32"]["tokens_equal"] == [256, 256]
    for dtype in ("fp32", "int8"):
        cell = certificate["runtimes"]["onnx"][dtype]
        assert cell["passed"] is True
        assert cell["max_abs_diff"] <= cell["tolerance"]
    assert certificate["runtimes"]["onnx"]["fp32"]["tokens_equal"] == [256, 256]
    assert certificate["runtimes"]["onnx"]["fp32"]["max_abs_diff"] < 1e-4
    assert certificate["receipt"]["passed"] is True
    assert certificate["receipt"]["unlisted"] == []
    assert json.loads((folder / "certificate.json").read_text()) == certificate
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
    assert verify(folder, runtimes=("torch",))["passed"] is True, "a certificate does not spoil the folder"


@pytest.mark.node
def test_node_gives_the_same_tokens(folder: Path) -> None:
    """C10, C11, C12: transformers.js reads the folder, tokenizes as Python does and writes the same text."""
    certificate = verify(folder, runtimes=("node",))
    assert certificate["problems"] == []
    cells = certificate["runtimes"]["node"]
    assert cells["fp32"]["tokens_equal"] == [256, 256]
    assert cells["fp32"]["max_abs_diff"] < 1e-4
    assert cells["int8"]["passed"] is True
    assert cells["fp32"]["texts_equal"] == [15, 15]


@pytest.mark.browser
def test_chromium_gives_the_same_tokens(folder: Path) -> None:
    """C12, C15: through the page's own worker and library, with every other host unreachable."""
    certificate = verify(folder, runtimes=("browser",))
    assert certificate["problems"] == []
    for threads in ("browser", "browser-2"):
        cells = certificate["runtimes"][threads]
        assert cells["fp32"]["tokens_equal"] == [256, 256]
        assert cells["fp32"]["max_abs_diff"] < 1e-4
        assert cells["int8"]["passed"] is True


@pytest.mark.slow
@pytest.mark.browser
def test_chromium_gives_the_same_first_tokens_on_webgpu(folder: Path) -> None:
    """Where it is asked for: a software adapter is slow, so little is asked; whole numbers are not for it."""
    certificate = verify(folder, runtimes=("webgpu",))
    cells = certificate["runtimes"]["webgpu"]
    assert cells["fp32"]["tokens_equal"] == [8, 8]
    assert "skipped" in cells["int8"]
    assert certificate["passed"], certificate["problems"]


# -- tampering: the receipt names the file ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tamper", "name"),
    [
        (perturb_graph, "onnx/model.onnx"),
        (lambda folder: perturb_graph(folder, "model_quantized.onnx"), "onnx/model_quantized.onnx"),
        (swap_merge, "tokenizer.json"),
        (change_asset, "web/engine.js"),
        (lambda folder: (folder / "web/vendor/transformers.min.js").unlink(), "web/vendor/transformers.min.js"),
        (lambda folder: (folder / "index.html").write_text(""), "index.html"),
    ],
    ids=["graph", "quantized graph", "merge", "asset", "missing file", "page"],
)
def test_a_changed_file_fails_and_is_named(tamper: Callable[[Path], None], name: str, folder: Path) -> None:
    tamper(folder)
    certificate = verify(folder, runtimes=("onnx",))
    assert certificate["passed"] is False
    assert [problem for problem in certificate["problems"] if problem.startswith(name)]
    assert certificate["receipt"]["changed"] + certificate["receipt"]["missing"] == [name]


def test_a_page_older_than_its_graphs_is_refused(folder: Path) -> None:
    """The graphs were exported again into the folder: the page would call them damaged."""
    perturb_graph(folder)
    write_receipt(folder, {})
    with pytest.raises(FormatError, match="page is older") as caught:
        verify(folder, runtimes=("onnx", "browser"))
    assert caught.value.found == "onnx/model.onnx"


def test_verdicts_stand_in_the_receipt(folder: Path) -> None:
    certificate = verify(folder, runtimes=("onnx", "node"), node="no-such-node")
    receipt = json.loads((folder / "lmworks.json").read_text())
    assert receipt["certificate"] == {
        "passed": True,
        "date": certificate["checked"]["date"],
        "runtimes": {
            "onnx": {"fp32": "passed", "int8": "passed"},
            "node": {"fp32": "skipped", "int8": "skipped"},
        },
    }
    assert check_receipt(folder)["passed"]


# -- tampering with a receipt to match: the answers tell -------------------------------------------------------------


def test_a_perturbed_weight_fails_although_the_receipt_was_made_again(folder: Path) -> None:
    perturb_graph(folder)
    write_receipt(folder, {})
    certificate = verify(folder, runtimes=("onnx",))
    assert certificate["receipt"]["passed"] is True
    assert certificate["passed"] is False
    assert certificate["runtimes"]["onnx"]["fp32"]["passed"] is False
    assert certificate["runtimes"]["onnx"]["int8"]["passed"] is True
    assert any("onnx fp32" in problem for problem in certificate["problems"])


def test_a_perturbed_quantized_weight_fails_by_its_logits(folder: Path) -> None:
    perturb_graph(folder, "model_quantized.onnx")
    write_receipt(folder, {})
    certificate = verify(folder, runtimes=("onnx",))
    assert certificate["runtimes"]["onnx"]["fp32"]["passed"] is True
    cell = certificate["runtimes"]["onnx"]["int8"]
    assert cell["passed"] is False
    assert cell["rms_diff"] > cell["tolerance"]


def test_a_swapped_merge_fails_although_the_receipt_was_made_again(folder: Path) -> None:
    """C11: other tokens than when the model was made."""
    swap_merge(folder)
    write_receipt(folder, {})
    certificate = verify(folder, runtimes=("onnx",))
    assert certificate["passed"] is False
    equal, checked = certificate["selftest"]["ids_equal"]
    assert equal < checked
    assert any("tokenizer.json" in problem for problem in certificate["problems"])


def test_changed_weights_of_torch_fail(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.05
    save_file(tensors, path, metadata={"format": "pt"})
    write_receipt(folder, {})
    certificate = verify(folder, runtimes=("torch", "onnx"))
    assert certificate["runtimes"]["torch"]["fp32"]["passed"] is False
    assert certificate["runtimes"]["onnx"]["fp32"]["passed"] is True
    assert any("model.safetensors" in problem for problem in certificate["problems"])


def test_a_changed_record_fails(folder: Path) -> None:
    path = folder / "selftest.json"
    selftest = json.loads(path.read_text())
    selftest["prompts"][3]["tokens"][7] += 1
    path.write_text(json.dumps(selftest))
    write_receipt(folder, {})
    certificate = verify(folder, runtimes=("torch", "onnx"))
    assert certificate["selftest"]["tokens_equal"] == [255, 256]
    assert certificate["runtimes"]["onnx"]["fp32"]["tokens_equal"] == [255, 256]
    assert certificate["passed"] is False


@pytest.mark.node
def test_node_sees_a_swapped_merge_and_a_perturbed_weight(folder: Path) -> None:
    selftest = json.loads((folder / "selftest.json").read_text())
    swap_merge(folder)
    given = ask_node(folder, selftest, ["fp32"])["fp32"]
    assert any(a["ids"] != b["ids"] for a, b in zip(given["answers"], selftest["prompts"], strict=True))
    shutil.copy(made_folder() / "tokenizer.json", folder / "tokenizer.json")
    perturb_graph(folder)
    write_receipt(folder, {})
    certificate = verify(folder, runtimes=("node",))
    assert certificate["runtimes"]["node"]["fp32"]["passed"] is False
    assert certificate["runtimes"]["node"]["int8"]["passed"] is True


@pytest.mark.browser
def test_chromium_refuses_a_damaged_graph_and_still_runs_the_other(folder: Path) -> None:
    """A failed load spoils every later one in the same worker; a fresh worker does not know of it."""
    perturb_graph(folder)
    cells = verify(folder, runtimes=("browser",))["runtimes"]["browser"]
    assert cells["fp32"]["passed"] is False
    assert "onnx/model.onnx is damaged" in cells["fp32"]["problem"]
    assert cells["int8"]["passed"] is True


@pytest.mark.slow
@pytest.mark.browser
def test_chromium_gives_the_answers_of_the_graph_that_it_was_given(folder: Path) -> None:
    """The page was made again over a perturbed graph: nothing is damaged, and the answers tell."""
    perturb_graph(folder)
    selftest = json.loads((folder / "selftest.json").read_text())
    write_page(folder, title="x", facts=facts(), selftest=selftest)
    write_receipt(folder, {})
    cells = verify(folder, runtimes=("browser",))["runtimes"]["browser"]
    assert cells["fp32"]["passed"] is False
    assert cells["fp32"]["max_abs_diff"] > cells["fp32"]["tolerance"]


@pytest.mark.slow
@pytest.mark.browser
def test_chromium_runs_the_page_of_the_folder(folder: Path) -> None:
    """A page that samples where it should be greedy, or whose worker is broken, fails although the graph is right."""
    change_asset(folder)
    write_receipt(folder, {})
    cells = verify(folder, runtimes=("browser",))["runtimes"]["browser"]
    assert cells["fp32"]["passed"] is False
    assert cells["fp32"]["tokens_equal"][0] < 256
    (folder / "web" / "worker.js").write_text("this is not a script")
    write_receipt(folder, {})
    certificate = verify(folder, runtimes=("browser",), timeout=60)
    assert certificate["passed"] is False
    assert all(not cell["passed"] for cell in certificate["runtimes"]["browser"].values())


# -- what is missing -------------------------------------------------------------------------------------------------


def test_what_is_not_installed_is_skipped_and_not_passed(folder: Path, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LMWORKS_CHROMIUM", raising=False)
    certificate = verify(folder, runtimes=("node", "browser"), node="no-such-node", chromium=tmp_path / "no-chromium")
    for runtime in ("node", "browser"):
        for dtype in ("fp32", "int8"):
            cell = certificate["runtimes"][runtime][dtype]
            assert "not found" in cell["skipped"]
            assert "install" in cell["install"]
            assert "passed" not in cell
    assert certificate["passed"] is False, "nothing was checked"
    certificate = verify(folder, runtimes=("onnx", "node"), node="no-such-node")
    assert certificate["passed"] is True
    assert "skipped" in certificate["runtimes"]["node"]["fp32"]


@pytest.mark.node
def test_missing_packages_are_skipped_with_the_line_that_installs_them(
    folder: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("LMWORKS_NODE_MODULES", str(tmp_path))
    cell = verify(folder, runtimes=("node",))["runtimes"]["node"]["fp32"]
    assert "@huggingface/transformers" in cell["skipped"]
    assert cell["install"].startswith("npm ci --ignore-scripts")


def test_bad_arguments_are_input_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no runtime 'brwser'") as caught:
        verify(folder, runtimes=("torch", "brwser"))
    assert caught.value.fix == 'did you mean "browser"?'
    with pytest.raises(InputError, match="no dtype 'fp31'") as caught:
        verify(folder, dtypes=("fp31",))
    assert caught.value.fix == 'did you mean "fp32"?'
    with pytest.raises(InputError, match="holds no q4 graph"):
        verify(folder, dtypes=("q4",))
    with pytest.raises(InputError, match="runtime"):
        verify(folder, runtimes=())
    with pytest.raises(InputError, match="no such model folder"):
        verify(tmp_path / "nothing")
    (folder / "selftest.json").write_text('{"prompts": []}')
    certificate = verify(folder, runtimes=("torch",))  # the receipt says that the file was changed
    assert not certificate["passed"] and "selftest.json" in certificate["problems"][0]
    (folder / "lmworks.json").unlink()
    with pytest.raises(FormatError, match="prompts"):
        verify(folder, runtimes=("torch",))
    (folder / "selftest.json").unlink()
    with pytest.raises(FormatError, match="selftest"):
        verify(folder, runtimes=("torch",))


def stand_in(path: Path, script: str) -> Path:
    """Write an executable shell script."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_browser_that_hangs_is_ended_with_its_children(folder: Path, tmp_path: Path) -> None:
    selftest = json.loads((folder / "selftest.json").read_text())
    pid_file = tmp_path / "pid"
    hangs = stand_in(tmp_path / "chromium", f"sleep 300 & echo $! > '{pid_file}'; wait")
    started = time.monotonic()
    with pytest.raises(Broken, match="no answer"):
        ask_browser(folder, selftest, ["fp32"], chromium=hangs, timeout=1)
    assert time.monotonic() - started < 20
    child = int(pid_file.read_text())
    with pytest.raises(ProcessLookupError):
        for _ in range(50):
            os.kill(child, 0)
            time.sleep(0.1)


def test_a_browser_or_a_node_that_crashes_fails(folder: Path, tmp_path: Path, monkeypatch) -> None:
    crashes = stand_in(tmp_path / "crashes", "echo a crash >&2; exit 3")
    modules = tmp_path / "node_modules"
    (modules / "@huggingface/transformers").mkdir(parents=True)
    (modules / "@huggingface/transformers/package.json").write_text("{}")
    certificate = verify(folder, runtimes=("node", "browser"), node=crashes, node_modules=modules, chromium=crashes)
    assert certificate["passed"] is False
    assert "a crash" in certificate["runtimes"]["node"]["fp32"]["problem"]
    assert "a crash" in certificate["runtimes"]["browser"]["int8"]["problem"]


# -- the receipt -----------------------------------------------------------------------------------------------------


def test_the_receipt_sees_every_change(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "certificate.json").write_text("{}")
    receipt = write_receipt(tmp_path, {"seed": 7}, exclude=("lmworks.json", "certificate.json", "kept"))
    assert receipt["seed"] == 7
    assert sorted(receipt["files"]) == ["b.txt", "sub/a.txt"]
    assert check_receipt(tmp_path)["passed"] is True
    (tmp_path / "certificate.json").write_text("other")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "x").write_text("x")
    assert check_receipt(tmp_path) == {"passed": True, "files": 2, "changed": [], "missing": [], "unlisted": []}
    (tmp_path / "new.txt").write_text("n")
    (tmp_path / "sub" / "a.txt").write_text("A")
    (tmp_path / "b.txt").unlink()
    found = check_receipt(tmp_path)
    assert found == {
        "passed": False,
        "files": 2,
        "changed": ["sub/a.txt"],
        "missing": ["b.txt"],
        "unlisted": ["new.txt"],
    }


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"files": []}', '{"files": {}}', '{"files": {"a": 1}}', '{"files": {"../x": {"sha256": "0"}}}'],
)
def test_a_receipt_that_cannot_be_used_does_not_pass(text: str, tmp_path: Path) -> None:
    (tmp_path / "lmworks.json").write_text(text)
    assert check_receipt(tmp_path)["passed"] is False
    (tmp_path / "lmworks.json").unlink()
    assert "missing" in check_receipt(tmp_path)["problem"]
