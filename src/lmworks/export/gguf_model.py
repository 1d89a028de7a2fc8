"""A decoder as llama.cpp lays it out: the keys of its sizes, and its tensors from ours and back.

A row of a table maps a module's name in the file to ours; `{}` is the layer's number, and a tuple is fused along its
outputs, as in `models/families`. Llama's queries and keys are permuted: llama.cpp turns the pair (x_2i, x_2i+1) of a
head where the Hub's checkpoints, and we, turn (x_i, x_i+R/2).

Shapes: D hidden_size, H heads, E head_dim, R rotary_dim, I inputs. Source: the GGUF specification of ggml.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from lmworks.base.errors import InputError
from lmworks.models.checkpoint import BODY, HEAD, Row
from lmworks.models.compact_files import compact_layers
from lmworks.models.config import Config
from lmworks.models.families import architecture
from lmworks.models.heads import Model
from lmworks.models.rope import rope_frequencies
from lmworks.models.weights import State

Table = dict[str, str | tuple[str, ...]]
SHARED: Table = {
    "token_embd": "embeddings.tokens",
    "blk.{}.attn_norm": "layers.{}.attention_norm",
    "blk.{}.attn_output": "layers.{}.attention.o_proj",
    "blk.{}.ffn_up": "layers.{}.mlp.up_proj",
    "blk.{}.ffn_down": "layers.{}.mlp.down_proj",
    "output_norm": "final_norm",
}
FUSED: Table = {"blk.{}.attn_qkv": tuple(f"layers.{{}}.attention.{name}_proj" for name in "qkv")}
SEPARATE: Table = {f"blk.{{}}.attn_{name}": f"layers.{{}}.attention.{name}_proj" for name in "qkv"}
GATED: Table = {
    **SHARED,
    **SEPARATE,
    "blk.{}.ffn_norm": "layers.{}.mlp_norm",
    "blk.{}.ffn_gate": "layers.{}.mlp.gate_proj",
}
PERMUTED = ("attn_q.", "attn_k.")
FACTORS = "rope_freqs.weight"  # what each rotary frequency is divided by


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What llama.cpp calls a family, and what it can vary in it."""

    name: str
    table: Table
    acts: tuple[str, ...]
    permuted: bool = False
    stretched: bool = False  # it reads FACTORS
    any_head_dim: bool = True
    projects: bool = False  # it wants the projection even where that is the embedding's matrix


GELU = ("gelu_new", "gelu_pytorch_tanh")  # ggml's GELU is the approximation by tanh
LLAMA = Architecture(name="llama", table=GATED, acts=("silu",), permuted=True, stretched=True)
ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Architecture(name="qwen2", table=GATED, acts=("silu",)),
    "qwen3": Architecture(
        name="qwen3",
        table={**GATED, **{f"blk.{{}}.attn_{name}_norm": f"layers.{{}}.attention.{name}_norm" for name in "qk"}},
        acts=("silu",),
    ),
    "phi3": Architecture(
        name="phi3",
        table={
            **SHARED,
            **FUSED,
            "blk.{}.ffn_norm": "layers.{}.mlp_norm",
            "blk.{}.ffn_up": ("layers.{}.mlp.gate_proj", "layers.{}.mlp.up_proj"),
        },
        acts=("silu",),
    ),
    "phi": Architecture(name="phi2", table=SHARED | FUSED, acts=GELU, any_head_dim=False, projects=True),
    "gpt2": Architecture(
        name="gpt2",
        table={**SHARED, **FUSED, "position_embd": "embeddings.positions", "blk.{}.ffn_norm": "layers.{}.mlp_norm"},
        acts=GELU,
        any_head_dim=False,
    ),
}


def find_architecture(model: Model, where: str) -> Architecture:
    """Return llama.cpp's name and tables for a model; raise InputError for one that it cannot run as we do."""
    c, supported = model.config, ", ".join(ARCHITECTURES)
    if c.model_type not in ARCHITECTURES or model.kind != "CausalLM" or not c.causal:
        raise InputError(
            "GGUF is for the decoders that llama.cpp has, with the head that predicts the next token", where=where,
            found=architecture(c.model_type, model.kind), expected=supported, fix="export it with --to onnx",
        )  # fmt: skip
    if model.parts or compact_layers(model):
        raise InputError(
            "this model's layers are not the published ones", where=where,
            found="layers of a user's own" if model.parts else "whole numbers or factors",
            expected="plain weights", fix="export the model that it was made from: GGUF has its own q8_0 and q4_0",
        )  # fmt: skip
    found = ARCHITECTURES[c.model_type]
    odd = {
        f"the activation {c.hidden_act}": c.hidden_act not in found.acts,
        "stretched rotary frequencies": c.turn is not None or (c.rotary.scaling is not None and not found.stretched),
        f"{c.num_attention_heads} heads of {c.head_dim} beside a hidden size of {c.hidden_size}": not found.any_head_dim
        and c.num_attention_heads * c.head_dim != c.hidden_size,
    }
    if any(odd.values()):
        raise InputError(
            f"llama.cpp has no {c.model_type} of this kind", where=where,
            found=", ".join(name for name, is_odd in odd.items() if is_odd),
            expected=f"{' or '.join(found.acts)}, and the family's usual shape", fix="export it with --to onnx",
        )  # fmt: skip
    return found


