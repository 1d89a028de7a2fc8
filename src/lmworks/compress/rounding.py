"""Round the matrices of a graph: whole numbers of 8 and 4 bits, the latter so that what they multiply changes least.

    bytes      w = q s                 one scale an output; zero stays zero
    blocks     w = (q - z) s           q from 0 to 15; 32 inputs of an output share a scale s and a zero z
    NF4        w = table[q] a          64 weights in a row share their largest, a

With the inputs' second moments, H = mean x x^T over real data, blocks are rounded one input after the other, and the
inputs that are still to come make up for each error, so that |x W - x W'|² is small rather than |W - W'|² (Frantar et
al. 2023, GPTQ, algorithm 1).

Shapes: I inputs, O outputs, N blocks of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

BLOCK = 32  # inputs that share a scale in q4
TOP = 15  # the greatest number of four bits
RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)  # of a block's smallest to its largest weight
DAMPING = 0.02  # of the mean moment: directions that the data hardly show are not trusted
BNB_BLOCK = 64
# NF4: quantiles of a normal distribution, scaled to 1, zero among them (Dettmers et al. 2023, appendix E)
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What was found out about a model for one dtype of its graph; names are those of the graph's products."""

    moments: Mapping[str, Floats] = field(default_factory=dict)  # (I, I) of what each matrix multiplies
    kept: tuple[str, ...] = ()  # matrices in 8 bits that multiply floats: those that mind most
    sensitivity: Mapping[str, float] = field(default_factory=dict)  # the divergence with one matrix alone rounded
    divergence: float | None = None  # of the whole


def quantize_bytes(weight: Floats, *, axis: int, largest: int) -> tuple[NDArray[np.int8], Floats]:
    """Return whole numbers up to `largest` and their scales along `axis`; weight is about whole * scale."""
    scale = np.abs(weight).max(axis, keepdims=True) / largest
    scale = np.where(scale == 0, 1, scale).astype(np.float32)
    return np.round(weight / scale).astype(np.int8), scale


def quantize_blocks(weight: Floats, moments: Floats | None = None) -> tuple[Bytes, Floats, Bytes]:
    """Return (O, I) as 4-bit numbers (O, N, 16), scales (O, N) and zero points (O, N / 2); two a byte, low first.

    weight is about (number - zero) * scale; zero stays zero. `moments` (I, I) are those of what it multiplies.
    """
    outputs, inputs = weight.shape
    turned = np.pad(weight.T, ((0, -inputs % BLOCK), (0, 0))).astype(np.float32)  # (N 32, O)
    whole, scale, zero = round_plainly(turned) if moments is None else round_for(turned, moments)
    numbers = whole.T.reshape(outputs, -1, BLOCK).astype(np.uint8)
    zeros = np.pad(zero.T, ((0, 0), (0, len(zero) % 2))).astype(np.uint8)
    return pair(numbers[..., ::2], numbers[..., 1::2]), scale.T, pair(zeros[:, ::2], zeros[:, 1::2])


def restore_blocks(packed: Bytes, scale: Floats, zeros: Bytes, inputs: int) -> Floats:
    """Return the matrix (O, I) that `quantize_blocks` stands for."""
    zero = unpair(zeros)[:, : scale.shape[1], None]  # (O, N, 1)
    blocks: Floats = (unpair(packed).astype(np.float32) - zero) * scale[..., None]  # (O, N, 32)
    return blocks.reshape(len(scale), -1)[:, :inputs]


def round_plainly(turned: Floats) -> tuple[Floats, Floats, Floats]:
    """Return numbers (I, O), scales and zeros (N, O): each number is the nearest."""
    blocks = turned.reshape(-1, BLOCK, turned.shape[1])  # (N, 32, O)
    scale, zero = choose_scales(blocks, np.ones(BLOCK, np.float32))
    whole = np.clip(np.round(blocks / scale[:, None]) + zero[:, None], 0, TOP)
    return whole.reshape(turned.shape), scale, zero


