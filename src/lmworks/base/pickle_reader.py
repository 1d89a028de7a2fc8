"""Read a pickle as data: no name in it is ever looked up, imported or called.

A pickle is a program for a stack machine, and some of its instructions call functions by name. This reader knows the
instructions that tensors need and a short list of names, each of which stands for a record of ours. Any other name is
noted in `refused`, and reading goes on, so that one pass finds them all; an instruction that is not known ends it.
Standard library only: it runs in a bare child process.

Source: CPython, Lib/pickletools.py (the instructions); torch 2.13, _utils.py and serialization.py (the names).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

LONGEST_INT = 16  # bytes; sizes need 8
STORAGES = {  # torch's classes: the dtype as safetensors spells it
    "FloatStorage": "F32", "DoubleStorage": "F64", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "UntypedStorage": "U8",
}  # fmt: skip
DTYPES = {
    "float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "complex64": "C64", "uint16": "U16", "uint32": "U32",
    "uint64": "U64", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
REBUILD = "torch._utils._rebuild_"
CALLS = {"collections.OrderedDict", "torch.Size", *(REBUILD + s for s in ("tensor", "tensor_v2", "tensor_v3"))}
CALLS.add(REBUILD + "parameter")


class Damaged(Exception):
    """The file does not hold what it should."""


class Refused(Exception):
    """What the file names that is not on the list, as its arguments."""


class Name(NamedTuple):
    """A function or class that the pickle names; `refused` where it is not on the list."""

    name: str
    refused: bool = False


class Storage(NamedTuple):
    """Where numbers lie: the key of their record, their dtype, how many there are."""

    key: str
    dtype: str
    size: int


class View(NamedTuple):
    """A tensor: which numbers of a storage it has, in elements of its own dtype."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Mark:
    """What MARK leaves on the stack."""