def context_length(c: Config) -> int:
    """Return how many tokens give our answers: llama.cpp has no sliding window in these families."""
    return min(c.max_tokens, c.window) if c.local_layers and c.window else c.max_tokens


def describe_sizes(c: Config, arch: Architecture) -> dict[str, int | float]:
    """Return the sizes as the file's keys say them."""
    own: dict[str, int | float] = {
        "context_length": context_length(c),
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "vocab_size": c.vocab_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        f"attention.layer_norm_{'rms_' if c.norm == 'rms' else ''}epsilon": float(c.norm_eps),
    }
    if c.positions == "rope":
        own |= {"rope.dimension_count": c.rotary.dim or c.head_dim, "rope.freq_base": float(c.rotary.theta)}
    if c.num_attention_heads * c.head_dim != c.hidden_size:
        own |= {"attention.key_length": c.head_dim, "attention.value_length": c.head_dim}
    return {f"{arch.name}.{key}": value for key, value in own.items()}


def make_rows(model: Model, arch: Architecture) -> list[Row]:
    """Lay the architecture's table over the model: one row a tensor of the file, the constants apart."""
    shapes = {name: parameter.shape for name, parameter in model.state_dict().items()}
    wanted: dict[str, tuple[str, ...]] = {"output.bias": (f"{HEAD}project.bias",)}
    if arch.projects or not model.is_tied:
        wanted["output.weight"] = (f"{HEAD}project.weight",)
    for theirs, ours in arch.table.items():
        modules = (ours,) if isinstance(ours, str) else ours
        for layer in range(model.config.num_hidden_layers) if "{}" in theirs else (0,):
            for leaf in ("weight", "bias"):
                names = tuple(f"{BODY}{module.format(layer)}.{leaf}" for module in modules)
                wanted[f"{theirs.format(layer)}.{leaf}"] = names
    rows = [
        Row(key, names, tuple(shapes[name] for name in names), False)
        for key, names in wanted.items()
        if all(name in shapes for name in names)
    ]
    left = shapes.keys() - {name for row in rows for name in row.names}
    left -= {f"{HEAD}project.weight"} if model.is_tied else set()
    if left:
        raise InputError("GGUF has no place for some weights", found=", ".join(sorted(left))[:300])
    return rows


def make_tensors(model: Model, arch: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Yield the file's tensors in float32, each made when it is asked for."""
    state = {name: parameter.detach() for name, parameter in model.state_dict().items()}
    for row in make_rows(model, arch):
        tensor = row.join(state).float()
        heads = count_heads(row.key, model.config, arch)
        yield row.key, interleave(tensor, heads) if heads else tensor
    if model.config.rotary.scaling is not None:
        yield FACTORS, rope_factors(model.config)


def read_state(tensors: dict[str, Tensor], model: Model, arch: Architecture) -> State:
    """Return our parameters from the file's tensors: the inverse of `make_tensors`."""
    state: State = {}
    for row in make_rows(model, arch):
        heads = count_heads(row.key, model.config, arch)
        tensor = tensors[row.key]
        state.update(row.split(separate(tensor, heads) if heads else tensor))
    return state


def count_heads(key: str, c: Config, arch: Architecture) -> int:
    """Return the heads of a tensor that is permuted, 0 for every other."""
    if not arch.permuted or not any(part in key for part in PERMUTED):
        return 0
    return c.num_attention_heads if "attn_q." in key else c.num_key_value_heads


def interleave(tensor: Tensor, heads: int) -> Tensor:
    """Put the two halves of each head side by side: rows i and i + E/2 of H * E become 2i and 2i + 1."""
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])  # (H, 2, E/2, I)
    return halves.transpose(1, 2).reshape(tensor.shape)  # (H * E, I)


def separate(tensor: Tensor, heads: int) -> Tensor:
    """Undo `interleave`."""
    pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])  # (H, E/2, 2, I)
    return pairs.transpose(1, 2).reshape(tensor.shape)  # (H * E, I)


def rope_factors(c: Config) -> Tensor:
    """Return what llama.cpp divides each plain frequency by, to get the stretched one: (R/2,)."""
    plain = rope_frequencies(replace(c, rotary=replace(c.rotary, scaling=None)))
    return (plain.double() / rope_frequencies(c).double()).float()
