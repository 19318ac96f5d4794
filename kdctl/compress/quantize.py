"""Post-training quantisation to int8, as an ONNX file in QDQ form that ONNX Runtime fuses into int8 kernels."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdctl.compress.base import Compressor
from kdctl.compress.calibration import Range, ranges
from kdctl.config.types import PositiveInt
from kdctl.errors import KdctlError
from kdctl.export import graph
from kdctl.export.onnx import OUTPUT, open_predictor, open_session, preprocessing, quiet, to_graph

if TYPE_CHECKING:
    import onnx
    from torch import nn

__all__ = ["Quantize", "open_predictor"]

Floats = NDArray[np.float32]

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
BETWEEN = (
    "Add", "Mul", "Relu", "Clip", "LeakyRelu", "Sigmoid", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat",
    "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split", "Resize",
)  # fmt: skip
"""What stands between convolutions: in int8 too, or every one of them costs two conversions and a float kernel."""


class Quantize(Compressor):
    """Static int8: weights symmetric, a scale a channel; activations with ranges from calibration images.

    Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, 2018.
    dtype: int8. mode: static, ranges are fixed ahead. calibration: minmax takes the extremes, percentile leaves out
    0.01 % of the values, entropy the range that changes the distribution least. samples: calibration images.
    per_channel: one scale an output channel (or one a tensor).
    Activations are unsigned, on ARM signed: what the machine's int8 instructions take.
    """

    target = "onnx"
    file_name = "model.onnx"

    def __init__(
        self,
        *,
        dtype: Literal["int8"] = "int8",
        mode: Literal["static"] = "static",
        calibration: Literal["minmax", "percentile", "entropy"] = "minmax",
        samples: PositiveInt = 512,
        per_channel: bool = True,
    ) -> None:
        self.dtype, self.mode, self.calibration = dtype, mode, calibration
        self.samples, self.per_channel = samples, per_channel

    def variant(self) -> str:
        return f"{self.dtype}-{self.mode}"

    def convert(
        self,
        model: nn.Module,
        calibration_images: Iterable[Floats],
        image_shape: tuple[int, int, int],
        out: Path,
        metadata: dict[str, Any],
    ) -> None:
        """Writes the int8 model to `out`.

        calibration_images: batches of float32 images (N, C, H, W) in [0, 1], none of them from the test split; the
        first `samples` are used, so they should come in random order. Raises KdctlError where they do not fit.
        """
        images = take(calibration_images, self.samples, image_shape)
        with tempfile.TemporaryDirectory() as folder:
            prepared = self._prepare(to_graph(model, image_shape), Path(folder))
            found = self._calibrate(prepared, images, Path(folder))
            quantized = self._quantize(prepared, found)
        _float_logits(quantized)
        graph.strip(quantized)
        graph.shorten(quantized)
        quantization = {
            "dtype": self.dtype, "mode": self.mode, "calibration": self.calibration, "samples": len(images),
            "per_channel": self.per_channel, "activations": activation_type(),
        }  # fmt: skip
        about = {"preprocessing": preprocessing(image_shape), "quantization": quantization, **metadata}
        graph.write(quantized, out, about)

    def _prepare(self, proto: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
        """Folds constants and normalisations, infers shapes, names every node."""
        import onnx
        from onnxruntime.quantization import quant_pre_process

        source, path = folder / "source.onnx", folder / "prepared.onnx"
        onnx.save(proto, source)
        with quiet():
            quant_pre_process(source, path, skip_symbolic_shape=True)
        prepared = onnx.load(path)
        for i, node in enumerate(prepared.graph.node):
            node.name = f"{node.op_type}_{i}"
        return prepared

    def _calibrate(self, prepared: onnx.ModelProto, images: Floats, folder: Path) -> dict[str, Range]:
        """Ranges of every float tensor that a quantised operator reads or makes."""
        import onnx

        constants = {t.name for t in prepared.graph.initializer}
        known = {v.name: v.type.tensor_type.elem_type for v in (*prepared.graph.value_info, *prepared.graph.input)}
        known |= {v.name: v.type.tensor_type.elem_type for v in prepared.graph.output}
        chosen = [node for node in prepared.graph.node if node.op_type in LINEAR + BETWEEN]
        names = dict.fromkeys(name for node in chosen for name in (*node.input, *node.output) if name not in constants)
        tensors = [name for name in names if known.get(name) == onnx.TensorProto.FLOAT]
        watched = onnx.ModelProto()
        watched.CopyFrom(prepared)
        given = {v.name for v in prepared.graph.input}
        already = {v.name for v in prepared.graph.output}
        for name in tensors:
            if name not in given | already:
                watched.graph.output.append(onnx.ValueInfoProto(name=name))
        path = folder / "watched.onnx"
        onnx.save(watched, path)
        session = open_session(path, threads=1)
        inside = [name for name in tensors if name not in given]
        found = ranges(session, inside, images, self.calibration)
        extremes = (min(0.0, float(images.min())), max(0.0, float(images.max())))
        return found | {name: extremes for name in tensors if name in given}

    def _quantize(self, prepared: onnx.ModelProto, found: dict[str, Range]) -> onnx.ModelProto:
        """Puts quantise and dequantise pairs around the operators, weights as int8, biases as int32."""
        from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType, TensorsData

        data = {name: (np.float32(low), np.float32(high)) for name, (low, high) in found.items()}
        pairs = {name: (np.asarray(low), np.asarray(high)) for name, (low, high) in data.items()}
        with quiet():
            quantizer = QDQQuantizer(
                prepared,
                self.per_channel,
                False,  # reduce_range: full 8-bit weights
                QuantType.QInt8,
                QuantType.QUInt8 if activation_type() == "uint8" else QuantType.QInt8,
                TensorsData(CalibrationMethod.MinMax, pairs),
                [],
                _in_float(prepared),
                list(LINEAR + BETWEEN),
                {},
            )
            quantizer.quantize_model()
        proto: onnx.ModelProto = quantizer.model.model
        return proto


def activation_type() -> Literal["uint8", "int8"]:
    """The type of activations that this machine's int8 instructions are made for: x86 multiplies unsigned by signed."""
    return "int8" if platform.machine().lower() in ("arm64", "aarch64") else "uint8"


