"""LiteRT, formerly TensorFlow Lite: a model as a .tflite file for phones and boards, and that file as a predictor.

Images go in as float (N, C, H, W) in [0, 1] and logits come out as float, whatever is between. Metadata travel as
TensorFlow Lite's associated files do, in a zip archive at the end of the file: `kdctl.json` and `labels.txt`.
Converting wants older versions of what kdctl stands on, so it may happen in an environment of its own (elsewhere.py).
Importing this file imports neither torch nor the runtime.
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdctl import runs
from kdctl.errors import ConfigError, KdctlError, MissingError, Problem
from kdctl.export import elsewhere
from kdctl.export.base import Contents, Exporter, FilePredictor, Floats, Quantization, available_cores
from kdctl.export.executorch import check_choices, silent
from kdctl.export.manifest import preprocessing
from kdctl.export.onnx import quiet

if TYPE_CHECKING:
    from kdctl.models.record import Model

TARGET = "litert"
METADATA, LABELS = "kdctl.json", "labels.txt"
SIGNATURE, ARGUMENT = "serving_default", "args_0"
"""What the converter calls the model and its input."""
NORMALISATION = r"^(?!.*_net/)(?!.*serving_default_output).*$"
"""Names of what is made outside the net: normalised images, which stay in float (int8 would round them twice). What the
net makes last is named after the output."""


class LiteRt(Exporter):
    """LiteRT (.tflite, the TensorFlow Lite format) with XNNPACK: fp32, or quantised by ai-edge-quantizer.

    int8-static takes the least and greatest values of the calibration images as ranges. int4 is for size alone: XNNPACK
    takes int4 weights of linears, those of convolutions are unpacked at every call (`inspect().delegated` tells).
    """

    target = TARGET
    file_name = "model.tflite"
    quantizations = ("int8-static", "int8-dynamic", "int8-weight_only", "int4-weight_only", "fp16")

    def require(self) -> None:
        elsewhere.python_of(TARGET, converting=True)

    def check(self, quantization: Quantization | None) -> None:
        super().check(quantization)
        if quantization is not None:
            check_choices(TARGET, quantization, calibrations=("minmax",))
            if quantization.learned:
                message = "litert files cannot hold the scales that quantisation-aware training found"
                raise ConfigError(Problem(message, key="target", hint="onnx and executorch files can"))

    def convert(
        self,
        model: Model,
        image_shape: tuple[int, ...],
        out: Path,
        metadata: dict[str, Any],
        quantization: Quantization | None = None,
    ) -> None:
        self.check(quantization)
        if quantization is not None and quantization.mode == "static":
            quantization.calibration_images(image_shape)
        with quiet(), silent():
            data = _converted(model, image_shape)
            if quantization is not None:
                data = _quantized(data, quantization)
            document = {"preprocessing": preprocessing(image_shape), **metadata}
            document["any_batch"] = _takes_any_batch(data, image_shape)
        with runs.writing(out) as file:
            file.write(with_metadata(data, document))


# ---------------------------------------------------------------------------------------------------------- converting


def _converted(model: Model, image_shape: tuple[int, ...]) -> bytes:
    """The fp32 file, for one image."""
    import litert_torch
    import torch

    from kdctl.models.plain import plain

    try:
        with torch.no_grad():
            program = litert_torch.convert(plain(model), (torch.zeros(1, *image_shape),))
        return bytes(program.model_content())
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise KdctlError(
            f"the model cannot be exported to LiteRT: {reason[0]}",
            hint="the forward pass must be traceable by torch.export, with operators that LiteRT has",
        ) from error


def _quantized(data: bytes, quantization: Quantization) -> bytes:
    """The file with its numbers kept as asked."""
    from ai_edge_quantizer import calibrator, quantizer, recipe_manager

    recipes = recipe_manager.RecipeManager()
    _fill(recipes, quantization)
    ranges = None
    if quantization.mode == "static" and quantization.images is not None:
        seen = calibrator.Calibrator(data, num_threads=1, qsv_update_func=_wider)
        images = [{ARGUMENT: image[None]} for image in np.ascontiguousarray(quantization.images, np.float32)]
        seen.calibrate({SIGNATURE: images}, recipes)
        ranges = seen.get_model_qsvs()
    work = quantizer.Quantizer(data, recipes.get_quantization_recipe())
    return bytes(work.quantize(ranges, enable_progress_bar=False, enable_progress_report=False).quantized_model)


def _fill(recipes: Any, quantization: Quantization) -> None:
    """Writes down which operators are quantised, and how."""
    from ai_edge_quantizer import qtyping
    from ai_edge_quantizer.algorithm_manager import AlgorithmName

    everything = qtyping.TFLOperationName.ALL_SUPPORTED
    grain = qtyping.QuantGranularity.CHANNELWISE if quantization.per_channel else qtyping.QuantGranularity.TENSORWISE
    bits = 4 if quantization.dtype == "int4" else 8
    if quantization.dtype == "fp16":
        kept = qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT)
        config = qtyping.OpQuantizationConfig(
            weight_tensor_config=kept, compute_precision=qtyping.ComputePrecision.FLOAT, explicit_dequantize=True
        )
        for operator in ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D", "CONV_2D_TRANSPOSE", "EMBEDDING_LOOKUP"):
            name = qtyping.TFLOperationName[operator]
            recipes.add_quantization_config(".*", name, config, AlgorithmName.FLOAT_CASTING)
    elif quantization.mode == "static":
        recipes.add_static_config(".*", everything, 8, bits, weight_granularity=grain)
        for place in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
            recipes.add_quantization_config(".*", place, algorithm_key=AlgorithmName.NO_QUANTIZE)
        recipes.add_quantization_config(NORMALISATION, everything, algorithm_key=AlgorithmName.NO_QUANTIZE)
    elif quantization.mode == "dynamic":
        recipes.add_dynamic_config(".*", everything, bits, granularity=grain)
    else:
        recipes.add_weight_only_config(".*", everything, bits, granularity=grain)
    for path in sorted(quantization.keep):
        recipes.add_quantization_config(scope(path), everything, algorithm_key=AlgorithmName.NO_QUANTIZE)


def scope(path: str) -> str:
    """A pattern for the names that the converter gives to what a module of the net makes: `Class_name/Class_name;`."""
    steps = "/".join(rf"[^/;]*_{re.escape(name)}" for name in path.split("."))
    return rf"_net/{steps}[/;]"


def _wider(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The range that holds two ranges."""
    return {**a, **b, "min": np.minimum(a["min"], b["min"]), "max": np.maximum(a["max"], b["max"])}


