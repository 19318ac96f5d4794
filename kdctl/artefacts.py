"""Artefacts: what compress and export leave in a run. Made aside, re-loaded from disk, measured, gated, then renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kdctl import bench, build, evaluate, registry, runs
from kdctl.bench.latency import Cell, measure
from kdctl.config.schema import Experiment, OutputStage
from kdctl.data.prepare import Data
from kdctl.errors import GateError, Problem
from kdctl.evaluate import Floats, Predictions, Predictor, TorchPredictor, choose_split, predict
from kdctl.models.record import Model
from kdctl.runs import Run

BATCHES = (1, 32)


def make(run: Run, experiment: Experiment, stage: OutputStage, data: Data) -> dict[str, Any]:
    """Runs one compress or export stage on a run's student and returns its document, which is also result.json.

    Three columns: `before` (fp32 in PyTorch), `same_runtime` (fp32 in the artefact's runtime) and `after`. Raises
    GateError, with the artefact kept, when a gate of the stage is missed.
    """
    converter = _converter(stage)
    variant = stage.name or converter.variant()
    home = run / "artefacts"
    home.mkdir(exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=home, prefix=f".{variant}-"))
    try:
        os.chmod(aside, 0o755)
        student = evaluate.load_student(run, experiment)
        converter.convert(student, aside / converter.file_name, calibration=_calibration(data, converter))
        document = _measure(run, experiment, data, student, converter, aside) | {"variant": variant}
        document["artefact"] = str(Run(home / variant))
        document["gates"] = gates(document, stage)
        runs.write_json(aside / "result.json", document)
        runs.write_json(aside / "manifest.json", converter.manifest(aside, student) | {"variant": variant})
        _replace(aside, home / variant)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return document
