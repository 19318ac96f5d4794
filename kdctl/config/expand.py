"""From what a file says to what runs: shorthands become stages, and every default is written out.

`expand` is pure, and a fixed point: the dump of an Experiment is a valid file that expands to the same Experiment.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from kdctl import registry
from kdctl.config.arguments import defaults
from kdctl.config.check import check
from kdctl.config.consistency import kind_makes_model
from kdctl.config.overrides import load_document
from kdctl.config.schema import (
    Component,
    DataSpec,
    Distill,
    Experiment,
    ExperimentFile,
    Gates,
    Keeping,
    LossSpec,
    ModelSpec,
    OutputStage,
    RunSettings,
    StageData,
    TeacherSpec,
    TrainStage,
)
from kdctl.config.terms import teaches
from kdctl.config.yaml_io import Document, KeyPath
from kdctl.runs import holds_model

C = TypeVar("C", bound=Component)
_STAGE = TrainStage()
FINETUNE_EPOCHS = 5
FINETUNE_LR = 0.2
"""The learning rate of a finetune, as a share of the experiment's, where the stage has none of its own."""


@dataclass(frozen=True)
class Loaded:
    """An experiment with where it came from. base: the folder of its file.

    links: place in the resolved experiment -> place in the document that it was taken from.
    """

    experiment: Experiment
    document: Document
    base: Path
    links: dict[KeyPath, KeyPath] = field(default_factory=dict)


def load_experiment(path: Path, overrides: Sequence[str] = (), require_files: bool = True) -> Loaded:
    """Reads, merges, checks and expands an experiment file.

    Raises ConfigError with every problem; MissingError when the file, or (with `require_files`) weights or data that it
    names by a path, are not there.
    """
    path = Path(path)
    document = load_document(path, overrides)
    file = check(document, require_files)
    expansion = _Expansion(file)
    return Loaded(expansion.experiment(), document, path.absolute().parent, expansion.links)


def expand(file: ExperimentFile) -> Experiment:
    """The experiment that a file comes to."""
    return _Expansion(file).experiment()


def complete(spec: C, group: str, keep: Sequence[str] = ()) -> C:
    """The component with the defaults of its class written out, in the order of its signature."""
    kind = str(spec.arguments["target"]) if group == "exporters" else spec.kind
    component = registry.find(group, kind)
    signature = registry.signature(component)
    given = {signature.aliases.get(name, name): value for name, value in spec.arguments.items()}
    # Weights with a record say themselves what they are: a default would contradict them.
    recorded = isinstance(spec, ModelSpec) and spec.weights is not None and holds_model(spec.weights)
    filled = {} if recorded else defaults(signature)
    known = {**filled, **given}
    ordered = {name: known[name] for name in signature.arguments if name in known}
    rest = {name: value for name, value in given.items() if name not in ordered}
    kept = {name: rest.pop(name) for name in keep if name in rest}
    own = {info.alias or name: getattr(spec, name) for name, info in type(spec).model_fields.items()}
    if not component.is_builtin:  # what is named like a key of ours, no file can give: it keeps its default
        ordered = {name: value for name, value in ordered.items() if name not in own}
    own = {key: value for key, value in own.items() if value is not None}
    if group != "exporters":
        own["kind"] = registry.canonical(group, kind)
    return type(spec).model_validate(own | kept | ordered | rest)


