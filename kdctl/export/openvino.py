"""OpenVINO: a model as OpenVINO's own pair of files (the graph as XML, its constants beside it), and its predictor.

The file takes float images (N, C, H, W) in [0, 1], any N, and gives logits (N, classes). Importing this file imports
neither torch nor OpenVINO.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdctl.errors import KdctlError, MissingError
from kdctl.export.base import Contents, Exporter, FilePredictor, Floats, Quantization, available_cores
from kdctl.export.manifest import preprocessing
from kdctl.export.openvino_weights import compress_weights, weights

if TYPE_CHECKING:
    from kdctl.models.record import Model

INPUT, OUTPUT = "images", "logits"
DYNAMIC_GROUP = 32
"""How many inputs share a scale that is found at run time, with `int8-dynamic`."""


class OpenVino(Exporter):
    """OpenVINO, run by its CPU plug-in: fp32, or int8, int4, fp16 or bf16 by a quantize stage.

    int8-static has the scales of our ONNX files. dynamic keeps all weights in int8 and quantises the inputs of linear
    layers at each call, 32 at a time; convolutions compute in float, as all layers do with weight_only. fp16 makes the
    file smaller and computes in fp32; bf16 computes in bf16 where the processor can.
    """

    target = "openvino"
    file_name = "model.xml"
    takes_learned = True
    quantizations = ("int8-static", "int8-dynamic", "int8-weight_only", "int4-weight_only", "fp16", "bf16")

    def require(self) -> None:
        library()

    def convert(
        self,
        model: Model,
        image_shape: tuple[int, ...],
        out: Path,
        metadata: dict[str, Any],
        quantization: Quantization | None = None,
    ) -> None:
        """Writes `out` (.xml) and its constants beside it (.bin). Raises KdctlError where it has no OpenVINO form."""
        self.check(quantization)
        openvino = library()
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "model.onnx"
            names = _write_source(model, image_shape, source, quantization)
            try:
                graph = openvino.convert_model(source)
            except Exception as error:
                raise KdctlError(f"OpenVINO cannot read the model: {_reason(error)}") from error
        if quantization is not None and quantization.mode != "static":
            compress_weights(graph, names, quantization)
        _tidy(graph)
        name = "fp32" if quantization is None else quantization.name
        about = {"preprocessing": preprocessing(image_shape), "quantization": name, **metadata}
        graph.set_rt_info(json.dumps(about, ensure_ascii=False), ["kdctl"])
        _save(graph, out)

    def files(self, out: Path) -> list[Path]:
        """The graph and its constants."""
        return [out, out.with_suffix(".bin")]


def library() -> Any:
    """The openvino package. Raises MissingError where it is not installed."""
    try:
        import openvino
    except ImportError as error:
        raise MissingError(f"OpenVINO is not there: {error}", hint="pip install 'kdctl[openvino]'") from error
    return openvino


def _reason(error: BaseException) -> str:
    """What an exception of OpenVINO's says, without the places in its source."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("Exception from", "Check '", "While validating"))]
    return " ".join(told)[:400] or type(error).__name__


def _write_source(
    model: Model, image_shape: tuple[int, ...], path: Path, quantization: Quantization | None
) -> dict[bytes, str]:
    """The model as an ONNX file for OpenVINO to read: quantised if static, else in fp32.

    Returns the paths of its layers by the bytes of their weights, which survive what OpenVINO does to names and shapes.
    """
    from onnx import numpy_helper

    from kdctl.export.onnx import Onnx, to_graph

    if quantization is not None and quantization.mode == "static":
        Onnx().convert(model, image_shape, path, {}, quantization)
        return {}
    proto = to_graph(model, image_shape, fixed=() if quantization is None else tuple(quantization.learned))
    path.write_bytes(proto.SerializeToString())
    weights = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer if t.name.endswith(".weight")}
    paths = {name: name.removeprefix("net.").removesuffix(".weight") for name in weights}
    plain = {array.tobytes(): paths[name] for name, array in weights.items()}
    return plain | {array.T.tobytes(): paths[name] for name, array in weights.items() if array.ndim == 2}


