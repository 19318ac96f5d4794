"""Experiments made from an experiment: its controls, and what a further seed of a group runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdctl import ranks, registry, runs
from kdctl.config.schema import Component, DataSpec, Experiment, LossSpec, ModelSpec, TapPair, TeacherSpec, TrainStage
from kdctl.data.prepare import Data
from kdctl.errors import ConfigError, Problem, UsageError, did_you_mean
from kdctl.losses.base import Loss
from kdctl.methods.base import Method
from kdctl.runs import Run
from kdctl.tasks.base import Task

SHARED = "teachers"
"""The folder of a run that holds the teachers which another run of its group trained."""
BASELINE = "baseline"
SMOOTHING = 0.1
"""The label smoothing of the control of that name (Szegedy et al., CVPR 2016)."""

Files = dict[str, Path]
"""What a run is given beside its experiment: name in the run -> file to copy."""


@dataclass(frozen=True)
class Made:
    """The runs that a control may be made from. first: the group's first main run, which has its teachers; same_seed:
    the finished runs of the control's own seed by role, `main` or a control's name; seeds: those of every seed."""

    first: Run
    same_seed: Mapping[str, Run]
    seeds: Sequence[Mapping[str, Run]]


@dataclass(frozen=True)
class Control:
    """A control run of a group: in one line what it is, how it is made, whether it must show no gain, and whether it is
    made of the runs of all seeds, once these are done."""

    what: str
    make: Callable[[Experiment, Made], tuple[Experiment, Files]]
    placebo: bool = False
    last: bool = False


def parse_controls(text: str) -> list[str]:
    """The names of a list with commas, each once, in the order in which they are run. Raises UsageError for another."""
    named = [word.strip() for word in text.split(",") if word.strip()]
    for name in named:
        if name not in CONTROLS:
            hint = did_you_mean(name, CONTROLS) or "those there are: " + ", ".join(CONTROLS)
            raise UsageError(f"--controls: there is no control '{name}'", hint=hint)
    return [name for name in CONTROLS if name in named]


def check_controls(experiment: Experiment, names: Sequence[str], data: Data) -> None:
    """Raises ConfigError, before anything is trained, where a control cannot be made of an experiment and its data."""
    if names:
        _check_labels(control(experiment), data)
    if "label_smoothing" in names:
        _smoothed(experiment)
    taught = any(stage.teachers for stage in _student_stages(experiment))
    needs_teacher = [name for name in names if name in ("random_teacher", "shuffled_labels", "self")]
    if needs_teacher and not taught:
        message = f"the controls {', '.join(needs_teacher)} replace the teacher, and this experiment has none"
        raise ConfigError(Problem(message, key="teacher", hint="leave them out"))
    for stage in _student_stages(experiment):
        if stage.teachers:
            _check_replaced(experiment, stage, names)


def _check_labels(alone: Experiment, data: Data) -> None:
    """Refuses a student alone that no label would teach."""
    for stage in alone.train_stages:
        told = any(not _class(spec).needs_targets for spec in stage.losses)
        if not told and not data.for_stage(stage.data).train.has_labels:
            message = "no training sample has a label: without a teacher the student would learn nothing"
            raise ConfigError(Problem(message, key="data", hint="leave out the controls, or label some samples"))


def _check_replaced(experiment: Experiment, stage: TrainStage, names: Sequence[str]) -> None:
    """Refuses another teacher for a stage that cannot have it."""
    size = stage.data.batch_size or experiment.data.batch_size
    if "shuffled_labels" in names and size < 2 * stage.accumulate * ranks.current().size:
        message = f"a batch of {size} samples in {stage.accumulate * ranks.current().size} parts leaves no other sample"
        hint = "shuffled_labels gives answers to the next sample of a part: leave it out, or take larger batches"
        raise ConfigError(Problem(message, key="data.batch_size", hint=hint))
    if "self" in names and _method(stage).prepare is not Method.prepare:
        message = f"the method {stage.method.kind} fits student and teacher to each other, and not to the baseline"
        raise ConfigError(Problem(message, key="method", hint="leave self out of --controls"))


def _student_stages(experiment: Experiment) -> list[TrainStage]:
    return [s for s in experiment.train_stages if s.role == "student"]


# ------------------------------------------------------------------------------------------------- without a teacher


def control(experiment: Experiment) -> Experiment:
    """The same experiment without a teacher: teacher terms gone, supervised weights scaled to 1, all else equal.

    A method that rounds or prunes what the student computes with stays; any other is `distill`.

    A stage that had no weight on labels, teacher terms alone or alpha 1, trains on the task's own loss: a student that
    nothing trains would fake a gain. Raises ConfigError where the task has no such loss and no other term is left, and
    where the images are made of the teacher.
    """
    mine = _student_stages(experiment)
    if all(_method(stage).makes_samples for stage in mine):
        message = f"the method {mine[0].method.kind} makes its samples of the teacher, and without one there are none"
        hint = "leave the controls out; a student of real data is an experiment of its own"
        raise ConfigError(Problem(message, key="method", hint=hint))
    task: type[Task] = registry.load(registry.find("tasks", experiment.task.kind))
    graded = task.link != "embedding"  # embeddings have no truth to be graded by
    if not graded and not any(_alone(stage.losses) for stage in mine):
        hint = "embeddings have no such term: compare with the untrained student, as docs/text.md says"
        raise ConfigError(Problem("no term is left without the teacher", key="losses", hint=hint))
    names = {stage.name for stage in mine}
    stages: list[Any] = []
    for stage in inheriting_nothing(mine):
        losses = _graded(stage.losses) if graded else _alone(stage.losses) or [LossSpec(kind="supervised")]
        update: dict[str, Any] = {"teacher": None, "losses": losses, "balance": "none"}
        update["ensemble"] = Component(kind="mean_logits")
        if not _method(stage).shapes_student:
            update["method"] = Component(kind="distill")
        if stage.student is not None and stage.student.stage not in (None, *names):  # an assistant, which is not made
            update["student"] = stage.student.model_copy(update={"stage": None})
        if stage.start not in ("fresh", "previous", *names):
            update["start"] = "fresh"
        stages.append(stage.model_copy(update=update))
    data = _without_further_texts(experiment, stages)
    return experiment.model_copy(update={"data": data, "stages": stages, "teacher_cache": None})


def _without_further_texts(experiment: Experiment, stages: Sequence[TrainStage]) -> DataSpec:
    """The data without `expand`: texts without a label tell terms that need one nothing, and cost time.

    They stay where a term needs no label, and where a `limit` takes its share of them: without them the control would
    have more labels than the distillation.
    """
    data = experiment.data
    limited = any(limit is not None for limit in (data.limit, *(stage.data.limit for stage in stages)))
    told = any(not _class(spec).needs_targets for stage in stages for spec in stage.losses)
    return data if limited or told else data.model_copy(update={"expand": []})


def inheriting_nothing(stages: Sequence[TrainStage]) -> list[TrainStage]:
    """The stages with fresh weights in place of inherited ones, which are part of what a teacher gives. Nothing is
    frozen in them and in what goes on from them: fresh weights that never train would be a handicap."""
    heirs: set[str] = set()
    changed = []
    for stage in stages:
        if stage.student is not None and stage.student.inherit is not None:
            stage = stage.model_copy(update={"student": stage.student.model_copy(update={"inherit": None})})
            heirs.add(stage.name)
        if stage.start in heirs or stage.name in heirs:
            heirs.add(stage.name)
            stage = stage.model_copy(update={"frozen": []})
        changed.append(stage)
    return changed


def _alone(losses: Sequence[LossSpec]) -> list[LossSpec]:
    """The terms without a teacher, as they are."""
    return [spec for spec in losses if not _class(spec).needs_teacher]


def _graded(losses: Sequence[LossSpec]) -> list[LossSpec]:
    """The terms without a teacher. Those on labels weigh 1 together: leaving ce at 0.1 would fake a gain."""
    kept = [(spec, _class(spec).needs_targets) for spec in _alone(losses)]
    total = sum(_final(spec) for spec, on_labels in kept if on_labels)
    if total <= 0:
        return [LossSpec(kind="supervised"), *(spec for spec, on_labels in kept if not on_labels)]
    return [_scaled(spec, 1 / total) if on_labels else spec for spec, on_labels in kept]


def _class(spec: LossSpec) -> type[Loss]:
    return registry.load(registry.find("losses", spec.kind))


def _method(stage: TrainStage) -> type[Method]:
    return registry.load(registry.find("methods", stage.method.kind))


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


def _smoothed(experiment: Experiment) -> Experiment:
    """The control with label smoothing in each supervised term. Raises ConfigError where all have it already."""
    alone, changed = control(experiment), False
    stages: list[Any] = []
    for stage in alone.train_stages:
        losses = []
        for spec in stage.losses:
            plain = registry.canonical("losses", spec.kind) == "supervised" and not spec.arguments.get(
                "label_smoothing"
            )
            changed = changed or plain
            losses.append(LossSpec(**spec.model_dump() | {"label_smoothing": SMOOTHING}) if plain else spec)
        stages.append(stage.model_copy(update={"losses": losses}))
    if not changed:
        message = "no supervised term is without label smoothing: this control would be the baseline"
        raise ConfigError(Problem(message, key="losses", hint="leave label_smoothing out of --controls"))
    return alone.model_copy(update={"stages": stages})


def _for_as_long(experiment: Experiment, made: Made) -> tuple[Experiment, Files]:
    """The control with as many epochs as fit into the seconds that a distillation took, as many for every seed.

    These are averages over the seeds: with a store the first one asked the teacher for all of them. What the baseline's
    epochs take follows from those that it trained: it may have stopped early.
    """
    alone = control(experiment)
    main = plain = 0.0
    for runs_of_seed in made.seeds:
        spent = runs_of_seed["main"].info.get("seconds", {})
        main += sum(spent.get(stage.name, 0.0) for stage in alone.train_stages)
        plain += sum(_seconds_an_epoch(runs_of_seed[BASELINE], s.name) * s.epochs for s in alone.train_stages)
    factor = max(1.0, main / plain) if plain > 0 else 1.0
    stages = [s.model_copy(update={"epochs": round(s.epochs * factor)}) for s in alone.train_stages]
    return alone.model_copy(update={"stages": stages}), {}


def _seconds_an_epoch(run: Run, stage: str) -> float:
    """What an epoch of a finished stage took on average; 0 where it had none."""
    epochs = runs.read_json(run.stage_dir(stage) / "result.json")["epochs"]
    return run.info.get("seconds", {}).get(stage, 0.0) / epochs if epochs else 0.0


# ---------------------------------------------------------------------------------------------- with another teacher


def with_shared_teachers(experiment: Experiment, first: Run) -> tuple[Experiment, Files]:
    """The experiment with the teachers that the group's first run trained, and the files that its run is given.

    The weights are named relative to the new run, which holds a copy: it stays whole when it is moved. A stage
    that goes on from such a model has it as its student, with these weights.
    """
    made = {s.name for s in experiment.train_stages if s.role in ("teacher", "assistant")}
    files: Files = {}

    def shared(spec: Any) -> Any:
        if not isinstance(spec, ModelSpec) or spec.stage not in made:
            return spec
        for suffix in (".safetensors", ".json"):
            files[f"{SHARED}/{spec.stage}{suffix}"] = first.stage_dir(str(spec.stage)) / f"model{suffix}"
        return spec.model_copy(update={"stage": None, "weights": f"{SHARED}/{spec.stage}.safetensors"})

    stages: list[Any] = []
    for stage in experiment.stages:
        if isinstance(stage, TrainStage) and stage.name not in made:
            stage = _taught_by(stage, [shared(t) for t in stage.teachers])
            student = stage.student
            if stage.start in made:
                student = (student or experiment.student).model_copy(update={"stage": stage.start, "weights": None})
                stage = stage.model_copy(update={"start": "fresh"})
            stage = stage.model_copy(update={"student": shared(student)})
        product = stage in experiment.products
        if stage.name not in made and not (
            product and experiment.origin(stage).name in made
        ):  # the first run has these
            stages.append(stage)
    return experiment.model_copy(update={"stages": stages}), files


def _taught_by(stage: TrainStage, teachers: Sequence[Any]) -> TrainStage:
    """The stage with other teachers, in the form that it had."""
    teacher = list(teachers) if isinstance(stage.teacher, list) else (list(teachers) or [None])[0]
    return stage.model_copy(update={"teacher": teacher})


def _replaced(
    experiment: Experiment, made: Made, change: Callable[[TrainStage, Files], TrainStage]
) -> tuple[Experiment, Files]:
    """The student's stages of a further seed, each taught stage changed; what would be made of the student is not."""
    shared, files = with_shared_teachers(experiment, made.first)
    mine = inheriting_nothing(_student_stages(shared))
    stages = [change(stage, files) if stage.teachers else stage for stage in mine]
    return shared.model_copy(update={"stages": stages}), files


