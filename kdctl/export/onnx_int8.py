"""Static int8 ONNX in QDQ form: pairs of quantise and dequantise around operators, which runtimes fuse to int8 kernels.

Weights are symmetric int8, biases int32, activations 8-bit levels of a fixed range: unsigned on x86, signed on ARM,
what the machine's int8 instructions take (Jacob et al., Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference, 2018).
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from kdctl.export import graph
from kdctl.export.base import Learned, Quantization
from kdctl.export.graph import LINEAR, Graph
from kdctl.export.onnx_session import open_session
from kdctl.export.onnx_weights import store_integers
from kdctl.quant.ranges import Calibration, Range, Spread, to_grid, weight_scales

Floats = NDArray[np.float32]

MOVES = ("Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split", "MaxPool", "Gather")
"""What gives out values that it took: quantised, they keep their levels."""
BETWEEN = (
    "Add", "Mul", "Relu", "Clip", "LeakyRelu", "Sigmoid", "AveragePool", "GlobalAveragePool", "Concat", "Resize",
    *MOVES,
)  # fmt: skip
"""What stands between convolutions: in int8 too, or every one of them costs two conversions and a float kernel."""
ACTIVATION_BYTES = 256 * 2**20
INT4 = 4


def activation_type() -> Literal["uint8", "int8"]:
    """The type of activations that this machine's int8 instructions are made for: x86 multiplies unsigned by signed."""
    return "int8" if platform.machine().lower() in ("arm64", "aarch64") else "uint8"


def static(proto: onnx.ModelProto, image_shape: tuple[int, ...], how: Quantization) -> dict[str, Any]:
    """Quantises a graph in place; returns what the file says of it.

    Ranges of activations come from `how.images`, those of learned layers from training. Raises KdctlError where there
    are no images, they do not fit, or what they become is not finite.
    """
    images = how.calibration_images(image_shape)
    for i, node in enumerate(proto.graph.node):
        node.name = f"{node.op_type}_{i}"
    plan = _Plan(proto, how)
    plan.limits = calibrate(proto, plan.tensors, images, how.calibration)
    plan.settle()
    for node in plan.nodes:
        plan.weights_of(node)
    widened = replace(how, dtype="int8", mode="weight_only", group_size=None)
    for name, node in plan.widened.items():
        store_integers(plan.view, name, node, widened)
    plan.pairs()
    graph.sort(proto)
    graph.prune(proto)
    return {
        "dtype": how.dtype, "mode": how.mode, "calibration": how.calibration, "samples": len(images),
        "per_channel": how.per_channel, "activations": activation_type(), "kept": sorted(how.keep),
        "learned": len(how.learned),
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------- calibration


def calibrate(proto: onnx.ModelProto, tensors: list[str], images: Floats, method: Calibration) -> dict[str, Range]:
    """The range [low, high] of each tensor over all images, zero always inside (quant/ranges.py).

    Memory stays bounded: images go through in batches small enough for all their activations to fit. Raises KdctlError
    when a tensor is not finite.
    """
    given = [value.name for value in proto.graph.input]
    watched = onnx.ModelProto()
    watched.CopyFrom(proto)
    already = {value.name for value in proto.graph.output}
    inside = [name for name in tensors if name not in given]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inside if name not in already)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "watched.onnx"
        onnx.save(watched, path)
        found = ranges(open_session(path, threads=1), inside, images, method)
    extremes = (min(0.0, float(images.min())), max(0.0, float(images.max())))
    return found | {name: extremes for name in tensors if name in given}


def ranges(session: Any, tensors: list[str], images: Floats, method: Calibration) -> dict[str, Range]:
    """The ranges of a session's outputs over images, its only input, in one pass or two."""
    spreads = {name: Spread() for name in tensors}
    batch = _batch_size(session, tensors, images)
    for name, values in _activations(session, tensors, images, batch):
        spreads[name].stretch(values)
    if method != "minmax":
        for name, values in _activations(session, tensors, images, batch):
            spreads[name].count(values)
    return {name: spread.range(method) for name, spread in spreads.items()}


