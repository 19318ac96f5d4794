"""ONNX whose weights alone are stored in few bits, and dynamic int8 of linears: activations quantised as they come.

Weight-only files hold a weight as integers or 16-bit floats, with what widens it (Cast, Mul) in the graph. Runtimes do
that once, as they load the file: the file is small, speed and memory are those of fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from kdctl.export import graph
from kdctl.export.base import Quantization, group_length
from kdctl.export.graph import LINEAR, Graph
from kdctl.quant.ranges import to_grid, weight_scales

Floats = NDArray[np.float32]
_HALF = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def weight_only(proto: onnx.ModelProto, how: Quantization) -> dict[str, Any]:
    """Stores the weights of convolutions and linears as how.dtype, in place; returns what the file says of it.

    int8 and int4 are symmetric with a scale an output channel (or a tensor; int4 scales are searched for the least
    squared error), or one for each `group_size` weights of a channel. Where a channel cannot be cut into such
    groups they are the largest size below that fits, or the channel (`group_length`); `groups` of the answer holds
    the sizes that are not what was wanted, by layer. Embeddings are stored in int8 with a scale a row, also beside
    int4. fp16 and bf16 round to nearest; their exponents decide what they hold: fp16 has 11 bits of precision from
    6e-5 to 65504, bf16 8 bits over the range of fp32.
    """
    view = Graph(proto)
    _store_embeddings(view, how)
    sizes: dict[str, int] = {}
    for name, nodes in _weights(view, how):
        if how.dtype in _HALF:
            _store_half(view, name, _HALF[how.dtype])
        else:
            path = graph.layer_path(nodes[0])  # it is named by the weight, which becomes another
            sizes[path] = store_integers(view, name, nodes[0], how)
    graph.sort(proto)
    graph.prune(proto)
    about: dict[str, Any] = {"dtype": how.dtype, "mode": "weight_only", "kept": sorted(how.keep)}
    if how.dtype not in _HALF:
        about |= {"per_channel": how.per_channel, "group_size": how.group_size}
    if how.group_size is not None and sizes:
        about["groups"] = {path: size for path, size in sizes.items() if size != how.group_size}
    return about


def _weights(view: Graph, how: Quantization) -> Iterator[tuple[str, list[onnx.NodeProto]]]:
    """Each weight to be stored differently, with the nodes that take it."""
    takers: dict[str, list[onnx.NodeProto]] = {}
    for node in view.proto.node:
        if node.op_type in LINEAR and node.input[1] in view.constants and graph.layer_path(node) not in how.keep:
            takers.setdefault(node.input[1], []).append(node)
    yield from takers.items()


def _store_embeddings(view: Graph, how: Quantization) -> None:
    """Tables of which the input picks rows: in int8 with a scale a row, or in 16 bits. The picked rows are widened."""
    for node in list(view.proto.node):
        table = view.constant(node.input[0]) if node.op_type == "Gather" else None
        if table is None or table.dtype != np.float32 or table.ndim != 2 or node.input[1] in view.constants:
            continue
        name, rows, out = node.input[0], node.input[1], node.output[0]
        path = name.removeprefix("net.").removesuffix(".weight")
        if graph.attributes(node).get("axis", 0) != 0 or path in how.keep or len(view.readers(name)) > 1:
            continue
        if how.dtype in _HALF:
            stored = view.add_constant(name + "_half", table.astype(helper.tensor_dtype_to_np_dtype(_HALF[how.dtype])))
            scaled = []
        else:
            scales = weight_scales(table, 8)
            stored = view.add_constant(name + "_int8", to_grid(table, scales, 8))
            scale = view.add_constant(name + "_scale", scales.reshape(-1, 1))
            scaled = [
                helper.make_node("Gather", [scale, rows], [out + "_scale"]),
                helper.make_node("Mul", [out + "_wide", out + "_scale"], [out]),
            ]
        picked = [
            helper.make_node("Gather", [stored, rows], [out + "_picked"]),
            helper.make_node("Cast", [out + "_picked"], [out + "_wide" if scaled else out], to=TensorProto.FLOAT),
        ]
        view.replace(node, [*picked, *scaled])


def _store_half(view: Graph, name: str, kind: int) -> None:
    value = view.constant(name)
    assert value is not None
    stored = value.astype(helper.tensor_dtype_to_np_dtype(kind))
    wide = name + "_wide"
    view.redirect(name, wide)
    view.add_constant(name + "_half", stored)
    view.add_nodes(helper.make_node("Cast", [name + "_half"], [wide], to=TensorProto.FLOAT))


def store_integers(view: Graph, name: str, node: onnx.NodeProto, how: Quantization) -> int:
    """The weight as (channels, groups, size) integers times (channels, groups, 1) scales, brought to its own shape.

    Returns how many weights share a scale.
    """
    value = view.constant(name)
    assert value is not None
    bits = 4 if how.dtype == "int4" else 8
    axis = graph.channel_axis(node, value.ndim)
    front = np.moveaxis(value, axis, 0)
    found = how.learned.get(graph.layer_path(node))
    rows = np.ascontiguousarray(front).reshape(len(front), -1)
    size = rows.shape[1] if found is not None else group_length(rows.shape[1], how.group_size)
    grouped = rows.reshape(-1, size)
    if found is not None:
        scales, bits = np.asarray(found.weight_scale, np.float32).reshape(-1), found.weight_bits
    elif how.per_channel:
        scales = weight_scales(grouped, bits, search=bits == 4)
    else:
        scales = weight_scales(grouped.reshape(1, -1), bits, search=bits == 4)
    levels = to_grid(grouped, np.broadcast_to(scales, len(grouped)), bits).reshape(len(front), -1, size)
    shaped = scales.reshape((len(front), -1, 1) if scales.size > 1 else ())
    _expand(view, name, levels, shaped, bits, front.shape, axis)
    return int(rows.size // scales.size)


def _expand(
    view: Graph, name: str, levels: NDArray[np.int8], scales: Floats, bits: int, front: tuple[int, ...], axis: int
) -> None:
    """Writes a weight's integers and the nodes that make the weight of them."""
    wide = name + "_wide"
    view.redirect(name, wide)
    stored, scale = name + f"_int{bits}", view.add_constant(name + "_scale", scales)
    if bits <= 4:
        view.add_tensor(graph.int4(stored, levels))
    else:
        view.add_constant(stored, levels)
    shape = view.add_constant(name + "_shape", np.asarray(front, np.int64))
    order = [*range(1, axis + 1), 0, *range(axis + 1, len(front))]
    view.add_nodes(
        helper.make_node("Cast", [stored], [name + "_cast"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [name + "_cast", scale], [name + "_rows"]),
        helper.make_node("Reshape", [name + "_rows", shape], [name + "_front" if axis else wide]),
    )
    if axis:
        view.add_nodes(helper.make_node("Transpose", [name + "_front"], [wide], perm=order))


def dynamic(proto: onnx.ModelProto, how: Quantization) -> dict[str, Any]:
    """Linears compute in int8 with the range of their input found at each call; in place. Returns what the file says.

    Weights of linears: int8, a scale an output channel (or one a tensor); their input becomes 256 levels between its
    extremes, all samples of a call together. Weights of convolutions are stored in int8 and computed in float: a
    quantisation of each feature map at run time costs more than its int8 kernel gains. On x86 without VNNI
    instructions sums of two products saturate at 16 bits, which loses some precision.
    """
    view = Graph(proto)
    _store_embeddings(view, how)
    levels: dict[str, tuple[str, str, str]] = {}
    for name, nodes in _weights(view, how):
        value = view.constant(name)
        linear = all(node.op_type in ("Gemm", "MatMul") and graph.plain(node) for node in nodes)
        if value is None or value.ndim != 2 or not linear:
            store_integers(view, name, nodes[0], replace(how, dtype="int8", mode="weight_only", group_size=None))
            continue
        weight, scale = _integer_weight(view, name, nodes[0], how)
        for node in nodes:
            _multiply(view, node, weight, scale, levels)
    graph.sort(proto)
    graph.prune(proto)
    return {"dtype": "int8", "mode": "dynamic", "per_channel": how.per_channel, "kept": sorted(how.keep)}


def _integer_weight(view: Graph, name: str, node: onnx.NodeProto, how: Quantization) -> tuple[str, str]:
    """Names of the weight (K, N) as int8 and of its scales (N,) or ()."""
    value = view.constant(name)
    assert value is not None
    rows = value if graph.channel_axis(node, 2) == 0 else np.ascontiguousarray(value.T)
    found = how.learned.get(graph.layer_path(node))
    if found is not None:
        scales, bits = np.asarray(found.weight_scale, np.float32).reshape(-1), found.weight_bits
    else:
        scales, bits = weight_scales(rows if how.per_channel else rows.reshape(1, -1), 8), 8
    levels = to_grid(rows, np.broadcast_to(scales, len(rows)), bits)
    stored = view.add_constant(name + "_int8", np.ascontiguousarray(levels.T))
    return stored, view.add_constant(name + "_scale", scales.reshape((-1,) if scales.size > 1 else ()))


def _multiply(
    view: Graph, node: onnx.NodeProto, weight: str, scale: str, levels: dict[str, tuple[str, str, str]]
) -> None:
    """x W (+ b) of a node as integers; `levels` remembers what has been quantised already."""
    source, out = node.input[0], node.output[0]
    if source not in levels:
        levels[source] = (source + "_u8", source + "_u8_scale", source + "_u8_zero")
        view.add_nodes(helper.make_node("DynamicQuantizeLinear", [source], list(levels[source])))
    integers, step, zero = levels[source]
    bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
    product = out + "_product" if bias else out
    new = [
        helper.make_node("MatMulInteger", [integers, weight, zero], [out + "_i32"]),
        helper.make_node("Cast", [out + "_i32"], [out + "_cast"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [step, scale], [out + "_scale"]),
        helper.make_node("Mul", [out + "_cast", out + "_scale"], [product]),
    ]
    if bias:
        new.append(helper.make_node("Add", [product, bias], [out]))
    view.replace(node, new)