def _random(experiment: Experiment, made: Made) -> tuple[Experiment, Files]:
    """Each teacher with the weights that it begins with."""

    def change(stage: TrainStage, files: Files) -> TrainStage:
        return _taught_by(stage, [_untrained(spec, files) for spec in stage.teachers])

    return _replaced(experiment, made, change)


def _untrained(spec: TeacherSpec, files: Files) -> TeacherSpec:
    """A teacher without weights of the architecture that its record, where it has one, says."""
    known: dict[str, Any] = {}
    stem = None if spec.weights is None else files.get(spec.weights, Path(spec.weights))
    if stem is not None and runs.holds_model(str(stem)):
        record = runs.read_json(stem / "student.json" if stem.is_dir() else stem.with_suffix(".json"))
        normalize = record.get("normalize") or "none"
        known = {"kind": record["kind"], **record["arguments"]}
        known |= {"normalize": normalize, "input_size": record.get("input_size")}
    given = spec.model_dump(by_alias=False, exclude={"weights", "stage", "mapping", "classes", "train"})
    return TeacherSpec(**given | known | {"control": True})


def _shuffled(experiment: Experiment, made: Made) -> tuple[Experiment, Files]:
    """Each teacher's answers given to other samples."""

    def change(stage: TrainStage, files: Files) -> TrainStage:
        return _taught_by(stage, [spec.model_copy(update={"shuffled": True}) for spec in stage.teachers])

    return _replaced(experiment, made, change)


