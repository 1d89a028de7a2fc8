"""Networks without attention as nodes: ONNX's own RNN, LSTM and GRU, their states as inputs and outputs.

    input_ids (B, T), state.0 (B, S, D) …  ->  logits (B, T or 1, V), new_state.0 (B, S, D) …

A graph reads rows without padding between them and their states: whoever feeds it aligns texts on the left. Gates stand
in another order here than in torch, and a GRU's reset comes after the product, as in torch (linear_before_reset).

Shapes: B batch, T tokens, D hidden_size, E embedding_size, S states of a layer, n window.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lmworks.export.walk import Walk
from lmworks.models.feedforward import DenseLayer, FeedForward
from lmworks.models.recurrent import Recurrent, RecurrentLayer

STATE, NEW_STATE = "state.", "new_state."
OPERATORS: dict[type[nn.Module], tuple[str, list[int]]] = {  # and torch's gates in ONNX's order
    nn.RNN: ("RNN", [0]),
    nn.LSTM: ("LSTM", [0, 3, 1, 2]),  # i f g o -> i o f c
    nn.GRU: ("GRU", [1, 0, 2]),  # r z n -> z r h
}


def declare_states(walk: Walk) -> str:
    """Declare the ids (B, T), and how many logits are asked for; the states are declared with their layers."""
    walk.graph.input("num_logits_to_keep", np.int64, [])
    return walk.graph.input("input_ids", np.int64, ["batch_size", "sequence_length"])


def declare_state(walk: Walk, layer: int, shape: tuple[int, int]) -> tuple[str, str]:
    """Declare the state of a layer as it comes and as it goes: (B, S, D) each."""
    names = walk.graph.input(f"{STATE}{layer}", np.float32, ["batch_size", *shape])
    return names, walk.graph.output(f"{NEW_STATE}{layer}", np.float32, ["batch_size", *shape])


def emit_vectors(walk: Walk, body: Recurrent | FeedForward, ids: str) -> str:
    """Look the tokens up: (B, T) -> (B, T, E)."""
    tokens = walk.matrix(body.embeddings.tokens, "embeddings")
    return walk.arithmetic.embed(walk.graph, ids, tokens, name="embeddings.tokens", tied=walk.tied)


def emit_recurrent(walk: Walk, body: Recurrent, path: str, ids: str) -> str:
    """Return the hidden states (B, T, D)."""
    graph, add, size = walk.graph, walk.graph.add, body.config.hidden_size
    x = add("Transpose", [emit_vectors(walk, body, ids)], name="steps", perm=[1, 0, 2])  # (T, B, E)
    for i, layer in enumerate(body.layers):
        assert isinstance(layer, RecurrentLayer)
        cell, name = layer.cell, f"layers.{i}.cell"
        operator, gates = OPERATORS[type(cell)]
        states = 2 if operator == "LSTM" else 1
        read = partial(order, walk, gates=gates, size=size)
        weights = [
            graph.weight(f"{name}.{kind}", read([getattr(cell, f"{kind}_l0")])) for kind in ("weight_ih", "weight_hh")
        ]
        bias = graph.weight(f"{name}.bias", read([getattr(cell, f"{kind}_l0") for kind in ("bias_ih", "bias_hh")]))
        past, present = declare_state(walk, i, (states, size))
        before = add("Transpose", [past], name=f"{name}.past", perm=[1, 0, 2])  # (S, B, D)
        starts = [before]
        if states == 2:
            starts = [f"{name}.past.h", f"{name}.past.c"]  # (1, B, D) each
            add("Split", [before], name=f"{name}.past.split", outputs=starts, axis=0, num_outputs=2)
        ends = [f"{name}.last.{kind}" for kind in ("h", "c")[:states]]  # (1, B, D) each
        reset = {"linear_before_reset": 1} if operator == "GRU" else {}
        inputs = [x, *weights, bias, "", *starts]
        y = add(operator, inputs, name=name, outputs=[f"{name}.out", *ends], hidden_size=size, **reset)  # (T, 1, B, D)
        x = add("Squeeze", [y, graph.constant([1])], name=f"{name}.steps")  # (T, B, D)
        last = add("Concat", ends, name=f"{name}.last", axis=0) if states == 2 else ends[0]
        add("Transpose", [last], name=f"{name}.present", perm=[1, 0, 2], outputs=[present])
    return add("Transpose", [x], name="texts", perm=[1, 0, 2])  # (B, T, D)


def order(walk: Walk, parameters: list[nn.Parameter], gates: list[int], size: int) -> NDArray[np.float32]:
    """Return a cell's gates (G D, …) in ONNX's order, of several parameters one after the other, for one direction."""
    arrays = [walk.read(parameter) for parameter in parameters]
    blocks = [array[gate * size : (gate + 1) * size] for array in arrays for gate in gates]
    return np.concatenate(blocks)[None]


def emit_feed_forward(walk: Walk, body: FeedForward, path: str, ids: str) -> str:
    """Return the hidden states (B, T, D): the window is n slices of the vectors after their state."""
    graph, add, before = walk.graph, walk.graph.add, body.before
    x = emit_vectors(walk, body, ids)  # (B, T, E)
    if before:
        past, present = declare_state(walk, 0, (before, body.embeddings.tokens.embedding_dim))
        length = add("Shape", [ids], name="window.length", start=1, end=2)  # T
        everything = add("Concat", [past, x], name="window.vectors", axis=1)  # (B, n - 1 + T, E)
        end = graph.constant([2**62])
        add("Slice", [everything, length, end, graph.constant([1])], name="window.state", outputs=[present])
        parts = []
        for i in range(before + 1):
            stop = add("Add", [length, graph.constant([i])], name=f"window.{i}.stop")
            inputs = [everything, graph.constant([i]), stop, graph.constant([1])]
            parts.append(add("Slice", inputs, name=f"window.{i}"))
        x = add("Concat", parts, name="window", axis=-1)  # (B, T, n E)
    for i, layer in enumerate(body.layers):
        assert isinstance(layer, DenseLayer)
        name = f"layers.{i}.linear"
        x = add("Tanh", [walk.affine(layer.linear, name, x)], name=f"{name}.act")
    return x
