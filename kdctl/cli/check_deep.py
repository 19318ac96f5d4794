"""The part of `kdctl check --deep` that people read, and what the stages after training need of this environment."""

from __future__ import annotations

from typing import Any

from kdctl.cli import console, doctor
from kdctl.cli.progress import duration
from kdctl.config.schema import Experiment, OutputStage
from kdctl.errors import counted
from kdctl.report.numbers import bytes_text


def needs(experiment: Experiment) -> list[dict[str, Any]]:
    """Whether the runtimes work in which stages make files: doctor's check of each, tried in its own process."""
    stages = [stage for stage in experiment.stages if isinstance(stage, OutputStage)]
    targets: dict[str, list[str]] = {}
    for stage in stages:
        target = stage.arguments.get("target", "onnx" if stage.kind == "quantize" else None)
        if isinstance(target, str):
            targets.setdefault(target, []).append(stage.name)
    return [{"target": target, "stages": names, **doctor.try_target(target)} for target, names in targets.items()]


def show(deep: dict[str, Any]) -> None:
    """Each stage: what goes in, its models, a table of its terms, memory, store and time; then the total."""
    for stage in deep["stages"]:
        console.out()
        _show_stage(stage)
    console.out()
    for need in deep["needs"]:
        state = need["detail"] if need["status"] == "ok" else f"{need['status']}: {need['detail']}"
        fix = f"; {need['fix']}" if need["fix"] else ""
        _line("needs", f"{need['target']} for {', '.join(need['stages'])}: {state}{fix}")
    total = deep["total"]
    store = f", stores {bytes_text(total['store_bytes'])}" if total["store_bytes"] else ""
    where = f"{deep['device']}, {deep['precision']}, {counted(deep['threads'], 'thread')}"
    _line(
        "total",
        f"{_seconds(total['seconds'])} of training, {bytes_text(total['peak_bytes'])} of memory{store}; {where}",
    )
    for note in deep["notes"]:
        _line("note", note)


def _show_stage(stage: dict[str, Any]) -> None:
    shape = _shape(stage["input_shape"])
    epochs, steps = counted(stage["epochs"], "epoch"), counted(stage["steps"], "step")
    _line("stage", f"{stage['name']}: {epochs} of {steps}, {counted(stage['samples'], 'sample')}")
    _line("input", f"{shape}, batch {stage['batch_size']}")
    for who, model in [("student", stage["student"]), *(("teacher", teacher) for teacher in stage["teachers"])]:
        _line(who, f"{model['kind']}: {model['parameters']:,} parameters, {model['macs']:,} MACs")
        for tap, features in model["taps"].items():
            _line("", f"tap {tap}: {_shape(features)}")
    _show_terms(stage["terms"])
    if stage["memory"]:
        _line("memory", _memory_text(stage["memory"]))
    if stage["store"]:
        store = stage["store"]
        held = f", of which {store['held']:,} are there" if store["held"] else ""
        pays = f"{store['seconds']:.0f} s to fill, pays off after {store['pays_off_after_epochs']:.1f} epochs"
        pays = f"that of stage {store['shared_with']}" if store["shared_with"] else pays
        _line("store", f"{counted(store['rows'], 'sample')}, {bytes_text(store['bytes'])}{held}; {pays}")
    if stage["time"]:
        _line("time", _time_text(stage["time"]))
    for label in ("warning", "note"):
        for text in stage[f"{label}s"]:
            _line(label, text)


def _show_terms(terms: list[dict[str, Any]]) -> None:
    if not terms:
        return
    console.out("terms on one batch, at the weights that the schedules end in:")
    rows = []
    for term in terms:
        share = None if term["share"] is None else f"{100 * term['share']:.3g} %"
        numbers = [None if term[key] is None else f"{term[key]:.4g}" for key in ("weight", "value", "weighted")]
        rows.append([term["name"], *numbers, share])
    console.print_table(["term", "weight", "value", "weighted", "gradient"], rows)
    for term in terms:
        for part in term["adapters"]:
            _line("adapter", f"{term['name']}: {part['name']} ({part['kind']}), {part['parameters']:,} parameters")


def _memory_text(memory: dict[str, Any]) -> str:
    names = ("weights", "gradients", "optimizer", "teachers", "activations")
    parts = ", ".join(f"{name} {bytes_text(memory[name])}" for name in names if memory[name])
    return f"{bytes_text(memory['peak'])} ({memory['how']}): {parts}"


def _time_text(spent: dict[str, Any]) -> str:
    teacher = f" ({spent['teacher_ms']:.1f} ms of it asking the teacher)" if spent["teacher_ms"] >= 0.05 else ""
    text = f"{_seconds(spent['seconds'])}: {spent['step_ms']:.1f} ms a step{teacher}"
    text += f", {spent['evaluation_seconds']:.2f} s a validation"
    return text + (
        f", {_seconds(spent['before_seconds'])} before the first step" if spent["before_seconds"] >= 1 else ""
    )


def _seconds(spent: float) -> str:
    return f"{spent:.1f} s" if spent < 60 else duration(spent)


def _line(label: str, text: str) -> None:
    console.out(f"{label:<9}{text}")


def _shape(sizes: list[int]) -> str:
    return " x ".join(map(str, sizes)) or "one number"
