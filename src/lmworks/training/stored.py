"""Which tensors of a model a checkpoint holds, and how they are written: what is trained, never what is frozen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lmworks.training.int8 import Int8Linear

DTYPES = {
    torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's parameters and saved buffers by name; a tied one once, under its first name."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def is_frozen(model: nn.Module) -> dict[int, bool]:
    """Tell of every tensor, by its id, whether training leaves it as it is."""
    frozen = {id(parameter): not parameter.requires_grad for parameter in model.parameters()}
    eight_bits = [module for module in model.modules() if isinstance(module, Int8Linear)]
    return frozen | {id(buffer): True for module in eight_bits for buffer in module.buffers(recurse=False)}


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint holds: all that training may change, by name; what is frozen comes from elsewhere."""
    frozen, tied = is_frozen(model), model_tensors(model)
    state = model.state_dict(keep_vars=True)
    return {name: tied[name] for name in tied if not frozen.get(id(state[name]), False)}


def frozen_sum(model: nn.Module) -> str:
    """Return a SHA-256 of what `saved_tensors` leaves out; "" for nothing."""
    kept, digest = saved_tensors(model), hashlib.sha256()
    rest = {name: tensor for name, tensor in model_tensors(model).items() if name not in kept}
    for piece in tensor_bytes(rest):
        digest.update(piece)
    return digest.hexdigest() if rest else ""


def tensor_bytes(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file piece by piece, so that no second copy of the tensors is made."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        if tensor.nbytes:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            yield flat.view(torch.uint8).numpy().data
