"""The manifest of an artefact: what its files are, how to call them, and checksums that tell whether they are whole."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from kdctl import __version__, runs
from kdctl.errors import KdctlError, MissingError
from kdctl.export.base import FilePredictor, Tokens

NAME = "manifest.json"
_CHANNELS = {1: "grey", 3: "RGB"}
"""The order of an image's channels, by how many it has."""


def describe(
    predictor: FilePredictor, *, target: str, variant: str, model: str, source: str, folder: Path
) -> dict[str, Any]:
    """The manifest of the files in a folder.

    predictor: opens `model`, which is one of them (or the stem of two). source: the stage whose model it was made of.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (NAME, "result.json"))
    tokens = getattr(predictor, "tokens", None)
    shape = list(predictor.image_shape) if tokens is None else ["length"]
    of_tokens = [] if getattr(predictor, "head", "sample") in ("sample", "embedding") else ["length"]
    takes = preprocessing(predictor.image_shape, tokens)
    return {
        "format": 1,
        "kdctl_version": __version__,
        "target": target,
        "variant": variant,
        "runtime": predictor.runtime,
        "model": model,
        "source": source,
        "inputs": [{
            "name": predictor.input, "shape": [predictor.fixed_batch or "batch", *shape], "dtype": takes["dtype"],
            "layout": takes["layout"],
        }],
        "outputs": [{
            "name": predictor.output,
            "shape": [predictor.fixed_batch or "batch", *of_tokens, predictor.num_classes],
            "dtype": "float32",
        }],
        "preprocessing": takes,
        "class_names": predictor.class_names,
        "files": [
            {"name": p.relative_to(folder).as_posix(), "bytes": p.stat().st_size, "sha256": sha256(p)} for p in files
        ],
    }  # fmt: skip


def preprocessing(image_shape: tuple[int, ...], tokens: Any = None) -> dict[str, Any]:
    """What a file expects of its caller, and what it does itself. tokens: of texts, a TokenInput or a Tokens."""
    if tokens is not None:
        own = {field.name: getattr(tokens, field.name) for field in dataclasses.fields(Tokens)}
        return {"layout": "NL", "dtype": "int64", "shape": list(image_shape), "padding": "behind", "tokens": own}
    takes = {"layout": "NCHW", "dtype": "float32", "range": [0, 1], "shape": list(image_shape), "normalize": "inside"}
    return takes | ({"channels": _CHANNELS[image_shape[0]]} if image_shape[0] in _CHANNELS else {})


def verify(folder: Path) -> dict[str, Any]:
    """Reads a folder's manifest and checks its files. Raises MissingError or, for a damaged file, KdctlError."""
    path = folder / NAME
    if not path.is_file():
        raise MissingError(f"{folder} is not an artefact: it has no {NAME}", hint="kdctl compress makes one")
    try:
        manifest: dict[str, Any] = runs.read_json(path)
        files = [(folder / entry["name"], entry["sha256"]) for entry in manifest["files"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise KdctlError(f"{path} is damaged: it lacks {error}", hint="make the artefact again") from error
    for file, expected in files:
        if not file.resolve().is_relative_to(folder.resolve()):
            raise KdctlError(f"{path} names {file}, which lies outside of the artefact", hint="make the artefact again")
        if not file.is_file():
            raise MissingError(f"{file} is not there, but {NAME} names it", hint="make the artefact again")
        if sha256(file) != expected:
            raise KdctlError(f"{file} is damaged: its checksum is not that of {NAME}", hint="make the artefact again")
    return manifest


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
