"""Count the parameters of a checkpoint by component, from the names and shapes in its headers alone. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping

from lmworks.base.safetensors_header import TensorInfo

COMPONENTS = {  # the first whose pattern a tensor's name has
    "head": r"^(lm_head|embed_out|classifier|pre_classifier|score|qa_outputs|"
    r"cls\.|vocab_|(lm_|mask_)?predictions\.|sop_|head\.|decoder\.\w+$)",
    "layers": r"(^|\.)\d+\.",
    "embeddings": r"embed|(^|\.)(wte|wpe)\.",
    "rest": "",
}
BUFFERS = re.compile(r"(^|\.)(position_ids|token_type_ids|inv_freq|masked_bias|num_batches_tracked)$")
MASK = re.compile(r"(attn|attention)\.bias$")  # of four dimensions: a triangle, not a parameter
TOKENS = re.compile(r"(word_embeddings|embed_tokens|tok_embeddings|embed_in|wte)\.weight$")
TIED_HEAD = re.compile(
    r"^(lm_head|embed_out|decoder|vocab_projector|(cls\.)?predictions\.decoder|lm_head\.decoder)\.weight$"
)
TIED_BIAS = {
    "cls.predictions.decoder.bias": "cls.predictions.bias", "predictions.decoder.bias": "predictions.bias",
    "lm_head.decoder.bias": "lm_head.bias",
}  # fmt: skip
PACKED = re.compile(r"^lmworks\..*\.q$")  # a matrix of whole numbers, of four bits two in a byte
GRIDS = re.compile(r"^lmworks\..*\.(scale|zero|span)$")  # what its numbers mean


def count_parameters(tensors: Mapping[str, TensorInfo], tied: bool) -> dict[str, int] | None:
    """Return the parameters of each component and their total; masks and scales are none, what is tied counts once."""
    if not tensors:
        return None
    found = dict.fromkeys(("embeddings", "layers", "head", "rest"), 0)
    embeddings = {info.shape for name, info in tensors.items() if TOKENS.search(name)}
    for name, info in tensors.items():
        if BUFFERS.search(name) or (MASK.search(name) and len(info.shape) == 4):
            continue
        if (tied and TIED_HEAD.search(name) and info.shape in embeddings) or TIED_BIAS.get(name) in tensors:
            continue
        if GRIDS.search(name):
            continue
        size = 2 * info.size if PACKED.search(name) and info.dtype == "U8" else info.size
        found[next(part for part, pattern in COMPONENTS.items() if re.search(pattern, name))] += size
    return {**found, "total": sum(found.values())}
