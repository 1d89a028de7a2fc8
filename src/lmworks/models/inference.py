"""Inference made faster with the same numbers: no padding, and matrices in the order that the processor reads best.

Shapes: B rows, N tokens of all rows without padding, T tokens of a row, D hidden_size, O outputs of the head.

The tokens of a ragged batch lie end to end, (1, N, D): norms, Linears and MLPs never see padding, and attention runs
once for all rows of one length. Rows must come sorted by length.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from itertools import groupby

import torch
from torch import Tensor, nn

from lmworks.models.attention import Attention, Context, Span
from lmworks.models.heads import Model
from lmworks.models.layers import ACTIVATIONS, MLP, GatedMLP
from lmworks.models.prefix import After
from lmworks.models.transformer import Transformer
from lmworks.models.view import Whole

POST_OPS = {"gelu": ("gelu", "none"), "gelu_new": ("gelu", "tanh"), "gelu_pytorch_tanh": ("gelu", "tanh"),
            "silu": ("swish", ""), "relu": ("relu", "")}  # fmt: skip
MANY_ROWS = 512  # what float32 matrices are ordered for: measured, nothing is lost down to 8 rows
TRIAL_ROWS, TRIALS = 64, 5  # the products that are measured: a short text
CLOSE = 1e-5


def run_ragged(model: Model, input_ids: Tensor, lengths: Sequence[int], token_type_ids: Tensor | None = None) -> Tensor:
    """Run rows that lie end to end: ids (N,), the length of each row, all above 0 and sorted -> (N, O) or (B, O).

    A head that pools answers once a row (B, O), the others once a token; the bare body gives its states (N, D).
    """
    x = ragged_states(model.transformer, input_ids, lengths, token_type_ids)  # (N, D)
    if model.kind == "Model":
        return x
    if model.head.pool == "none":
        scores: Tensor = model.head(x)  # (N, O)
        return scores
    rows = torch.split(x, list(lengths))
    pooled = {"first": lambda row: row[0], "last": lambda row: row[-1], "mean": lambda row: row.mean(0)}
    states = torch.stack([pooled[model.head.pool](row) for row in rows])  # (B, D)
    logits: Tensor = model.head(states[:, None])  # rows of one token: pooling leaves them as they are
    return logits


def ragged_states(
    body: Transformer, input_ids: Tensor, lengths: Sequence[int], token_type_ids: Tensor | None = None
) -> Tensor:
    """Run the body on rows that lie end to end, all above 0 and sorted: ids (N,) -> states (N, D)."""
    c, prefix = body.config, body.prefix.rows()
    places = torch.cat([torch.arange(length, device=input_ids.device) for length in lengths])[None]  # (1, N)
    places = places + body.prefix.length
    x = body.embeddings(input_ids[None], places, None if token_type_ids is None else token_type_ids[None])  # (1, N, D)

    def context(window: int | None, frequencies: tuple[float, ...]) -> Context:
        spans = make_spans(lengths, window, causal=c.causal, device=x.device, prefix=prefix)
        return Context(rope=body.rope(frequencies, places), spans=spans)

    everywhere = context(None, body.frequencies)
    local = context(c.window, body.local_frequencies) if c.local_layers else everywhere
    return body.through(x, everywhere, local)[0]


def make_spans(
    lengths: Sequence[int], window: int | None, *, causal: bool, device: torch.device,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> tuple[Span, ...]:  # fmt: skip
    """Return the spans of rows of one length: [2, 2, 5] -> two rows of 2, one of 5."""
    spans = []
    for length, group in groupby(lengths):
        rows = len(list(group))
        whole = Whole(torch.empty(1, length, device=device), None, causal=causal)
        after = None if prefix is None else After(whole, length, prefix)
        spans.append(Span(rows, length, *(after or whole).look(window), after))
    return tuple(spans)


class PackedLinear(nn.Module):
    """One Linear, or several of one input side by side, in the order that the processor reads best; then `act`."""

    def __init__(self, *linears: nn.Linear, act: str = "", rows: int = 1) -> None:
        """Reorder the matrices once, for products of about `rows` rows."""
        super().__init__()
        weight = torch.cat([linear.weight.detach() for linear in linears])  # (out, in)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self.post_op = POST_OPS[act] if act else ("none", "")

    def forward(self, x: Tensor) -> Tensor:
        """Multiply, add the bias, and apply the activation while the numbers are at hand: (…, in) -> (…, out)."""
        name, algorithm = self.post_op
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], algorithm)
        return y


class PackedAttention(Attention):
    """Attention whose queries, keys and values come from one product."""

    def __init__(self, given: Attention, rows: int) -> None:
        nn.Module.__init__(self)
        self.layer, self.dropout = given.layer, 0.0
        self.heads, self.kv_heads, self.head_dim = given.heads, given.kv_heads, given.head_dim
        self.qkv_proj = PackedLinear(given.q_proj, given.k_proj, given.v_proj, rows=rows)
        bent = type(given.o_proj) is not nn.Linear  # an adapter that may be no matrix is on it
        self.o_proj = given.o_proj if bent else PackedLinear(given.o_proj, rows=rows)  # type: ignore[assignment]

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """Return queries (B, T, H * E), keys and values (B, T, K * E)."""
        sizes = [count * self.head_dim for count in (self.heads, self.kv_heads, self.kv_heads)]
        return torch.split(self.qkv_proj(x), sizes, -1)


def pack(model: nn.Module, *, rows: int = 1) -> None:
    """Put packed matrices in place of every Linear on the CPU; a torch without these operators keeps its own.

    `rows`: how many tokens a product has, about. Activations and the joint product of queries, keys and values come
    with it. What was packed is for inference alone: it cannot be trained or saved.
    """
    if not can_pack(next(model.parameters())):
        return
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Attention):
                setattr(parent, name, PackedAttention(child, rows))
        if isinstance(parent, MLP):
            first = "gate_proj" if isinstance(parent, GatedMLP) else "up_proj"
            act = next(name for name, function in ACTIVATIONS.items() if function is parent.act)
            setattr(parent, first, PackedLinear(getattr(parent, first), act=act, rows=rows))
            parent.act = nn.Identity()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and not hasattr(parent, "adapters"):  # adapters read the matrix they lie on
                setattr(parent, name, PackedLinear(child, rows=rows))


def can_pack(weight: Tensor) -> bool:
    """Say whether this torch and this processor have the operators for a weight's device and dtype."""
    if weight.device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return weight.dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_if_faster(model: Model) -> None:
    """Pack the blocks of a float32 model where a few products of its largest matrix show that it pays.

    Not for a model that writes text: a product of a single row is fastest as torch does it.
    """
    layers, c = model.transformer.layers, model.config
    if (c.causal and model.head.pool == "none") or not can_pack(next(layers.parameters())):
        return
    if packing_pays(c.hidden_size, c.intermediate_size, torch.get_num_threads()):
        pack(layers, rows=MANY_ROWS)


@cache
def packing_pays(inputs: int, outputs: int, threads: int) -> bool:
    """Measure, once for these sizes, whether a packed product is faster than torch's own, and equal to 1e-5."""
    generator = torch.Generator().manual_seed(0)
    plain = nn.Linear(inputs, outputs)
    nn.init.normal_(plain.weight, std=inputs**-0.5, generator=generator)
    x = torch.empty(TRIAL_ROWS, inputs).normal_(generator=generator)
    packed = PackedLinear(plain, rows=MANY_ROWS)
    if (plain(x) - packed(x)).abs().max() > CLOSE:
        return False
    best = {plain: float("inf"), packed: float("inf")}  # the least time of each: what else runs can only add to it
    for _ in range(TRIALS):
        for linear in best:
            start = time.perf_counter()
            linear(x)
            best[linear] = min(best[linear], time.perf_counter() - start)
    return best[packed] < best[plain]
