"""`lmworks convert` against torch.load(weights_only=True): the same tensors to the bit, and no name is ever called."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from minilm_heads import MINILM
from parity.zoo import CONFIGS, make_reference
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import lmworks
from lmworks.base import hub, torch_file
from lmworks.base.errors import FormatError, InputError
from lmworks.cli import main
from lmworks.models.checkpoint import load_model
from lmworks.training.adapter_files import open_adapter
from lmworks.verbs.converting import convert, convert_file

ROOT = Path(lmworks.__file__).parents[1]


def same(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors have the same dtype, shape and bits."""
    flat = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*flat)


def compare(source: Path | dict[str, Any], target: Path, **twins: str) -> int:
    """Compare a converted file with what torch reads from its origin; return the number of tensors."""
    wanted = source if isinstance(source, dict) else torch.load(source, weights_only=True)
    found = load_file(target)
    wanted = {name: tensor for name, tensor in wanted.items() if isinstance(tensor, Tensor)}
    assert set(wanted) == {*found, *twins}
    for name, tensor in wanted.items():
        assert same(found[twins.get(name, name)], tensor), name
    return len(wanted)


def tensors() -> dict[str, Tensor]:
    """Return views, strides, shared storages and every dtype that both formats have."""
    torch.manual_seed(0)
    base, cube = torch.randn(60), torch.randn(2, 3, 4, 5)
    made: dict[str, Tensor] = {
        "whole": base.view(6, 10),
        "shared": base.view(10, 6),
        "transposed": base.view(6, 10).t(),
        "part": base.view(6, 10)[2:5, 1:7],
        "every third": base[3:50:3],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "expanded": torch.tensor([7.0]).expand(4, 9),
        "permuted": cube.permute(3, 1, 0, 2),
        "inner": cube.permute(1, 0, 2, 3),
        "row": base.view(6, 10)[3],
        "column": base.view(6, 10)[:, 3],
        "parameter": nn.Parameter(torch.randn(5)),
        "one": torch.ones(1, 1, 1).expand(3, 1, 1),
        "strided scalar": base[7],
        "negative zero": -torch.zeros(3),
        "größe": torch.ones(2),
    }
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.complex64):
        made[str(dtype)] = torch.randn(4, 3, dtype=dtype).t()
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        made[str(dtype)] = torch.randint(0, 100, (3, 5), dtype=dtype)[:, ::2]
    made["bool"] = torch.rand(9) > 0.5
    return made


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_tensors_of_every_kind_are_those_of_torch(tmp_path: Path, zipped: bool, protocol: int) -> None:
    """C9: strides, views, shared storages, small and odd dtypes, in both of torch's formats."""
    source, target = tmp_path / "pytorch_model.bin", tmp_path / "model.safetensors"
    made: dict[str, Any] = OrderedDict(tensors())
    if zipped:  # torch itself cannot read these back from its older format
        made |= {str(dtype): torch.zeros(3).to(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)}
        made["uint16"] = torch.tensor([1, 65535], dtype=torch.uint16)
    made |= {"epoch": 3, "notes": ["a", (1, 2.5)], "none": None}
    torch.save(made, source, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    said = convert_file(source, target)
    assert compare(source if protocol == 2 else made, target) == len(made) - 3  # torch's own reader knows protocol 2
    assert said["left_out"] == ["epoch", "notes", "none"]


def make_bert(folder: Path, *, zipped: bool = True, shards: int = 1) -> Any:
    """Write the folder of a small BERT with a masked LM head as the Hub had them for years; return the model."""
    model = make_reference("bert", "MaskedLM")
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    state = model.state_dict()
    names = list(state)
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        return model
    places = {name: f"pytorch_model-{1 + i % shards:05d}-of-{shards:05d}.bin" for i, name in enumerate(names)}
    for file in set(places.values()):
        part = {name: state[name] for name in names if places[name] == file}
        torch.save(part, folder / file, _use_new_zipfile_serialization=zipped)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return model


@pytest.mark.parametrize(("zipped", "shards"), [(True, 1), (False, 1), (True, 3), (False, 2)])
def test_a_converted_folder_answers_as_the_original(tmp_path: Path, zipped: bool, shards: int) -> None:
    """The whole way: refused by load, converted, loaded; the hidden states are those of transformers."""
    folder, out = tmp_path / "old", tmp_path / "new"
    reference = make_bert(folder, zipped=zipped, shards=shards)
    (folder / "README.md").write_text("# A model")
    asked = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoModel": "modeling_own.Own"}}
    (folder / "config.json").write_text(json.dumps(asked))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["own.T", None]}, "a": 1}))
    (folder / "training_args.bin").write_bytes(b"not opened")
    (folder / "modeling_own.py").write_text("raise SystemExit('run')")
    with pytest.raises(FormatError, match=rf"lmworks convert {folder} -o OUT"):
        load_model(folder, "MaskedLM")
    report = convert(folder, out)
    ids = torch.arange(40).reshape(2, 20)
    model = load_model(out, "MaskedLM")
    with torch.no_grad():
        assert (model(ids) - reference(ids).logits).abs().max() <= 1e-5
    held = {path.name for path in out.iterdir()}
    assert {"config.json", "README.md", "lmworks.json"} <= held
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"a": 1}
    assert not held & {"training_args.bin", "modeling_own.py"} and not any(name.endswith(".bin") for name in held)
    assert report.values["behind"] == ["modeling_own.py", "training_args.bin"]
    assert ("model.safetensors" in held) == (shards == 1) != ("model.safetensors.index.json" in held)


