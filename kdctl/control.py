"""Experiments made from an experiment: its control, and what a further seed of a group runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdctl import registry
from kdctl.config.schema import Component, Experiment, LossSpec, ModelSpec, TrainStage
from kdctl.errors import ConfigError, Problem
from kdctl.losses.base import Loss
from kdctl.runs import Run

SHARED = "teachers"
"""The folder of a run that holds the teachers which another run of its group trained."""


def control(experiment: Experiment) -> Experiment:
    """The same experiment without a teacher: teacher terms gone, supervised weights scaled to 1, all else equal.

    A stage that had teacher terms alone trains on the task's own loss for as long. Raises ConfigError when no stage of
    the student has a term without a teacher.
    """
    mine = [s for s in experiment.train_stages if s.role == "student"]
    if not any(_alone(stage.losses) for stage in mine):
        hint = "the control needs a term without a teacher, for example {kind: ce, weight: 0.1}"
        raise ConfigError(Problem("no term is left without the teacher", key="losses", hint=hint))
    stages: list[Any] = []
    for stage in mine:
        losses = _alone(stage.losses) or [LossSpec(kind="supervised")]
        update: dict[str, Any] = {"teacher": None, "losses": losses, "balance": "none"}
        update |= {"method": Component(kind="distill"), "ensemble": Component(kind="mean_logits")}
        stages.append(stage.model_copy(update=update))
    return experiment.model_copy(update={"stages": stages, "teacher_cache": None})


def _alone(losses: Sequence[LossSpec]) -> list[LossSpec]:
    """The terms without a teacher. The supervised ones weigh 1 together: leaving ce at 0.1 would fake a gain."""
    kept = [(spec, _class(spec)) for spec in losses if not _class(spec).needs_teacher]
    total = sum(_final(spec) for spec, loss in kept if loss.needs_targets)
    if total <= 0:
        return [spec for spec, _ in kept]
    return [_scaled(spec, 1 / total) if loss.needs_targets else spec for spec, loss in kept]


def _class(spec: LossSpec) -> type[Loss]:
    return registry.load(registry.find("losses", spec.kind))


def _final(spec: LossSpec) -> float:
    """What the term weighs in the end: a moment in steps is taken for one after all that are in epochs."""
    if not isinstance(spec.weight, dict):
        return spec.weight
    return spec.weight[max(spec.weight, key=lambda m: (1, int(m.split()[0])) if isinstance(m, str) else (0, m))]


def _scaled(spec: LossSpec, factor: float) -> LossSpec:
    """The term with its weight times a factor, rounded so that 0.1 x 10 is 1."""
    if isinstance(spec.weight, dict):
        return spec.model_copy(update={"weight": {e: round(w * factor, 12) for e, w in spec.weight.items()}})
    return spec.model_copy(update={"weight": round(spec.weight * factor, 12)})


def with_shared_teachers(experiment: Experiment, first: Run) -> tuple[Experiment, dict[str, Path]]:
    """The experiment with the teachers that the group's first run trained, and the files that its run is given.

    The weights are named relative to the new run, which holds a copy: it stays whole when it is moved.
    """
    made = {s.name for s in experiment.train_stages if s.role in ("teacher", "assistant")}
    files: dict[str, Path] = {}

    def shared(spec: Any) -> Any:
        if not isinstance(spec, ModelSpec) or spec.stage not in made:
            return spec
        for suffix in (".safetensors", ".json"):
            files[f"{SHARED}/{spec.stage}{suffix}"] = first.stage_dir(str(spec.stage)) / f"model{suffix}"
        return spec.model_copy(update={"stage": None, "weights": f"{SHARED}/{spec.stage}.safetensors"})

    stages: list[Any] = []
    for stage in experiment.stages:
        if isinstance(stage, TrainStage) and stage.name not in made:
            teachers = [shared(t) for t in stage.teachers]
            teacher = teachers if isinstance(stage.teacher, list) else (teachers or [None])[0]
            stage = stage.model_copy(update={"teacher": teacher, "student": shared(stage.student)})
        product = stage in experiment.products
        if stage.name not in made and not (
            product and experiment.origin(stage).name in made
        ):  # the first run has these
            stages.append(stage)
    return experiment.model_copy(update={"stages": stages}), files
