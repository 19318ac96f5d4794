"""The graph rewrites: same numbers before and after, and hands off where they would not be exact."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from kdctl.export import graph


def model(nodes, constants, channels=3, outputs=None):
    """An ONNX model over `x` (N, channels, 8, 8) whose last node makes `y`."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", channels, 8, 8])
    y = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs or ["y"]]
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    made = helper.make_graph(nodes, "g", [x], y, tensors)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(proto, channels=3):
    x = np.random.default_rng(0).standard_normal((2, channels, 8, 8)).astype(np.float32)
    return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": x})


def operators(proto):
    return [node.op_type for node in proto.graph.node]


def floats(*shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def check(proto, expected, channels=3):
    before = run(proto, channels)
    rewritten = graph.simplify(proto)
    assert operators(rewritten) == expected
    for a, b in zip(before, run(rewritten, channels), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("op", ["Mul", "Div"])
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (3, 1, 1), ()])
def test_scale_goes_into_the_convolution(op, shape):
    nodes = [helper.make_node(op, ["x", "s"], ["t"]), helper.make_node("Conv", ["t", "w"], ["y"], pads=[1, 1, 1, 1])]
    check(model(nodes, {"s": np.abs(floats(*shape)) + np.float32(0.5), "w": floats(4, 3, 3, 3)}), ["Conv"])


def test_scale_stays_where_another_node_reads_it():
    nodes = [
        helper.make_node("Mul", ["x", "s"], ["t"]),
        helper.make_node("Conv", ["t", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["t", "c"], ["y"]),
    ]
    check(model(nodes, {"s": floats(1, 3, 1, 1), "w": floats(3, 3, 3, 3)}), ["Mul", "Conv", "Add"])


def test_scale_stays_where_convolutions_share_weights():
    nodes = [
        helper.make_node("Mul", ["x", "s"], ["t"]),
        helper.make_node("Conv", ["t", "w"], ["a"]),
        helper.make_node("Conv", ["x", "w"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    check(model(nodes, {"s": floats(1, 3, 1, 1), "w": floats(4, 3, 3, 3)}), ["Mul", "Conv", "Conv", "Add"])


@pytest.mark.parametrize("scale, group", [((1, 3, 1, 1), 3), ((1, 1, 8, 8), 1)])
def test_scale_stays_ahead_of_groups_and_per_pixel(scale, group):
    nodes = [helper.make_node("Mul", ["x", "s"], ["t"]), helper.make_node("Conv", ["t", "w"], ["y"], group=group)]
    check(model(nodes, {"s": floats(*scale), "w": floats(3, 3 // group, 3, 3)}), ["Mul", "Conv"])


@pytest.mark.parametrize("axes", [[2, 3], [-1, -2]])
def test_mean_over_pixels_becomes_a_pooling(axes):
    mean = helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=0)
    check(model([mean], {"axes": np.array(axes)}), ["GlobalAveragePool", "Flatten"])
    mean = helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=1)
    check(model([mean], {"axes": np.array(axes)}), ["GlobalAveragePool"])


def test_mean_over_channels_stays():
    mean = helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=0)
    check(model([mean], {"axes": np.array([1, 2])}), ["ReduceMean"])


def shortcut(starts=(0,), pads=(0, 1, 0, 0, 0, 2, 0, 0), value=0.0):
    end = np.array([2**63 - 1])
    nodes = [
        helper.make_node("Slice", ["x", "start", "end", "two", "step"], ["a"]),
        helper.make_node("Slice", ["a", "start", "end", "three", "step"], ["b"]),
        helper.make_node("Pad", ["b", "pads", "value"], ["y"]),
    ]
    constants = {
        "start": np.array(starts), "end": end, "two": np.array([2]), "three": np.array([3]), "step": np.array([2]),
        "pads": np.array(pads), "value": np.float32(value),
    }  # fmt: skip
    return model(nodes, constants)


def test_padded_shortcut_becomes_a_convolution():
    check(shortcut(), ["Conv"])


@pytest.mark.parametrize(
    "change", [{"starts": (1,)}, {"pads": (0, 1, 1, 0, 0, 2, 0, 0)}, {"value": 1.0}, {"pads": (0,) * 8}]
)
def test_other_slices_and_pads_stay(change):
    check(shortcut(**change), ["Slice", "Slice", "Pad"])


def test_shorten_joins_equal_constants_and_keeps_the_interface():
    nodes = [
        helper.make_node("Add", ["x", "a_long_name"], ["another_long_name"]),
        helper.make_node("Mul", ["another_long_name", "the_same_value"], ["y"]),
    ]
    proto = model(nodes, {"a_long_name": floats(1, 3, 1, 1), "the_same_value": floats(1, 3, 1, 1)})
    before = run(proto)
    graph.shorten(proto)
    assert len(proto.graph.initializer) == 1
    assert [i.name for i in proto.graph.input] == ["x"] and [o.name for o in proto.graph.output] == ["y"]
    assert max(len(name) for node in proto.graph.node for name in node.output) == 1
    np.testing.assert_array_equal(before[0], run(proto)[0])


def test_write_leaves_nothing_behind_when_it_fails(tmp_path):
    proto = model([helper.make_node("Relu", ["x"], ["y"])], {})
    with pytest.raises(Exception, match="cannot be written"):
        graph.write(proto, tmp_path / "missing" / "m.onnx", {})
    (tmp_path / "taken.onnx").mkdir()
    with pytest.raises(Exception, match="cannot be written"):
        graph.write(proto, tmp_path / "taken.onnx", {})
    assert [p.name for p in tmp_path.iterdir()] == ["taken.onnx"]
