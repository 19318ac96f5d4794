"""Runtimes that live in an environment of their own.

LiteRT's converter wants older versions of what kdctl stands on, so it may be installed elsewhere: where this
interpreter lacks a target's library, and `KDCTL_<TARGET>_PYTHON` names another interpreter that has kdctl and the
library, files are converted, read and run there. The other process (kdctl.export.guest) is handed the model as it is
saved, images as .npy and everything else as JSON; a predictor there takes batches over pipes. Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import struct
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from kdctl import __version__, errors
from kdctl.errors import KdctlError, MissingError
from kdctl.export.base import Contents, FilePredictor, Floats, Quantization
from kdctl.launch import OWN_GROUP, child_environment

if TYPE_CHECKING:
    from kdctl.models.record import Model

LIBRARIES = {"executorch": ("executorch",), "litert": ("ai_edge_litert",)}
"""What a target's files need to run. A target that is not listed runs where kdctl runs."""
CONVERTERS = {"litert": ("litert_torch", "ai_edge_quantizer")}
"""What making them needs beside."""
GUEST = "kdctl.export.guest"
SHAPE, REPLY = struct.Struct("<4I"), struct.Struct("<BII")
"""A batch's header: N, C, H, W, then float32. A reply's: 0, N and classes, then float32; or 1, 0 and the bytes of an
error's JSON; or 2, 0 and the bytes of what the predictor is."""
LIMIT = 3600.0
"""Seconds after which a conversion that does not end is ended."""


def variable(target: str) -> str:
    """The environment variable that names a target's interpreter."""
    return f"KDCTL_{target.upper()}_PYTHON"


def lacking(target: str, converting: bool = False) -> list[str]:
    """The libraries of a target that this interpreter does not have."""
    needed = (*LIBRARIES.get(target, ()), *(CONVERTERS.get(target, ()) if converting else ()))
    return [name for name in needed if importlib.util.find_spec(name) is None]


def is_here(target: str, converting: bool = False) -> bool:
    """Whether this interpreter can run a target's files, and make them."""
    return not lacking(target, converting)


def python_of(target: str, converting: bool = False) -> str:
    """The interpreter that runs a target's files (and makes them): this one where it can, else the one that is named.

    Raises MissingError where there is none.
    """
    if is_here(target, converting):
        return sys.executable
    name = variable(target)
    python = os.environ.get(name)
    if not python:
        raise MissingError(
            f"{target} is not installed",
            hint=f"pip install 'kdctl[{target}]', or set {name} to the Python of an environment that has it "
            "(scripts/make-runtimes of the repository makes one)",
        )
    if not os.access(python, os.X_OK) or Path(python).is_dir():
        hint = "scripts/make-runtimes of the repository makes one"
        raise MissingError(f"{name} is {python}, and that is no Python", hint=hint)
    return python


# ---------------------------------------------------------------------------------------------------- converting there


def convert(
    target: str,
    arguments: dict[str, Any],
    model: Model,
    image_shape: tuple[int, ...],
    out: Path,
    metadata: dict[str, Any],
    quantization: Quantization | None,
) -> None:
    """Exporter.convert of a target with its arguments, in the target's own environment. Raises what it raises there."""
    from kdctl.models.record import save_model

    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "model")
        if quantization is not None and quantization.images is not None:
            np.save(Path(folder) / "images.npy", quantization.images.astype(np.float32), allow_pickle=False)
        request = {
            "arguments": arguments, "image_shape": list(image_shape), "out": str(Path(out).absolute()),
            "metadata": metadata, "quantization": None if quantization is None else to_document(quantization),
        }  # fmt: skip
        _ask(target, "convert", Path(folder), request)


def inspect(target: str, path: Path) -> Contents:
    """What a target's file holds, read in the target's own environment."""
    with tempfile.TemporaryDirectory() as folder:
        return Contents(**_ask(target, "inspect", Path(folder), {"path": str(Path(path).absolute())}))


def to_document(quantization: Quantization) -> dict[str, Any]:
    """A quantization as JSON values, but for its images."""
    learned = {
        path: dataclasses.asdict(found) | {"weight_scale": found.weight_scale.tolist()}
        for path, found in quantization.learned.items()
    }
    plain = {f.name: getattr(quantization, f.name) for f in dataclasses.fields(quantization)}
    return plain | {"images": None, "keep": sorted(quantization.keep), "learned": learned}


