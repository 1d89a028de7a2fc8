"""Names with a layer's number in them. Torch-free."""

from __future__ import annotations

import re


def to_template(key: str) -> tuple[str, str]:
    """Take the layer's number out of a name: "layers.3.mlp.up_proj" -> ("layers.{}.mlp.up_proj", "3")."""
    number = re.search(r"\.(\d+)\.", key)
    return (f"{key[: number.start()]}.{{}}.{key[number.end() :]}", number[1]) if number else (key, "")


def merge_layers(problems: list[str]) -> list[str]:
    """Say what is wrong in many layers once: ["missing: h.0.b", "missing: h.1.b"] -> ["missing: h.{0,1}.b"]."""
    layers: dict[str, list[str]] = {}
    for problem in problems:
        template, layer = to_template(problem)
        layers.setdefault(template, []).append(layer)
    return [
        template.replace("{}", found[0] if len(found) == 1 else f"{{{shorten(found)}}}", 1)
        for template, found in layers.items()
    ]


def shorten(numbers: list[str]) -> str:
    """Return a few numbers as they are, many by their ends: "0,1,2", "0…31"."""
    return ",".join(numbers) if len(numbers) < 4 else f"{numbers[0]}…{numbers[-1]}"
