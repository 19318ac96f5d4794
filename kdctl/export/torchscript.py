"""TorchScript: a model as a program that PyTorch runs without its Python code, and that program as a predictor.

PyTorch calls TorchScript deprecated in favour of torch.export (`pt2`); on phones ExecuTorch is PyTorch Mobile's
successor. The file takes float images (N, C, H, W) in [0, 1], any N, and gives logits (N, classes).
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdctl import runs
from kdctl.errors import ConfigError, KdctlError, MissingError, Problem
from kdctl.export.base import Contents, Exporter, FilePredictor, Floats, Quantization, reason
from kdctl.export.manifest import preprocessing

if TYPE_CHECKING:
    import torch

    from kdctl.models.record import Model

METADATA = "kdctl.json"
"""The name of our own part of the file."""


class TorchScript(Exporter):
    """TorchScript, traced and frozen: fp32, or int8 by a quantize stage.

    int8-static quantises what torch.fx can follow, convolutions above all; int8-dynamic the linear layers.
    mobile: fuses and packs for PyTorch Mobile, which a PyTorch without XNNPACK cannot; its successor is `executorch`.
    """

    target = "torchscript"
    file_name = "model.torchscript"
    quantizations = ("int8-static", "int8-dynamic")

    def __init__(self, *, mobile: bool = False) -> None:
        self.mobile = mobile

    def convert(
        self,
        model: Model,
        image_shape: tuple[int, ...],
        out: Path,
        metadata: dict[str, Any],
        quantization: Quantization | None = None,
    ) -> None:
        """Writes the program to `out`. Raises KdctlError where the model cannot be traced for any batch size."""
        import torch
        from torch.backends import xnnpack

        self.check(quantization)
        if self.mobile and not xnnpack.enabled:  # type: ignore[attr-defined]
            message = f"PyTorch {torch.__version__} is built without XNNPACK: it cannot optimise for mobile"
            raise MissingError(message, hint="take the target executorch, which succeeds PyTorch Mobile")
        prepared, name = copy.deepcopy(model).cpu().float().eval(), "none"
        with _silent(), torch.no_grad():
            if quantization is None:
                from kdctl.models.fold import folded

                prepared.net = folded(prepared.net)
            else:
                from kdctl.export import torchscript_int8

                name = torchscript_int8.engine("qnnpack" if self.mobile else None, quantization.mode)
                with _engine(name):
                    torchscript_int8.quantize(prepared, image_shape, quantization)
            with _engine(name):
                program = _traced(prepared, image_shape)
                if self.mobile:
                    from torch.utils.mobile_optimizer import optimize_for_mobile

                    program = optimize_for_mobile(program)
                about = {
                    "preprocessing": preprocessing(image_shape), "engine": name, "image_shape": list(image_shape),
                    "quantization": "fp32" if quantization is None else quantization.name, **metadata,
                }  # fmt: skip
                _save(program, out, about)

    def check(self, quantization: Quantization | None) -> None:
        """Raises ConfigError for a quantization that a TorchScript file cannot hold."""
        super().check(quantization)
        if quantization is not None and quantization.learned:
            message = "torchscript files take their scales from calibration images, not from training"
            raise ConfigError(Problem(message, key="target", hint="onnx and openvino take what training found"))


def _traced(model: torch.nn.Module, image_shape: tuple[int, ...]) -> torch.jit.ScriptModule:
    """The frozen program of a model in eval mode. A trace follows one batch: that it holds for others is tried."""
    import torch

    generator = torch.Generator().manual_seed(0)
    two, three = (torch.rand(n, *image_shape, generator=generator) for n in (2, 3))
    others = [three, torch.zeros(1, *image_shape), torch.ones(1, *image_shape)]
    try:
        program = torch.jit.freeze(torch.jit.trace(model, two, check_trace=False))
        pairs = [(program(images), model(images)) for images in others]
    except Exception as error:
        raise KdctlError(f"the model cannot be traced for TorchScript: {reason(error)}", hint=_ANY) from error
    for images, (answer, expected) in zip(others, pairs, strict=True):
        if not isinstance(expected, torch.Tensor) or expected.ndim != 2 or len(expected) != len(images):
            raise KdctlError("the model cannot be traced for TorchScript: it does not give logits (N, classes)")
        if answer.shape != expected.shape or not torch.allclose(answer, expected, 1e-3, 1e-3, equal_nan=True):
            raise KdctlError("the traced model computes something else for other images than those traced", hint=_ANY)
    return program


_ANY = "the forward pass must be the same for any images and any batch size"


def _save(program: torch.jit.ScriptModule, out: Path, metadata: dict[str, Any]) -> None:
    import torch

    buffer = io.BytesIO()
    torch.jit.save(program, buffer, _extra_files={METADATA: json.dumps(metadata, ensure_ascii=False)})
    try:
        with runs.writing(out) as file:
            file.write(buffer.getbuffer())
    except OSError as error:
        raise KdctlError(f"{out} cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keeps from the user that TorchScript and torch.ao are deprecated: the docstrings say so once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _engine(name: str) -> Iterator[None]:
    """Packs int8 weights for one of torch's kernels inside the block; `none` leaves things as they are."""
    import torch

    before = torch.backends.quantized.engine
    try:
        if name != "none":
            torch.backends.quantized.engine = name
        yield
    finally:
        torch.backends.quantized.engine = before