class Reader:
    """The stack machine over `data`; `read` may be called again for a pickle that follows."""

    def __init__(self, data: bytes | memoryview) -> None:
        self.data, self.at = memoryview(data), 0
        self.refused: list[str] = []
        self.storages: dict[str, Storage] = {}
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def read(self) -> Any:
        """Return the object of the next pickle; raise Damaged where it is none, Refused where it names more."""
        self.stack, self.memo = [], {}
        try:
            made = self.run()
        except Damaged as error:
            if self.refused:
                raise Refused(*self.refused, str(error)) from None
            raise
        if self.refused:
            raise Refused(*self.refused)
        return made

    def run(self) -> Any:
        """Follow the instructions up to the last one."""
        try:
            while (code := self.take(1)[0]) != 0x2E:  # STOP
                if code not in STEPS:
                    raise Damaged(f"an instruction that no tensor needs ({code:#04x} at byte {self.at - 1})")
                STEPS[code](self)
            return self.stack.pop()
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, struct.error) as error:
            raise Damaged(f"the pickle is damaged at byte {self.at} ({type(error).__name__})") from None

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        if not 0 <= count <= len(self.data) - self.at:
            raise Damaged(f"the pickle ends at byte {len(self.data)}, in the middle of a value")
        self.at += count
        return bytes(self.data[self.at - count : self.at])

    def line(self) -> str:
        """Return the text up to a line feed."""
        start = self.at
        while self.take(1) != b"\n":
            if self.at - start > 1000:
                raise Damaged("a name has more than 1000 letters")
        return bytes(self.data[start : self.at - 1]).decode()

    def number(self, form: str) -> Any:
        """Return a number of this struct format."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def since_mark(self) -> list[Any]:
        """Take what lies above the last mark off the stack, and the mark."""
        for i in range(len(self.stack) - 1, -1, -1):
            if isinstance(self.stack[i], Mark):
                found = self.stack[i + 1 :]
                del self.stack[i:]
                return found
        raise Damaged("the pickle has no mark where it needs one")

    def find(self, module: object, name: object) -> Name:
        """Return what a name stands for, and note it where it is not on the list."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise Damaged("the pickle computes a name")
        whole = f"{module}.{name}"
        parts = whole.removeprefix("torch.storage." if module == "torch.storage" else "torch.")
        known = whole in CALLS or (module in ("torch", "torch.storage") and (parts in STORAGES or parts in DTYPES))
        return Name(whole, refused=self.refuse(whole) if not known else False)

    def refuse(self, what: str) -> bool:
        """Note what is not on the list; always true."""
        what = "".join(letter if letter.isprintable() else "?" for letter in what[:200])
        if what not in self.refused and len(self.refused) < 100:
            self.refused.append(what)
        return True

    def call(self, name: object, arguments: object) -> Any:
        """Return what a call stands for; nothing is called."""
        if not isinstance(name, Name) or not isinstance(arguments, tuple):
            raise Damaged("the pickle calls what is no name")
        if name.refused or name.name not in CALLS:
            return Name(name.name, refused=self.refuse(name.name))
        if name.name == "collections.OrderedDict":
            made: dict[Any, Any] = {}
            for pair in arguments[0] if arguments else ():  # as Python 2 wrote it
                put(made, *pair)
            return made
        if name.name == "torch.Size":
            return tuple(arguments[0]) if arguments else ()
        if name.name == REBUILD + "parameter":
            return arguments[0]
        return self.view(name.name, arguments)

    def view(self, name: str, arguments: tuple[Any, ...]) -> View | Name:
        """Return a tensor: (storage, offset, shape, stride, requires_grad, hooks, then dtype or metadata)."""
        storage, offset, shape, stride = arguments[:4]
        if isinstance(storage, Name) and storage.refused:
            return storage
        dtype = storage.dtype if isinstance(storage, Storage) else ""
        if name.endswith("v3"):
            dtype = DTYPES.get(arguments[6].name.removeprefix("torch."), "")
        more = arguments[7:] if name.endswith("v3") else arguments[6:]
        if any(more):
            return Name("tensor metadata", refused=self.refuse(f"tensor metadata {str(more[0])[:60]}"))
        whole = isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride) <= 64
        if not dtype or not whole or any(type(n) is not int or n < 0 for n in (offset, *shape, *stride)):
            raise Damaged("a tensor is not a storage, an offset, a shape and strides")
        return View(storage, dtype, offset, shape, stride)

    def persistent(self, found: object) -> Storage | Name:
        """Return the storage that a persistent id names: ("storage", class, key, device, numbers, view)."""
        if not isinstance(found, tuple) or not found or found[0] != "storage":
            what = found[0] if isinstance(found, tuple) and found and isinstance(found[0], str) else "object"
            return Name(what, refused=self.refuse(f"persistent {what}"))
        _, kind, key, _, size, *view = found
        if isinstance(kind, Name) and kind.refused:
            return kind
        dtype = STORAGES.get(kind.name.rpartition(".")[2], "") if isinstance(kind, Name) else ""
        if not dtype or not isinstance(key, str) or type(size) is not int or size < 0:
            raise Damaged("a storage is not a class, a key and a size")
        if any(view):
            return Name("storage view", refused=self.refuse("a view of a storage (torch before 0.4)"))
        made = Storage(key, dtype, size)
        if self.storages.setdefault(key, made) != made:
            raise Damaged("two storages have one key")
        return made


def put(target: object, key: object, value: object) -> None:
    """Set an item; what hashes deeply is no key."""
    if not isinstance(target, dict) or not isinstance(key, str | int | float | None):
        raise Damaged("the pickle sets an item of what is no dict, or under what is no plain key")
    target[key] = value


def push(make: Callable[[Reader], Any]) -> Callable[[Reader], None]:
    """Return the step that puts a value on the stack."""
    return lambda r: r.stack.append(make(r))


def keep(form: str) -> Callable[[Reader], None]:
    """Return the step that remembers the top of the stack under a number."""

    def step(r: Reader) -> None:
        r.memo[r.number(form)] = r.stack[-1]

    return step


def skip(count: int) -> Callable[[Reader], None]:
    """Return the step that reads over bytes that change nothing."""

    def step(r: Reader) -> None:
        r.take(count)

    return step


def memoize(r: Reader) -> None:
    """Remember the top of the stack under the next number."""
    r.memo[len(r.memo)] = r.stack[-1]


def set_items(pairs: Callable[[Reader], list[Any]]) -> Callable[[Reader], None]:
    """Return the step that puts keys and values into the dict below them."""

    def step(r: Reader) -> None:
        found = pairs(r)
        for key, value in zip(found[::2], found[1::2], strict=False):
            put(r.stack[-1], key, value)

    return step


