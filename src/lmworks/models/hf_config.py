"""Values of a published config.json: typed reading, and the rotary settings of both generations. Torch-free.

transformers 4: rope_theta beside rope_scaling {rope_type (before: type), factor, …}
transformers 5: rope_parameters {rope_theta, rope_type, factor, …}
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lmworks.base.errors import FormatError, InputError
from lmworks.models.config import Config, LongRope, RopeScaling, Rotary

LONG = "longrope"
MOST_NUMBER = 1e30  # a float32 holds it; NaN and infinity are above
ROPE_TYPES = ("default", "llama3", LONG)


class Fields:
    """Typed reading of a JSON object: a missing or mistyped value is a FormatError that names it.

    A null counts as missing, as it does in the files of the Hub.
    """

    def __init__(self, hf: Mapping[str, Any], name: str = "config.json") -> None:
        self.hf, self.name = hf, name

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a whole number."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._mistyped(key, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MOST_NUMBER:
            raise self._mistyped(key, "a number")
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """Return a list of so many numbers."""
        value = self._get(key, None)
        whole = isinstance(value, list) and all(type(item) in (int, float) for item in value)
        if not isinstance(value, list) or not whole or len(value) != count:
            raise self._mistyped(key, f"a list of {count} numbers")
        return tuple(float(item) for item in value)

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._mistyped(key, "a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._mistyped(key, "true or false")
        return value

    def table(self, key: str) -> dict[str, Any]:
        """Return an object, empty where it is missing."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self._mistyped(key, "an object")
        return value

    def token(self, key: str, default: int | None = None) -> int | None:
        """Return a token id; None where the file says null, the default where it says nothing."""
        return default if key not in self.hf else None if self.hf[key] is None else self.integer(key)

    def tokens(self, key: str, default: int | None = None) -> int | tuple[int, ...] | None:
        """Return a token id, or several, or None."""
        value = self.hf.get(key)
        if isinstance(value, list) and all(type(item) is int for item in value):
            return tuple(value)
        return self.token(key, default)

    def choice(self, key: str, default: str, choices: Sequence[str]) -> str:
        """Return one of some strings."""
        value = self.text(key, default)
        if value not in choices:
            raise InputError(f"{self.name}: {key} is not supported", found=value, expected=" or ".join(choices))
        return value

    def must_be(self, key: str, value: object) -> None:
        """Raise InputError where a setting that is not implemented here is switched on."""
        found = self.hf.get(key)
        if found is not None and found != value:
            raise InputError(f"{self.name}: {key} is not supported", found=f"{found}", expected=f"{value}")

    def must_look_back(self) -> None:
        """Raise InputError where a decoder is told to see later tokens too; transformers takes a null for a no."""
        if not self.hf.get("is_causal", True):
            self.must_be("is_causal", True)
            raise InputError(f"{self.name}: is_causal is not supported", found="null", expected="True")

    def _get(self, key: str, default: object) -> object:
        value = self.hf.get(key)
        value = default if value is None else value
        if value is None:
            raise FormatError(f"{self.name} does not state {key}")
        return value

    def _mistyped(self, key: str, expected: str) -> FormatError:
        return FormatError(
            f"{self.name}: {key} is not {expected}", found=repr(self.hf.get(key))[:200], expected=expected
        )


def read_rope(hf: Mapping[str, Any], head_dim: int, partial: float | None = None) -> Rotary:
    """Return how a head is rotated; an unsupported kind is an InputError that lists ours.

    `partial` is the share of a head that is rotated where the file says nothing; None: the family rotates all of it.
    """
    outer = Fields(hf)
    where = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"  # as transformers, where both are stated
    rope = Fields(outer.table(where), f"config.json, {where}")
    kind = rope.text("rope_type", rope.text("type", "default"))
    kind = LONG if kind == "su" else kind  # its first name
    if kind not in ROPE_TYPES:
        raise InputError(f"the rope type {kind!r} is not supported", expected=" or ".join(ROPE_TYPES))
    theta = rope.number("rope_theta", outer.number("rope_theta", 10000.0))
    usual = outer.number("partial_rotary_factor", 1.0 if partial is None else partial)
    share = rope.number("partial_rotary_factor", usual)
    if partial is None and share != 1:
        raise InputError(f"{rope.name}: partial_rotary_factor is not supported", found=f"{share}", expected="1.0")
    dim = None if share == 1 else int(head_dim * share)
    if kind == "default":
        return Rotary(theta=theta, dim=dim)
    length = outer.integer("max_position_embeddings", 2048)
    inner = rope.integer("original_max_position_embeddings", length)
    original = outer.integer("original_max_position_embeddings", inner)
    if kind == "llama3":
        factors = {name: rope.number(name) for name in ("factor", "low_freq_factor", "high_freq_factor")}
        scaling: RopeScaling | LongRope = RopeScaling(**factors, original_max_position_embeddings=original)
    else:
        pairs = (dim or head_dim) // 2
        factor = rope.number("attention_factor", long_factor(rope.number("factor", length / original), original))
        scaling = LongRope(short=rope.numbers("short_factor", pairs), long=rope.numbers("long_factor", pairs),
                           factor=factor, original_max_position_embeddings=original)  # fmt: skip
    return Rotary(theta=theta, scaling=scaling, dim=dim)


def plain_rope(hf: Mapping[str, Any], kind: str) -> Fields:
    """Return what rope_parameters say of one kind of layers; raise InputError where they or rope_scaling stretch it."""
    outer, where = Fields(hf), "config.json, rope_parameters"
    if outer.table("rope_scaling"):
        outer.must_be("rope_scaling", None)
    found = Fields(Fields(outer.table("rope_parameters"), where).table(kind), f"{where}, {kind}")
    for key, value in (("rope_type", "default"), ("type", "default"), ("partial_rotary_factor", 1)):
        found.must_be(key, value)
    return found


def long_factor(factor: float, original: int) -> float:
    """Return what cosines and sines are multiplied by where a context became `factor` times as long."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0


def write_rope(c: Config) -> dict[str, Any]:
    """Return the keys of both generations: each reads its own and agrees with the other."""
    r, s = c.rotary, c.rotary.scaling
    share = {} if r.dim is None else {"partial_rotary_factor": r.dim / c.head_dim}
    plain, more = {"rope_theta": r.theta, **share}, {}
    if s is None:
        return {"rope_parameters": {"rope_type": "default", **plain}, "rope_scaling": None, **plain}
    if isinstance(s, RopeScaling):
        scaling: dict[str, Any] = {"rope_type": "llama3", **vars(s)}
        parameters = {**scaling, **plain}
    else:  # transformers 4 wants three keys and no more
        usual = long_factor(c.max_position_embeddings / s.original_max_position_embeddings,
                            s.original_max_position_embeddings)  # fmt: skip
        own = {} if s.factor == usual else {"attention_factor": s.factor}
        scaling = {"type": LONG, "short_factor": list(s.short), "long_factor": list(s.long), **own}
        more = {"original_max_position_embeddings": s.original_max_position_embeddings}
        parameters = {**scaling, "rope_type": LONG, **more, **plain}
        del parameters["type"]
    return {"rope_parameters": parameters, "rope_scaling": scaling, **more, **plain}