# ----------------------------------------------------------------------------------------------------------- predictor


class TorchScriptPredictor(FilePredictor):
    """A TorchScript file in PyTorch on the CPU. threads: how many this process computes with from now on.

    What opens and runs the file is TorchScript's own reader and interpreter, not Python's: no pickle of Python is
    loaded. It is a program all the same, so kdctl opens only files whose checksum the manifest holds.
    """

    def __init__(self, path: Path | str, threads: int | None = None) -> None:
        import torch

        self.path = Path(path)
        if threads:
            torch.set_num_threads(threads)
        program, self.metadata = load(self.path)
        self.runtime = f"torchscript {torch.__version__}"
        channels, height, width = self.metadata["image_shape"]
        self.image_shape = (channels, height, width)
        self.class_names = list(self.metadata.get("class_names", []))
        with _silent():
            self.program = torch.jit.optimize_for_inference(program)
        self.num_classes = int(self(np.zeros((1, *self.image_shape), np.float32)).shape[1])

    def __call__(self, images: Floats) -> Floats:
        import torch

        self.check_images(images)
        try:
            with torch.inference_mode():
                logits: Floats = self.program(torch.from_numpy(np.ascontiguousarray(images, np.float32))).numpy()
        except RuntimeError as error:
            raise KdctlError(f"{self.path} cannot be run by this PyTorch: {reason(error)}") from error
        return logits


def open_predictor(path: Path | str, threads: int | None = None) -> TorchScriptPredictor:
    """The predictor of an exported file; its arguments are plain, so that a measuring process can be told of it."""
    return TorchScriptPredictor(path, threads)


def load(path: Path) -> tuple[torch.jit.ScriptModule, dict[str, Any]]:
    """The program of a file and what we wrote beside it. Raises MissingError and, for any other file, KdctlError."""
    import torch

    if not path.is_file():
        raise MissingError(f"there is no file {path}", hint="kdctl export makes one")
    extra = {METADATA: ""}
    try:
        with zipfile.ZipFile(path) as archive:
            parts = [name for name in archive.namelist() if name.endswith(f"/extra/{METADATA}")]
            metadata = json.loads(archive.read(parts[0]))
        with _silent(), _engine(metadata["engine"]):
            program = torch.jit.load(path, map_location="cpu", _extra_files=extra)
        channels, height, width = (int(size) for size in metadata["image_shape"])
    except Exception as error:
        message = f"{path} is damaged or not a TorchScript file of kdctl: {reason(error)}"
        raise KdctlError(message, hint="make the artefact again") from error
    return program, metadata | {"image_shape": [channels, height, width]}


# ------------------------------------------------------------------------------------------------------------- checking

_MOVES = {
    "flatten", "unflatten", "reshape", "view", "permute", "transpose", "contiguous", "slice", "select", "pad", "cat",
    "constant_pad_nd", "stack", "size", "Int", "unsqueeze", "squeeze", "expand", "chunk", "split", "to", "max_pool2d",
    "dropout", "quantize_per_tensor", "dequantize", "alias",
}  # fmt: skip
"""Operators that move or convert numbers and compute nothing with them."""


def inspect(path: Path) -> Contents:
    """Reads a file's sizes, and which operators its program executes, of them in int8 those that are given int8."""
    program, _ = load(path)
    nodes = list(program.inlined_graph.nodes())
    operators = [node for node in nodes if not node.kind().startswith("prim::")]
    in_int8: set[str] = set()
    """Tensors that hold int8, by name."""
    int8, floats = 0, Counter[str]()
    for node in operators:
        room, _, name = node.kind().partition("::")
        reads = any(value.debugName() in in_int8 for value in node.inputs())
        if name == "quantize_per_tensor" or (name != "dequantize" and reads) or _makes_int8(room, name):
            in_int8.update(value.debugName() for value in node.outputs())
        if name not in _MOVES:
            int8 += reads or room == "quantized"
            floats[node.kind()] += not reads and room != "quantized"
    with zipfile.ZipFile(path) as archive:
        constants = sum(part.file_size for part in archive.infolist() if part.filename.split("/")[-1].isdigit())
    return Contents(
        bytes=path.stat().st_size,
        weight_bytes=constants,
        weights=sum(_weights(node) for node in nodes),
        operators=len(operators),
        int8_operators=int8,
        float_operators={kind: n for kind, n in floats.items() if n},
    )


def _makes_int8(room: str, name: str) -> bool:
    return room == "quantized" and not name.endswith("_dynamic")


def _weights(node: Any) -> int:
    """How many weights a constant of the program holds: a tensor of 2 dimensions or more, or a layer's packed int8."""
    import torch

    if node.kind() != "prim::Constant" or not node.hasAttribute("value"):
        return 0
    value = node.output().toIValue()
    if isinstance(value, torch.Tensor):
        return value.numel() if value.ndim >= 2 and max(value.shape) < value.numel() else 0
    if not isinstance(value, torch.ScriptObject):
        return 0
    kind = str(node.output().type()).rpartition(".")[2]
    unpack = {
        "LinearPackedParamsBase": torch.ops.quantized.linear_unpack,
        "Conv2dPackedParamsBase": torch.ops.quantized.conv2d_unpack,
    }.get(kind)
    return 0 if unpack is None else int(unpack(value)[0].numel())
