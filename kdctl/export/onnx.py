"""ONNX: a model as a file that ONNX Runtime (and most other runtimes) opens, and that file as a predictor.

Preprocessing is inside the graph: it takes float images (N, C, H, W) in [0, 1], any N, and gives logits (N, classes).
Importing this file does not import torch, so that a process that measures the file holds ONNX Runtime alone.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kdctl.config.types import PositiveInt
from kdctl.errors import ConfigError, KdctlError, MissingError, Problem
from kdctl.export.base import Exporter

if TYPE_CHECKING:
    import onnx
    from torch import nn

Floats = NDArray[np.float32]
INPUT, OUTPUT = "images", "logits"


class Onnx(Exporter):
    """ONNX in fp32, run by ONNX Runtime.

    opset: version of the operator set; 20 is what every current runtime reads.
    """

    target = "onnx"
    file_name = "model.onnx"

    def __init__(self, *, opset: PositiveInt = 20) -> None:
        if not 18 <= opset <= 22:
            raise ConfigError(Problem(f"opset is {opset}; it can be 18 to 22", key="opset"))
        self.opset = opset

    def variant(self) -> str:
        return "onnx-fp32"

    def convert(self, model: nn.Module, image_shape: tuple[int, int, int], out: Path, metadata: dict[str, Any]) -> None:
        """Writes the model to `out`, with `metadata` in the file. Raises KdctlError where it has no ONNX form."""
        from kdctl.export import graph

        proto = to_graph(model, image_shape, self.opset)
        graph.strip(proto)
        graph.write(proto, out, {"preprocessing": preprocessing(image_shape), **metadata})


def preprocessing(image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """What the file expects of its caller, and what it does itself."""
    return {"layout": "NCHW", "dtype": "float32", "range": [0, 1], "shape": list(image_shape), "normalize": "inside"}


def record_metadata(record: dict[str, Any]) -> dict[str, Any]:
    """A model's architecture record as metadata of a file; the class names stand on their own."""
    rest = {key: value for key, value in record.items() if key != "class_names"}
    return {"record": rest, "class_names": record.get("class_names", [])}


def to_graph(model: nn.Module, image_shape: tuple[int, int, int], opset: int = 20) -> onnx.ModelProto:
    """The model's ONNX graph: fp32, eval mode, any batch size, simplified. The model itself is left as it is."""
    import torch

    from kdctl.export import graph

    copied = copy.deepcopy(model).cpu().float().eval()
    images = torch.zeros(2, *image_shape)
    shapes = ({0: torch.export.Dim("batch")},)
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                copied, (images,), dynamo=True, opset_version=opset, dynamic_shapes=shapes,
                input_names=[INPUT], output_names=[OUTPUT], verbose=False,
            )  # fmt: skip
    except Exception as error:
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise KdctlError(
            f"the model cannot be exported to ONNX: {reason[0]}",
            hint="the forward pass must be traceable by torch.export with any batch size",
        ) from error
    assert program is not None  # dynamo=True always gives a program
    return graph.simplify(program.model_proto)


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


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class OnnxPredictor:
    """An ONNX file in ONNX Runtime on the CPU.

    runtime: name and version. image_shape: (C, H, W). fixed_batch: the only batch size it takes, None for any.
    class_names, metadata: as stored in the file. threads: how many it computes with.
    Called with float32 images (N, C, H, W) in [0, 1]; returns float32 logits (N, C).
    """

    def __init__(self, path: Path | str, threads: int | None = None) -> None:
        import onnxruntime

        self.path = Path(path)
        self.threads = threads or _available_cores()
        self.session = open_session(self.path, self.threads)
        self.runtime = f"onnxruntime {onnxruntime.__version__}"
        self.metadata: dict[str, str] = dict(self.session.get_modelmeta().custom_metadata_map)
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        shape = inputs[0].shape if len(inputs) == 1 else []
        if len(shape) != 4 or not all(isinstance(d, int) for d in shape[1:]) or len(outputs[0].shape) != 2:
            raise KdctlError(f"{path} does not take images (N, C, H, W) and give logits (N, classes)")
        self.input, self.output = inputs[0].name, outputs[0].name
        self.fixed_batch: int | None = shape[0] if isinstance(shape[0], int) else None
        self.image_shape: tuple[int, int, int] = (shape[1], shape[2], shape[3])
        self.num_classes = int(outputs[0].shape[1])
        self.class_names: list[str] = json.loads(self.metadata.get("class_names", "[]"))

    def __call__(self, images: Floats) -> Floats:
        if images.ndim != 4 or images.shape[1:] != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise KdctlError(f"{self.path.name} takes images (N, {expected}); these are {tuple(images.shape)}")
        logits: Floats = self.session.run([self.output], {self.input: np.ascontiguousarray(images, np.float32)})[0]
        return logits


