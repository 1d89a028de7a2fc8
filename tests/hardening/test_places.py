"""Where files may lie, and what they may ask for: one test for each way in that was found, so that it stays shut."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from strangers import COMMIT, adapter, bert, cached, gpt2, graph, llama, monitored, ngram, older, receipt, shards

from lmworks.api import load
from lmworks.base.errors import FormatError, InputError, LmworksError
from lmworks.base.files import own_file, read_json, read_own
from lmworks.base.hub_cache import find_cached
from lmworks.base.onnx_file import check_onnx
from lmworks.cli import main
from lmworks.evaluation.monitor import read_monitor
from lmworks.export.hf import export as export_hf
from lmworks.export.receipt import check_receipt
from lmworks.models.checkpoint import load_model
from lmworks.models.families import read_config
from lmworks.tokens.tokenizer import Tokenizer
from lmworks.training.adapter_files import open_adapter
from lmworks.verbs import ngram_folder
from lmworks.verbs.inspection import inspect_folder


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_links_may_lead_into_the_folder_and_the_cache_alone(tmp_path: Path) -> None:
    folder, outside = tmp_path / "model", tmp_path / "outside"
    bert(folder)
    outside.mkdir()
    (folder / "real.json").write_text("{}")
    (folder / "inside.json").symlink_to("real.json")
    assert own_file(folder / "inside.json") == folder / "inside.json"
    (tmp_path / "link to the folder").symlink_to(folder)
    load_model(tmp_path / "link to the folder", "SequenceClassification")
    cases = {"absolute": "/etc/passwd", "up": "../outside/x", "loop": "loop", "dangling": "../outside/nothing"}
    (outside / "x").write_text("{}")
    for name, target in cases.items():
        (folder / name).symlink_to(target)
        with pytest.raises(FormatError, match=rf"{name} is a link"):
            own_file(folder / name)
    (outside / "blobs").mkdir()  # a folder of this name is no cache
    (outside / "blobs" / "x").write_text("{}")
    (folder / "false").symlink_to("../outside/blobs/x")
    with pytest.raises(FormatError, match="false is a link"):
        own_file(folder / "false")
    cache = cached(tmp_path / "hub")
    snapshot = cache / "models--org--name" / "snapshots" / COMMIT
    assert load(snapshot, runtime="torch")(["a cat"])
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(folder / "config.json")
    with pytest.raises(FormatError, match=r"config\.json is a link that leads out"):
        read_config(snapshot)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_every_file_of_a_model_is_its_own(tmp_path: Path, name: str) -> None:
    """A file that is a link to another place is refused whatever it holds, and so are pipes, which would block."""
    folder = bert(tmp_path / "model")
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match=rf"{name} is a link that leads out"):
        load(folder, runtime="torch")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    start = time.monotonic()
    try:  # what is no file counts as missing where it may be missing
        load(folder, runtime="torch")(["a cat"])
    except FormatError as error:
        assert name in str(error)
    assert time.monotonic() - start < 5


def test_the_older_vocabularies_too(tmp_path: Path) -> None:
    for make, name in ((older, "vocab.txt"), (llama, "tokenizer.model")):
        folder = make(tmp_path / name)
        (folder / name).rename(tmp_path / "elsewhere")
        (folder / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(FormatError, match=rf"{name} is a link that leads out"):
            Tokenizer.from_pretrained(folder)


def test_an_index_names_files_beside_it(tmp_path: Path) -> None:
    folder = shards(tmp_path / "model")
    path = folder / "model.safetensors.index.json"
    whole = json.loads(path.read_text())["weight_map"]
    shutil.copyfile(folder / "model-00001-of-00003.safetensors", tmp_path / "x.safetensors")
    first = next(iter(whole))
    for name in ("../x.safetensors", str(tmp_path / "x.safetensors"), "..", "", "a\0b.safetensors",
                 "\\\\host\\x.safetensors", "x.bin", ".hidden.safetensors", "sub/x.safetensors"):  # fmt: skip
        change(path, weight_map={**whole, first: name})
        with pytest.raises(FormatError, match="the index points outside its folder"):
            load_model(folder, "SequenceClassification")


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "sub/x", "..", "", "a\\b", "nothing"])
def test_a_graph_keeps_its_weights_beside_it(tmp_path: Path, location: str) -> None:
    """CVE-2022-25882, CVE-2024-27318 and their kin: checked before ONNX Runtime opens the file."""
    folder = graph(tmp_path / "model", external=True)
    assert load(folder, runtime="onnx")(["a cat"])
    path = folder / "onnx" / "model.onnx"
    data = next(folder.glob("onnx/model.onnx_data*"))
    shutil.copyfile(data, folder / "secret")
    model = onnx.load(str(path), load_external_data=False)
    moved = 0
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value, moved = location, moved + 1
    assert moved > 5
    path.write_bytes(model.SerializeToString())
    with pytest.raises(FormatError, match=r"model\.onnx cannot be loaded: the tensor \S+ lies in"):
        load(folder, runtime="onnx")
    path.unlink()
    path.symlink_to(folder / "secret")
    with pytest.raises(FormatError, match=r"model\.onnx is a link"):
        load(folder, runtime="onnx")


def test_tensors_deep_inside_a_graph_are_found_too(tmp_path: Path) -> None:
    """In a branch, an attribute, a function, a sparse tensor; and the data must hold what the graph says."""
    helper, proto = onnx.helper, onnx.TensorProto

    def away(location: str, **more: str) -> onnx.TensorProto:
        made = onnx.TensorProto(name="t", data_type=proto.FLOAT, dims=[2], data_location=proto.EXTERNAL)
        for key, value in {"location": location, **more}.items():
            made.external_data.add(key=key, value=value)
        return made

    def graph_of(*initializers: onnx.TensorProto, nodes: Any = ()) -> onnx.GraphProto:
        return helper.make_graph(list(nodes), "g", [], [], initializer=list(initializers))

    def model_of(made: onnx.GraphProto) -> onnx.ModelProto:
        return helper.make_model(made)

    branch = helper.make_node("If", ["c"], ["y"], then_branch=graph_of(away("../x")), else_branch=graph_of())
    constant = helper.make_node("Constant", [], ["y"], value=away("../x"))
    sparse = graph_of()
    sparse.sparse_initializer.append(onnx.SparseTensorProto(values=away("../x"), indices=onnx.TensorProto(), dims=[9]))
    function = model_of(graph_of())
    function.functions.append(helper.make_function("d", "f", [], ["y"], [constant], []))
    training = model_of(graph_of())
    training.training_info.add(algorithm=graph_of(away("../x")))
    path = tmp_path / "model.onnx"
    hidden = [
        model_of(graph_of(nodes=[branch])),
        model_of(graph_of(nodes=[constant])),
        model_of(sparse),
        function,
        training,
    ]
    (tmp_path / "data").write_bytes(bytes(100))
    sizes = [away("data", offset="96", length="8"), away("data", offset="-8"), away("data", length="x"),
             away("data", offset=str(2**64), length="8")]  # fmt: skip
    for made in (*hidden, *(model_of(graph_of(tensor)) for tensor in sizes)):
        path.write_bytes(made.SerializeToString())
        with pytest.raises(FormatError, match=r"model\.onnx cannot be loaded: the tensor t "):
            check_onnx(path)
    path.write_bytes(model_of(graph_of(away("data", offset="92", length="8"))).SerializeToString())
    check_onnx(path)


def test_an_adapter_with_numbers_that_are_none(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter")
    held = load_file(folder / "adapter_model.safetensors")
    name = next(key for key in held if "lora_A" in key)
    held[name][0, 0] = torch.nan
    save_file(held, folder / "adapter_model.safetensors")
    with pytest.raises(FormatError, match=r"NaN or infinity[\s\S]*adapter_model\.safetensors[\s\S]*lora_A"):
        open_adapter(folder)


def test_weights_with_numbers_that_are_none_are_named(tmp_path: Path) -> None:
    """The answer is refused, and the message says which weights are at fault."""
    for make, task in ((bert, "text-classification"), (gpt2, "text-generation")):
        folder = make(tmp_path / task)
        held = load_file(folder / "model.safetensors")
        name = next(key for key in held if key.endswith(("intermediate.dense.weight", "mlp.c_fc.weight")))
        held[name][0, 0] = torch.nan
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(FormatError, match=r"not (numbers|finite)[\s\S]*model\.safetensors"):
            load(folder, task, runtime="torch")(["a cat"])
    with pytest.raises(FormatError, match=r"transformer\.layers\.0\.mlp"):
        load(tmp_path / "text-classification", runtime="torch")(["a cat"])


def test_code_that_a_folder_names_is_reported_and_not_passed_on(tmp_path: Path) -> None:
    """auto_map, and keys by which other libraries fetch kernels (CVE-2026-4372), end here; nothing was imported."""
    folder, out = bert(tmp_path / "model"), tmp_path / "out"
    marker = tmp_path / "run"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')")
    code = {"AutoModel": "own.Own", "AutoModelForSequenceClassification": "own.Own", "AutoTokenizer": ["own.T", None]}
    asked = {"auto_map": code, "_attn_implementation_internal": "org/kernel", "trust_remote_code": True, "kept": 1}
    change(folder / "config.json", **asked)
    change(folder / "tokenizer_config.json", auto_map=code)
    assert load(folder, runtime="torch")(["a cat"])
    assert any("never run" in warning for warning in inspect_folder(folder).values["warnings"])
    export_hf(folder, out)
    written = read_json(out / "config.json")
    assert written["kept"] == 1 and not {*asked} - {"kept"} & {*written}
    assert "auto_map" not in read_json(out / "tokenizer_config.json")
    change(folder / "config.json", model_type="own")
    with pytest.raises(InputError, match=r"'own' is not supported[\s\S]*auto_map"):
        load(folder)
    assert not marker.exists()


def test_json_that_no_reader_should_take(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text in ("[" * 100_000 + "]" * 100_000, '{"a":' * 50_000, f'{{"a": {"9" * 100_000}}}', '{"a": "\\ud800"}',
                 "{} x", '{"\\udfff": 1}', "\x00", "nul", '"x"'):  # fmt: skip
        path.write_text(text)
        with pytest.raises(FormatError, match=r"config\.json"):
            read_json(path)
    path.write_text('{"a": "\\ud83d\\ude00"}')
    assert read_json(path) == {"a": "😀"}
    with path.open("wb") as file:
        file.truncate(300 << 20)  # takes no room on the disk
    with pytest.raises(FormatError, match=r"config\.json is too large"):
        read_own(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(FormatError, match=r"config\.json is not a file"):
        read_json(path)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400", "1e308"])
def test_numbers_of_a_config_are_numbers(tmp_path: Path, value: str) -> None:
    folder = bert(tmp_path / "model")
    text = (folder / "config.json").read_text()
    assert '"layer_norm_eps": 1e-12' in text
    (folder / "config.json").write_text(text.replace('"layer_norm_eps": 1e-12', f'"layer_norm_eps": {value}'))
    with pytest.raises(FormatError, match=r"config\.json: layer_norm_eps is not a number"):
        read_config(folder)


def test_counts_are_compared_with_the_file_first(tmp_path: Path) -> None:
    """An ARPA file that promises a billion n-grams, and n-gram arrays that are no model's."""
    folder = ngram(tmp_path / "model")
    arpa = tmp_path / "x.arpa"
    arpa.write_text((folder / "model.arpa").read_text().replace("ngram 2=", "ngram 2=999999"))
    with pytest.raises(FormatError, match=r"n-grams cannot be in \d+ bytes"):
        ngram_folder.load(arpa)
    held = load_file(folder / "model.safetensors")
    for name, value in {
        "2.keys": held["2.keys"].flip(0), "3.keys": held["3.keys"] + 10**12, "2.backoff": held["2.backoff"][:-1],
        "unigrams": held["unigrams"] * torch.nan, "3.logprobs": held["3.logprobs"] + 99,
        "2.logprobs": held["2.logprobs"].float(),
    }.items():  # fmt: skip
        save_file({**held, name: value.contiguous()}, folder / "model.safetensors")
        with pytest.raises(FormatError, match=r"n-gram model is damaged[\s\S]*model\.safetensors"):
            ngram_folder.load(folder)


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a\0b", "x" * 300])
def test_receipts_and_monitors_name_files_inside(tmp_path: Path, name: str) -> None:
    folder = monitored(tmp_path / "monitored")
    facts = read_json(folder / "monitor.json")
    change(folder / "monitor.json", files={**facts["files"], name: "0" * 64})
    with pytest.raises(FormatError, match=r"points outside its folder[\s\S]*monitor\.json"):
        read_monitor(folder)
    folder = receipt(tmp_path / "receipt")
    facts = read_json(folder / "lmworks.json")
    change(folder / "lmworks.json", files={**facts["files"], name: {"sha256": "0" * 64}})
    assert "points outside its folder" in check_receipt(folder)["problem"]


