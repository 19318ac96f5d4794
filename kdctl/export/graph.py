"""ONNX graphs: exact rewrites that run faster, and files that hold nothing but what a runtime reads.

Shapes: N batch, C channels, H x W pixels.
"""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from kdctl import __version__
from kdctl.errors import KdctlError


class Graph:
    """A view of a model's graph: constants by name, who makes a tensor, who reads it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.proto = model.graph
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.makers = {name: node for node in model.graph.node for name in node.output}
        self.outputs = {value.name for value in model.graph.output}

    def readers(self, name: str) -> list[onnx.NodeProto]:
        return [node for node in self.proto.node if name in node.input]

    def only_reader(self, name: str) -> onnx.NodeProto | None:
        """The node that reads a tensor when there is exactly one and the tensor is not an output."""
        nodes = self.readers(name)
        return nodes[0] if len(nodes) == 1 and name not in self.outputs else None

    def constant(self, name: str) -> NDArray[Any] | None:
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    def add_constant(self, name: str, value: NDArray[Any]) -> str:
        return self.add_tensor(numpy_helper.from_array(value, name))

    def add_tensor(self, tensor: onnx.TensorProto) -> str:
        self.proto.initializer.append(tensor)
        self.constants[tensor.name] = self.proto.initializer[-1]
        return tensor.name

    def add_nodes(self, *nodes: onnx.NodeProto) -> None:
        """Puts nodes at the end, wherever their inputs are made: see `sort`."""
        self.proto.node.extend(nodes)

    def replace(self, old: onnx.NodeProto, new: list[onnx.NodeProto]) -> None:
        """Puts nodes in the place of one; they must make what it made."""
        position = next(i for i, node in enumerate(self.proto.node) if node is old or node == old)
        del self.proto.node[position]
        for offset, node in enumerate(new):
            self.proto.node.insert(position + offset, node)

    def redirect(self, old: str, new: str) -> None:
        """Lets every reader of one tensor read another."""
        for node in self.proto.node:
            for i, name in enumerate(node.input):
                if name == old:
                    node.input[i] = new


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


# ------------------------------------------------------------------------------------------------------ exact rewrites


def simplify(model: onnx.ModelProto, fixed: Collection[str] = ()) -> onnx.ModelProto:
    """Rewrites that change no output beyond rounding and leave runtimes fewer and better supported operators.

    The scale of the input normalisation goes into the first convolution, a mean over pixels becomes a global pooling,
    and a strided slice with zero channels around it (a shortcut without parameters) becomes a 1x1 convolution, so that
    a residual network is convolutions and sums throughout. fixed: paths of layers whose weights stay as they are.
    """
    model = onnx.shape_inference.infer_shapes(model)
    shapes = {v.name: _dims(v) for v in (*model.graph.value_info, *model.graph.input, *model.graph.output)}
    for rewrite in (_fold_scale, _pool_mean, _convolve_shortcut):
        for node in list(model.graph.node):
            if rewrite is _fold_scale and fixed and _feeds(Graph(model), node, fixed):
                continue
            rewrite(Graph(model), node, shapes)
    prune(model)
    onnx.checker.check_model(model)
    return model


def _feeds(graph: Graph, node: onnx.NodeProto, layers: Collection[str]) -> bool:
    """Whether one of some layers reads what a node makes."""
    return any(len(r.input) > 1 and layer_path(r) in layers for r in graph.readers(node.output[0]))


def _dims(value: onnx.ValueInfoProto) -> list[int | None]:
    dims = value.type.tensor_type.shape.dim
    return [d.dim_value if d.HasField("dim_value") else None for d in dims]


def _fold_scale(graph: Graph, node: onnx.NodeProto, shapes: dict[str, list[int | None]]) -> None:
    """x * m or x / d ahead of a convolution: into its weights. Exact under zero padding: zero scaled is zero."""
    if node.op_type not in ("Mul", "Div") or (factor := graph.constant(node.input[1])) is None:
        return
    conv = graph.only_reader(node.output[0])
    if conv is None or conv.op_type != "Conv" or conv.input[0] != node.output[0]:
        return
    weight = graph.constant(conv.input[1])
    if weight is None or graph.only_reader(conv.input[1]) is None:
        return
    per_channel = (1, weight.shape[1]) + (1,) * (weight.ndim - 2)
    if factor.size != 1 and factor.shape not in (per_channel, per_channel[1:]):
        return
    factor = factor.reshape(per_channel if factor.size > 1 else ())  # with groups only a scalar can get here
    scaled = weight / factor if node.op_type == "Div" else weight * factor
    graph.constants[conv.input[1]].CopyFrom(numpy_helper.from_array(scaled.astype(weight.dtype), conv.input[1]))
    conv.input[0] = node.input[0]
    graph.replace(node, [])


def _pool_mean(graph: Graph, node: onnx.NodeProto, shapes: dict[str, list[int | None]]) -> None:
    """The mean over H and W of an (N, C, H, W) tensor: GlobalAveragePool, and Flatten where the axes go."""
    if node.op_type != "ReduceMean" or len(node.input) < 2 or len(shapes.get(node.input[0], [])) != 4:
        return
    axes = graph.constant(node.input[1])
    if axes is None or sorted(int(a) % 4 for a in axes) != [2, 3]:
        return
    if attributes(node).get("keepdims", 1):
        graph.replace(node, [helper.make_node("GlobalAveragePool", [node.input[0]], list(node.output))])
        return
    pooled = node.output[0] + "_pooled"
    pool = helper.make_node("GlobalAveragePool", [node.input[0]], [pooled])
    graph.replace(node, [pool, helper.make_node("Flatten", [pooled], list(node.output))])


def _convolve_shortcut(graph: Graph, node: onnx.NodeProto, shapes: dict[str, list[int | None]]) -> None:
    """Pad(Slice(x)) that takes every s-th pixel and adds zero channels: a 1x1 convolution with stride s."""
    before, after = _padded_channels(graph, node)
    source, strides = node.input[0] if node.input else "", [1, 1]
    while before + after and (sliced := graph.makers.get(source)) is not None and sliced.op_type == "Slice":
        steps = _pixel_steps(graph, sliced)
        if steps is None or graph.only_reader(source) is None:
            return
        strides = [a * b for a, b in zip(strides, steps, strict=True)]
        source = sliced.input[0]
    shape = shapes.get(source, [])
    if not before + after or strides == [1, 1] or len(shape) != 4 or shape[1] is None:
        return
    channels = shape[1]
    weight = np.zeros((before + channels + after, channels, 1, 1), np.float32)
    weight[before + np.arange(channels), np.arange(channels)] = 1
    name = graph.add_constant(node.output[0] + "_weight", weight)
    conv = helper.make_node("Conv", [source, name], list(node.output), kernel_shape=[1, 1], strides=strides)
    graph.replace(node, [conv])


def _padded_channels(graph: Graph, node: onnx.NodeProto) -> tuple[int, int]:
    """(before, after) of a Pad that adds zeros to the channels of a 4-dimensional tensor alone; else (0, 0)."""
    if node.op_type != "Pad" or len(node.input) > 3 or attributes(node).get("mode", b"constant") != b"constant":
        return 0, 0
    value = graph.constant(node.input[2]) if len(node.input) == 3 and node.input[2] else np.zeros(())
    pads = graph.constant(node.input[1])
    if value is None or value.any() or pads is None or pads.size != 8 or (pads < 0).any():
        return 0, 0
    before, after = int(pads[1]), int(pads[5])
    return (before, after) if int(pads.sum()) == before + after else (0, 0)


def _pixel_steps(graph: Graph, node: onnx.NodeProto) -> list[int] | None:
    """Steps over H and W of a Slice that takes the whole of them; None for any other slice."""
    constants = [graph.constant(name) for name in node.input[1:]]
    if len(constants) != 4 or any(c is None for c in constants):
        return None
    steps = [1, 1]
    for start, end, axis, step in zip(*constants, strict=True):
        if start != 0 or end < 2**31 - 1 or axis not in (2, 3) or step < 1:
            return None
        steps[int(axis) - 2] *= int(step)
    return steps


def sort(model: onnx.ModelProto) -> None:
    """Puts every node behind those that make its inputs, as ONNX wants it, and else leaves the order as it is."""
    made = {tensor.name for tensor in model.graph.initializer} | {v.name for v in model.graph.input} | {""}
    waiting = [copy.deepcopy(node) for node in model.graph.node]
    sorted_nodes: list[onnx.NodeProto] = []
    while waiting:
        later: list[onnx.NodeProto] = []
        for node in waiting:
            ready = all(name in made for name in node.input)
            (sorted_nodes if ready else later).append(node)
            made.update(node.output if ready else ())
        if len(later) == len(waiting):
            raise KdctlError("the graph goes in a circle, or reads what nobody makes")
        waiting = later
    del model.graph.node[:]
    model.graph.node.extend(sorted_nodes)


def prune(model: onnx.ModelProto) -> None:
    """Drops nodes whose outputs nobody reads, then constants nobody reads."""
    graph = model.graph
    while True:
        read = {name for node in graph.node for name in node.input} | {v.name for v in graph.output}
        dead = [i for i, node in enumerate(graph.node) if not any(name in read for name in node.output)]
        for i in reversed(dead):
            del graph.node[i]
        if not dead:
            break
    kept = [t for t in graph.initializer if t.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


# ------------------------------------------------------------------------------------------------------------- weights

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_SHAPED = ("Cast", "Mul", "Reshape", "Transpose", "DequantizeLinear")
"""What may stand between a stored weight and the operator that takes it."""


def name_weights(model: onnx.ModelProto, parameters: dict[str, NDArray[Any]]) -> None:
    """Gives a weight that was stored transposed (of a MatMul) the name of its parameter back."""
    graph = Graph(model)
    flipped = {(p.T.shape, p.T.tobytes()): name for name, p in parameters.items() if p.ndim == 2}
    for node in model.graph.node:
        if node.op_type != "MatMul" or (value := graph.constant(node.input[1])) is None:
            continue
        name = flipped.get((value.shape, value.tobytes()))
        if name is not None and name not in graph.constants:
            old = node.input[1]
            graph.constants[name] = graph.constants.pop(old)
            graph.constants[name].name = name
            graph.redirect(old, name)


def weights(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """The stored weights of convolutions and linears, by name, whatever number format they are in."""
    graph = Graph(model)
    found = {}
    for node in model.graph.node:
        if node.op_type in (*LINEAR, "MatMulInteger", "ConvInteger"):
            name = node.input[1]
            while name not in graph.constants and name in graph.makers and graph.makers[name].op_type in _SHAPED:
                name = graph.makers[name].input[0]
            if name in graph.constants:
                found[name] = graph.constants[name]
    return found


def layers(model: onnx.ModelProto, wrapped: str = "net.") -> dict[str, list[onnx.NodeProto]]:
    """The nodes of convolutions and linears with constant weights, by the path of their module in the net.

    wrapped: what stands before the paths where the net is inside a Model.
    """
    graph = Graph(model)
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        if node.op_type in LINEAR and node.input[1] in graph.constants:
            found.setdefault(layer_path(node, wrapped), []).append(node)
    return found


def layer_path(node: onnx.NodeProto, wrapped: str = "net.") -> str:
    """The path of the module that a convolution's or linear's weight belongs to."""
    return node.input[1].removeprefix(wrapped).removesuffix(".weight")


def plain(node: onnx.NodeProto) -> bool:
    """Whether a linear is x W + b, with no factors and its input as it comes."""
    said = attributes(node)
    return said.get("alpha", 1) == 1 and said.get("beta", 1) == 1 and not said.get("transA", 0)


def channel_axis(node: onnx.NodeProto, dimensions: int) -> int:
    """The axis of a weight's output channels."""
    if node.op_type == "Gemm":
        return 0 if attributes(node).get("transB", 0) else 1
    return {"Conv": 0, "ConvTranspose": 1, "MatMul": dimensions - 1}[node.op_type]