class _Expansion:
    """One expansion: the stages made so far, and what each was made from."""

    def __init__(self, file: ExperimentFile) -> None:
        self.file = file
        self.links: dict[KeyPath, KeyPath] = {}
        self.stages: list[TrainStage | OutputStage] = []
        given = [*(file.stages or []), *file.compress, *file.export]
        self.given = {s.name for s in given if "name" in s.model_fields_set}
        """Names that the file gives; a stage without one takes another."""

    def experiment(self) -> Experiment:
        file = self.file
        if file.stages is None:
            self._from_shorthands()
        else:
            for index, stage in enumerate(file.stages):
                self.links["stages", index] = ("stages", index)
                self._add(stage, ("stages", index))
        settings = {name: getattr(file.train, name) for name in RunSettings.model_fields}
        return Experiment(
            name=file.name,
            task=complete(file.task, "tasks"),
            data=_complete_data(file.data),
            student=complete(file.student, "models"),
            teacher_cache=file.teacher_cache,
            loggers=[complete(spec, "loggers") for spec in file.loggers],
            train=RunSettings(**settings),
            stages=self.stages,
        )

    # ------------------------------------------------------------------------------------------------------ shorthands

    def _from_shorthands(self) -> None:
        file = self.file
        single = isinstance(file.teacher, TeacherSpec)
        given = [file.teacher] if isinstance(file.teacher, TeacherSpec) else file.teacher or []
        teachers = []
        for number, spec in enumerate(given):
            place: KeyPath = ("teacher",) if single else ("teacher", number)
            if spec.train is not None:
                spec = self._add_teacher(spec, place, spec.name or ("teacher" if single else f"teacher-{number + 1}"))
            teachers.append(spec)
        teacher = None if not teachers else teachers[0] if single else teachers
        index = len(self.stages)
        self.links["stages", index, "teacher"] = ("teacher",)
        self._add_train(TrainStage(name="student", teacher=teacher, start="fresh"))
        for number, stage in enumerate(file.compress):
            self.links["stages", len(self.stages)] = ("compress", number)
            self._add(stage, ("compress", number))
        for number, component in enumerate(file.export):
            self.links["stages", len(self.stages)] = ("export", number)
            self.links["stages", len(self.stages), "target"] = ("export", number, "kind")
            said = component.model_dump(exclude={"kind"}, by_alias=True)
            self._add_output(OutputStage(kind="export", target=component.kind, **said))

    def _add_teacher(self, spec: TeacherSpec, place: KeyPath, name: str) -> TeacherSpec:
        """Adds the stage that trains a teacher; returns the teacher that takes its weights from there."""
        training = spec.train
        assert training is not None  # the caller has looked
        index = len(self.stages)
        self.links["stages", index] = (*place, "train")
        self.links["stages", index, "student"] = place
        settings: dict[str, Any] = {
            key: value
            for key in ("epochs", "losses", "optimizer", "schedule")
            if (value := getattr(training, key)) is not None
        }
        student = ModelSpec(**_model_part(spec))
        self._add_train(
            TrainStage(name=name, role="teacher", student=student, start="fresh", data=training.data, **settings)
        )
        return spec.model_copy(update={"train": None, "stage": name})

    # --------------------------------------------------------------------------------------------------------- stages

    def _add(self, stage: TrainStage | OutputStage, place: KeyPath) -> None:
        if isinstance(stage, OutputStage):
            self._add_output(stage)
        elif stage.kind == "finetune":
            self._add_train(self._as_training(stage), place)
        else:
            self._add_train(stage, place)

    def _as_training(self, stage: TrainStage) -> TrainStage:
        """What a `finetune` comes to: the last model trains on, more gently, with the teacher, else with the model that
        compression began with."""
        given, origin = stage.model_fields_set, self._origin()
        update: dict[str, Any] = {"kind": "train", "role": "compressed", "student": origin.student}
        update["name"] = stage.name if "name" in given else self._free_name("finetune")
        update["epochs"] = stage.epochs if "epochs" in given else FINETUNE_EPOCHS
        update["start"] = self._model_before(stage.start)
        for key in ("schedule", "ensemble"):
            update[key] = getattr(stage if key in given else origin, key)
        if "teacher" not in given and origin.teachers:
            update["teacher"] = origin.teacher
            update |= {} if "losses" in given else {"losses": origin.losses, "balance": origin.balance}
        elif "teacher" not in given and origin.student is not None:
            update["teacher"] = TeacherSpec(stage=origin.name, **_model_part(origin.student))
        if "losses" not in given and "losses" not in update:
            update["losses"] = distill_losses(self.file.distill or Distill())
        if "optimizer" not in given:
            update["optimizer"] = _gentle(origin.optimizer, stage.method if "method" in given else _STAGE.method)
        own = {name: getattr(stage, name) for name in given}
        return TrainStage(**{"method": _STAGE.method, "balance": _STAGE.balance, **own, **update})

    def _origin(self) -> TrainStage:
        """The last stage so far that trained the student itself; consistency has made sure that there is one."""
        return next(s for s in reversed(self.stages) if isinstance(s, TrainStage) and s.role == "student")

    def _model_before(self, start: str) -> str:
        """The stage whose model a stage of compression takes: the last that made one, where none is named."""
        if start != "previous":
            return start
        return next(s.name for s in reversed(self.stages) if makes_model(s))

    def _free_name(self, name: str) -> str:
        taken = {s.name for s in self.stages} | self.given
        return next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)

    def _add_train(self, stage: TrainStage, place: KeyPath | None = None) -> None:
        """Adds a training stage with everything in it that it takes from the experiment."""
        file, index, given = self.file, len(self.stages), stage.model_fields_set
        here: KeyPath = ("stages", index)

        def take(key: str, other: Any, fallback: Any) -> Any:
            if key in given:
                return getattr(stage, key)
            self.links[(*here, key)] = (key,)
            return fallback if other is None else other

        def learners(key: str, other: Any, fallback: Any) -> Any:
            """How the student learns is no word about how its teacher does."""
            return take(key, other, fallback) if key in given or stage.role != "teacher" else fallback

        teacher = stage.teacher
        if "teacher" not in given and stage.role != "teacher":
            teacher = file.teacher
            self.links[(*here, "teacher")] = ("teacher",)
        student = stage.student
        if student is None:
            student = file.student
            self.links[(*here, "student")] = ("student",)
            if stage.role == "teacher" and isinstance(file.teacher, TeacherSpec):
                student = ModelSpec(**_model_part(file.teacher))
                self.links[(*here, "student")] = ("teacher",)
        for key in Keeping.model_fields:
            if key not in given:
                self.links[(*here, key)] = ("train", key)
        teachers = teacher if isinstance(teacher, list) else [] if teacher is None else [teacher]
        student = complete(student, "models")
        start = self._start(stage, student)
        if start != "fresh":  # it goes on with what an earlier stage made, from whatever that began with
            student = student.model_copy(update={"inherit": None})
        done = [complete(spec, "models") for spec in teachers]
        method = complete(learners("method", file.method, _STAGE.method), "methods")
        self.stages.append(
            TrainStage(
                name=stage.name,
                role=stage.role,
                student=student,
                teacher=done if isinstance(teacher, list) else done[0] if done else None,
                method=method,
                ensemble=complete(learners("ensemble", file.ensemble, _STAGE.ensemble), "ensembles"),
                balance=learners("balance", file.balance, _STAGE.balance),
                losses=[complete(loss, "losses") for loss in self._losses(stage, bool(done) or teaches(method), here)],
                optimizer=complete(take("optimizer", file.optimizer, _STAGE.optimizer), "optimizers"),
                schedule=complete(take("schedule", file.schedule, _STAGE.schedule), "schedules"),
                start=start,
                frozen=take("frozen", file.frozen, []) if stage.role == "student" else stage.frozen,
                data=_complete_stage_data(stage.data),
                **{key: getattr(stage if key in given else file.train, key) for key in Keeping.model_fields},
                **{key: getattr(stage, key) for key in Gates.model_fields},
            )
        )

    def _losses(self, stage: TrainStage, has_teacher: bool, here: KeyPath) -> list[LossSpec]:
        file = self.file
        if "losses" in stage.model_fields_set:
            return stage.losses
        if stage.role == "teacher":
            return [LossSpec(kind="supervised")]
        if file.losses is not None:
            self.links[(*here, "losses")] = ("losses",)
            return file.losses
        if not has_teacher:
            return [LossSpec(kind="supervised")]
        self.links[(*here, "losses", 0, "weight")] = ("distill", "alpha")
        self.links[(*here, "losses", 1, "weight")] = ("distill", "alpha")
        self.links[(*here, "losses", 1, "temperature")] = ("distill", "T")
        return distill_losses(file.distill or Distill())

    def _start(self, stage: TrainStage, student: ModelSpec) -> str:
        """The name of the stage whose weights a stage starts from, or `fresh`.

        `previous`, where it is not written, means the last stage before it that trained the same model in the same
        role; where it is written, the training stage before it, whatever that trained.
        """
        if stage.start != "previous":
            return stage.start
        earlier = [s for s in self.stages if isinstance(s, TrainStage)]
        if "start" not in stage.model_fields_set:
            same = (stage.role, student.kind, student.arguments)
            earlier = [s for s in earlier if s.student and (s.role, s.student.kind, s.student.arguments) == same]
        return earlier[-1].name if earlier else "fresh"

    def _add_output(self, stage: OutputStage) -> None:
        group = "exporters" if stage.kind == "export" else "compressors"
        done = complete(stage, group, keep=("target",))
        name = done.name or self._free_name(variant(done))
        self.stages.append(done.model_copy(update={"name": name, "start": self._model_before(stage.start)}))


