"""Prefix tuning: keys and values before the first token of every layer, the only thing trained (Li and Liang 2021).

They start as what the model itself computes for a few of its tokens, which trains steadier than noise; the network
through which the paper trains them is left out. Positions and the file are peft's: tokens count on after the prefix,
and prefix keys are stored as attention reads them, so rotated ones stay as they were rotated. Every token sees the
prefix, in layers that see a window too; transformers lets it slide out of a decoder's window (Mistral).

Shapes: N length of the prefix, L layers, K key/value heads, T tokens, E head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lmworks.base.errors import InputError
from lmworks.models.heads import Model
from lmworks.models.view import Whole
from lmworks.models.weights import State
from lmworks.training.lora import DEFAULT, activate, copy_layers, remove_adapter, wrap
from lmworks.training.lora_layers import Prefix, without_adapters
from lmworks.training.peft_format import Settings
from lmworks.training.targets import whole_layers

PLACE = "transformer.prefix"
TENSOR = "prompt_embeddings"  # (N, L * 2 * K * E), as peft calls it


class Recorder:
    """A past that holds nothing and notes the keys and values that pass."""

    def __init__(self) -> None:
        self.pairs: list[Tensor] = []  # (2, K, T, E) of each layer

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Note a layer's keys and values (1, K, T, E), and return them."""
        self.pairs.append(torch.cat((k, v)))
        return k, v


def add_prefix(
    model: Model, *, length: int = 16, tokens: Sequence[int] | None = None, whole: Sequence[str] | None = None,
    seed: int = 0, name: str = DEFAULT,
) -> Model:  # fmt: skip
    """Freeze a model and put a prefix before its first token, in place.

    It starts as the keys and values of `tokens` (None: `length` ids drawn by `seed`). `whole` are layers of which a
    copy is trained as it is; None: the head of a task. Raises InputError for a model of images, or a prefix that
    leaves no room for a text.
    """
    c = model.config
    if c.vision is not None:
        raise InputError("a model of images takes no prefix", found=c.model_type, expected="a model of text",
                         fix="choose --method lora or adapter")  # fmt: skip
    check_own_layers(model, "a prefix has keys and values of its own for each layer")
    if tokens is None:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(c.vocab_size, (length,), generator=generator).tolist()
    check_room(model, len(tokens))
    numbers = activations(model, tokens)
    remove_adapter(model, name)
    wrap(model, PLACE, name, Prefix(numbers))
    copy_layers(model, whole_layers(model, whole), name)
    activate(model, name)
    return model


def check_own_layers(model: Model, why: str) -> None:
    """Raise InputError for a model whose layers run several times."""
    if model.config.relative is not None:
        raise InputError("attention that knows distances cannot know how far a prefix is",
                         found=model.config.model_type, fix="choose --method lora")  # fmt: skip
    groups = model.config.layer_groups
    if groups is not None:
        raise InputError(f"this model's layers share their weights, and {why}", found=f"{groups} for all layers",
                         expected="a model whose layers are its own", fix="choose --method lora")  # fmt: skip


def check_room(model: Model, length: int) -> None:
    """Raise InputError for a prefix that is empty, or that leaves less than half of the positions to the text."""
    most = model.config.max_tokens // 2
    if not 1 <= length <= most:
        raise InputError("no prefix can have this length", found=str(length), expected=f"1 to {most}")


def activations(model: Model, tokens: Sequence[int]) -> Tensor:
    """Return the keys and values of these tokens as a text, without adapters: (N, L, 2, K, E) in float32."""
    body, recorder, training = model.transformer, Recorder(), model.training
    model.eval()
    with torch.no_grad(), without_adapters(model):
        ids = torch.tensor([list(tokens)], device=next(model.parameters()).device)
        view = Whole(ids, None, causal=model.config.causal)
        body.run(body.embeddings(ids, view.position_ids), view, view.position_ids, recorder)
    model.train(training)
    return torch.stack(recorder.pairs).float().permute(3, 0, 1, 2, 4).contiguous()  # (L, 2, K, N, E) turned


def prefix_tensors(on: Mapping[str, nn.Module]) -> State:
    """Return the prefix as peft stores it: (N, L * 2 * K * E)."""
    prefix = on[PLACE]
    assert isinstance(prefix, Prefix)
    return {TENSOR: prefix.numbers.flatten(1)}


def prefix_settings(model: Model, on: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Return what adapter_config.json says of a prefix."""
    prefix, c = on[PLACE], model.config
    assert isinstance(prefix, Prefix)
    width = c.num_key_value_heads * c.head_dim
    return {
        "num_virtual_tokens": len(prefix.numbers), "num_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_key_value_heads, "token_dim": width, "encoder_hidden_size": width,
        "num_transformer_submodules": 1, "prefix_projection": False, "init_weights": None,
    }  # fmt: skip


def take_prefix(model: Model, tensors: State, settings: Settings, problems: list[str]) -> list[tuple[str, nn.Module]]:
    """Take the prefix out of a file's tensors, for its place in the model; complaints go to `problems`."""
    c, tensor = model.config, tensors.pop(TENSOR, None)
    layout = (c.num_hidden_layers, 2, c.num_key_value_heads, c.head_dim)
    width = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    if c.vision is not None:
        problems.append("a model of images takes no prefix")
    elif tensor is None:
        problems.append(f"missing: {TENSOR}")
    elif tensor.ndim != 2 or tensor.shape[1] != width or len(tensor) != settings.own.get("num_virtual_tokens"):
        expected = (settings.own.get("num_virtual_tokens"), width)
        problems.append(f"wrong shape: {TENSOR} is {tuple(tensor.shape)}, not {expected}")
    else:
        check_room(model, len(tensor))
        device = next(model.parameters()).device
        return [(PLACE, Prefix(tensor.float().unflatten(1, layout).to(device)))]  # type: ignore[no-untyped-call]
    return []