def int4(name: str, levels: NDArray[np.int8]) -> onnx.TensorProto:
    """A constant of 4-bit integers, two a byte (opset 21)."""
    return helper.make_tensor(name, onnx.TensorProto.INT4, levels.shape, levels.reshape(-1).tolist())


def constant_size(tensor: onnx.TensorProto) -> int:
    """How many numbers a constant holds."""
    return int(np.prod(tensor.dims, dtype=np.int64))


def constant_bytes(tensor: onnx.TensorProto) -> int:
    """How many bytes a constant takes in the file."""
    packed = tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    if packed:
        return (constant_size(tensor) + 1) // 2
    return constant_size(tensor) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


# --------------------------------------------------------------------------------------------------------- small files


def strip(model: onnx.ModelProto) -> None:
    """Takes out what only people and exporters read: doc strings, traces, node names, shapes of inner tensors."""
    graph = model.graph
    for item in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        item.doc_string = ""
        del item.metadata_props[:]
    for node in graph.node:
        node.name = ""
    del graph.value_info[:]
    del graph.quantization_annotation[:]
    graph.name = "model"
    model.producer_name, model.producer_version = "kdctl", __version__


def shorten(model: onnx.ModelProto) -> None:
    """Constants with equal content become one, and every tensor but inputs and outputs gets the shortest free name."""
    graph = Graph(model)
    first: dict[tuple[Any, ...], str] = {}
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        same = first.setdefault((tensor.data_type, array.shape, array.tobytes()), tensor.name)
        if same != tensor.name and tensor.name not in graph.outputs:
            graph.redirect(tensor.name, same)
    prune(model)
    keep = {v.name for v in (*model.graph.input, *model.graph.output)}
    uses = Counter(name for node in model.graph.node for name in (*node.input, *node.output) if name)
    short = {name: name for name in keep}
    for name, _ in uses.most_common():
        if name not in short:
            short[name] = _base36(len(short))
    for node in model.graph.node:
        node.input[:] = [short[name] if name else "" for name in node.input]
        node.output[:] = [short[name] if name else "" for name in node.output]
    for tensor in model.graph.initializer:
        tensor.name = short[tensor.name]


def _base36(number: int) -> str:
    digits = ""
    while number or not digits:
        number, digit = divmod(number, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return digits


def write(model: onnx.ModelProto, out: Path, metadata: dict[str, Any]) -> None:
    """Writes the file aside and renames it. Metadata values that are not text are stored as JSON."""
    del model.metadata_props[:]
    for key, value in {"kdctl_version": __version__, **metadata}.items():
        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), ensure_ascii=False)
        model.metadata_props.add(key=key, value=text)
    aside = out.with_name(f".{out.name}.tmp")
    try:
        aside.write_bytes(model.SerializeToString())
        os.replace(aside, out)
    except OSError as error:
        raise KdctlError(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        aside.unlink(missing_ok=True)
