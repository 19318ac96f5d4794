"""ONNX: a model as a file that ONNX Runtime (and most other runtimes) opens, and that file as a predictor.

Preprocessing is inside the graph: it takes float images (N, C, H, W) in [0, 1], any N, and gives logits (N, classes).
A model of texts takes token numbers, int64 (N, L), any N and L, and finds mask and segments in them itself; one that
answers for each token gives logits (N, L, classes).
Importing this file does not import torch, so that a process that measures the file holds ONNX Runtime alone.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kdctl.config.types import PositiveInt
from kdctl.errors import ConfigError, KdctlError, Problem
from kdctl.export.base import Contents, Exporter, FilePredictor, Quantization, Tokens, available_cores
from kdctl.export.manifest import preprocessing
from kdctl.export.onnx_session import open_session

if TYPE_CHECKING:
    import onnx
    from torch import nn

Floats = NDArray[np.float32]
Array = NDArray[Any]
INPUT, OUTPUT = "images", "logits"
TEXT_INPUT = "tokens"
INT4_OPSET = 21
"""The first version of the operator set with 4-bit integers."""


class Onnx(Exporter):
    """ONNX, run by ONNX Runtime: fp32, or int8, int4, fp16 or bf16 by a quantize stage.

    opset: version of the operator set; 20 is what every current runtime reads. int4 takes 21.
    """

    target = "onnx"
    file_name = "model.onnx"
    takes_learned = True
    quantizations = ("int8-static", "int8-dynamic", "int8-weight_only", "int4-weight_only", "fp16", "bf16")
    of_texts = ("fp32", "int8-dynamic", "int8-weight_only", "int4-weight_only", "fp16", "bf16")

    def __init__(self, *, opset: PositiveInt = 20) -> None:
        if not 18 <= opset <= 22:
            raise ConfigError(Problem(f"opset is {opset}; it can be 18 to 22", key="opset"))
        self.opset = opset

    def convert(
        self,
        model: nn.Module,
        image_shape: tuple[int, ...],
        out: Path,
        metadata: dict[str, Any],
        quantization: Quantization | None = None,
    ) -> None:
        """Writes the model to `out`, with `metadata` in the file; in fp32 without a quantization.

        Raises KdctlError where the model has no ONNX form or the calibration images do not fit it.
        """
        from kdctl.export import graph

        self.check(quantization)
        learned = {} if quantization is None else quantization.learned
        int4 = any(layer.weight_bits <= 4 for layer in learned.values())
        if int4 or (quantization is not None and quantization.dtype == "int4"):
            opset = max(self.opset, INT4_OPSET)
        else:
            opset = self.opset
        proto = to_graph(model, image_shape, opset, learned)
        about: dict[str, Any] = {"preprocessing": preprocessing(image_shape, _tokens_of(model))}
        if quantization is not None:
            about["quantization"] = _quantize(proto, image_shape, quantization)
        graph.strip(proto)
        if quantization is not None:
            graph.shorten(proto)
        graph.write(proto, out, about | metadata)


def _quantize(proto: onnx.ModelProto, image_shape: tuple[int, ...], how: Quantization) -> dict[str, Any]:
    """Quantises a graph in place; returns what the file says of it."""
    from kdctl.export import onnx_int8, onnx_weights

    if how.mode == "static" and how.dtype == "int8":
        return onnx_int8.static(proto, image_shape, how)
    if how.mode == "dynamic" and how.dtype == "int8":
        return onnx_weights.dynamic(proto, how)
    return onnx_weights.weight_only(proto, how)


def record_metadata(record: dict[str, Any]) -> dict[str, Any]:
    """A model's architecture record as metadata of a file; the class names stand on their own."""
    rest = {key: value for key, value in record.items() if key != "class_names"}
    return {"record": rest, "class_names": record.get("class_names", [])}


