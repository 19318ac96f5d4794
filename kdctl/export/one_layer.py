"""Whether a target works here: a model of one layer is written, opened and compared, which takes seconds."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from kdctl import registry
from kdctl.errors import GateError, KdctlError
from kdctl.export import files

TOLERANCE = 1e-3
"""How far logits may be apart; a broken kernel is off by far more."""


def attempt(target: str) -> str:
    """Runs a linear layer through a target; says what ran it and how far it is from PyTorch, as one line of text.

    Raises KdctlError where the target cannot write or open the file, GateError where it computes something else.
    """
    import torch

    from kdctl.models.record import ModelRecord, build_model

    torch.manual_seed(0)
    names = ["a", "b", "c", "d"]
    record = ModelRecord("mlp", {"hidden": []}, 4, names, [3, 8, 8], {"mean": [0.5], "std": [0.25]})
    model = build_model(record).eval()
    images = np.random.default_rng(0).random((3, *record.image_shape), dtype=np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(images)).numpy()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / registry.create("exporters", target, {}).file_name
        files.write(target, model, path, {"class_names": names})
        predictor = files.open_file(target, path, threads=1)
        logits = predictor(images)
    difference = float(np.abs(logits - expected).max())
    if not difference <= TOLERANCE:
        raise GateError(f"{predictor.runtime} computes a linear layer wrongly: it is off by {difference:.2g}")
    return f"{predictor.runtime} runs a one-layer model"


def main(target: str) -> None:
    """Prints what `attempt` says; ends the process with its error, in one line, where it fails."""
    try:
        print(attempt(target))
    except KdctlError as error:
        print(str(error).replace("\n", " "), file=sys.stderr)
        sys.exit(error.code)
