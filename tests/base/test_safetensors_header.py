"""The header check against the safetensors library: what we accept, it opens alike; the rest is one FormatError."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_torch

from lmworks.base.errors import FormatError
from lmworks.base.safetensors_header import BITS, MAX_TENSORS, TensorInfo, check_header

TENSORS = {
    "embed.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "layers.0.bias": torch.ones(5, dtype=torch.bfloat16),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros(0, 3),
    "größe": torch.tensor([True, False]),
    "small": torch.zeros(3, dtype=torch.float8_e4m3fn),
}
WHOLE = save_torch(TENSORS, metadata={"format": "pt"})


def pack(header: object, data: bytes = b"") -> bytes:
    """Return a file with this header: bytes as they are, anything else as JSON."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype: str = "F32", shape: tuple[int, ...] = (1,), offsets: tuple[int, ...] = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def refused(path: Path, content: bytes) -> str:
    """Return the message for a file with this content; fail if it is accepted or names no file."""
    path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        check_header(path)
    assert path.name in str(caught.value)
    return str(caught.value)


def test_what_the_library_wrote_is_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(WHOLE)
    found = check_header(path)
    size = int.from_bytes(WHOLE[:8], "little")
    with safe_open(path, "pt") as file:
        assert list(found) == list(file.offset_keys())
        for name, info in found.items():
            assert (info.dtype, list(info.shape)) == (
                file.get_slice(name).get_dtype(),
                file.get_slice(name).get_shape(),
            )
            ours = WHOLE[8 + size + info.start : 8 + size + info.end]
            assert ours == TENSORS[name].view(torch.uint8 if TENSORS[name].dim() else torch.int64).numpy().tobytes()


