"""Seeded damage to a good folder: what a broken disk, a bad download or an attacker may make of it."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from test_convert import hostile

DEEP = 20_000
ODD: list[Any] = [
    None, -1, 0, 1, 3, 2**31, 2**63, 10**30, 1e308, -1e308, 0.5, True, False, "", "x", "-1", [], {}, [None], [[]],
    {"a": 1}, float("nan"), float("inf"), "../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "x" * 100_000,
    list(range(1000)),
]  # fmt: skip
PLACES = ["../model.safetensors", "/etc/passwd", "a/../../b", "\0", "..", ".", "", "C:\\x", "~/x", "x" * 5000, "sub/x",
          "../../../../../../etc/passwd", "nothing.safetensors", "\\\\host\\share", "file:///etc/passwd"]  # fmt: skip
EXTRA: dict[str, Any] = {
    "auto_map": {"AutoModel": "modeling_own.Own", "AutoConfig": "own.Own", "AutoTokenizer": ["t.T", None]},
    "trust_remote_code": True, "_attn_implementation_internal": "org/kernel", "attn_implementation": "org/kernel",
    "custom_pipelines": {"x": {"impl": "x.X"}}, "quantization_config": {"quant_method": "bitsandbytes"},
    "model_type": "own", "architectures": ["Own"], "__class__": {"__init__": 1}, "torch_dtype": "exec('1')",
    "tokenizer_class": "../own.Own", "transformers_version": "99", "dtype": "float64", "id2label": {"x": "y"},
}  # fmt: skip
TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% for i in range(100000000) %}{{ i }}{% endfor %}",
    "{{ 'a' * 1000000000 }}", "{{ cycler.__init__.__globals__.os.popen('id').read() }}", "{% include '/etc/passwd' %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{{ messages", "\0",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
]  # fmt: skip
Mutation = tuple[str, str]  # the file, and what was done to it


def files_of(folder: Path) -> list[Path]:
    """Return the files of a folder, the same in every run."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def mutate(draw: random.Random, folder: Path, outside: Path) -> Mutation:
    """Damage one file of `folder`; `outside` is a folder that nothing may read."""
    files = [path for path in files_of(folder) if path.name not in ("README.md", ".gitattributes", "picture.png")]
    path = draw.choice(files)
    ways: list[Callable[[random.Random, Path], str]] = [binary, binary]
    if path.suffix == ".json":
        ways += [structure] * 6 + (
            [places] * 2 if path.name.endswith(("index.json", "modules.json", "monitor.json")) else []
        )
    elif path.suffix == ".safetensors":
        ways += [header] * 6 + [numbers] * 2
    elif path.suffix == ".bin":
        ways += [pickles] * 6
    elif path.suffix in (".txt", ".arpa", ".jinja"):
        ways += [lines] * 3 + ([template] * 3 if path.suffix == ".jinja" else [])
    elif path.suffix == ".onnx":
        ways += [protobuf] * 3
    if draw.random() < 0.12:
        return path.relative_to(folder).as_posix(), place(draw, path, outside)
    return path.relative_to(folder).as_posix(), draw.choice(ways)(draw, path)