def _takes_any_batch(data: bytes, image_shape: tuple[int, ...]) -> bool:
    """Whether the file, made for one image, gives the same for several at once as for each of them."""
    images = np.random.default_rng(0).random((3, *image_shape), dtype=np.float32)
    alone = _Interpreter(data, 1)
    expected = np.concatenate([alone(image[None]) for image in images])
    try:
        given = _Interpreter(data, 1)(images)
    except (RuntimeError, ValueError):  # a reshape to a fixed size, most often
        return False
    return given.shape == expected.shape and float(np.abs(given - expected).max()) <= 1e-3 * float(
        np.abs(expected).max()
    )


def with_metadata(data: bytes, document: dict[str, Any]) -> bytes:
    """The file with an archive at its end. Equal documents give equal bytes."""
    file = io.BytesIO(data)
    labels = "".join(f"{name}\n" for name in document.get("class_names", []))
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        for name, text in ((METADATA, json.dumps(document, sort_keys=True)), (LABELS, labels)):
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, text)
    return file.getvalue()


def read_metadata(path: Path) -> dict[str, Any]:
    """What is written in a file; nothing of a file that is not ours. Raises KdctlError where it is damaged."""
    if not zipfile.is_zipfile(path):
        return {}
    try:
        with zipfile.ZipFile(path) as archive:
            if METADATA not in archive.namelist():
                return {}
            document = json.loads(archive.read(METADATA))
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise KdctlError(f"{path} is damaged: its metadata cannot be read", hint="make the artefact again") from error
    return document if isinstance(document, dict) else {}