def round_for(turned: Floats, moments: Floats) -> tuple[Floats, Floats, Floats]:
    """Return the same, rounded for inputs with these moments (I, I): later inputs make up for earlier errors."""
    w, size = turned.copy(), len(turned)
    upper = spread(moments, size)  # (I, I)
    worth = (1 / np.diag(upper) ** 2).astype(np.float32)  # what an error of an input costs in the end
    whole, scales, zeros = np.empty_like(w), [], []
    for start in range(0, size, BLOCK):
        part = slice(start, start + BLOCK)
        (scale,), (zero,) = choose_scales(w[None, part], worth[part])  # (O,) each
        errors = np.empty((BLOCK, w.shape[1]), np.float32)
        for i in range(start, start + BLOCK):
            whole[i] = np.clip(np.round(w[i] / scale) + zero, 0, TOP)
            errors[i - start] = error = (w[i] - (whole[i] - zero) * scale) / upper[i, i]
            w[i : part.stop] -= upper[i, i : part.stop, None] * error
        w[part.stop :] -= upper[part, part.stop :].T @ errors
        scales.append(scale)
        zeros.append(zero)
    return whole, np.stack(scales), np.stack(zeros)


def spread(moments: Floats, size: int) -> Floats:
    """Return U (I, I), upper triangular, with U^T U the inverse of the damped moments; row i spreads i's error."""
    damped = np.eye(size)
    damped[: len(moments), : len(moments)] = moments
    damped[np.diag_indices(len(moments))] += DAMPING * np.diag(moments).mean() + np.finfo(np.float32).tiny
    return np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)


def choose_scales(blocks: Floats, worth: Floats) -> tuple[Floats, Floats]:
    """Return the scale and zero (N, O) of blocks (N, 32, O): of the ranges the one whose squared errors cost least.

    A range that cuts its outliers off leaves finer steps for the rest. `worth` (32,) is what an input's error costs.
    """
    low, high = np.minimum(blocks.min(1), 0), np.maximum(blocks.max(1), 0)  # (N, O)
    least, scale, zero = np.full(low.shape, np.inf, np.float32), np.ones_like(low), np.zeros_like(low)
    for part in RANGES:
        step = np.where(high == low, 1, (high - low) * np.float32(part) / TOP)
        origin = np.clip(np.round(-low * np.float32(part) / step), 0, TOP)
        steps = np.clip(np.round(blocks / step[:, None]) + origin[:, None], 0, TOP)
        wrong = np.square((steps - origin[:, None]) * step[:, None] - blocks)  # (N, 32, O)
        cost = np.einsum("j,njo->no", worth, wrong)
        better = cost < least
        least, scale = np.where(better, cost, least), np.where(better, step, scale)
        zero = np.where(better, origin, zero)
    return scale, zero


def quantize_nf4(weight: Floats) -> tuple[Bytes, Floats]:
    """Return (O, I) row after row as places in NF4, two a byte, high first, and the largest of each 64."""
    flat = weight.ravel()
    blocks = np.pad(flat, (0, -flat.size % BNB_BLOCK)).reshape(-1, BNB_BLOCK)
    largest = np.abs(blocks).max(-1)
    unit = blocks / np.where(largest == 0, 1, largest)[:, None]
    middles = (NF4[1:] + NF4[:-1]) / 2
    places = np.searchsorted(middles, unit).astype(np.uint8).ravel()[: flat.size + flat.size % 2]
    return pair(places[1::2], places[::2]), largest.astype(np.float32)


def pair(low: Bytes, high: Bytes) -> Bytes:
    """Return two 4-bit numbers in a byte."""
    return np.bitwise_or(low, np.left_shift(high, 4, dtype=np.uint8), dtype=np.uint8)


def unpair(packed: Bytes) -> NDArray[Any]:
    """Return the two numbers of each byte side by side, low first: (…, n) -> (…, 2n)."""
    return np.stack((packed & 15, packed >> 4), -1).reshape(*packed.shape[:-1], -1)
