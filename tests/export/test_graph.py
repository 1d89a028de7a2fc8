"""The hand-written graph: constants once, the unread dropped, errors before the file."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from lmworks.export.graph import Graph


def make_graph() -> Graph:
    """y = (x + 2) * w."""
    graph = Graph()
    x = graph.input("x", np.float32, ["n"])
    graph.output("y", np.float32, ["n"])
    more = graph.add("Add", [x, graph.constant(2, np.float32)], name="more")
    graph.add("Mul", [more, graph.weight("w", np.float32(3))], name="product", outputs=["y"])
    return graph


def run(data: bytes) -> list[float]:
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.array([1, 2], np.float32)})[0].tolist()


def test_it_computes():
    assert run(make_graph().to_bytes()) == [9.0, 12.0]


def test_equal_constants_are_one_and_different_ones_are_not():
    graph = make_graph()
    names = [
        graph.constant(1),
        graph.constant(1),
        graph.constant([1]),
        graph.constant(1, np.float32),
        graph.constant([1, 2]),
        graph.constant([12]),
        graph.constant([]),
    ]
    assert len(set(names)) == len(names) - 1
    assert names[0] == names[1]


def test_what_nobody_reads_is_dropped():
    graph = make_graph()
    graph.add("Neg", ["x"], name="unread")
    graph.add("Neg", ["unread.out"], name="unread_too")
    graph.weight("unread_weight", np.ones(3, np.float32))
    model = onnx.load_from_string(graph.to_bytes())
    assert [node.name for node in model.graph.node] == ["more", "product"]
    assert sorted(tensor.name for tensor in model.graph.initializer) == ["constant.float32.2.0.0", "w"]


def test_outputs_of_a_fused_node_that_nobody_reads_are_left_out():
    graph = make_graph()
    graph.output("sum", np.float32, ["n"])
    inputs = ["x", "x", graph.weight("gamma", np.ones(2, np.float32))]
    outputs = ["norm", "mean", "deviation", "sum"]
    graph.add("com.microsoft.SkipSimplifiedLayerNormalization", inputs, name="skip", outputs=outputs)
    node = onnx.load_from_string(graph.to_bytes()).graph.node[-1]
    assert (node.domain, node.op_type) == ("com.microsoft", "SkipSimplifiedLayerNormalization")
    assert list(node.output) == ["", "", "", "sum"]


def test_a_weight_stored_twice_is_a_mistake():
    graph = make_graph()
    with pytest.raises(AssertionError, match="w"):
        graph.weight("w", np.ones(1))


def test_a_value_that_nothing_makes_is_caught():
    graph = make_graph()
    graph.output("z", np.float32, ["n"])
    graph.add("Neg", ["nowhere"], name="lost", outputs=["z"])
    with pytest.raises(onnx.checker.ValidationError, match="nowhere"):
        graph.to_bytes()


def test_the_order_of_bytes_is_fixed():
    assert make_graph().to_bytes() == make_graph().to_bytes()