# ----------------------------------------------------------------------------------------------------------- predictor


class _Interpreter:
    """A file in LiteRT's interpreter, as bytes: images to logits, of the batch size of the moment."""

    def __init__(self, data: bytes, threads: int) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self.interpreter = Interpreter(model_content=data, num_threads=threads)
        self.interpreter.allocate_tensors()
        (taken,), (given,) = self.interpreter.get_input_details(), self.interpreter.get_output_details()
        self.input, self.output = int(taken["index"]), int(given["index"])
        self.names = str(taken["name"]), str(given["name"])
        self.input_shape, self.output_shape = tuple(map(int, taken["shape"])), tuple(map(int, given["shape"]))
        self.floats = taken["dtype"] is np.float32 and given["dtype"] is np.float32
        self.batch = self.input_shape[0]

    def __call__(self, images: Floats) -> Floats:
        if len(images) != self.batch:
            self.batch = -1
            self.interpreter.resize_tensor_input(self.input, images.shape)
            self.interpreter.allocate_tensors()
            self.batch = len(images)
        self.interpreter.set_tensor(self.input, images)
        self.interpreter.invoke()
        logits: Floats = self.interpreter.get_tensor(self.output)
        return logits


class LiteRtPredictor(FilePredictor):
    """A .tflite file in LiteRT's interpreter, which hands what it can to XNNPACK. threads: None for all cores."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        self.path = path
        self._interpreter = _load(path, threads or available_cores())
        shape, given = self._interpreter.input_shape, self._interpreter.output_shape
        if len(shape) != 4 or len(given) != 2 or not self._interpreter.floats:
            raise KdctlError(f"{path} does not take float images (N, C, H, W) and give float logits (N, classes)")
        self.runtime = f"litert {_version()}"
        self.image_shape, self.num_classes = (shape[1], shape[2], shape[3]), given[1]
        self.input, self.output = self._interpreter.names
        self.metadata = read_metadata(path)
        self.class_names = list(self.metadata.get("class_names", []))
        self.fixed_batch = None if self.metadata.get("any_batch") else shape[0]

    def __call__(self, images: Floats) -> Floats:
        self.check_images(images)
        images = np.ascontiguousarray(images, np.float32)
        if len(images) == 0:
            return np.empty((0, self.num_classes), np.float32)
        if self.fixed_batch is None:
            return self._interpreter(images)
        return np.concatenate([self._interpreter(image[None]) for image in images])


def open_predictor(path: Path | str, threads: int | None = None) -> LiteRtPredictor:
    """The predictor of a .tflite file.

    Raises MissingError where there is no file, KdctlError for a damaged one.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"there is no file {path}", hint="kdctl export makes one")
    return LiteRtPredictor(path, threads)


def _version() -> str:
    from importlib.metadata import version

    return version("ai-edge-litert")