def to_graph(
    model: nn.Module, image_shape: tuple[int, ...], opset: int = 20, fixed: Collection[str] = ()
) -> onnx.ModelProto:
    """The model's ONNX graph: fp32, eval mode, any batch size, of texts any length, simplified. The model itself is
    left as it is.

    fixed: paths of layers whose weights stay as they are; in other layers what scales their input is folded.
    """
    from kdctl.export import graph

    copied = copy.deepcopy(model).cpu().float().eval()
    proto = graph.simplify(_traced(copied, image_shape, opset), fixed)
    graph.name_weights(proto, {name: tensor.numpy() for name, tensor in copied.state_dict().items()})
    return proto


_TRACED: dict[str, onnx.ModelProto] = {}
"""What torch's exporter made last, by what it was made of: it takes seconds, and what was quantised for a runtime is
then held against its own fp32 file there."""


def _traced(model: nn.Module, image_shape: tuple[int, ...], opset: int) -> onnx.ModelProto:
    """The graph as torch's exporter leaves it, not made again for a model of equal record, layers and weights."""
    if not hasattr(model, "record"):
        return _trace(model, image_shape, opset)  # nothing says what its code is
    key = _fingerprint(model, image_shape, opset)
    if key not in _TRACED:
        _TRACED.clear()
        _TRACED[key] = _trace(model, image_shape, opset)
    return _TRACED[key]


def _fingerprint(model: nn.Module, image_shape: tuple[int, ...], opset: int) -> str:
    digest = hashlib.sha256(repr((model.record, model, image_shape, opset)).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        array = np.ascontiguousarray(tensor.detach().numpy())
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _trace(model: nn.Module, image_shape: tuple[int, ...], opset: int) -> onnx.ModelProto:
    """Raises KdctlError where the model cannot be traced."""
    import torch

    axes, given, inputs = {0: torch.export.Dim("batch")}, INPUT, torch.zeros(2, *image_shape)
    if (tokens := _tokens_of(model)) is not None:
        axes[1], given = torch.export.Dim("length"), TEXT_INPUT
        inputs = torch.full((2, *image_shape), (tokens.pad + 1) % tokens.vocab_size)
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                model, (inputs,), dynamo=True, opset_version=opset, dynamic_shapes=(axes,),
                input_names=[given], output_names=[OUTPUT], verbose=False,
            )  # fmt: skip
    except Exception as error:
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise KdctlError(
            f"the model cannot be exported to ONNX: {reason[0]}",
            hint="the forward pass must be traceable by torch.export with any batch size and length of texts",
        ) from error
    assert program is not None  # dynamo=True always gives a program
    return program.model_proto


def _tokens_of(model: nn.Module) -> Any:
    """What the numbers of a model of texts mean; None of a model of images."""
    return getattr(getattr(model, "record", None), "tokens", None)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the chatter of exporters and quantisers (prints, warnings, log lines) from the user."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


# ----------------------------------------------------------------------------------------------------------- predictor


class OnnxPredictor(FilePredictor):
    """An ONNX file in ONNX Runtime on the CPU. threads: how many it computes with, all cores without."""

    def __init__(self, path: Path | str, threads: int | None = None) -> None:
        import onnxruntime

        self.path = Path(path)
        self.threads = threads or available_cores()
        self.session = open_session(self.path, self.threads)
        self.runtime = f"onnxruntime {onnxruntime.__version__}"
        self.metadata = {k: _value(v) for k, v in self.session.get_modelmeta().custom_metadata_map.items()}
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        shape = inputs[0].shape if len(inputs) == 1 else []
        told = self.metadata.get("preprocessing")
        tokens = told.get("tokens") if isinstance(told, dict) and len(shape) == 2 else None
        images = len(shape) == 4 and all(isinstance(d, int) for d in shape[1:])
        if not (images or tokens) or len(outputs[0].shape) not in ((2, 3) if tokens else (2,)):
            raise KdctlError(f"{path} does not take images (N, C, H, W) or texts and give logits (N, classes)")
        self.tokens = None if tokens is None else Tokens.of(tokens)
        self.input, self.output = inputs[0].name, outputs[0].name
        self.fixed_batch = shape[0] if isinstance(shape[0], int) else None
        self.image_shape = tuple(shape[1:]) if self.tokens is None else (self.tokens.length,)
        self.num_classes = int(outputs[0].shape[-1])
        self.class_names = list(self.metadata.get("class_names", []))

    def __call__(self, images: Array) -> Floats:
        images = self._checked(images)
        if self.fixed_batch is None or len(images) == self.fixed_batch:
            return self._run(images)
        return in_turns(self._run, images, self.fixed_batch)

    def _checked(self, images: Array) -> Array:
        """The images or token numbers as the file takes them. Raises KdctlError for others."""
        if self.tokens is not None:
            if images.ndim != 2 or images.dtype.kind not in "iu" or not 0 < images.shape[1] <= self.tokens.length:
                expected = f"token numbers, int64 (N, 1 to {self.tokens.length})"
                raise KdctlError(f"{self.path.name} takes {expected}; these are {images.dtype} {tuple(images.shape)}")
            return np.ascontiguousarray(images, np.int64)
        self.check_images(images)
        return np.ascontiguousarray(images, np.float32)

    def _run(self, images: Array) -> Floats:
        logits: Floats = self.session.run([self.output], {self.input: images})[0]
        return logits


