"""Values of a published config.json: typed reading, and the rotary settings of both generations. Torch-free.

transformers 4: rope_theta beside rope_scaling {rope_type (before: type), factor, …}
transformers 5: rope_parameters {rope_theta, rope_type, factor, …}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmworks.base.errors import FormatError, InputError
from lmworks.models.config import Config, RopeScaling

ROPE_TYPES = ("default", "llama3")


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
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._mistyped(key, "a number")
        return float(value)

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

    def _get(self, key: str, default: object) -> object:
        value = self.hf.get(key)
        value = default if value is None else value
        if value is None:
            raise FormatError(f"{self.name} does not state {key}")
        return value

    def _mistyped(self, key: str, expected: str) -> FormatError:
        return FormatError(f"{self.name}: {key} is not {expected}", found=repr(self.hf.get(key)), expected=expected)


def read_rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return `rope_theta` and `rope_scaling` for a Config; an unsupported kind is an InputError that lists ours."""
    outer = Fields(hf)
    found = outer.table("rope_parameters") or outer.table("rope_scaling")
    rope = Fields(found, "config.json, rope_parameters" if hf.get("rope_parameters") else "config.json, rope_scaling")
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in ROPE_TYPES:
        raise InputError(f"the rope type {kind!r} is not supported", expected=" or ".join(ROPE_TYPES))
    theta = rope.number("rope_theta", outer.number("rope_theta", 10000.0))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    scaling = RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=rope.integer(
            "original_max_position_embeddings", outer.integer("max_position_embeddings", 2048)
        ),
    )
    return {"rope_theta": theta, "rope_scaling": scaling}


def write_rope(c: Config) -> dict[str, Any]:
    """Return the keys of both generations: each reads its own and agrees with the other."""
    share = {} if c.rotary_dim is None else {"partial_rotary_factor": c.rotary_dim / c.head_dim}
    if c.rope_scaling is None:
        scaling: dict[str, Any] | None = None
        parameters = {"rope_type": "default", "rope_theta": c.rope_theta, **share}
    else:
        s = c.rope_scaling
        scaling = {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_max_position_embeddings,
        }
        parameters = {**scaling, "rope_theta": c.rope_theta, **share}
    return {"rope_parameters": parameters, "rope_theta": c.rope_theta, "rope_scaling": scaling, **share}


def read_rotary_dim(hf: Mapping[str, Any], head_dim: int, default: float) -> int | None:
    """Return how much of a head is rotated, None for all of it; both generations state a share of it."""
    outer = Fields(hf)
    share = Fields(outer.table("rope_parameters")).number(
        "partial_rotary_factor", outer.number("partial_rotary_factor", default)
    )
    return None if share == 1 else int(head_dim * share)