def _load(path: Path, threads: int) -> _Interpreter:
    with quiet(), silent():
        try:
            return _Interpreter(path.read_bytes(), threads)
        except (ValueError, RuntimeError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            message = f"{path} is damaged or not a LiteRT model: {lines[-1]}"
            raise KdctlError(message, hint="make the artefact again") from error


# ------------------------------------------------------------------------------------------------------------- reading

_MOVES = frozenset({
    "QUANTIZE", "DEQUANTIZE", "RESHAPE", "TRANSPOSE", "PAD", "PADV2", "SLICE", "STRIDED_SLICE", "SPLIT", "SPLIT_V",
    "CONCATENATION", "SQUEEZE", "EXPAND_DIMS", "PACK", "UNPACK", "GATHER", "GATHER_ND", "CAST", "BROADCAST_TO", "TILE",
    "EMBEDDING_LOOKUP", "SHAPE", "MAX_POOL_2D",
})  # fmt: skip
"""Operators that move or convert numbers and compute nothing with them."""
_WEIGHTED = frozenset({"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"})


class _Graph:
    """The operators of a file's first subgraph, as (name, inputs, outputs), and its tensors."""

    def __init__(self, data: bytes) -> None:
        from ai_edge_litert import schema_py_generated as schema

        model = schema.Model.GetRootAs(data)
        self._types = {number: name for name, number in vars(schema.TensorType).items() if isinstance(number, int)}
        names = {number: name for name, number in vars(schema.BuiltinOperator).items() if isinstance(number, int)}
        codes = [model.OperatorCodes(i) for i in range(model.OperatorCodesLength())]
        kinds = [names[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())] for code in codes]
        self._graph = model.Subgraphs(0)
        operators = [self._graph.Operators(i) for i in range(self._graph.OperatorsLength())]
        self.operators = [
            (kinds[o.OpcodeIndex()], list(o.InputsAsNumpy()), list(o.OutputsAsNumpy()))
            for o in operators
        ]  # fmt: skip
        buffers = [model.Buffers(i) for i in range(model.BuffersLength())]
        self._sizes = [buffer.Size() if buffer.Offset() > 1 else buffer.DataLength() for buffer in buffers]
        self.weight_bytes = sum(self._sizes)

    def type(self, tensor: int) -> str:
        return self._types[self._graph.Tensors(tensor).Type()]

    def size(self, tensor: int) -> int:
        return math.prod(int(n) for n in self._graph.Tensors(tensor).ShapeAsNumpy())

    def is_constant(self, tensor: int) -> bool:
        return tensor >= 0 and self._sizes[self._graph.Tensors(tensor).Buffer()] > 0

    def executed(self) -> Iterator[tuple[str, list[int], list[int]]]:
        """The operators that run at each call: not those that unpack constants."""
        for operator in self.operators:
            if not all(self.is_constant(tensor) for tensor in operator[1]):
                yield operator

    def is_int8(self, name: str, inputs: list[int]) -> bool:
        """Whether an operator computes in integers: its input is int8, or it makes it so because its weight is."""
        types = [self.type(tensor) for tensor in inputs[:2] if tensor >= 0]
        return types[0] == "INT8" or (name in _WEIGHTED | {"BATCH_MATMUL"} and types[-1] in ("INT8", "INT4", "INT2"))


def inspect(path: Path) -> Contents:
    """Reads a file's sizes and operators. delegated: the share of operators that XNNPACK takes on this machine."""
    interpreter = _load(path, 1).interpreter
    data = path.read_bytes()
    graph = _Graph(data)
    executed = list(graph.executed())
    int8 = [name for name, inputs, _ in executed if name not in _MOVES and graph.is_int8(name, inputs)]
    floats = [name for name, inputs, _ in executed if name not in _MOVES and not graph.is_int8(name, inputs)]
    taken = _delegated(graph, interpreter._get_ops_details())
    shares = [outputs[0] in taken for _, _, outputs in executed]
    return Contents(
        bytes=len(data),
        weight_bytes=graph.weight_bytes,
        weights=sum(graph.size(inputs[1]) for name, inputs, _ in executed if name in _WEIGHTED),
        operators=len(executed),
        int8_operators=len(int8),
        float_operators=dict(Counter(floats)),
        delegated=sum(shares) / max(len(shares), 1),
    )


def _delegated(graph: _Graph, planned: list[dict[str, Any]]) -> set[int]:
    """The tensors that delegates make: back from what a delegate gives to what it takes.

    The interpreter lists delegates as operators of their own beside those they replace, and does not say which.
    """
    makers = {tensor: inputs for _, inputs, outputs in graph.operators for tensor in outputs}
    taken: set[int] = set()
    for delegate in planned:
        if delegate["op_name"] != "DELEGATE":
            continue
        given, wanted = set(map(int, delegate["inputs"])), [int(tensor) for tensor in delegate["outputs"]]
        while wanted:
            tensor = wanted.pop()
            if tensor in makers and tensor not in taken and tensor not in given:
                taken.add(tensor)
                wanted += [int(source) for source in makers[tensor]]
    return taken