# --------------------------------------------------------------------------------------------------------------- files


def _tidy(graph: Any) -> None:
    """Names the input and the output, and folds biases that an integer graph keeps in 32 bits: no smaller than fp32."""
    from openvino import opset13 as operators

    graph.inputs[0].get_tensor().set_names({INPUT})
    graph.outputs[0].get_tensor().set_names({OUTPUT})
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "Add":
            continue
        for port in node.inputs():
            value = _bias(port.get_source_output().get_node())
            if value is not None:
                port.replace_source_output(operators.constant(value).output(0))
    shared: dict[tuple[Any, ...], Any] = {}
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "Constant":
            key = (str(node.get_element_type()), tuple(node.shape), bytes(node.get_tensor_view().data.tobytes()))
            first = shared.setdefault(key, node)
            if first is not node:
                for port in node.output(0).get_target_inputs():
                    port.replace_source_output(first.output(0))


def _bias(node: Any) -> Floats | None:
    """The value of Reshape(Multiply(Convert(32-bit integers), scale)) or a part of it; None of anything else."""
    kind = node.get_type_name()
    if kind == "Constant":
        return np.array(node.data)
    before = [port.get_source_output().get_node() for port in node.inputs()]
    if kind == "Convert" and before[0].get_type_name() == "Constant" and before[0].data.dtype == np.int32:
        return np.asarray(before[0].data, np.float32)
    if kind not in ("Multiply", "Reshape") or before[1].get_type_name() != "Constant":
        return None
    value = _bias(before[0]) if before[0].get_type_name() != "Constant" else None
    if value is None:
        return None
    return value * np.asarray(before[1].data, np.float32) if kind == "Multiply" else value.reshape(node.shape)


def _save(graph: Any, out: Path) -> None:
    """Writes both files aside and renames them; where the second cannot be, the first is what it was before."""
    import openvino

    constants = out.with_suffix(".bin")
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            aside, before = Path(folder) / out.name, Path(folder) / "before.bin"
            openvino.save_model(graph, aside, compress_to_fp16=False)
            text = aside.read_text(encoding="utf-8")
            aside.write_text("".join(line.lstrip("\t") for line in text.splitlines()), encoding="utf-8")
            if constants.exists():
                os.replace(constants, before)
            try:
                os.replace(aside.with_suffix(".bin"), constants)
                os.replace(aside, out)
            except BaseException:
                constants.unlink(missing_ok=True)
                if before.exists():
                    os.replace(before, constants)
                raise
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else _reason(error)
        raise KdctlError(f"{out} cannot be written: {reason}") from error


# ----------------------------------------------------------------------------------------------------------- predictor


class OpenVinoPredictor(FilePredictor):
    """A pair of files in OpenVINO on the CPU. threads: how many it computes with, all cores without.

    It computes in fp32, which OpenVINO by itself would not where the processor has bf16, unless the file is a bf16 one.
    """

    def __init__(self, path: Path | str, threads: int | None = None) -> None:
        openvino = library()
        self.path = Path(path)
        self.threads = threads or available_cores()
        graph = read(self.path)
        self.runtime = f"openvino {openvino.__version__.partition('-')[0]}"
        self.metadata = _metadata(graph)
        shape, classes = graph.inputs[0].partial_shape, graph.outputs[0].partial_shape
        static = len(graph.inputs) == 1 and len(shape) == 4 and all(d.is_static for d in list(shape)[1:])
        if not static or len(classes) != 2 or not classes[1].is_static:
            raise KdctlError(f"{path} does not take images (N, C, H, W) and give logits (N, classes)")
        self.image_shape = (shape[1].get_length(), shape[2].get_length(), shape[3].get_length())
        self.fixed_batch = shape[0].get_length() if shape[0].is_static else None
        self.num_classes = classes[1].get_length()
        self.class_names = list(self.metadata.get("class_names", []))
        self.compiled = compiled(graph, self.metadata, self.threads)
        self.request = self.compiled.create_infer_request()

    def __call__(self, images: Floats) -> Floats:
        self.check_images(images)
        answer = self.request.infer({0: np.ascontiguousarray(images, np.float32)}, share_inputs=True)
        logits: Floats = np.array(answer[0], np.float32)
        return logits