def test_every_dtype_is_as_wide_as_the_library_says(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for dtype, bits in BITS.items():
        path.write_bytes(pack({"a": entry(dtype, (8,), (0, bits))}, bytes(bits)))
        assert check_header(path) == {"a": TensorInfo(dtype, (8,), 0, bits)}
        with safe_open(path, "np") as file:
            assert file.get_slice("a").get_shape() == [8]


GOOD = entry()
BAD: dict[str, tuple[object, bytes, str]] = {  # what is wrong: header, data, and what the message says
    "not JSON": (b'{"a": ', b"", "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "not valid JSON"),
    "an array": (b"[1, 2]", b"", "does not start with {"),
    "a space first": (b" {}", b"", "does not start with {"),
    "deep nesting": (b'{"a":' + b'{"a":' * 100_000, b"", "not valid JSON"),
    "deep lists": (b'{"a":' + b"[" * 100_000, b"", "not valid JSON"),
    "a name twice": (b'{"a":' + json.dumps(GOOD).encode() + b',"a":{}}', b"1234", "'a' comes twice"),
    "a key twice": (b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"1", "'dtype' comes twice"),
    "half a character": (b'{"\\ud800":' + json.dumps(GOOD).encode() + b"}", b"1234", "name is not valid text"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "metadata that is a list": ({"__metadata__": []}, b"", "__metadata__"),
    "an entry that is a list": ({"a": ["F32", [1], [0, 4]]}, b"1234", "entry of a"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"1234", "entry of a"),
    "an unknown dtype": ({"a": entry("F33")}, b"1234", "unknown dtype"),
    "a dtype that is a list": ({"a": {**GOOD, "dtype": ["F32"]}}, b"1234", "unknown dtype"),
    "a negative size": ({"a": entry(shape=(-1,))}, b"1234", "not a size"),
    "a size of -0": (b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}', b"", "not a size"),
    "a size that is a float": ({"a": {**GOOD, "shape": [1.0]}}, b"1234", "not a size"),
    "a size that is NaN": (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}', b"", "not a size"),
    "a size that is true": ({"a": {**GOOD, "shape": [True]}}, b"1234", "list of sizes"),
    "a size of 5000 digits": (b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b"]}}", b"", "not a size"),
    "a product over 64 bits": ({"a": entry(shape=(2**63, 4, 0), offsets=(0, 0))}, b"", "too large for any file"),
    "a product that wraps to 4": ({"a": entry(shape=(2**62, 4, 2**2 + 1))}, b"1234", "too large for any file"),
    "a shape that does not fit": ({"a": entry(shape=(2,))}, b"1234", "8 bytes"),
    "half a byte": ({"a": entry("F4", (1,), (0, 1))}, b"1", "0.5 bytes"),
    "offsets backwards": ({"a": entry(offsets=(4, 0))}, b"1234", "[start, end]"),
    "three offsets": ({"a": entry(offsets=(0, 4, 8))}, b"1234", "[start, end]"),
    "a hole": ({"a": GOOD, "b": entry(offsets=(5, 9))}, bytes(9), "b leaves a hole after a"),
    "a hole at the start": ({"a": entry(offsets=(1, 5))}, bytes(5), "a leaves a hole after the header"),
    "an overlap": ({"a": GOOD, "b": entry(offsets=(2, 6))}, bytes(6), "b overlaps a"),
    "the same place twice": ({"a": GOOD, "b": GOOD}, b"1234", "b overlaps a"),
    "data that is short": ({"a": GOOD, "b": entry(offsets=(4, 8))}, bytes(5), "3 bytes are missing at its end, from b"),
    "data that is long": ({"a": GOOD}, bytes(6), "2 bytes at its end"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_header_that_lies_is_refused(tmp_path: Path, what: str) -> None:
    header, data, says = BAD[what]
    assert says in refused(tmp_path / "model.safetensors", pack(header, data))


def test_a_length_is_compared_with_the_file_and_the_limit(tmp_path: Path) -> None:
    """Incident rows of parsers: a length that the file does not have is never allocated."""
    path = tmp_path / "model.safetensors"
    for content in (b"", b"1234567", bytes(8), (2**63).to_bytes(8, "little") + b"{}"):
        assert "the file ends before its header does" in refused(path, content)
    with path.open("wb") as file:  # sparse: the length is honest, and too long
        file.write((100_000_001).to_bytes(8, "little") + b"{")
        file.truncate(100_000_100)
    with pytest.raises(FormatError, match="header is too long"):
        check_header(path)


def test_a_truncated_file_says_how_much_is_missing(tmp_path: Path) -> None:
    message = refused(tmp_path / "model-00002-of-00003.safetensors", WHOLE[:-7])
    assert "7 bytes are missing" in message
    assert "fetch it again" in message


def test_a_bomb_is_refused_in_less_than_a_second(tmp_path: Path) -> None:
    """900,000 empty tensors are valid, and take the library 8 seconds and 1.2 GB to open."""
    one = json.dumps(entry(shape=(0,), offsets=(0, 0)))
    bomb = pack(("{" + ",".join(f'"t{i}":{one}' for i in range(900_000)) + "}").encode())
    numbers = pack(b'{"a":{"dtype":"U8","shape":[' + b"1," * 40_000_000 + b'1],"data_offsets":[0,1]}}', b"1")
    path = tmp_path / "model.safetensors"
    for content in (bomb, numbers):
        path.write_bytes(content)
        start = time.process_time()
        with pytest.raises(FormatError, match="too many tensors"):
            check_header(path)
        assert time.process_time() - start < 1
    path.write_bytes(pack(("{" + ",".join(f'"t{i}":{one}' for i in range(MAX_TENSORS)) + "}").encode()))
    assert len(check_header(path)) == MAX_TENSORS


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, says in (
        (tmp_path, "not a file"),
        (tmp_path / "pipe", "not a file"),
        (tmp_path / "absent", "is missing"),
    ):
        with pytest.raises(FormatError, match=says):
            check_header(path)


def agree(path: Path, content: bytes) -> None:
    """Refuse with FormatError, or say what the library says of the same file."""
    path.write_bytes(content)
    try:
        found = check_header(path)
    except FormatError:
        return
    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.offset_keys()}
            theirs = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except SafetensorError as error:
        pytest.fail(f"accepted what the library refuses: {error}")
    assert {name: (info.dtype, list(info.shape)) for name, info in found.items()} == theirs


QUICK = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUICK
@given(data=st.data())
def test_flipped_and_truncated_files_are_refused_or_read_alike(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(WHOLE)
    header = 8 + int.from_bytes(WHOLE[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header - 1))] ^= 1 << data.draw(st.integers(0, 7))
    cut = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    agree(tmp_path / "model.safetensors", bytes(content[:cut]))


SIZES = st.one_of(st.integers(-1, 9), st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64 - 1, 2**64, 10**30]))
VALUES = st.one_of(
    st.none(), st.booleans(), SIZES, st.floats(), st.text(max_size=4), st.sampled_from(sorted(BITS)),
    st.lists(SIZES, max_size=4),
)  # fmt: skip


@QUICK
@given(data=st.data())
def test_edited_headers_are_refused_or_read_alike(tmp_path: Path, data: st.DataObject) -> None:
    """Change, drop and add parts of real entries, so that most edits reach the checks behind the JSON."""
    size = int.from_bytes(WHOLE[:8], "little")
    header = json.loads(WHOLE[8 : 8 + size])
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(header)))
        match data.draw(st.sampled_from(("drop", "rename", "replace", "key", "number", "copy"))):
            case "drop" if len(header) > 1:
                header.pop(name)
            case "rename":
                header[data.draw(st.text(max_size=3))] = header.pop(name)
            case "replace":
                header[name] = data.draw(VALUES)
            case "copy":
                header["copy"] = header[name]
            case "key" if isinstance(header[name], dict):
                header[name] = {**header[name], data.draw(st.sampled_from(("dtype", "shape", "x"))): data.draw(VALUES)}
            case "number" if isinstance(header[name], dict):
                numbers = header[name].get(data.draw(st.sampled_from(("shape", "data_offsets"))))
                if isinstance(numbers, list) and numbers:
                    numbers[data.draw(st.integers(0, len(numbers) - 1))] = data.draw(SIZES)
            case _:
                pass
    agree(tmp_path / "model.safetensors", pack(header, WHOLE[8 + size :]))


@QUICK
@given(
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=6), dtype=st.sampled_from(["F64", "U8", "F16"])
)
def test_whatever_the_library_writes_is_accepted(tmp_path: Path, shapes: list[list[int]], dtype: str) -> None:
    from safetensors.numpy import save

    kind = {"F64": np.float64, "U8": np.uint8, "F16": np.float16}[dtype]
    path = tmp_path / "model.safetensors"
    path.write_bytes(save({f"t{i}": np.zeros(shape, kind) for i, shape in enumerate(shapes)}))
    assert {name: list(info.shape) for name, info in check_header(path).items()} == {
        f"t{i}": shape for i, shape in enumerate(shapes)
    }
