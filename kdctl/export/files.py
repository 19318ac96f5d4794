"""Files of other runtimes, by target: written, opened, read, here or in an environment of their own (elsewhere.py)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdctl import registry
from kdctl.errors import ConfigError, MissingError
from kdctl.export import elsewhere
from kdctl.export.base import Contents, Exporter, FilePredictor, Quantization

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
    """Writes a model to `out` for a target. arguments: of its exporter. See Exporter.convert for what it raises;
    ConfigError besides for a model of texts where the target takes none."""
    exporter: Exporter = registry.create("exporters", target, arguments or {})
    exporter.check(quantization)
    if model.record.tokens is not None:
        exporter.check_texts("fp32" if quantization is None else quantization.name)
    shape = model.record.input_shape
    if elsewhere.is_here(target, converting=True):
        exporter.convert(model, shape, out, metadata, quantization)
    else:
        elsewhere.convert(target, dict(arguments or {}), model, shape, out, metadata, quantization)


def opener(target: str) -> str:
    """The function that opens a target's files, as text, for a process that measures: it stands beside the exporter.

    Raises MissingError for a target that is not installed.
    """
    try:
        place = registry.find("exporters", target).target.rpartition(":")[0]
    except ConfigError:
        hint = "`kdctl list exporters` shows them"
        raise MissingError(f"no installed runtime opens '{target}' files", hint=hint) from None
    return f"{place}:open_predictor"


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