def _gentle(optimizer: Component, method: Component) -> Component:
    """The optimizer of a finetune that names none: what its method asks for, else the student's, slowed down."""
    own = registry.signature(registry.find("methods", method.kind)).attributes.get("finetune_optimizer")
    if own:
        return Component.model_validate(own)
    lr = optimizer.arguments.get("lr")
    return optimizer.model_copy(update={"lr": round(lr * FINETUNE_LR, 12)} if isinstance(lr, int | float) else {})


def makes_model(stage: TrainStage | OutputStage) -> bool:
    """Whether a stage makes a model that compression can go on with, and not a file, a teacher or an assistant."""
    if isinstance(stage, TrainStage):
        return stage.role in ("student", "compressed")
    return kind_makes_model(stage.kind)


def distill_losses(distill: Distill) -> list[LossSpec]:
    """The terms that the shorthand stands for: ce x (1 - alpha) + kd x alpha."""
    return [
        LossSpec(kind="supervised", weight=round(1 - distill.alpha, 12)),
        LossSpec(kind="kd", weight=distill.alpha, temperature=distill.temperature),
    ]


def variant(stage: OutputStage) -> str:
    """A name for what a stage makes, from what tells it from others: `int8-static`, `prune-0.5`, `onnx`."""
    arguments: Mapping[str, Any] = stage.arguments
    if stage.kind == "export":
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", str(arguments["target"])).strip("-")
    if isinstance(arguments.get("dtype"), str):
        where = [str(arguments["target"])] if arguments.get("target", "onnx") != "onnx" else []
        how = [str(arguments["mode"])] if arguments.get("mode", "auto") != "auto" else []
        return "-".join([*where, str(arguments["dtype"]), *how])
    if arguments.get("latency_ms") is not None:
        return f"{stage.kind}-{arguments['latency_ms']:g}ms"
    amount = next((value for value in arguments.values() if type(value) is float), None)
    kind = re.sub(r"[^A-Za-z0-9_.-]+", "-", stage.kind.rpartition(":")[2])
    return kind if amount is None else f"{kind}-{amount:g}"


def _model_part(spec: ModelSpec) -> dict[str, Any]:
    """What of a teacher makes it a model: all but where its weights come from and what it is for."""
    return {"kind": spec.kind, "normalize": spec.normalize, "input_size": spec.input_size, **spec.arguments}


def _complete_data(data: DataSpec) -> DataSpec:
    done = complete(data, "data")
    return done.model_copy(
        update={
            "augment": [complete(item, "augment") for item in data.augment],
            "strong_augment": [complete(item, "augment") for item in data.strong_augment],
            "transfer": [complete(item, "data") for item in data.transfer],
            "expand": [complete(item, "expansions") for item in data.expand],
        }
    )


def _complete_stage_data(data: StageData) -> StageData:
    given = {name: value for name in ("augment", "strong_augment") if (value := getattr(data, name)) is not None}
    return data.model_copy(update={n: [complete(item, "augment") for item in items] for n, items in given.items()})