def _ask(target: str, action: str, folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Runs one action of the guest, which finds its request in a folder and leaves its reply there."""
    python = python_of(target, action == "convert")
    (folder / "request.json").write_text(json.dumps({"target": target, **request}), encoding="utf-8")
    command = [python, "-m", GUEST, action, str(folder)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, env=child_environment(PYTHONWARNINGS="ignore"),
            timeout=LIMIT, **OWN_GROUP,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise KdctlError(f"{target} did not {action} within {LIMIT:.0f} seconds in {python}") from error
    reply = folder / "reply.json"
    if not reply.is_file():
        raise _died(target, python, done.returncode, done.stderr)
    return _checked(json.loads(reply.read_text(encoding="utf-8")))


def _checked(reply: dict[str, Any]) -> dict[str, Any]:
    """A reply's document. Raises the error that it tells of, with that error's exit code."""
    if "error" in reply:
        kinds = {kind.code: kind for kind in (errors.ConfigError, errors.MissingError, errors.OutOfMemoryError)}
        raise kinds.get(reply["code"], KdctlError)(*(errors.Problem(**problem) for problem in reply["error"]))
    if reply["kdctl_version"] != __version__:
        message = f"the other environment has kdctl {reply['kdctl_version']}, this one {__version__}"
        raise MissingError(message, hint="install the same version in both")
    document: dict[str, Any] = reply["document"]
    return document


def _died(target: str, python: str, code: int | None, stderr: bytes) -> KdctlError:
    lines = stderr.decode(errors="replace").strip().splitlines()
    last = lines[-1] if lines else "it said nothing"
    if "No module named" in last:
        hint = f"install kdctl and {target} there: pip install 'kdctl[{target}]'"
        return MissingError(f"{variable(target)} is {python}, and it lacks what it needs: {last}", hint=hint)
    return KdctlError(f"{target}'s process ({python}) ended with code {code}: {last}")


# ------------------------------------------------------------------------------------------------------- running there


class ElsewherePredictor(FilePredictor):
    """A file in a runtime of another environment: a child process takes batches over pipes and gives logits.

    The process ends with the predictor, with `close`, or when this process ends and its pipe closes.
    """

    def __init__(self, target: str, path: Path, threads: int | None = None) -> None:
        self.path, self.target = path, target
        self._python = python_of(target)
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [self._python, "-m", GUEST, "serve", target, str(path.absolute()), "" if threads is None else str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            env=child_environment(PYTHONWARNINGS="ignore"), **OWN_GROUP,
        )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to: IO[bytes] = self._process.stdin
        self._from: IO[bytes] = self._process.stdout
        self.close = weakref.finalize(self, _end, self._process, self._errors)
        told = _checked(json.loads(self._read(self._header(2))))
        self.runtime: str = told["runtime"]
        channels, height, width = told["image_shape"]
        self.image_shape = (channels, height, width)
        self.num_classes: int = told["num_classes"]
        self.class_names: list[str] = told["class_names"]
        self.metadata: dict[str, Any] = told["metadata"]
        self.input, self.output = told["input"], told["output"]
        self.fixed_batch: int | None = told["fixed_batch"]

    def __call__(self, images: Floats) -> Floats:
        self.check_images(images)
        try:
            self._to.write(SHAPE.pack(*images.shape))
            self._to.write(np.ascontiguousarray(images, "<f4").data)
            self._to.flush()
        except OSError:
            pass  # it has died: reading says why
        size = self._header(0)
        logits = np.frombuffer(self._read(size), "<f4").reshape(len(images), self.num_classes)
        return logits.astype(np.float32)

    def _header(self, expected: int) -> int:
        """How many bytes follow. Raises the error that comes in their place."""
        kind, count, size = REPLY.unpack(self._read(REPLY.size))
        if kind == 1:
            _checked(json.loads(self._read(size)))
        if kind != expected:
            raise KdctlError(f"{self.target}'s process answers out of turn")
        return int(size if kind == 2 else 4 * count * size)

    def _read(self, size: int) -> bytes:
        data = self._from.read(size)
        if len(data) < size:
            code = self._process.wait()
            self._errors.seek(0)
            raise _died(self.target, self._python, code, self._errors.read())
        return data


def _end(process: subprocess.Popen[bytes], errors_file: IO[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, errors_file):
        try:
            if stream is not None:
                stream.close()
        except OSError:
            pass


def open_predictor(target: str, path: Path, threads: int | None = None) -> ElsewherePredictor:
    """A target's file as a predictor that runs in the target's own environment."""
    return ElsewherePredictor(target, Path(path), threads)