def take(batches: Iterable[Floats], samples: int, image_shape: tuple[int, int, int]) -> Floats:
    """The first images of a stream of batches, as one array (N, C, H, W). Raises KdctlError where they do not fit."""
    taken: list[Floats] = []
    missing = samples
    for batch in batches:
        if batch.ndim != 4 or tuple(batch.shape[1:]) != tuple(image_shape):
            expected = ", ".join(map(str, image_shape))
            raise KdctlError(f"calibration images are {tuple(batch.shape)}; the model takes (N, {expected})")
        taken.append(np.asarray(batch[:missing], np.float32))
        missing -= len(taken[-1])
        if missing == 0:
            break
    if sum(map(len, taken)) == 0:
        raise KdctlError("there are no calibration images", hint="static quantisation needs some of the training split")
    return np.concatenate(taken)


def _in_float(proto: onnx.ModelProto) -> list[str]:
    """Names of nodes to leave in float: sums and products with a constant, which a coarse scale would spoil."""
    constants = {t.name for t in proto.graph.initializer}
    return [n.name for n in proto.graph.node if n.op_type in ("Add", "Mul") and any(i in constants for i in n.input)]


def _float_logits(proto: onnx.ModelProto) -> None:
    """Lets a last linear give its logits in float: 256 levels would tie classes, and the kernel gives floats anyway."""
    view = graph.Graph(proto)
    dequantize = view.makers[OUTPUT]
    if dequantize.op_type != "DequantizeLinear":
        return
    quantize = view.makers.get(dequantize.input[0])
    linear = view.makers.get(quantize.input[0]) if quantize is not None else None
    if linear is None or linear.op_type not in ("Gemm", "MatMul") or view.only_reader(linear.output[0]) is None:
        return
    linear.output[0] = OUTPUT
    view.replace(dequantize, [])
    graph.prune(proto)