def append(values: Callable[[Reader], list[Any]]) -> Callable[[Reader], None]:
    """Return the step that puts values into the list below them."""

    def step(r: Reader) -> None:
        found = values(r)
        if not isinstance(r.stack[-1], list):
            raise Damaged("the pickle adds to what is no list")
        r.stack[-1].extend(found)

    return step


def build(r: Reader) -> None:
    """Leave out the state that an object is given: an OrderedDict's (`_metadata`) says nothing about tensors."""
    r.stack.pop()
    if not isinstance(r.stack[-1], dict | Name):
        r.refuse(f"attributes of a {type(r.stack[-1]).__name__}")


def tops(r: Reader, count: int) -> list[Any]:
    """Take values off the stack, in their order."""
    if len(r.stack) < count:
        raise Damaged("the pickle takes what is not there")
    found = r.stack[len(r.stack) - count :]
    del r.stack[len(r.stack) - count :]
    return found


def make_call(r: Reader) -> Any:
    """Take a name and its arguments off the stack; return what the call stands for."""
    return r.call(*tops(r, 2))


def make_refused(r: Reader) -> Name:
    """Note an object that a class makes by itself (NEWOBJ): of what we know nothing is made so."""
    name, _ = tops(r, 2)
    if not isinstance(name, Name):
        raise Damaged("the pickle makes an object of what is no class")
    return Name(name.name, refused=r.refuse(name.name))


def whole_number(r: Reader, size: int) -> int:
    """Return a whole number of so many bytes."""
    if not 0 <= size <= LONGEST_INT:
        raise Damaged(f"a number of {size} bytes")
    return int.from_bytes(r.take(size), "little", signed=True)


STEPS: dict[int, Callable[[Reader], None]] = {
    0x80: skip(1),  # PROTO
    0x95: skip(8),  # FRAME
    ord("("): push(lambda r: Mark()),
    ord("N"): push(lambda r: None),
    0x88: push(lambda r: True),
    0x89: push(lambda r: False),
    ord("}"): push(lambda r: {}),
    ord("]"): push(lambda r: []),
    ord(")"): push(lambda r: ()),
    ord("t"): push(lambda r: tuple(r.since_mark())),
    0x85: push(lambda r: tuple(tops(r, 1))),
    0x86: push(lambda r: tuple(tops(r, 2))),
    0x87: push(lambda r: tuple(tops(r, 3))),
    ord("K"): push(lambda r: r.take(1)[0]),
    ord("M"): push(lambda r: r.number("<H")),
    ord("J"): push(lambda r: r.number("<i")),
    ord("G"): push(lambda r: r.number(">d")),
    0x8A: push(lambda r: whole_number(r, r.take(1)[0])),
    0x8B: push(lambda r: whole_number(r, r.number("<i"))),
    ord("X"): push(lambda r: r.take(r.number("<I")).decode()),
    0x8C: push(lambda r: r.take(r.take(1)[0]).decode()),
    0x8D: push(lambda r: r.take(r.number("<Q")).decode()),
    ord("U"): push(lambda r: r.take(r.take(1)[0]).decode()),  # as Python 2 wrote them
    ord("T"): push(lambda r: r.take(r.number("<i")).decode()),
    ord("C"): push(lambda r: r.take(r.take(1)[0])),
    ord("B"): push(lambda r: r.take(r.number("<I"))),
    ord("q"): keep("<B"),
    ord("r"): keep("<I"),
    0x94: memoize,
    ord("h"): push(lambda r: r.memo[r.number("<B")]),
    ord("j"): push(lambda r: r.memo[r.number("<I")]),
    ord("c"): push(lambda r: r.find(r.line(), r.line())),
    0x93: push(lambda r: r.find(*tops(r, 2))),
    ord("Q"): push(lambda r: r.persistent(tops(r, 1)[0])),
    ord("R"): push(make_call),
    0x81: push(make_refused),
    ord("b"): build,
    ord("s"): set_items(lambda r: tops(r, 2)),
    ord("u"): set_items(Reader.since_mark),
    ord("a"): append(lambda r: tops(r, 1)),
    ord("e"): append(Reader.since_mark),
}