def open_predictor(path: Path | str, threads: int | None = None) -> OnnxPredictor:
    """The predictor of an exported file; its arguments are plain, so that a measuring process can be told of it."""
    return OnnxPredictor(path, threads)


def open_session(path: Path, threads: int = 1, optimized: Path | None = None) -> Any:
    """An ONNX Runtime session with all graph optimisations. Raises MissingError and, for a damaged file, KdctlError."""
    import onnxruntime

    if not path.is_file():
        raise MissingError(f"there is no file {path}", hint="kdctl compress makes one")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = str(error).replace("\n", " ").split(" : ")[-1].strip()
        raise KdctlError(f"{path} is damaged or not an ONNX model: {reason}", hint="make the artefact again") from error


# ------------------------------------------------------------------------------------------------------------- checking


class Predicts(Protocol):
    """Images to logits."""

    def __call__(self, images: Floats) -> Floats: ...


@dataclass(frozen=True)
class Parity:
    """How far two predictors are apart on the same images. agreement: percent with the same class."""

    max_abs_diff: float
    agreement: float
    samples: int


def check_parity(a: Predicts, b: Predicts, images: Floats, batch_size: int = 256) -> Parity:
    """Compares the logits of two predictors on images (N, C, H, W). Not finite counts as infinitely far."""
    largest, same = 0.0, 0
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        logits_a, logits_b = a(batch), b(batch)
        difference = float(np.abs(logits_a - logits_b).max())
        largest = max(largest, difference if np.isfinite(difference) else float("inf"))
        same += int((logits_a.argmax(1) == logits_b.argmax(1)).sum())
    return Parity(largest, 100.0 * same / len(images), len(images))


@dataclass(frozen=True)
class Contents:
    """What an ONNX file holds and what ONNX Runtime makes of it on this machine.

    bytes: the file. weight_bytes: its constants; the rest describes the graph. weights: numbers in weights of
    convolutions and linears. operators: how many ONNX Runtime executes. int8_operators: how many of them compute in
    int8. float_operators: names and counts of those that compute in float.
    """

    bytes: int
    weight_bytes: int
    weights: int
    operators: int
    int8_operators: int
    float_operators: dict[str, int]

    @property
    def description_bytes(self) -> int:
        return self.bytes - self.weight_bytes


_MOVES = {
    "QuantizeLinear", "DequantizeLinear", "ReorderInput", "ReorderOutput", "Transpose", "Flatten", "Reshape", "Squeeze",
    "Unsqueeze", "Slice", "Split", "Concat", "Pad", "Gather", "Shape", "Identity", "MaxPool",
}  # fmt: skip
"""Operators that move or convert numbers and compute nothing with them."""
_INT8 = ("QLinear", "QGemm", "MatMulInteger", "DynamicQuantize", "Nhwc")


def inspect(path: Path) -> Contents:
    """Reads a file's sizes, and which operators it becomes once ONNX Runtime has optimised it."""
    import onnx
    from onnx import numpy_helper

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        open_session(path, optimized=optimized)
        executed = Counter(node.op_type for node in onnx.load(optimized).graph.node)
    constants = [numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]
    int8 = {name for name in executed if name.startswith(_INT8)}
    floats = {name: n for name, n in executed.items() if name not in int8 | _MOVES}
    return Contents(
        bytes=path.stat().st_size,
        weight_bytes=sum(c.nbytes for c in constants),
        weights=sum(c.size for c in constants if c.ndim >= 2),
        operators=sum(executed.values()),
        int8_operators=sum(executed[name] for name in int8),
        float_operators=floats,
    )
