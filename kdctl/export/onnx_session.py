"""ONNX Runtime, opened on a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdctl.errors import KdctlError, MissingError


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
