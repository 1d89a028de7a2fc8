"""Round matrices to whole numbers: q = round(w / s).

    symmetric    s = max |w| / 127                       w is about q s             (7 instead of 127 for four bits)
    asymmetric   s = (max - min) / 255, z = lowest - min / s, rounded               w is about (q - z) s

The maximum is that of the matrix, of each output's row, or of each group of a row. What multiplies them is
models/compact.py.

Shapes: I inputs, O outputs, G groups of a row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lmworks.base.errors import InputError
from lmworks.models.compact import (
    TENSOR,
    Activations,
    Grid,
    QuantizedEmbedding,
    QuantizedLinear,
    TiedLinear,
    by_group,
    dequantize,
    is_compact,
)
from lmworks.models.heads import Model
from lmworks.models.transformer import TokenEmbeddings

EMBEDDING = "transformer.embeddings.tokens"
PROJECTION = "head.project"
ROW_GRIDS = {8: Grid(bits=8), 4: Grid(bits=4, per=32)}  # of the embedding's rows


def quantize_matrix(w: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return q (O, I) int8, s and z (O, G) of a matrix (O, I): `dequantize` gives it back, rounded.

    This is all that quantization is; the numbers of every layer come from here.
    """
    groups = by_group(w.float(), grid.per)  # (O, G, I / G)
    least = torch.finfo(torch.float32).tiny
    if grid.symmetric:
        scale = groups.abs().amax(-1).clamp(min=least) / grid.highest  # (O, G)
        zero = None
        q = torch.round(groups / scale[..., None])
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)  # 0 stays exactly 0
        scale = ((high - low) / (grid.highest - grid.lowest)).clamp(min=least)
        zero = torch.round(grid.lowest - low / scale)
        q = torch.round(groups / scale[..., None]) + zero[..., None]
    q = q.clamp(grid.lowest, grid.highest).to(torch.int8)
    q = q.reshape(w.shape) if grid.per == TENSOR else q.flatten(1)[:, : w.shape[1]]
    return q.contiguous(), scale, zero


def rounding_error(w: Tensor, grid: Grid) -> float:
    """Return how far the rounded matrix is from the matrix, as a share of its norm."""
    q, scale, zero = quantize_matrix(w, grid)
    return float((dequantize(q, scale, zero, per=grid.per) - w).norm() / w.norm().clamp(min=1e-30))


def quantize_linear(given: nn.Linear, grid: Grid, *, span: Tensor | None = None) -> QuantizedLinear:
    """Return a Linear in whole numbers; `span` (2,) is the calibration that static activations need."""
    if (span is None) == (grid.activations == "static"):
        raise InputError("a static scale of activations comes from calibration", fix="give --data, or use dynamic")
    bias = None if given.bias is None else given.bias.detach().float().clone()
    layer = QuantizedLinear(*quantize_matrix(given.weight.detach(), grid), grid, bias=bias, span=span)
    return layer.train(given.training)


def find_linears(model: Model, *, head: bool = True) -> dict[str, nn.Linear]:
    """Return the Linears of a model by name; the projection that is the embedding's matrix is none of them."""
    found = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    if model.is_tied:
        found.pop("head.project", None)
    return {name: module for name, module in found.items() if head or not name.startswith("head.")}


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of the one of this name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def quantize(
    model: Model, grid: Grid, *, embeddings: bool = True, skip: Collection[str] = (),
    spans: Mapping[str, Tensor] | None = None,
) -> Model:  # fmt: skip
    """Quantize the Linears of the body and the embedding in place; return the model.

    A projection that is the embedding's matrix stays so, in whole numbers. Another head, a few
    numbers that decide, stays as it is; so do the layers of `skip`, names of ours. `spans` is what
    `calibrate.find_spans` gives. Raises InputError for a name that the model lacks, or a model that is compact already.
    """
    check_plain(model)
    linears = find_linears(model, head=False)
    unknown = set(skip) - {*linears, EMBEDDING}
    if unknown:
        raise InputError("there is no such layer to skip", found=", ".join(sorted(unknown)),
                         expected=", ".join(list(linears)[:4]) + " …")  # fmt: skip
    for name, linear in linears.items():
        if name not in skip:
            put(model, name, quantize_linear(linear, grid, span=None if spans is None else spans[name]))
    table = model.transformer.embeddings
    if embeddings and EMBEDDING not in skip and isinstance(table, TokenEmbeddings):
        rows = ROW_GRIDS[grid.bits]
        layer = QuantizedEmbedding(*quantize_matrix(table.tokens.weight.detach(), rows), rows)
        table.tokens = layer  # type: ignore[assignment]
        if model.is_tied and model.head.project is not None:
            put(model, PROJECTION, TiedLinear(layer, bias=model.head.project.bias))
    return model


def check_plain(model: Model) -> None:
    """Raise InputError for a model that is compact already, or holds layers of a user's own."""
    if model.parts or is_compact(model):
        raise InputError("this model's layers cannot be made smaller again", fix="begin with the model it was made of")


def with_activations(grid: Grid, activations: Activations) -> Grid:
    """Return the grid with other activations; raise InputError where they do not go together."""
    return replace(grid, activations=activations)