def in_turns(run: Predicts, images: Array, size: int) -> Floats:
    """Logits of any number of images from something that takes exactly `size` at a time; the last turn is filled up."""
    logits = []
    for start in range(0, len(images), size):
        turn = images[start : start + size]
        filled = np.concatenate([turn, np.repeat(turn[-1:], size - len(turn), axis=0)])
        logits.append(run(filled)[: len(turn)])
    return np.concatenate(logits)


def _value(text: str) -> Any:
    """A value of the metadata: what was no text had been written as JSON."""
    try:
        return json.loads(text) if text[:1] in ("{", "[") else text
    except ValueError:
        return text


def open_predictor(path: Path | str, threads: int | None = None) -> OnnxPredictor:
    """The predictor of an exported file; its arguments are plain, so that a measuring process can be told of it."""
    return OnnxPredictor(path, threads)


# ------------------------------------------------------------------------------------------------------------- checking


class Predicts(Protocol):
    """Images, or token numbers, to logits."""

    def __call__(self, images: Array) -> Floats: ...


_MOVES = {
    "QuantizeLinear", "DequantizeLinear", "ReorderInput", "ReorderOutput", "Transpose", "Flatten", "Reshape", "Squeeze",
    "Unsqueeze", "Slice", "Split", "Concat", "Pad", "Gather", "Shape", "Identity", "MaxPool",
}  # fmt: skip
"""Operators that move or convert numbers and compute nothing with them."""
_INT8 = ("QLinear", "QGemm", "MatMulInteger", "DynamicQuantize", "Nhwc", "QClip")


def _operators(optimized: onnx.ModelProto) -> Counter[str]:
    """The operators of an optimised graph by name; a Clip of 8-bit levels (activations of fewer bits) is a QClip."""
    from onnx import TensorProto

    eight_bits = (TensorProto.UINT8, TensorProto.INT8)
    levels = {tensor.name for tensor in optimized.graph.initializer if tensor.data_type in eight_bits}

    def name(node: onnx.NodeProto) -> str:
        return "QClip" if node.op_type == "Clip" and levels & set(node.input) else node.op_type

    return Counter(name(node) for node in optimized.graph.node)


def inspect(path: Path) -> Contents:
    """Reads a file's sizes, and which operators it becomes once ONNX Runtime has optimised it."""
    import onnx

    from kdctl.export import graph

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        open_session(path, optimized=optimized)
        executed = _operators(onnx.load(optimized))
    proto = onnx.load(path)
    int8 = {name for name in executed if name.startswith(_INT8)}
    floats = {name: n for name, n in executed.items() if name not in int8 | _MOVES}
    return Contents(
        bytes=path.stat().st_size,
        weight_bytes=sum(graph.constant_bytes(tensor) for tensor in proto.graph.initializer),
        weights=sum(graph.constant_size(tensor) for tensor in graph.weights(proto).values()),
        operators=sum(executed.values()),
        int8_operators=sum(executed[name] for name in int8),
        float_operators=floats,
    )