def _by_itself(experiment: Experiment, made: Made) -> tuple[Experiment, Files]:
    """The baseline of this seed as the only teacher: what a model of the student's own size can teach it."""
    baseline = made.same_seed[BASELINE]

    def change(stage: TrainStage, files: Files) -> TrainStage:
        student = stage.student or experiment.student
        for suffix in (".safetensors", ".json"):
            files[f"{SHARED}/self{suffix}"] = baseline / f"student{suffix}"
        given = student.model_dump(by_alias=False, exclude={"weights", "stage", "mapping", "inherit"})
        teacher = TeacherSpec(**given, weights=f"{SHARED}/self.safetensors", control=True)
        losses = [spec.model_copy(update={"taps": [_own_tap(tap) for tap in spec.taps]}) for spec in stage.losses]
        return stage.model_copy(
            update={"teacher": teacher, "losses": losses, "ensemble": Component(kind="mean_logits")}
        )

    return _replaced(experiment, made, change)


def _own_tap(tap: Any) -> Any:
    return tap.student if isinstance(tap, TapPair) else tap


CONTROLS: dict[str, Control] = {
    BASELINE: Control(
        "the same student without a teacher: its terms gone, the supervised weights scaled to 1, nothing inherited",
        lambda experiment, _: (control(experiment), {}),
    ),
    "equal_time": Control(
        "the baseline, trained for as many epochs as fit into the distillation's time", _for_as_long, last=True
    ),
    "label_smoothing": Control(
        f"the baseline with label smoothing {SMOOTHING}: soft labels that know nothing",
        lambda experiment, _: (_smoothed(experiment), {}),
    ),
    "random_teacher": Control("a teacher of the same kind with the weights that it begins with", _random, placebo=True),
    "shuffled_labels": Control("the teacher's answers, each given to another sample", _shuffled, placebo=True),
    "self": Control("the baseline student as its own teacher", _by_itself),
}
"""The student of none inherits. In the order of reports, in which those of a seed are run too: some are made from those
before them."""
