"""Inference made faster with the same numbers: no padding, and matrices in the order that the processor reads best.

Shapes: B rows, N tokens of all rows without padding, T tokens of a row, D hidden_size, O outputs of the head.

The tokens of a ragged batch lie end to end, (1, N, D): norms, Linears and MLPs never see padding, and attention runs
once for all rows of one length. Rows must come sorted by length.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import groupby

import torch
from torch import Tensor, nn

from lmworks.models.attention import Attention, Context, Span
from lmworks.models.compact import CHANNEL, QuantizedLinear
from lmworks.models.heads import Model
from lmworks.models.layers import ACTIVATIONS, MLP, GatedMLP
from lmworks.models.prefix import After
from lmworks.models.transformer import Transformer
from lmworks.models.view import Whole

POST_OPS = {"gelu": ("gelu", "none"), "gelu_new": ("gelu", "tanh"), "gelu_pytorch_tanh": ("gelu", "tanh"),
            "silu": ("swish", ""), "relu": ("relu", "")}  # fmt: skip
FEW_ROWS = 64  # up to which oneDNN multiplies faster by a matrix as it lies: measured 1.5 times at 8, 1.1 at 32
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
    counts = torch.tensor(list(lengths), device=input_ids.device)  # (B,)
    totals = torch.repeat_interleave(counts, counts)[None] + body.prefix.length  # (1, N): of each token's row
    x = body.embeddings(input_ids[None], places, None if token_type_ids is None else token_type_ids[None])  # (1, N, D)

    distances = body.distances(max(lengths))

    def context(window: int | None, frequencies: tuple[float, ...]) -> Context:
        spans = make_spans(lengths, window, causal=c.causal, device=x.device, prefix=prefix)
        return Context(rope=body.rope(frequencies, places, totals), spans=spans, distances=distances)

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


class DirectLinear(nn.Linear):
    """A Linear that multiplies a few rows by oneDNN, with its matrix as it lies in the file: nothing is copied."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply and add the bias: (…, in) -> (…, out)."""
        if 1 < x.shape[:-1].numel() <= FEW_ROWS:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return y
        return super().forward(x)


class PackedAttention(Attention):
    """Attention whose queries, keys and values come from one product, and perhaps its output from a packed one."""

    def __init__(self, given: Attention, qkv_proj: nn.Module, o_proj: nn.Module) -> None:
        nn.Module.__init__(self)
        self.layer, self.dropout = given.layer, 0.0
        self.heads, self.kv_heads, self.head_dim = given.heads, given.kv_heads, given.head_dim
        self.qkv_proj, self.o_proj = qkv_proj, o_proj  # type: ignore[assignment]
        self.q_norm, self.k_norm = given.q_norm, given.k_norm

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
            if type(child) is not Attention:
                continue
            if all(map(is_plain, (child.q_proj, child.k_proj, child.v_proj))):
                qkv = PackedLinear(child.q_proj, child.k_proj, child.v_proj, rows=rows)
                out = PackedLinear(child.o_proj, rows=rows) if is_plain(child.o_proj) else child.o_proj
                setattr(parent, name, PackedAttention(child, qkv, out))
        first = "gate_proj" if isinstance(parent, GatedMLP) else "up_proj"
        if isinstance(parent, MLP) and is_plain(getattr(parent, first)):
            act = next(name for name, function in ACTIVATIONS.items() if function is parent.act)
            setattr(parent, first, PackedLinear(getattr(parent, first), act=act, rows=rows))
            parent.act = nn.Identity()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if is_plain(child) and not hasattr(parent, "adapters"):  # adapters read the matrix they lie on
                setattr(parent, name, PackedLinear(child, rows=rows))  # type: ignore[arg-type]


def is_plain(layer: nn.Module) -> bool:
    """Say whether a layer is a matrix and a bias, and no more: no adapter, no whole numbers, no factors."""
    return type(layer) in (nn.Linear, DirectLinear)


def multiply_directly(model: nn.Module) -> None:
    """Let every plain float32 Linear on the CPU multiply a few rows by oneDNN, where this torch has it."""
    for layer in model.modules():
        if type(layer) is nn.Linear and is_flat(layer.weight) and can_pack(layer.weight):
            layer.__class__ = DirectLinear


def is_flat(weight: Tensor) -> bool:
    """Say whether a float32 matrix lies row by row: another oneDNN would turn round at every call."""
    return weight.dtype == torch.float32 and weight.is_contiguous()


def join(model: nn.Module) -> None:
    """Put quantized layers into the form that is fastest here, in place, for inference alone.

    Those that read floats become plain Linears, which can be packed. Those that round what they read, queries, keys and
    values of one attention, become one product: their input is rounded once.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantizedLinear) and child.grid.activations == "none":
                setattr(parent, name, multiplied_out(child))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is Attention:
                three: list[nn.Module] = [child.q_proj, child.k_proj, child.v_proj]
                joined = joined_layers([layer for layer in three if isinstance(layer, QuantizedLinear)])
                if joined is not None:
                    setattr(parent, name, PackedAttention(child, joined, child.o_proj))


def multiplied_out(layer: QuantizedLinear) -> nn.Linear:
    """Return the Linear of the matrix that whole numbers stand for."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.weight, requires_grad=False)
    linear.bias = layer.bias  # type: ignore[assignment]
    return linear.eval()


def joined_layers(layers: Sequence[QuantizedLinear]) -> QuantizedLinear | None:
    """Return three layers of one input as one: (O, I), (P, I), (Q, I) -> (O + P + Q, I); None where they differ."""
    if len(layers) != 3 or len({(layer.grid, layer.bias is None, layer.span is None) for layer in layers}) > 1:
        return None
    first, *others = layers
    if first.span is not None and not all(
        other.span is not None and torch.equal(first.span, other.span) for other in others
    ):
        return None
    scale = torch.cat([layer.scale.expand(layer.out_features, 1) for layer in layers])  # (O + P + Q, 1)
    bias = None if first.bias is None else torch.cat([layer.bias for layer in layers if layer.bias is not None])
    q, grid = torch.cat([layer.numbers for layer in layers]), replace(first.grid, per=CHANNEL)
    return QuantizedLinear(q, scale, None, grid, bias=bias, span=first.span).eval()


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
    if not reads_only(model) or not can_pack(next(layers.parameters())):
        return
    if packing_pays(c.hidden_size, c.intermediate_size, torch.get_num_threads()):
        pack(layers, rows=MANY_ROWS)


def reads_only(model: Model) -> bool:
    """Say whether a model reads whole texts; one that writes multiplies a row at a time."""
    return not model.config.causal or model.head.pool != "none"


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