def _batch_size(session: Any, tensors: list[str], images: Floats) -> int:
    one = session.run(tensors, {session.get_inputs()[0].name: images[:1]})
    return max(1, min(64, ACTIVATION_BYTES // max(1, sum(v.nbytes for v in one))))


def _activations(session: Any, tensors: list[str], images: Floats, batch: int) -> Iterator[tuple[str, NDArray[Any]]]:
    name = session.get_inputs()[0].name
    for start in range(0, len(images), batch):
        yield from zip(tensors, session.run(tensors, {name: images[start : start + batch]}), strict=True)


# ---------------------------------------------------------------------------------------------------------- quantising


class _Plan:
    """Which operators of a graph become int8, and the levels of the tensors around them.

    nodes: those operators. tensors: what they read and make in float. limits: range of each tensor. bits: how many
    bits a tensor has where training settled it. own: (node, tensor) -> (range, bits) for a learned layer that wants
    other levels of its input than its other readers. stored: weights that are written; several nodes may share one.
    raw: tensors that a kept layer reads, in float. widened: by weight, convolutions that make one of these: their
    kernels give 8-bit levels alone, so they compute in float, with weights in int8.
    """

    def __init__(self, proto: onnx.ModelProto, how: Quantization) -> None:
        self.how = how
        self.view = Graph(proto)
        types = _types(proto)
        self.kept = {n.name for path, nodes in graph.layers(proto).items() for n in nodes if path in how.keep}
        self.nodes = [n for n in proto.graph.node if self._chosen(n, types)]
        names = dict.fromkeys(
            name for node in self.nodes for name in (*node.input, *node.output) if name not in self.view.constants
        )
        self.tensors = [name for name in names if types.get(name) == TensorProto.FLOAT]
        self.raw: set[str] = set()
        self.widened: dict[str, onnx.NodeProto] = {}
        self._free(proto)
        self.limits: dict[str, Range] = {}
        self.bits: dict[str, int] = {}
        self.own: dict[tuple[str, str], tuple[Range, int]] = {}
        self.stored: dict[str, tuple[str, Floats]] = {}

    def _chosen(self, node: onnx.NodeProto, types: dict[str, int]) -> bool:
        """Sums and products with a constant stay in float: a coarse scale would spoil them."""
        if node.op_type not in LINEAR + BETWEEN or node.name in self.kept:
            return False
        if types.get(node.input[0]) != TensorProto.FLOAT:
            return False
        if node.op_type in LINEAR:
            return node.op_type == "MatMul" or (node.input[1] in self.view.constants and graph.plain(node))
        return node.op_type not in ("Add", "Mul", "Concat") or not any(n in self.view.constants for n in node.input)

    def _free(self, proto: onnx.ModelProto) -> None:
        """Lets kept layers read what was not rounded on the way from the last sum or linear before them."""
        waiting = [n.input[0] for n in proto.graph.node if n.name in self.kept]
        inside = {node.name: node for node in self.nodes}
        while waiting:
            tensor = waiting.pop()
            if tensor in self.raw:
                continue
            self.raw.add(tensor)
            maker = self.view.makers.get(tensor)
            if maker is None or maker.name not in inside or maker.op_type in ("MatMul", "Gemm"):
                continue
            del inside[maker.name]
            if maker.op_type in LINEAR:
                self.widened[maker.input[1]] = maker
            elif maker.op_type not in ("Add", "Mul", "Concat"):
                waiting.append(maker.input[0])
        self.nodes = list(inside.values())
        self.widened = {name: node for name, node in self.widened.items() if len(self.view.readers(name)) == 1}

    def learned(self, node: onnx.NodeProto) -> Learned | None:
        return self.how.learned.get(graph.layer_path(node)) if node.op_type in LINEAR else None

    # --------------------------------------------------------------------------------------------------------- levels

    def settle(self) -> None:
        """Learned ranges in their places, and the same levels on both sides of what only moves values."""
        for node in self.nodes:
            found = self.learned(node)
            if found is not None and found.input_range is not None:
                self._take(node, node.input[0], found.input_range, found.input_bits)
        for node in self.nodes:
            if node.op_type in MOVES and (node.output[0] not in self.bits):
                for name in node.output:
                    self._copy(node.input[0], name)
        for node in list(self.nodes):
            self._drop_clipping(node)

    def _take(self, node: onnx.NodeProto, tensor: str, limits: Range, bits: int) -> None:
        """Gives a learned layer's input its range: the tensor's own where that does not narrow it for other readers."""
        others = [r for r in self.view.readers(tensor) if self._wanted(r) != (limits, bits)]
        if others or tensor in self.view.outputs:
            self.own[node.name, tensor] = (limits, bits)
            return
        self.limits[tensor], self.bits[tensor] = limits, bits
        maker = self.view.makers.get(tensor)
        while maker is not None and maker.op_type in MOVES and self.view.only_reader(maker.input[0]) is not None:
            tensor = maker.input[0]
            self.limits[tensor], self.bits[tensor] = limits, bits
            maker = self.view.makers.get(tensor)

    def _wanted(self, node: onnx.NodeProto) -> tuple[Range, int] | None:
        found = self.learned(node)
        return None if found is None or found.input_range is None else (found.input_range, found.input_bits)

    def _copy(self, source: str, target: str) -> None:
        if source in self.limits and target in self.limits:
            self.limits[target] = self.limits[source]
            if source in self.bits:
                self.bits[target] = self.bits[source]

    def _drop_clipping(self, node: onnx.NodeProto) -> None:
        """A Relu or Clip whose output's levels lie within its bounds: quantising clips just so."""
        if node.op_type not in ("Relu", "Clip") or node.output[0] not in self.limits:
            return
        before = node.input[0]
        maker = self.view.makers.get(before)
        if maker is None or self.view.only_reader(before) is None or node.output[0] in self.view.outputs:
            return
        bounds = [self.view.constant(name) for name in node.input[1:]] if node.op_type == "Clip" else []
        low = 0.0 if node.op_type == "Relu" else _bound(bounds, 0, -np.inf)
        high = _bound(bounds, 1, np.inf)
        least, most = self.limits[node.output[0]]
        if least < low or most > high * (1 + 1e-6) or any(b is None for b in bounds):
            return
        maker.output[list(maker.output).index(before)] = node.output[0]
        self.view.makers[node.output[0]] = maker
        self.nodes = [n for n in self.nodes if n.name != node.name]
        self.view.replace(node, [])

    def scale(self, limits: Range, bits: int) -> tuple[np.float32, int]:
        """(step, level of zero) of a range of unsigned levels."""
        low, high = min(0.0, limits[0]), max(0.0, limits[1])
        levels = 2**bits - 1
        step = np.float32((high - low) / levels) if high > low else np.float32(1)
        if step < np.finfo(np.float32).tiny:
            step = np.float32(1)
        return step, int(np.clip(np.rint(-low / step), 0, levels))

    # -------------------------------------------------------------------------------------------------------- weights

    def weights_of(self, node: onnx.NodeProto) -> None:
        """Stores the weight of a convolution or linear as int8 and its bias as int32."""
        if node.op_type not in LINEAR or node.input[1] not in self.view.constants:
            return
        step, _ = self.scale(*self._levels(node, node.input[0]))
        bias = self._bias(node)
        if node.input[1] not in self.stored:
            self.stored[node.input[1]] = self._store(node, step, bias)
        node.input[1], scales = self.stored[node.input[1]]
        if bias is not None:
            self._store_bias(node, bias, np.asarray(step * scales, np.float32))

    def _bias(self, node: onnx.NodeProto) -> Floats | None:
        return self.view.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None

    def _levels(self, node: onnx.NodeProto, tensor: str) -> tuple[Range, int]:
        return self.own.get((node.name, tensor)) or (self.limits[tensor], self.bits.get(tensor, 8))

    def _store(self, node: onnx.NodeProto, step: np.float32, bias: Floats | None) -> tuple[str, Floats]:
        """Writes a weight: the name of it dequantised, and its scales, () or (C,).

        Where it has 4 bits the file holds 4-bit integers, which a runtime widens to int8 as it loads them. A transposed
        convolution in groups has no axis of its output channels in the weight: one scale holds for all.
        """
        name, weight = node.input[1], self.view.constant(node.input[1])
        assert weight is not None
        axis, found = graph.channel_axis(node, weight.ndim), self.learned(node)
        in_groups = node.op_type == "ConvTranspose" and graph.attributes(node).get("group", 1) > 1
        per_channel = self.how.per_channel and not in_groups
        front = np.moveaxis(weight, axis, 0)
        rows = np.ascontiguousarray(front).reshape(len(front), -1)
        if found is not None:
            scales, bits = np.asarray(found.weight_scale, np.float32), found.weight_bits
            scales = scales.reshape(-1) if scales.size > 1 else scales.reshape(())
        else:
            scales, bits = weight_scales(rows if per_channel else rows.reshape(1, -1), 8), 8
            scales = scales if per_channel else scales.reshape(())
        if bias is not None:  # it must fit 32 bits in steps of both scales
            least = np.abs(bias) / (float(step) * 2**30)
            scales = np.asarray(np.maximum(scales, least if scales.ndim else least.max()), np.float32)
        levels = to_grid(rows, np.broadcast_to(scales, len(rows)), bits).reshape(front.shape)
        levels = np.ascontiguousarray(np.moveaxis(levels, 0, axis))
        if bits <= INT4:
            self.view.add_tensor(graph.int4(name + "_q4", levels))
            self.view.add_nodes(helper.make_node("Cast", [name + "_q4"], [name + "_q"], to=TensorProto.INT8))
        else:
            self.view.add_constant(name + "_q", levels)
        return self._dequantize(name, scales, np.int8, axis), scales

    def _store_bias(self, node: onnx.NodeProto, bias: Floats, steps: Floats) -> None:
        name = f"{node.output[0]}_bias"
        levels = np.clip(np.rint(bias.astype(np.float64) / steps), -(2**31) + 1, 2**31 - 1)
        self.view.add_constant(name + "_q", levels.astype(np.int32))
        node.input[2] = self._dequantize(name, steps, np.int32, 0)

    def _dequantize(self, name: str, scales: Floats, kind: type, axis: int) -> str:
        """Makes `<name>_dq` of the levels `<name>_q`."""
        scale = self.view.add_constant(name + "_scale", scales)
        zero = self.view.add_constant(name + "_zero", np.zeros(scales.shape, kind))
        along: dict[str, Any] = {"axis": axis} if scales.ndim else {}
        self.view.add_nodes(helper.make_node("DequantizeLinear", [name + "_q", scale, zero], [name + "_dq"], **along))
        return name + "_dq"

    # ---------------------------------------------------------------------------------------------------------- pairs

    def pairs(self) -> None:
        """Puts a pair behind every tensor that an int8 operator reads or makes, another ahead of who has its own."""
        for node in self.nodes:
            for position, name in enumerate(node.input):
                if (node.name, name) in self.own:
                    node.input[position] = self._pair(name, f"{name}_{node.name}", *self.own[node.name, name])
        makers = {name: node for node in self.nodes for name in node.output}
        readers = {name for node in self.nodes for name in node.input}
        inside = {node.name for node in self.nodes} | {""}  # the pairs themselves have no name
        for name in self.limits:
            linear = name in makers and makers[name].op_type in ("MatMul", "Gemm")  # these can give floats
            wanted = name in readers or (name in makers and not linear) or any(name == t for _, t in self.own)
            if not wanted or name in self.view.outputs:
                continue
            read = [r for r in self.view.readers(name) if name not in self.raw or r.name in inside]
            out = self._pair(name, name, self.limits[name], self.bits.get(name, 8))
            for reader in read:
                reader.input[:] = [out if i == name else i for i in reader.input]

    def _pair(self, tensor: str, stem: str, limits: Range, bits: int) -> str:
        """Quantise and dequantise of a tensor; the name of what comes out."""
        step, zero = self.scale(limits, bits)
        kind, offset = (np.int8, 128) if activation_type() == "int8" else (np.uint8, 0)
        scale = self.view.add_constant(stem + "_scale", np.asarray(step))
        level = self.view.add_constant(stem + "_zero", np.asarray(zero - offset, kind))
        levels, out = stem + "_q", stem + "_dq"
        self.view.add_nodes(helper.make_node("QuantizeLinear", [tensor, scale, level], [levels]))
        if bits < 8:
            most = self.view.add_constant(stem + "_top", np.asarray(2**bits - 1 - offset, kind))
            self.view.add_nodes(helper.make_node("Clip", [levels, "", most], [levels + "_clipped"]))
            levels += "_clipped"
        self.view.add_nodes(helper.make_node("DequantizeLinear", [levels, scale, level], [out]))
        return out


def _types(proto: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(proto)
    values = (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)
    return {value.name: value.type.tensor_type.elem_type for value in values}


def _bound(bounds: list[NDArray[Any] | None], position: int, default: float) -> float:
    value = bounds[position] if len(bounds) > position else None
    return default if value is None else float(value)