def test_a_damaged_cache_is_not_found_rather_than_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cached(tmp_path / "hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    assert find_cached("org/name") is not None
    for name in ("refs/main", f"trees/{COMMIT}.json"):
        path = cache / "models--org--name" / name
        kept = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        start = time.monotonic()
        find_cached("org/name")
        assert time.monotonic() - start < 1
        path.unlink()
        path.write_bytes(kept)


def test_a_panic_of_a_native_library_is_one_of_our_errors(tmp_path: Path) -> None:
    """pyo3's PanicException is no Exception: `except Exception` would let it end the program."""
    folder = gpt2(tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["continuing_subword_prefix"] = "xxxxxxxx"
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    code = (
        "import sys, tokenizers\ntry:\n    tokenizers.Tokenizer.from_file(sys.argv[1])\n"
        "except Exception:\n    print('exception')\nexcept BaseException as error:\n    print(type(error).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, folder / "tokenizer.json"], capture_output=True, text=True)
    assert done.stdout.strip() == "PanicException"
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        Tokenizer.from_pretrained(folder)


def test_onnx_runtime_reports_to_nobody(tmp_path: Path) -> None:
    """C16: since 1.29 it keeps an identity and a queue of events in the home folder, and sends them; not under us."""
    folder = graph(tmp_path / "model")
    code = f"import lmworks; print(lmworks.load({str(folder)!r}, runtime='onnx')(['a cat'])[0][0].label)"
    home = tmp_path / "home"
    home.mkdir()
    kept = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY" and name[:3] != "XDG"}
    kept |= {"HOME": str(home), "LMWORKS_CACHE": str(tmp_path / "cache"), "CI": ""}
    done = subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True)
    assert done.stdout.startswith("LABEL_"), done.stderr
    assert not list(home.rglob("*"))


def test_all_errors_are_ours_for_plain_nonsense(tmp_path: Path) -> None:
    """Every file of a folder replaced by the same few bytes, in turn."""
    folder = bert(tmp_path / "model")
    for content in (b"", b"\0" * 64, b"{}", b"[]", b"null", b"\xff\xfe", b"x" * 4096):
        for path in sorted(folder.iterdir()):
            kept = path.read_bytes()
            path.write_bytes(content)
            try:
                assert np.isfinite([label.score for label in load(folder, runtime="torch")(["a cat"])[0]]).all()
            except LmworksError as error:
                assert "\n" in str(error)
            path.write_bytes(kept)


def test_no_link_of_a_stranger_reaches_what_is_written(tmp_path: Path) -> None:
    """A README that leads to a file of this machine would be published with the model."""
    secret = tmp_path / "secret"
    secret.write_text("{}")
    for name in ("README.md", "preprocessor_config.json", "1_Pooling/config.json"):
        folder, out = bert(tmp_path / name.replace("/", "-")), tmp_path / "out"
        (folder / "modules.json").write_text('[{"path": "", "type": "T"}, {"path": "1_Pooling", "type": "P"}]')
        (folder / "1_Pooling").mkdir()
        (folder / name).symlink_to(secret)
        with pytest.raises(FormatError, match="a link that leads out of its folder"):
            export_hf(folder, out)
        assert not out.exists()


def test_no_name_of_a_stranger_commands_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labels and messages may hold ESC; tables, lines and errors print it as a letter."""
    folder, evil = bert(tmp_path / "model"), "\x1b]0;owned\x07\x9b2J"
    change(folder / "config.json", id2label={str(i): f"{evil}{i}" for i in range(len(read_config(folder).labels))})
    assert main(["classify", str(folder), "a cat"]) == 0
    assert main(["inspect", str(folder)]) == 0
    assert main(["classify", str(tmp_path / evil), "a cat"]) == 2
    said = "".join(capsys.readouterr())
    assert "owned" in said and not any(part in said for part in ("\x1b]", "\x07", "\x9b"))
