"""Measures an artefact on disk in its own runtime, beside what it was made of, and holds it against its gates."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdctl import build, evaluate, registry, runs
from kdctl.artefacts.yardstick import TORCH, Yardstick, open_file, opener
from kdctl.bench import cost, notes
from kdctl.bench.latency import Cell, Row
from kdctl.bench.latency import measure as measure_latency
from kdctl.config.schema import Experiment, OutputStage, TrainStage
from kdctl.errors import GateError, Problem
from kdctl.evaluate import Predictions, TorchPredictor, predict
from kdctl.export import elsewhere, files, manifest
from kdctl.export.base import Exporter
from kdctl.models.record import Model, load_model
from kdctl.runs import Run
from kdctl.watch import Bar, no_bar

BATCHES = (1, 32)
THREADS = 1
PARITY = 1e-3
"""The largest difference between the logits of an fp32 file and its model's, as a share of the largest logit."""


def measure(
    yardstick: Yardstick,
    stage: OutputStage | TrainStage,
    source: Path,
    target: str,
    path: Path,
    details: dict[str, Any],
) -> dict[str, Any]:
    """The artefact on the whole test split, beside fp32 in PyTorch and fp32 in the same runtime, all from disk.

    source: the stem of the model that the stage started from; path: the artefact's file (the stem of a model).
    """
    experiment = yardstick.experiment
    student = yardstick.run.stage_dir(experiment.origin(stage).name) / "model"
    before = yardstick.of_model(student)
    predictor = open_file(target, path)
    after = yardstick.of_model(path) if target == TORCH else yardstick.predictions(predictor)
    made_of = after if target == TORCH else yardstick.of_model(source)
    paths = {"before": student, "after": path}
    said = {"before": before, "after": after}
    # The student's own fp32 file is what fp32 is in this runtime.
    own = details.get("quantization") == "fp32" and source == student
    if own:
        yardstick.keep_plain(target, student, path, after)
    elif target != TORCH:
        plain, plain_said = yardstick.plain(target, student)
        paths, said = paths | {"same_runtime": plain}, said | {"same_runtime": plain_said}
    timed = _time(target, paths) if yardstick.timed else {}
    small, whole = load_model(path if target == TORCH else source), load_model(student)
    columns: dict[str, dict[str, Any]] = {}
    for name, model in (("before", whole), ("after", small), ("same_runtime", whole)):
        if name in paths:
            size = _bytes(TORCH if name == "before" else target, paths[name])
            columns[name] = _column(name, model, size, yardstick.metrics(said[name]), timed)
        else:  # PyTorch is the runtime of the artefact too, or the artefact is fp32 in its runtime
            columns[name] = columns["after" if own else "before"]
    teacher = yardstick.of_teacher()
    contents = files.inspect(target, path) if target != TORCH else None
    return {
        "run": str(yardstick.run),
        "kind": stage.kind,
        "target": target,
        "runtime": predictor.runtime,
        "threads": THREADS,
        "split": yardstick.split,
        "samples": evaluate.labelled(after),
        **{name: columns[name] for name in ("before", "same_runtime", "after")},
        "agreement": float(yardstick.task.agreement(after.logits, before.logits)),
        "agreement_teacher": None if teacher is None else float(yardstick.task.agreement(after.logits, teacher.logits)),
        "max_abs_diff": None if target == TORCH else _furthest(_said(yardstick, after), _said(yardstick, made_of)),
        "largest_logit": float(np.abs(_said(yardstick, made_of)).max()),
        "details": details,
        "delegated": None if contents is None else contents.delegated,
        "notes": notes.explain(columns, contents) if timed else [],
    }


def _column(
    name: str, model: Model, size: int, metrics: dict[str, float], timed: dict[tuple[str, int], Row]
) -> dict[str, Any]:
    return {
        "bytes": size,
        "parameters": cost.parameters(model.net),
        "macs": cost.macs(model),
        "metrics": metrics,
        "latency_ms": {str(b): timed[name, b].p50_ms for b in BATCHES if timed},
        "cpu_ms": {str(b): timed[name, b].cpu_ms for b in BATCHES if timed},
    }


