"""Files of other runtimes, by target: written, opened and read here, or in the environment that has the runtime."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdctl import registry
from kdctl.errors import MissingError
from kdctl.export import elsewhere
from kdctl.export.base import Contents, FilePredictor, Quantization

if TYPE_CHECKING:
    from kdctl.models.record import Model


def write(
    target: str,
    model: Model,
    out: Path,
    metadata: dict[str, Any],
    quantization: Quantization | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model to `out` for a target. arguments: of its exporter. See Exporter.convert for what it raises."""
    channels, height, width = model.record.image_shape
    shape = (channels, height, width)
    exporter = registry.create("exporters", target, arguments or {})
    exporter.check(quantization)
    if elsewhere.is_here(target):
        exporter.convert(model, shape, out, metadata, quantization)
    else:
        elsewhere.convert(target, dict(arguments or {}), model, shape, out, metadata, quantization)


def opener(target: str) -> str:
    """The function that opens a target's files, as text, for a process that measures."""
    if target not in registry.catalogue("exporters"):
        raise MissingError(f"no installed runtime opens '{target}' files", hint="`kdctl list exporters` shows them")
    return f"kdctl.export.{target}:open_predictor"


def open_file(target: str, path: Path, threads: int | None = None) -> FilePredictor:
    """The predictor of a target's file."""
    module, function = opener(target).split(":")
    if not elsewhere.is_here(target):
        return elsewhere.open_predictor(target, path, threads)
    predictor: FilePredictor = getattr(importlib.import_module(module), function)(str(path), threads)
    return predictor


def inspect(target: str, path: Path) -> Contents:
    """What a target's file holds."""
    module, _ = opener(target).split(":")
    if not elsewhere.is_here(target):
        return elsewhere.inspect(target, path)
    contents: Contents = importlib.import_module(module).inspect(path)
    return contents