def open_predictor(path: Path | str, threads: int | None = None) -> OpenVinoPredictor:
    """The predictor of an exported file; its arguments are plain, so that a measuring process can be told of it."""
    return OpenVinoPredictor(path, threads)


def read(path: Path) -> Any:
    """The graph of a pair of files. Raises MissingError and, for damaged files, KdctlError."""
    openvino = library()
    constants = path.with_suffix(".bin")
    for file in (path, constants):
        if not file.is_file():
            raise MissingError(f"there is no file {file}", hint="an OpenVINO file is two: copy the .xml and the .bin")
    try:
        return openvino.Core().read_model(path, constants)
    except Exception as error:
        message = f"{path} or its .bin is damaged or not of OpenVINO: {_reason(error)}"
        raise KdctlError(message, hint="make the artefact again") from error


def _metadata(graph: Any) -> dict[str, Any]:
    """What the exporter wrote into the file; nothing of a file that is not ours."""
    if not graph.has_rt_info(["kdctl"]):
        return {}
    try:
        return dict(json.loads(graph.get_rt_info(["kdctl"]).astype(str)))
    except (ValueError, TypeError, RuntimeError) as error:
        raise KdctlError("the file's metadata is damaged", hint="make the artefact again") from error


def compiled(graph: Any, metadata: dict[str, Any], threads: int) -> Any:
    """The graph made ready for the CPU, for one call at a time. Raises KdctlError where an operator has no kernel."""
    import openvino

    core = openvino.Core()
    name = metadata.get("quantization", "fp32")
    bf16 = name == "bf16" and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_HYPER_THREADING": False,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": DYNAMIC_GROUP if name == "int8-dynamic" else 0,
    }
    try:
        return core.compile_model(graph, "CPU", options)
    except Exception as error:
        raise KdctlError(f"OpenVINO cannot run the file on this CPU: {_reason(error)}") from error


# ------------------------------------------------------------------------------------------------------------- checking

_MOVES = {
    "Input", "Output", "Const", "Reorder", "Reshape", "Transpose", "Convert", "Concatenation", "Split", "FakeQuantize",
    "StridedSlice", "Gather", "Pad", "Broadcast", "ShapeOf", "MemoryInput", "MemoryOutput",
}  # fmt: skip
"""Kinds of operators that move or convert numbers and compute nothing with them."""
_INTEGERS = ("u8", "i8", "u4", "i4")


def inspect(path: Path) -> Contents:
    """Reads the sizes of a pair of files, and which operators OpenVINO executes, in which type, on this machine."""
    graph = read(path)
    metadata = _metadata(graph)
    weight_only = str(metadata.get("quantization", "")).endswith("weight_only")
    executed: Counter[tuple[str, str]] = Counter()
    for node in compiled(graph, metadata, 1).get_runtime_model().get_ops():
        about = node.get_rt_info()
        executed[about["layerType"].astype(str), about["runtimePrecision"].astype(str)] += 1
    operators = Counter({key: n for key, n in executed.items() if key[0] not in ("Input", "Output", "Const")})
    computing = {key: n for key, n in operators.items() if key[0] not in _MOVES}
    int8 = {key: n for key, n in computing.items() if key[1] in _INTEGERS and not weight_only}
    floats: Counter[str] = Counter()
    for key, n in computing.items():
        floats[key[0]] += n if key not in int8 else 0
    constants = path.with_suffix(".bin").stat().st_size
    return Contents(
        bytes=path.stat().st_size + constants,
        weight_bytes=constants,
        weights=sum(int(np.prod(constant.shape)) for _, constant, _ in weights(graph)),
        operators=operators.total(),
        int8_operators=sum(int8.values()),
        float_operators={kind: n for kind, n in floats.items() if n},
    )