def binary(draw: random.Random, path: Path) -> str:
    """Cut, flip, overwrite, repeat or lengthen."""
    data = bytearray(path.resolve().read_bytes())
    way = draw.choice(
        ["truncated", "truncated", "flipped", "flipped", "flipped", "overwritten", "longer", "empty", "repeated"]
    )
    at = draw.randrange(max(len(data), 1))
    if way == "truncated":
        del data[at:]
    elif way == "flipped" and data:
        for _ in range(draw.choice([1, 1, 2, 8, 64])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif way == "overwritten" and data:
        part = draw.randbytes(draw.choice([1, 4, 64]))
        data[at : at + len(part)] = part
    elif way == "longer":
        data += draw.randbytes(draw.choice([1, 8, 4096]))
    elif way == "empty":
        data.clear()
    else:
        data[at:at] = data[: draw.randrange(1, 4096)]
    replace(path, bytes(data))
    return f"{way} at {at}"


def structure(draw: random.Random, path: Path) -> str:
    """Change one value of a JSON file, or its form."""
    text = path.resolve().read_text("utf-8")
    value = json.loads(text)
    way = draw.choice(["value"] * 8 + ["gone", "gone", "extra", "extra", "twice", "deep", "form", "huge"])
    if way == "value" or way == "gone":
        spots = list(walk(value))
        holder, key = draw.choice(spots) if spots else (value, None)
        if key is None:
            return "nothing to change"
        if way == "gone":
            del holder[key]
            said = f"{key} gone"
        else:
            holder[key] = draw.choice(ODD) if draw.random() < 0.85 else draw.choice(PLACES)
            said = f"{key} = {str(holder[key])[:60]!r}"
        replace(path, dump(value))
        return said
    if way == "extra" and isinstance(value, dict):
        key = draw.choice(list(EXTRA))
        replace(path, dump({**value, key: EXTRA[key]}))
        return f"with {key}"
    if way == "twice" and text.lstrip().startswith("{") and isinstance(value, dict) and value:
        key = draw.choice(list(value))
        again = json.dumps(draw.choice(ODD), allow_nan=True)
        replace(path, text.rstrip()[:-1].encode() + f", {json.dumps(key)}: {again}}}".encode())
        return f"{key} twice"
    if way == "deep":
        opening, closing = draw.choice([("[", "]"), ('{"a":', "}")])
        replace(path, (opening * DEEP + "1" + closing * DEEP).encode())
        return "nested deeply"
    if way == "huge":
        digits = "9" * draw.choice([400, 5000, 200_000])
        spots = [key for _, key in walk(value) if isinstance(key, str)] or ["a"]
        replace(
            path,
            json.dumps({**(value if isinstance(value, dict) else {}), draw.choice(spots): 0})
            .replace(": 0}", f": {digits}}}")
            .encode(),
        )
        return f"a number of {len(digits)} digits"
    form = draw.choice(["[]", "null", "1", '"x"', "", "{", "{}", "\ufeff{}", "NaN", "[1]", "{} {}"])
    replace(path, form.encode())
    return f"is {form!r}"


def walk(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every place of a JSON value: its holder and its key."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from walk(inner)


def dump(value: Any) -> bytes:
    """Return JSON, with whatever it holds."""
    return json.dumps(value, allow_nan=True).encode()


def places(draw: random.Random, path: Path) -> str:
    """Let a JSON file point elsewhere."""
    value = json.loads(path.resolve().read_text("utf-8"))
    where = draw.choice(PLACES)
    if isinstance(value, list):
        draw.choice(value)["path"] = where
    else:
        table = value.get("weight_map") or value.get("files")
        key = draw.choice(list(table))
        if "weight_map" in value:
            table[key] = where
        else:
            table[where] = table.pop(key)
    replace(path, dump(value))
    return f"points to {where[:40]!r}"


def header(draw: random.Random, path: Path) -> str:
    """Change the header of a safetensors file."""
    data = path.resolve().read_bytes()
    size = int.from_bytes(data[:8], "little")
    values, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    names = [name for name in values if name != "__metadata__"]
    name = draw.choice(names)
    way = draw.choice(
        ["length", "value", "value", "value", "rename", "twice", "gone", "swap", "reshape", "dtype", "deep", "many"]
    )
    if way == "length":
        length = draw.choice([0, 1, 2, size - 1, size + 1, len(data), 2**31, 2**40, 2**63, 2**64 - 1])
        replace(path, length.to_bytes(8, "little") + data[8:])
        return f"a header of {length} bytes"
    if way == "deep":
        raw = b'{"a":' * DEEP + b"1" + b"}" * DEEP
    elif way == "many":
        raw = json.dumps(
            {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(3000)}
        ).encode()
    elif way == "twice":
        raw = json.dumps(values).encode()[:-1] + f", {json.dumps(name)}: {json.dumps(values[name])}}}".encode()
    else:
        if way == "value":
            key = draw.choice(["dtype", "shape", "data_offsets"])
            values[name][key] = draw.choice([*ODD, [2**40, 2**40], [-1], [0, 2**63], [5, 3], ["1"], [0, 0], [1.5]])
        elif way == "rename":
            values[draw.choice(["x", "", "../x", "a\0b", "x" * 10_000, name.upper()])] = values.pop(name)
        elif way == "gone":
            del values[name]
        elif way == "swap":
            other = draw.choice(names)
            values[name], values[other] = values[other], values[name]
        elif way == "dtype":
            values[name]["dtype"] = draw.choice(["I32", "U8", "BOOL", "F64", "F16", "C64", "F8_E4M3", "F4"])
        else:
            shape = values[name]["shape"]
            values[name]["shape"] = draw.choice(
                [shape[::-1], [1, *shape], [*shape, 1], [len(rest)], [s * 2 for s in shape], []]
            )
        raw = json.dumps(values).encode()
    raw += b" " * (-len(raw) % 8)
    replace(path, len(raw).to_bytes(8, "little") + raw + rest)
    return f"{way} of {name}"


def numbers(draw: random.Random, path: Path) -> str:
    """Put NaN or infinity among the numbers."""
    data = bytearray(path.resolve().read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    count = (len(data) - start) // 4
    many = draw.choice([1, 16, max(count // 2, 1)])
    value = draw.choice([float("nan"), float("inf"), float("-inf"), 3e38])
    for _ in range(many):
        struct.pack_into("<f", data, start + 4 * draw.randrange(max(count, 1)), value)
    replace(path, bytes(data))
    return f"{many} numbers are {value}"


def pickles(draw: random.Random, path: Path) -> str:
    """Put a hostile pickle in the place of tensors, or a name in the midst of them."""
    made = hostile(path.with_name("run"))
    name = draw.choice(list(made))
    if draw.random() < 0.5:
        replace(path, made[name][0])
        return f"hostile: {name}"
    data = path.resolve().read_bytes()
    old, new = draw.choice([
        (b"_rebuild_tensor_v2", b"_rebuild_qtensor_x"), (b"FloatStorage", b"FloatStorege"),
        (b"torch._utils", b"torch._hacks"), (b"collections", b"subprocess_"), (b"OrderedDict", b"defaultdict"),
        (b"storage", b"module\0"), (b"\nFloatStorage\n", b"\nload\nStorage\n"),
    ])  # fmt: skip
    replace(path, data.replace(old, new))
    return f"{old!r} is {new!r}"


def lines(draw: random.Random, path: Path) -> str:
    """Change the lines of a text file."""
    rows = path.resolve().read_text("utf-8", "replace").split("\n")
    at = draw.randrange(len(rows))
    way = draw.choice(["twice", "gone", "long", "odd", "number", "swapped", "many"])
    if way == "twice":
        rows.insert(at, rows[at])
    elif way == "gone":
        del rows[at]
    elif way == "long":
        rows[at] = rows[at] + " x" * 200_000
    elif way == "odd":
        rows[at] = draw.choice(
            [
                "\0",
                "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
                "\\end\\",
                "nan\tx\tnan",
                "-inf\ta",
                " ",
                "#version",
            ]
        )
    elif way == "number":
        rows[at] = rows[at].replace("=", "=9999999999999").replace("-", "1e999 ")
    elif way == "swapped":
        other = draw.randrange(len(rows))
        rows[at], rows[other] = rows[other], rows[at]
    else:
        rows[at:at] = [f"w{i}" for i in range(2000)]
    replace(path, "\n".join(rows).encode("utf-8", "replace"))
    return f"line {at} {way}"


def template(draw: random.Random, path: Path) -> str:
    """Put a template that means harm."""
    text = draw.choice(TEMPLATES)
    replace(path, text.encode())
    return f"template {text[:40]!r}"


def protobuf(draw: random.Random, path: Path) -> str:
    """Change a graph: where its data lies, its names, its sizes."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    tensors = list(model.graph.initializer)
    tensor = draw.choice(tensors)
    way = draw.choice(["location", "location", "offset", "dims", "type", "operator", "name", "input", "metadata"])
    if way in ("location", "offset"):
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.ClearField("raw_data")
        held = {entry.key: entry.value for entry in tensor.external_data}
        if way == "location":
            held["location"] = draw.choice([*PLACES, "../outside/secret"])
        else:
            held |= {
                "location": held.get("location", path.name),
                draw.choice(["offset", "length"]): str(draw.choice([-1, 2**40, 2**63, 1, "x"])),
            }
        del tensor.external_data[:]
        for key, value in held.items():
            tensor.external_data.add(key=key, value=value.replace("\0", "?"))
    elif way == "dims":
        tensor.dims[:] = draw.choice([[-1], [2**40, 2**40], [0], [1], list(tensor.dims)[::-1], [*tensor.dims, 2]])
    elif way == "type":
        tensor.data_type = draw.choice([0, 2, 7, 10, 11, 99])
    elif way == "operator":
        draw.choice(list(model.graph.node)).op_type = draw.choice(["Own", "If", "Loop", "", "MatMul", "PythonOp"])
    elif way == "name":
        tensor.name = draw.choice(["", "x", "../x"])
    elif way == "input":
        draw.choice(list(model.graph.input)).name = draw.choice(["x", ""])
    else:
        model.metadata_props.add(key="x", value="/etc/passwd")
    replace(path, model.SerializeToString())
    return f"{way} of {tensor.name[:40]}"


def place(draw: random.Random, path: Path, outside: Path) -> str:
    """Put something else where the file was: a link, a folder, a pipe, nothing."""
    way = draw.choice(
        ["link to a twin outside", "link to /etc/passwd", "link up", "loop", "folder", "pipe", "gone", "dangling"]
    )
    if way == "link to a twin outside":
        (outside / path.name).write_bytes(path.resolve().read_bytes())
    path.unlink()
    if way == "folder":
        path.mkdir()
    elif way == "pipe":
        os.mkfifo(path)
    elif way != "gone":
        path.symlink_to({"link to a twin outside": outside / path.name, "link to /etc/passwd": Path("/etc/passwd"),
                         "link up": Path("../../../../../../../../etc/passwd"), "loop": path,
                         "dangling": outside / "nothing"}[way])  # fmt: skip
    return way


def replace(path: Path, data: bytes) -> None:
    """Write new content, also in the place of a link."""
    path.unlink()
    path.write_bytes(data)
