"""Find out which matrices of a graph must keep 8 bits and floats, by what the answers on real inputs become.

    emulate       each matrix as the graph will hold it; in int8 and uint8 its input too in 256 steps
    sensitivity   how far the model's answers move with one matrix alone rounded (calibrate.distance)
    kept          those that mind most for their size, one after the other, until the whole is within a limit

Shapes: I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from lmworks.base.types import Batch
from lmworks.compress.calibrate import distance, say
from lmworks.compress.quantize import find_linears, put
from lmworks.compress.rounding import Floats, Precision, quantize_blocks, quantize_bytes, restore_blocks
from lmworks.models.heads import Model

LARGEST = {"int8": 63, "uint8": 127}  # as the graph holds them
EXACT = 127  # a matrix that multiplies floats uses all its bits
STEPS = 255  # of an input in int8
LIMIT = 0.003  # of the divergence that a graph may have on the texts that it is chosen by
JUDGED = 16  # batches that answers are compared on: one matrix after the other is tried
MOST_NUMBERS = 1 << 23  # that are compared
SHARE = 0.34  # of the weights at most that keep 8 bits and floats
MOST_INPUTS = 4096  # of a matrix whose moments are kept
BODY = "transformer."


class Emulated(nn.Linear):
    """A Linear as a graph computes it: its input, a whole call, is rounded to 256 steps."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply and add the bias: (…, I) -> (…, O)."""
        low, high = (float(end) for end in x.aminmax())
        low, high = min(low, 0.0), max(high, 0.0)
        step = (high - low) / STEPS or 1.0
        zero = round(-low / step)
        return super().forward(((x / step).round() + zero).clamp(0, STEPS).sub(zero) * step)


def choose_precision(
    model: Model, batches: Sequence[Batch], dtype: str, *, limit: float = LIMIT, share: float = SHARE
) -> Precision:
    """Return what a graph in int8, uint8 or q4 should do with each matrix, by real inputs; the model stays as it is.

    A graph that is within the limit without more has no sensitivities.
    """
    units, judged = find_units(model), choose_judges(model, batches)
    moments = find_moments(model, units, batches) if dtype == "q4" else {}
    known = say(model, judged)
    sizes = {name: sum(linear.weight.numel() for linear in part.values()) for name, part in units.items()}
    sensitivity: dict[str, float] = {}
    kept: list[str] = []
    with restoring(model, units):
        rounded = {name: emulate(part, dtype, moments.get(name)) for name, part in units.items()}
        for part in rounded.values():
            place(model, part)
        left = distance(model, known, say(model, judged))
        if left > limit:
            for part in units.values():
                place(model, part)
            for name, part in units.items():  # alone
                place(model, rounded[name])
                sensitivity[name] = distance(model, known, say(model, judged))
                place(model, part)
            for part in rounded.values():
                place(model, part)
        room = share * sum(sizes.values())
        for name in sorted(sensitivity, key=lambda name: -sensitivity[name] / sizes[name]):
            room -= sizes[name]
            if left <= limit or room < 0:
                break
            place(model, emulate(units[name], "exact"))
            kept.append(name)
            left = distance(model, known, say(model, judged))
    return Precision(moments=moments, kept=tuple(kept), sensitivity=sensitivity, divergence=left)


def choose_judges(model: Model, batches: Sequence[Batch]) -> list[Batch]:
    """Return the batches that answers are compared on: few, and of a large vocabulary fewer."""
    outputs = model.config.hidden_size if model.kind == "Model" else model.spec.size(model.config)
    chosen: list[Batch] = []
    numbers = 0
    for batch in batches[:: max(len(batches) // JUDGED, 1)]:
        numbers += batch.get("input_ids", np.empty(0)).size * outputs
        if chosen and numbers > MOST_NUMBERS:
            break
        chosen.append(batch)
    return chosen


def find_units(model: Model) -> dict[str, dict[str, nn.Linear]]:
    """Return the Linears of the body by the names of the graph's products; a causal graph joins q, k and v."""
    units: dict[str, dict[str, nn.Linear]] = {}
    for name, linear in find_linears(model, head=False).items():
        path, _, leaf = name.removeprefix(BODY).rpartition(".")
        joined = model.config.causal and leaf in ("q_proj", "k_proj", "v_proj")
        units.setdefault(f"{path}.{'qkv_proj' if joined else leaf}", {})[name] = linear
    return units


def find_moments(
    model: Model, units: Mapping[str, Mapping[str, nn.Linear]], batches: Sequence[Batch]
) -> dict[str, Floats]:
    """Return the mean of x x^T (I, I) over real inputs of every matrix; queries, keys and values share theirs."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).float()  # (n, I)
            sums[name] = sums[name].addmm_(x.T, x) if name in sums else x.T @ x
            counts[name] = counts.get(name, 0) + len(x)

        return look

    shared = {name: f"{name.rpartition('.')[0]}.q_proj" for name in units if name.endswith((".k_proj", ".v_proj"))}
    hooks = []
    for name, part in units.items():
        linear = next(iter(part.values()))
        if shared.get(name) not in units and linear.in_features <= MOST_INPUTS:
            hooks.append(linear.register_forward_pre_hook(watch(name)))
    try:
        say(model, batches)
    finally:
        for hook in hooks:
            hook.remove()
    found = {name: (total / counts[name]).numpy() for name, total in sums.items()}
    return {name: found[shared.get(name, name)] for name in units if shared.get(name, name) in found}


def emulate(part: Mapping[str, nn.Linear], dtype: str, moments: Floats | None = None) -> dict[str, nn.Linear]:
    """Return layers that compute what a graph of this dtype does; "exact": 8 bits that multiply floats."""
    made: dict[str, nn.Linear] = {}
    for name, linear in part.items():
        weight = linear.weight.detach().float().numpy()  # (O, I)
        if dtype == "q4":
            stored = restore_blocks(*quantize_blocks(weight, moments), weight.shape[1])
        else:
            whole, scale = quantize_bytes(weight, axis=1, largest=LARGEST.get(dtype, EXACT))
            stored = whole * scale
        with torch.device("meta"):
            layer = (Emulated if dtype in LARGEST else nn.Linear)(linear.in_features, linear.out_features, bias=False)
        layer.weight, layer.bias = nn.Parameter(torch.from_numpy(stored).contiguous()), linear.bias
        made[name] = layer
    return made


def place(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put layers in their places by name."""
    for name, layer in layers.items():
        put(model, name, layer)


@contextmanager
def restoring(model: nn.Module, units: Mapping[str, Mapping[str, nn.Linear]]) -> Iterator[None]:
    """Put every layer back at the end."""
    try:
        yield
    finally:
        for part in units.values():
            place(model, part)
