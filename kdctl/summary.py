"""What a finished run measured, as one document: summary.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdctl import runs
from kdctl.bench import cost
from kdctl.config.schema import Experiment
from kdctl.data.prepare import Data
from kdctl.errors import counted
from kdctl.evaluate import evaluate_run, load_teachers
from kdctl.models.record import Model, load_model
from kdctl.runs import Run


def summarize(run: Run, experiment: Experiment, data: Data) -> dict[str, Any]:
    """Measures the finished student once on the test split (best and last), and its teacher, from disk.

    This is the document of `kdctl train`; where there is no test split, or none with a label, another stands in for it,
    and a note says so.
    """
    split = data.measured
    notes = _stands_in(split, data)
    best = evaluate_run(run, experiment, split=split, data=data)
    stage = experiment.student_stage
    result = runs.read_json(run.stage_dir(stage.name) / "result.json")
    last = best  # the same weights, where the last epoch was kept
    if result["kept"] == "best" and result["best_epoch"] != result["epochs"]:
        last = evaluate_run(run, experiment, split=split, checkpoint="last", data=data, with_teacher=False)
    lines = [line for line in run.metrics() if line["stage"] == stage.name]
    epoch = result["best_epoch"] if result["kept"] == "best" else result["epochs"]
    kept = next((line for line in lines if line["epoch"] == epoch), None)
    if result["finished"] != "all epochs done":
        whole = counted(stage.epochs, "epoch")
        notes.append(f"stage {stage.name} ended after {result['epochs']} of {whole}: {result['finished']}")
    model = load_model(run / "student")
    return {
        "run": str(run),
        "status": "done",
        "epochs": result["epochs"],
        "seconds": sum(run.info.get("seconds", {}).values()),
        "samples_per_second": _median([line["samples_per_second"] for line in lines]),
        "precision": experiment.train.precision,
        "threads": experiment.train.threads,
        "student": _about(model) | {
            "kept": result["kept"],
            "best": {"epoch": epoch, "val": kept["val"] if kept else {}, split: best["metrics"]},
            "last": {split: last["metrics"]},
        },
        "teacher": _teacher_summary(run, experiment, data, best, split),
        "agreement": best["agreement"],
        "baseline": None,
        "group": run.info["group"],
        "notes": notes + best["notes"],
    }  # fmt: skip


def _stands_in(split: str, data: Data) -> list[str]:
    """That another split than test is measured, and why."""
    if split == "val":
        why = "there is no test split" if data.test is None else "the test split has no label"
        return [f"{why}: validation stands in for it"]
    if split == "train":
        none = data.test is None and data.val is None
        why = "there is neither a test nor a validation split" if none else "only training samples have labels"
        return [f"{why}: the training split is measured"]
    return []


def _about(model: Model) -> dict[str, Any]:
    return {"kind": model.record.kind, "parameters": cost.parameters(model.net)}


def _teacher_summary(
    run: Run, experiment: Experiment, data: Data, measured: dict[str, Any], split: str
) -> dict[str, Any] | None:
    if measured["teacher"] is None:
        return None
    models = load_teachers(run, experiment, data)
    kinds = [model.record.kind for model in models]
    parameters = sum(cost.parameters(model.net) for model in models)
    return {"kind": " + ".join(kinds), "parameters": parameters, split: measured["teacher"]}


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else 0.0
