"""Artefacts: what compress and export leave in a run. Made aside, re-loaded from disk, measured, gated, renamed."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kdctl import build, evaluate, registry, runs
from kdctl.bench import cost, notes
from kdctl.bench.latency import Cell, Row, measure
from kdctl.compress.base import Compressor
from kdctl.config.schema import Experiment, OutputStage
from kdctl.data.loader import as_float
from kdctl.data.prepare import Data
from kdctl.errors import GateError, MissingError, Problem
from kdctl.evaluate import Floats, Predictions, TorchPredictor, metrics, predict
from kdctl.export import manifest
from kdctl.export.base import Exporter
from kdctl.export.onnx import Onnx, inspect, record_metadata
from kdctl.models.record import Model
from kdctl.runs import Run

BATCHES = (1, 32)
THREADS = 1


def make(run: Run, experiment: Experiment, stage: OutputStage, data: Data) -> dict[str, Any]:
    """Runs one compress or export stage on a run's student and returns its document, which is also result.json.

    Three columns: `before` (fp32 in PyTorch), `same_runtime` (fp32 in the artefact's runtime) and `after`. An artefact
    of the same name is replaced once the new one is whole.
    """
    converter = _converter(stage)
    variant = stage.name or converter.variant()
    home = run / "artefacts"
    home.mkdir(exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=home, prefix=f".{variant}-"))
    try:
        os.chmod(aside, 0o755)
        student = evaluate.load_student(run, experiment)
        _convert(converter, student, data, aside / converter.file_name)
        document = _measure(run, experiment, data, student, converter, aside)
        document |= {"artefact": str(Run(home / variant)), "variant": variant}
        document["gates"] = gates(document, stage, build.build_task(experiment).primary)
        runs.write_json(aside / "result.json", document)
        predictor, files = _open(converter.target, aside / converter.file_name), sorted(aside.iterdir())
        described = manifest.describe(predictor, target=converter.target, variant=variant, files=files)
        runs.write_json(aside / manifest.NAME, described)
        _replace(aside, home / variant)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return document


def check_gates(document: dict[str, Any]) -> GateError | None:
    """The error of the gates that a document misses, None when all hold."""
    missed = [g for g in document["gates"] if not g["passed"]]
    problems = [
        Problem(f"{g['name']}: {g['value']:.3f}, and the limit is {g['limit']:g}", file=document["artefact"])
        for g in missed
    ]
    return GateError(*problems) if problems else None


def gates(document: dict[str, Any], stage: OutputStage, primary: str) -> list[dict[str, Any]]:
    """Each gate that the stage sets, with its limit, what was measured and whether it holds."""
    before, same, after = document["before"], document["same_runtime"], document["after"]
    result = []
    if stage.max_drop is not None:
        drop = before["metrics"][primary] - after["metrics"][primary]
        passed = drop <= stage.max_drop + 1e-9
        result.append({"name": "max_drop", "limit": stage.max_drop, "value": drop, "passed": passed})
    if stage.min_speedup is not None:
        speedup = same["cpu_ms"]["1"] / after["cpu_ms"]["1"]
        passed = speedup >= stage.min_speedup
        result.append({"name": "min_speedup", "limit": stage.min_speedup, "value": speedup, "passed": passed})
    return result


def evaluate_artefact(run: Run, experiment: Experiment, artefact: Path, split: str) -> dict[str, Any]:
    """Measures an artefact on disk in its own runtime, and how often it agrees with the fp32 student.

    Raises KdctlError when a file is not the one that its manifest describes.
    """
    made = manifest.verify(artefact)
    data, task = build.build_data(experiment), build.build_task(experiment)
    samples, size = data.split(split), experiment.data.eval_batch_size
    predictor = _open(made["target"], artefact / made["model"])
    predictions = predict(predictor, samples, size)
    student = predict(TorchPredictor(evaluate.load_student(run, experiment)), samples, size)
    return evaluate.describe(predictions, task, data) | {
        "split": split,
        "runtime": predictor.runtime,
        "teacher": None,
        "agreement": float(task.agreement(predictions.logits, student.logits)),
    }


# --------------------------------------------------------------------------------------------------------- converting


def _converter(stage: OutputStage) -> Compressor | Exporter:
    arguments = stage.arguments
    if stage.kind == "export":
        return registry.create("exporters", arguments.pop("target"), arguments)
    return registry.create("compressors", stage.kind, arguments)


def _convert(converter: Compressor | Exporter, student: Model, data: Data, out: Path) -> None:
    metadata = record_metadata(student.record.to_dict())
    shape = _image_shape(student)
    if isinstance(converter, Compressor):
        converter.convert(student, _calibration_images(data), shape, out, metadata)
    else:
        converter.convert(student, shape, out, metadata)


def _image_shape(student: Model) -> tuple[int, int, int]:
    channels, height, width = student.record.image_shape
    return channels, height, width


def _calibration_images(data: Data) -> Iterator[Floats]:
    """Clean training images in a random order that is always the same."""
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    for rows in order.split(128):
        yield as_float(data.train.fetch(rows)).numpy()


def _opener(target: str) -> str:
    """The function that opens files of a target, as text."""
    if target not in registry.catalogue("exporters"):
        raise MissingError(f"no installed runtime opens '{target}' files", hint="`kdctl list exporters` shows them")
    return f"kdctl.export.{target}:open_predictor"


def _open(target: str, path: Path) -> Any:
    module, function = _opener(target).split(":")
    return getattr(importlib.import_module(module), function)(path)


def _replace(aside: Path, final: Path) -> None:
    """Puts a finished directory in place of an older one. No half of either is ever seen under its name."""
    old = None
    if final.exists():
        old = Path(tempfile.mkdtemp(dir=final.parent, prefix=".old-")) / final.name
        os.replace(final, old)
    os.replace(aside, final)
    if old is not None:
        shutil.rmtree(old.parent, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------- measuring


def _measure(
    run: Run, experiment: Experiment, data: Data, student: Model, converter: Compressor | Exporter, folder: Path
) -> dict[str, Any]:
    """The artefact on the whole test split, beside fp32 in PyTorch and fp32 in the same runtime, all from disk."""
    task, size = build.build_task(experiment), experiment.data.eval_batch_size
    split = "test" if data.test is not None else "val"
    samples = data.split(split)
    with tempfile.TemporaryDirectory() as other:
        plain = Path(other) / Onnx.file_name
        _convert(Onnx(), student, data, plain)
        files = {"same_runtime": plain, "after": folder / converter.file_name}
        predictors = {name: _open(converter.target, path) for name, path in files.items()}
        said = {name: predict(p, samples, size) for name, p in predictors.items()}
        said["before"] = predict(TorchPredictor(student), samples, size)
        timed = _time(run, converter.target, files)
        files["before"] = run / "student.safetensors"
        parameters = cost.parameters(student.net)
        columns = {
            name: {
                "bytes": cost.file_bytes(files[name]),
                "parameters": parameters,
                "metrics": metrics(said[name], task),
                "latency_ms": {str(b): timed[name, b].p50_ms for b in BATCHES},
                "cpu_ms": {str(b): timed[name, b].cpu_ms for b in BATCHES},
            }
            for name in ("before", "same_runtime", "after")
        }
    teacher, _ = evaluate.predict_teacher(run, experiment, data, split)
    return {
        "run": str(run),
        "runtime": predictors["after"].runtime,
        "threads": THREADS,
        "split": split,
        "samples": len(samples),
        **columns,
        "agreement": float(task.agreement(said["after"].logits, said["before"].logits)),
        "agreement_teacher": _agreement(task, said["after"], teacher),
        "notes": _notes(columns, folder / converter.file_name, student),
    }


def _agreement(task: Any, a: Predictions, b: Predictions | None) -> float | None:
    return None if b is None else float(task.agreement(a.logits, b.logits))


def _time(run: Run, target: str, files: dict[str, Path]) -> dict[tuple[str, int], Row]:
    cells = []
    for batch in BATCHES:
        stem = {"path": str((run / "student").resolve())}
        cells.append(Cell("before", "kdctl.evaluate:open_torch", stem, batch, THREADS))
        cells += [Cell(name, _opener(target), {"path": str(path)}, batch, THREADS) for name, path in files.items()]
    return {(row.what, row.batch): row for row in measure(cells)}


def _notes(columns: dict[str, dict[str, Any]], file: Path, student: Model) -> list[str]:
    before, same, after = columns["before"], columns["same_runtime"], columns["after"]
    contents = inspect(file)
    size = notes.explain_size(
        before["bytes"], after["bytes"], weight_bytes=contents.weight_bytes, weights=contents.weights
    )
    speed = notes.explain_speed(
        same["cpu_ms"]["1"],
        after["cpu_ms"]["1"],
        operators=contents.operators,
        float_operators=contents.float_operators,
        macs=cost.macs(student, _image_shape(student)),
        int8_instructions=notes.has_int8_instructions(),
    )
    return [*size, *speed]