def _bytes(target: str, path: Path) -> int:
    """Of a model the weights file, of an exported file itself and those that it needs beside it."""
    if target == TORCH:
        return cost.file_bytes(path.with_name(path.name + ".safetensors"))
    exporter: Exporter = registry.create("exporters", target, {})
    return sum(cost.file_bytes(file) for file in exporter.files(path))


def _said(yardstick: Yardstick, predictions: Predictions) -> NDArray[Any]:
    """The logits; of a language model, whose logits are not kept, the log probability of each token that was there."""
    chosen_too = yardstick.task.target in ("next", "hidden")  # (log probability, number of the token chosen)
    return predictions.logits[:, :1] if chosen_too else predictions.logits


def _furthest(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The largest difference of two numbers; the largest float where it is not finite, which JSON cannot say."""
    difference = float(np.abs(a - b).max())
    return difference if np.isfinite(difference) else sys.float_info.max


def _time(target: str, paths: dict[str, Path]) -> dict[tuple[str, int], Row]:
    cells = []
    for batch in BATCHES:
        for name, path in paths.items():
            own = TORCH if name == "before" else target
            python = None if own == TORCH else elsewhere.python_of(own)
            cells.append(Cell(name, opener(own), {"path": str(path.resolve())}, batch, THREADS, python))
    return {(row.what, row.batch): row for row in measure_latency(cells)}


# -------------------------------------------------------------------------------------------------------------- gates


def gates(document: dict[str, Any], stage: OutputStage | TrainStage, primary: str) -> list[dict[str, Any]]:
    """Each gate that the stage sets, with its limit, what was measured and whether it holds.

    A file in fp32 has to say what its model says: `parity` is the largest difference as a share of the largest logit.
    """
    before, same, after = document["before"], document["same_runtime"], document["after"]
    result = []
    if stage.max_drop is not None:
        drop = before["metrics"][primary] - after["metrics"][primary]
        passed = drop <= stage.max_drop + 1e-9
        result.append({"name": "max_drop", "limit": stage.max_drop, "value": drop, "passed": passed})
    if stage.min_speedup is not None and after["cpu_ms"]:
        speedup = same["cpu_ms"]["1"] / after["cpu_ms"]["1"]
        passed = speedup >= stage.min_speedup
        result.append({"name": "min_speedup", "limit": stage.min_speedup, "value": speedup, "passed": passed})
    if stage.kind == "export" and document.get("details", {}).get("quantization") == "fp32":
        share = document["max_abs_diff"] / max(document["largest_logit"], 1e-12)
        result.append({"name": "parity", "limit": PARITY, "value": share, "passed": share <= PARITY})
    return result


def gated(run: Run, stage: OutputStage | TrainStage, primary: str) -> dict[str, Any]:
    """The document of an artefact that is there, held against the gates that its stage sets now."""
    path = run / "artefacts" / stage.name / "result.json"
    document = runs.read_json(path)
    held = gates(document, stage, primary)
    if held != document["gates"]:
        document["gates"] = held
        runs.write_json(path, document)
    return document


def check_gates(document: dict[str, Any]) -> GateError | None:
    """The error of the gates that a document misses, None when all hold."""
    missed = [g for g in document["gates"] if not g["passed"]]
    problems = [
        Problem(f"{g['name']}: {g['value']:.3g}, and the limit is {g['limit']:g}", file=document["artefact"])
        for g in missed
    ]
    return GateError(*problems) if problems else None


def evaluate_artefact(
    run: Run, experiment: Experiment, artefact: Path, split: str, bar: Bar = no_bar
) -> dict[str, Any]:
    """Measures an artefact on disk in its own runtime, and how often it agrees with the fp32 student.

    Raises KdctlError when a file is not the one that its manifest describes.
    """
    made = manifest.verify(artefact)
    data, task = build.build_data(experiment), build.build_task(experiment)
    samples, size = data.split(split), experiment.data.eval_batch_size
    predictor = open_file(made["target"], artefact / made["model"])
    predictions = predict(predictor, samples, task, size, bar, f"{artefact.name}, {split}")
    student = predict(
        TorchPredictor(evaluate.load_student(run, experiment)), samples, task, size, bar, f"student, {split}"
    )
    return evaluate.describe(predictions, task, data) | {
        "split": split,
        "runtime": predictor.runtime,
        "teacher": None,
        "agreement": float(task.agreement(predictions.logits, student.logits)),
    }
