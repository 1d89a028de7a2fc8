"""A stranger's ONNX file is walked in bounded time."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmworks.base import onnx_file
from lmworks.base.errors import FormatError


def wrap(tag: bytes, data: bytes) -> bytes:
    """Return a field of protobuf that holds bytes."""
    size, rest = b"", len(data)
    while rest > 127:
        size, rest = size + bytes([rest & 127 | 128]), rest >> 7
    return tag + size + bytes([rest]) + data


@pytest.mark.parametrize("field", [b"\x12\x00", b"\x08\x01", b"\x6a\x00"])  # empty bytes, a number, an empty entry
def test_countless_fields_are_refused(field: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many fields as no real file has end in an error; fewer are walked."""
    monkeypatch.setattr(onnx_file, "MOST_FIELDS", 1000, raising=False)
    path = tmp_path / "model.onnx"
    path.write_bytes(wrap(b"\x3a", wrap(b"\x2a", b"\x42\x01t" + field * 1001)))
    with pytest.raises(FormatError, match="more than 1,000 fields"):
        onnx_file.check_onnx(path)
    path.write_bytes(wrap(b"\x3a", wrap(b"\x2a", b"\x42\x01t" + b"\x12\x00" * 900)))
    onnx_file.check_onnx(path)