def test_a_tied_projection_is_stored_once(tmp_path: Path) -> None:
    """GPT-2's lm_head is its embedding; a model that does not tie them keeps both."""
    for tied in (True, False):
        folder, out = tmp_path / f"old {tied}", tmp_path / f"new {tied}"
        config = GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=2, n_positions=16, tie_word_embeddings=tied)
        model = GPT2LMHeadModel(config).eval()
        model.lm_head.weight = model.transformer.wte.weight  # shared in the file in either case
        model.save_pretrained(folder)
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        report = convert(folder, out)
        twins = report.values["files"]["pytorch_model.bin"]["twins"]
        assert twins == ({"lm_head.weight": "transformer.wte.weight"} if tied else {})
        assert compare(folder / "pytorch_model.bin", out / "model.safetensors", **twins) > 10
        ids = torch.arange(12)[None]
        with torch.no_grad():
            assert (load_model(out)(ids) - model(ids).logits).abs().max() <= 1e-5


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks transformers
def test_an_adapter_and_a_real_model(tmp_path: Path) -> None:
    """A PEFT folder with adapter_model.bin, and MiniLM's 90 MB."""
    base, old, out = tmp_path / "base", tmp_path / "old", tmp_path / "new"
    reference = make_reference("bert", "SequenceClassification")
    reference.save_pretrained(base)
    tuned = get_peft_model(reference, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    tuned.peft_config["default"].base_model_name_or_path = str(base)
    tuned.save_pretrained(old, safe_serialization=True)
    state = load_file(old / "adapter_model.safetensors")
    (old / "adapter_model.safetensors").unlink()
    torch.save(state, old / "adapter_model.bin")
    with pytest.raises(FormatError, match=rf"lmworks convert {old} -o OUT"):
        open_adapter(old)
    convert(old, out)
    assert open_adapter(out).facts["layers"] == 4
    assert compare(old / "adapter_model.bin", out / "adapter_model.safetensors") == len(state)
    big = tmp_path / "big"
    big.mkdir()
    torch.save(load_file(MINILM / "model.safetensors"), big / "pytorch_model.bin")
    convert(big, tmp_path / "whole")
    assert compare(big / "pytorch_model.bin", tmp_path / "whole" / "model.safetensors") > 100


class Call:
    """What a hostile pickle does when it is opened."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.made = (function, arguments)

    def __reduce__(self) -> Any:
        return self.made


def hostile(marker: Path) -> dict[str, tuple[bytes, str]]:
    """Return files that would run something, and a name that the message lists."""
    touch = f"touch {marker}"
    made = {}
    for protocol in (0, 1, 2, 4, 5):
        made[f"system {protocol}"] = (pickle.dumps(Call(os.system, touch), protocol), "posix.system")
    for zipped in (True, False):
        for name, call in {
            "exec": Call(exec, f"open({str(marker)!r}, 'w')"), "popen": Call(subprocess.Popen, ["touch", str(marker)]),
            "getattr": Call(getattr, "a", "upper"),
            "torch.load": Call(torch.load, str(marker)), "partial": Call(__import__("functools").partial, print),
        }.items():  # fmt: skip
            file = io.BytesIO()
            torch.save({"a": torch.ones(2), "b": call}, file, _use_new_zipfile_serialization=zipped)
            known = {"exec": "__builtin__.exec", "popen": "commands.Popen", "getattr": "__builtin__.getattr"}
            listed = {"torch.load": "torch.serialization.load", "partial": "functools.partial"} | known
            made[f"{name} {zipped}"] = (file.getvalue(), listed[name])
    made["stack global"] = (b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x02id\x85R.", "posix.system")
    made["by parts"] = (
        b"\x80\x02c__builtin__\ngetattr\ncposix\nsystem\nX\x01\x00\x00\x00a\x86R.",
        "__builtin__.getattr, posix.system",
    )
    made["inst"] = (b"(S'id'\niposix\nsystem\n.", "0x53")
    made["new object"] = (b"\x80\x02csubprocess\nPopen\n)\x81}b.", "subprocess.Popen")
    made["extension"] = (b"\x80\x02\x82\x01.", "0x82")
    made["beside torch"] = (b"\x80\x02ctorch.hub\nload\nX\x01\x00\x00\x00a\x85R.", "torch.hub.load")
    made["inside torch"] = (b"\x80\x02ctorch\nload\nX\x01\x00\x00\x00a\x85R.", "torch.load")
    made["dotted"] = (
        b"\x80\x04\x8c\x0ctorch._utils\x8c\x1b_rebuild_tensor.__globals__\x93.",
        "_rebuild_tensor.__globals__",
    )
    return made


def test_nothing_that_a_pickle_names_is_run(tmp_path: Path) -> None:
    """C9 and CVE-2025-32434's kin: all of them end in one error that lists what they named; no file appears."""
    marker, source, target = tmp_path / "run", tmp_path / "pytorch_model.bin", tmp_path / "model.safetensors"
    for name, (data, listed) in hostile(marker).items():
        source.write_bytes(data)
        with pytest.raises(FormatError) as caught:
            convert_file(source, target)
        assert "pytorch_model.bin" in str(caught.value), name
        assert listed in str(caught.value), (name, str(caught.value))
        assert not marker.exists(), name


def test_names_are_listed_all_at_once_and_nothing_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    torch.save(
        {"a": torch.ones(2), "b": Call(os.system, "id"), "c": Path("x"), "d": Call(print)}, folder / "pytorch_model.bin"
    )
    assert main(["convert", str(folder), "-o", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "posix.system, pathlib.PosixPath, builtins.print" in said or "posix.system, pathlib" in said
    assert "print" in said
    assert {path.name for path in tmp_path.iterdir()} == {"old"}


def repack(data: bytes, change: Any) -> bytes:
    """Return an archive with its records changed: a dict of name to bytes goes in and comes out."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    out, made = io.BytesIO(), change(records) or records
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in made.items():
            archive.writestr(name, content)
    return out.getvalue()


def state(view: tuple[Any, ...], numbers: int = 4, *, key: str = "0", storage: str = "FloatStorage") -> bytes:
    """Return an archive with one tensor: (offset, shape, stride) of a storage that states so many numbers."""
    offset, shape, stride = view

    def put(value: Any) -> bytes:
        if isinstance(value, tuple):
            return b"(" + b"".join(map(put, value)) + b"t"
        if isinstance(value, int):
            return b"\x8a\x0a" + (value % 2**80).to_bytes(10, "little")
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    persistent = b"(" + put("storage") + f"ctorch\n{storage}\n".encode() + put(key) + put("cpu") + put(numbers) + b"tQ"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + persistent + put(offset) + put(shape) + put(stride) + b"\x89}tR"
    program = b"\x80\x02}" + put("a") + call + b"s."
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("x/data.pkl", program)
        archive.writestr("x/data/0", bytes(16))
    return out.getvalue()


def test_views_that_reach_too_far_are_refused(tmp_path: Path) -> None:
    """Shapes, strides and offsets are compared with the bytes that are there, in unbounded integers."""
    source, target = tmp_path / "pytorch_model.bin", tmp_path / "model.safetensors"
    source.write_bytes(state((0, (2, 2), (2, 1))))
    convert_file(source, target)
    assert load_file(target)["a"].shape == (2, 2)
    wrong = {
        "too long": state((0, (5,), (1,))),
        "offset": state((1, (4,), (1,))),
        "stride": state((0, (2, 2), (3, 1))),
        "negative": state((0, (-1, 2), (1, 1))),
        "negative stride": state((3, (4,), (-1,))),
        "negative offset": state((-1, (4,), (1,))),
        "huge": state((0, (2**62, 2**62), (0, 0))),
        "bomb": state((0, (2**40,), (0,))),
        "overflow": state((2**63, (1,), (1,))),
        "no storage": state((0, (4,), (1,)), key="7"),
        "size": state((0, (4,), (1,)), 2**61),
        "short": state((0, (4,), (1,)), 5),
        "no dtype": state((0, (4,), (1,)), storage="QInt8Storage"),
        "outside": state((0, (4,), (1,)), key="../../../etc/passwd"),
        "ranks": state((0, (4,), (1, 1))),
    }
    for name, data in wrong.items():
        source.write_bytes(data)
        with pytest.raises(FormatError, match=r"pytorch_model\.bin"):
            convert_file(source, target)
            print(name)


def test_damaged_archives_and_old_files(tmp_path: Path) -> None:
    source, target = tmp_path / "pytorch_model.bin", tmp_path / "model.safetensors"
    whole, old = io.BytesIO(), io.BytesIO()
    torch.save(tensors(), whole)
    torch.save(tensors(), old, _use_new_zipfile_serialization=False)
    data = whole.getvalue()
    flipped = bytearray(data)
    with zipfile.ZipFile(whole) as archive:
        entry = max(archive.infolist(), key=lambda e: e.file_size if "/data/" in e.filename else 0)
    flipped[entry.header_offset + 200] ^= 16
    script = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), script)
    compressed = io.BytesIO()
    with zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}." + bytes(10_000_000))
    cases = {
        "empty": b"",
        "text": b"hello",
        "cut": data[: len(data) // 2],
        "cut old": old.getvalue()[:-7],
        "longer old": old.getvalue() + b"x",
        "flipped": bytes(flipped),
        "zip of nothing": repack(data, lambda r: {"a": b"b"}),
        "TorchScript": script.getvalue(),
        "big-endian": repack(data, lambda r: r | {n: b"big" for n in r if n.endswith("byteorder")}),
        "bool": repack(data, lambda r: {n: (b"\2" * 9 if len(v) == 9 else v) for n, v in r.items()}),
        "bomb": compressed.getvalue(),
        "tensor alone": (lambda f: (torch.save(torch.ones(2), f), f.getvalue())[1])(io.BytesIO()),
        "no tensors": (lambda f: (torch.save({"model": {"a": torch.ones(2)}}, f), f.getvalue())[1])(io.BytesIO()),
        "a module": (lambda f: (torch.save(nn.Linear(2, 2), f), f.getvalue())[1])(io.BytesIO()),
        "sparse": (lambda f: (torch.save({"a": torch.eye(2).to_sparse()}, f), f.getvalue())[1])(io.BytesIO()),
    }
    for name, content in cases.items():
        source.write_bytes(content)
        with pytest.raises(FormatError, match=r"pytorch_model\.bin"):
            convert_file(source, target)
            print(name)


def test_the_child_can_open_nothing(tmp_path: Path) -> None:
    """The process that reads a stranger's file ends at once where it opens, connects, forks or imports."""
    start = f"import sys; sys.path.append({str(ROOT)!r}); from lmworks.base.torch_file import limit; limit(5, 100); "
    for deed in (
        "open('/etc/passwd')",
        f"open({str(tmp_path / 'x')!r}, 'w')",
        "import socket; socket.socket()",
        "import os; os.fork()",
        "import os; os.system('id')",
        "import os; os.listdir('/')",
        "import colorsys",
        "exec('1')",
        "eval('1')",
        "import os; os.remove('x')",
        "import _socket; _socket.socket()",
        "import pickle",
    ):
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", f"{start}\n{deed}\nprint('done')"], capture_output=True
        )
        assert (done.returncode, done.stdout) == (77, b""), deed
    code = f"{start}\nimport os\nos.write(3, bytes(1000))"
    with (tmp_path / "out").open("wb") as file:
        place = code.replace("write(3", f"write({file.fileno()}")
        done = subprocess.run([sys.executable, "-I", "-S", "-c", place], pass_fds=[file.fileno()], capture_output=True)
    assert (tmp_path / "out").stat().st_size <= 100
    more = torch_file.MEMORY + (1 << 20)
    memory = f"{start}\ntry:\n    bytearray({more})\nexcept MemoryError:\n    print('refused')"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", memory], capture_output=True)
    assert done.stdout.split() == [b"refused"]


def test_an_index_that_lies(tmp_path: Path) -> None:
    """Shards outside the folder, missing ones, and tensors that are elsewhere."""
    folder = tmp_path / "old"
    make_bert(folder, shards=2)
    path = folder / "pytorch_model.bin.index.json"
    whole = json.loads(path.read_text())
    first = next(iter(whole["weight_map"]))
    other = "pytorch_model-00002-of-00002.bin"
    for change, said in {
        "../x.bin": "weight_map points elsewhere",
        "/etc/x.bin": "weight_map points elsewhere",
        "a.sh": "points elsewhere",
        "gone.bin": "gone.bin",
        other: "the shards do not hold what their index says",
    }.items():
        path.write_text(json.dumps({**whole, "weight_map": {**whole["weight_map"], first: change}}))
        with pytest.raises((FormatError, InputError), match=said):
            convert(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_links_that_lead_out_are_refused(tmp_path: Path) -> None:
    """Neither weights nor what comes along may be a file of this machine that the folder only points to."""
    folder, secret = tmp_path / "old", tmp_path / "secret.txt"
    secret.write_text("secret")
    make_bert(folder)
    (folder / "notes.txt").symlink_to(secret)
    with pytest.raises(FormatError, match=r"notes.txt is a link that leads out of its folder"):
        convert(folder, tmp_path / "out")
    (folder / "notes.txt").unlink()
    (folder / "pytorch_model.bin").rename(tmp_path / "elsewhere.bin")
    (folder / "pytorch_model.bin").symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(FormatError, match=r"pytorch_model.bin is a link that leads out of its folder"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_converted_says_why(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(InputError, match="no weights to convert"):
        convert(folder, tmp_path / "out")
    (folder / "model.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"rename the weights to pytorch_model\.bin"):
        convert(folder, tmp_path / "out")
    torch.save({"a": torch.ones(2)}, folder / "pytorch_model.bin")
    for out in (folder, folder / "inside", tmp_path):
        with pytest.raises(InputError, match="the output would lie in what is converted"):
            convert(folder, out)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="has safetensors already"):
        convert(folder, tmp_path / "out")


def test_a_model_of_the_hub_that_has_pickles_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R105: load names the command, and the command fetches and converts; the cache's links are followed."""
    folder = tmp_path / "model"
    make_bert(folder)
    for name in (*hub.OFFLINE, "HF_HOME", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        server.add_folder("org/old", folder)
        with pytest.raises(InputError, match=r"lmworks convert org/old -o OUT"):
            hub.find_folder("org/old")
        convert("org/old", tmp_path / "out")
        asked = len(server.log)
        convert("org/old", tmp_path / "again")
        assert len(server.log) == asked
    assert compare(folder / "pytorch_model.bin", tmp_path / "out" / "model.safetensors",
                   **{"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"})  # fmt: skip
    load_model(tmp_path / "again", "MaskedLM")
    assert "bert" in CONFIGS
