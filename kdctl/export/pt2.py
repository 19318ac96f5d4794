"""pt2: a model as a program of torch.export, PyTorch's successor of TorchScript, and that program as a predictor.

The file takes float images (N, C, H, W) in [0, 1], any N, and gives logits (N, classes).
"""

from __future__ import annotations

import copy
import io
import json
import zipfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdctl import runs
from kdctl.errors import ConfigError, KdctlError, MissingError, Problem
from kdctl.export.base import Contents, Exporter, FilePredictor, Floats, Quantization, reason
from kdctl.export.manifest import preprocessing
from kdctl.export.onnx import quiet

if TYPE_CHECKING:
    import torch

    from kdctl.models.record import Model

METADATA = "kdctl.json"
"""The name of our own part of the file."""


class Pt2(Exporter):
    """torch.export's program in fp32, run by PyTorch without the model's Python code.

    No int8: exported int8 programs hold the fp32 weights too, and without a compiler they run slower than fp32.
    """

    target = "pt2"
    file_name = "model.pt2"

    def convert(
        self,
        model: Model,
        image_shape: tuple[int, ...],
        out: Path,
        metadata: dict[str, Any],
        quantization: Quantization | None = None,
    ) -> None:
        """Writes the program to `out`. Raises KdctlError where torch.export cannot follow the model."""
        import torch

        from kdctl.models.fold import folded

        self.check(quantization)
        prepared = copy.deepcopy(model).cpu().float().eval()
        prepared.net = folded(prepared.net)
        prepared.requires_grad_(False)
        images = torch.zeros(2, *image_shape)
        buffer = io.BytesIO()
        about = {"preprocessing": preprocessing(image_shape), "image_shape": list(image_shape), **metadata}
        try:
            with quiet(), torch.no_grad():
                program = torch.export.export(prepared, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
                program.example_inputs = None  # else they are in the file, pickled
                extra = {METADATA: json.dumps(about, ensure_ascii=False)}
                torch.export.save(program, buffer, extra_files=extra)
        except Exception as error:
            raise KdctlError(
                f"the model cannot be exported by torch.export: {reason(error)}",
                hint="the forward pass must be traceable with any batch size",
            ) from error
        try:
            with runs.writing(out) as file:
                file.write(buffer.getbuffer())
        except OSError as error:
            raise KdctlError(f"{out} cannot be written: {error.strerror or error}") from error

    def check(self, quantization: Quantization | None) -> None:
        """Raises ConfigError for any quantization."""
        if quantization is not None:
            message = f"pt2 files cannot be {quantization.name}: they would be larger and slower than fp32"
            raise ConfigError(Problem(message, key="target", hint="onnx, openvino, executorch and litert are smaller"))


# ----------------------------------------------------------------------------------------------------------- predictor


class Pt2Predictor(FilePredictor):
    """An exported program in PyTorch on the CPU. threads: how many this process computes with from now on."""

    def __init__(self, path: Path | str, threads: int | None = None) -> None:
        import torch

        self.path = Path(path)
        if threads:
            torch.set_num_threads(threads)
        program, self.metadata = load(self.path)
        self.program = program.module()
        self.runtime = f"torch.export {torch.__version__}"
        channels, height, width = self.metadata["image_shape"]
        self.image_shape = (channels, height, width)
        self.class_names = list(self.metadata.get("class_names", []))
        self.num_classes = int(self(np.zeros((1, *self.image_shape), np.float32)).shape[1])

    def __call__(self, images: Floats) -> Floats:
        import torch

        self.check_images(images)
        with torch.inference_mode():
            logits: Floats = self.program(torch.from_numpy(np.ascontiguousarray(images, np.float32))).numpy()
        return logits


def open_predictor(path: Path | str, threads: int | None = None) -> Pt2Predictor:
    """The predictor of an exported file; its arguments are plain, so that a measuring process can be told of it."""
    return Pt2Predictor(path, threads)


def load(path: Path) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    """The program of a file and what we wrote beside it. Raises MissingError and, for any other file, KdctlError.

    torch.export.load unpickles whatever a file calls pickled. Ours have nothing of that kind, so a file that has is
    refused before it is opened.
    """
    import torch

    if not path.is_file():
        raise MissingError(f"there is no file {path}", hint="kdctl export makes one")
    try:
        metadata = _read_metadata(path)
        with quiet():
            program = torch.export.load(str(path))
    except KdctlError:
        raise
    except Exception as error:
        message = f"{path} is damaged or not a .pt2 file of kdctl: {reason(error)}"
        raise KdctlError(message, hint="make the artefact again") from error
    return program, metadata


def _read_metadata(path: Path) -> dict[str, Any]:
    """Our own part of a file; on the way, that no part of it is pickled."""
    metadata: dict[str, Any] = {}
    with zipfile.ZipFile(path) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
        names = {name.partition("/")[2]: name for name in archive.namelist()}
        if len(tops) != 1 or len(names) != len(archive.namelist()) or "archive_format" not in names:
            raise ValueError("it is no archive of torch.export")
        for part, name in names.items():
            *folders, file = part.split("/")
            if folders == ["data", "sample_inputs"] and archive.getinfo(name).file_size:
                raise KdctlError(f"{path} holds pickled inputs, which kdctl does not open")
            if file.endswith("_config.json"):
                entries = json.loads(archive.read(name))["config"].values()
                if any(entry["use_pickle"] or not entry["path_name"].startswith(_TENSORS) for entry in entries):
                    raise KdctlError(f"{path} holds pickled objects, which kdctl does not open")
        metadata = json.loads(archive.read(names[f"extra/{METADATA}"]))
    channels, height, width = (int(size) for size in metadata["image_shape"])
    return metadata | {"image_shape": [channels, height, width]}


_TENSORS = ("weight_", "tensor_")
"""How the names of plain tensors begin in an archive; others are objects."""


# ------------------------------------------------------------------------------------------------------------- checking

_MOVES = {
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "slice", "select", "pad", "constant_pad_nd",
    "cat", "stack", "sym_size", "unsqueeze", "squeeze", "expand", "chunk", "split", "contiguous", "clone", "max_pool2d",
    "alias", "getitem",
}  # fmt: skip
"""Operators that move numbers and compute nothing with them."""


def inspect(path: Path) -> Contents:
    """Reads a file's sizes and the operators of its program, all in fp32."""
    program, _ = load(path)
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    executed = Counter(getattr(target, "__name__", str(target)).split(".")[0] for target in calls)
    tensors = list(program.state_dict.values())
    constants = [value for value in program.constants.values() if hasattr(value, "nbytes")]
    return Contents(
        bytes=path.stat().st_size,
        weight_bytes=sum(tensor.nbytes for tensor in [*tensors, *constants]),
        weights=sum(tensor.numel() for tensor in tensors if tensor.ndim >= 2),
        operators=executed.total(),
        int8_operators=0,
        float_operators={name: n for name, n in executed.items() if name not in _MOVES},
    )
