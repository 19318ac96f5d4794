"""Weights of an OpenVINO graph in few bits: what each layer reads, and constants that widen to it.

Importing this file imports no OpenVINO.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdctl.errors import KdctlError
from kdctl.export.base import Floats, Learned, Quantization, group_length
from kdctl.quant import ranges


def weights(graph: Any) -> Iterator[tuple[Any, Any, Any]]:
    """(layer, its weights' constant, what reads that constant) of convolutions and products with a constant."""
    for layer in graph.get_ordered_ops():
        if layer.get_type_name() not in _LAYERS:
            continue
        reader = layer.input(1)
        node = reader.get_source_output().get_node()
        while node.get_type_name() in ("Convert", "Multiply", "Subtract", "Reshape", "FakeQuantize", "Transpose"):
            reader = node.input(0)
            node = reader.get_source_output().get_node()
        if node.get_type_name() == "Constant":
            yield layer, node, reader


_LAYERS = {"Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul"}


def compress_weights(graph: Any, names: dict[bytes, str], quantization: Quantization) -> None:
    """Keeps weights in few bits, as the graph's constants that it converts back: OpenVINO fuses that into the layer.

    In convolutions all weights of a channel share a scale; in linears `group_length` says how many. Raises KdctlError
    where a layer that is to be kept is not in the graph.
    """
    kept = set()
    for layer, constant, reader in list(weights(graph)):
        weight = np.array(constant.data, np.float32)
        path = names.get(weight.tobytes(), "")
        if path in quantization.keep:
            kept.add(path)
            continue
        if quantization.dtype in ("fp16", "bf16"):
            node = _in_fp16(weight) if quantization.dtype == "fp16" else _in_bf16(weight)
        else:
            node = _in_integers(weight, _channel_axes(layer, weight), quantization, quantization.learned.get(path))
        reader.replace_source_output(node.output(0))
    if kept != set(quantization.keep):
        missing = ", ".join(sorted(set(quantization.keep) - kept))
        raise KdctlError(f"layers that are to stay in fp32 are not in the OpenVINO graph: {missing}")
    graph.validate_nodes_and_infer_types()


def _channel_axes(layer: Any, weight: Floats) -> tuple[int, ...]:
    """The axes of a layer's weights that count its output channels."""
    kind = layer.get_type_name()
    if kind == "MatMul":
        return (weight.ndim - 2,) if layer.get_attributes()["transpose_b"] else (weight.ndim - 1,)
    return {"Convolution": (0,), "ConvolutionBackpropData": (1,), "GroupConvolution": (0, 1)}.get(kind, (0, 2))


def _in_fp16(weight: Floats) -> Any:
    """A constant in fp16, rounded to nearest even and clipped to its range, and what makes fp32 of it."""
    from openvino import opset13 as operators

    most = np.finfo(np.float16).max
    return operators.convert(operators.constant(np.clip(weight, -most, most).astype(np.float16)), "f32")


def _in_bf16(weight: Floats) -> Any:
    """A constant in bf16, rounded to nearest even, and what makes fp32 of it."""
    import openvino
    from openvino import opset13 as operators

    bits = np.ascontiguousarray(weight).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    tensor = openvino.Tensor(openvino.Type.bf16, list(weight.shape))
    tensor.data.view(np.uint16)[...] = rounded
    return operators.convert(openvino.op.Constant(tensor), "f32")


def _in_integers(weight: Floats, axes: tuple[int, ...], quantization: Quantization, learned: Learned | None) -> Any:
    """Weights of any shape as integers times a scale: one a channel (the axes), one a group, or one for all.

    What training found holds before the quantization: its bits, and a scale a channel or one.
    """
    from openvino import opset13 as operators

    bits = (4 if quantization.dtype == "int4" else 8) if learned is None else learned.weight_bits
    per_channel = quantization.per_channel if learned is None else np.size(learned.weight_scale) > 1
    moved = np.moveaxis(weight, axes, range(len(axes)))
    channels = int(np.prod(moved.shape[: len(axes)])) if per_channel else 1
    inputs = moved.shape[-1]
    group = inputs if learned is not None or weight.ndim != 2 else group_length(inputs, quantization.group_size)
    grouped = group < inputs
    rows = moved.reshape(-1, group) if grouped else moved.reshape(channels, -1)
    if learned is None:
        scale = ranges.weight_scales(rows, bits, search=bits == 4)
    else:
        scale = np.asarray(learned.weight_scale, np.float32).reshape(-1)
    whole = ranges.to_grid(rows, scale, bits)
    if grouped:  # (channels, groups, group): the product is turned back into the shape of the weights
        parts = (moved.shape[0], -1, group)
        product = operators.multiply(_integers(whole.reshape(parts), bits), scale.reshape(moved.shape[0], -1, 1))
        flat = operators.reshape(product, np.array(moved.shape), False)
        return flat if axes == (0,) else operators.transpose(flat, np.array([1, 0]))
    back = np.moveaxis(whole.reshape(moved.shape), range(len(axes)), axes)
    shape = [size if axis in axes and channels > 1 else 1 for axis, size in enumerate(weight.shape)]
    return operators.multiply(_integers(back, bits), np.ascontiguousarray(scale.reshape(shape)))


def _integers(whole: NDArray[np.int8], bits: int) -> Any:
    """A constant of 8-bit integers, or of 4-bit ones up to 4 bits (two a byte, the first low), converted to fp32."""
    import openvino
    from openvino import opset13 as operators

    whole = np.ascontiguousarray(whole)
    if bits > 4:
        return operators.convert(operators.constant(whole), "f32")
    tensor = openvino.Tensor(openvino.Type.i4, list(whole.shape))
    nibbles = np.append(whole.reshape(-1).view(np.uint8) & 15, np.uint8(0))[: whole.size + whole.size % 2]
    tensor.data.view(np.uint8).reshape(-1)[...] = nibbles[0::2] | (nibbles[1::2] << 4)
    return operators.convert(openvino.op.Constant(tensor), "f32")
