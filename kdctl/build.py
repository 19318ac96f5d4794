"""From an Experiment to objects: the one place where configuration and code meet."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdctl import ranks, registry, sharding
from kdctl.config.schema import Experiment, LossSpec, ModelSpec, Normalize, TeacherSpec, TrainStage
from kdctl.data.augment import Augment
from kdctl.data.loader import TrainLoader
from kdctl.data.prepare import Data, prepare
from kdctl.device import choose_device
from kdctl.errors import ConfigError, MissingError, Problem
from kdctl.losses.base import DryRun, Loss
from kdctl.methods.base import Method, Term
from kdctl.models import record as records
from kdctl.models.record import Model, ModelRecord
from kdctl.models.weights import load_weights
from kdctl.optim.optimizers import build_optimizer
from kdctl.optim.schedules import WeightSchedule
from kdctl.runs import holds_model
from kdctl.signals import Batch, Signals
from kdctl.taps import Taps
from kdctl.tasks.base import Task
from kdctl.teachers.base import Teacher
from kdctl.teachers.cached import CachedTeacher
from kdctl.teachers.ensemble import Ensemble
from kdctl.teachers.live import LiveTeacher
from kdctl.teachers.store import open_store

IMAGENET = Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
_DRY_RUN_SAMPLES = 8


@dataclass
class Built:
    """One training stage as objects."""

    task: Task
    data: Data
    loader: TrainLoader
    method: Method
    optimizer: torch.optim.Optimizer
    schedule: Callable[[int, int, int], float]
    teacher: Teacher | None
    members: list[Teacher]
    """Each of several teachers, whose mean `teacher` is."""
    device: torch.device
    precision: str

    @property
    def teachers(self) -> list[Model]:
        """The models that teach."""
        return [model for member in self.members for model in member.models]


def build_task(experiment: Experiment) -> Task:
    return registry.create("tasks", experiment.task.kind, experiment.task.arguments)


def build_data(experiment: Experiment) -> Data:
    return prepare(experiment.data)


def seed_everything(seed: int, *names: str) -> None:
    """Seeds torch from the run's seed and what is drawn next, so that one part's draws never shift another's."""
    digest = hashlib.sha256("/".join([str(seed), *names]).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


# ------------------------------------------------------------------------------------------------------------- models


def build_model(spec: ModelSpec, data: Data, key: str, stage_file: Callable[[str], Path] | None = None) -> Model:
    """A model of the given kind for this data, with its weights loaded where the spec names some.

    stage_file gives the stem of the model that an earlier stage made. Raises ConfigError where class counts, channels
    or names cannot match.
    """
    if spec.stage is not None and stage_file is not None:
        model = records.load_model(stage_file(spec.stage))
        _check_classes(model.record, data, key)
    elif spec.weights and holds_model(spec.weights):
        model = records.load_model(Path(spec.weights))
        _check_record(spec, model.record, data, key)
        _check_classes(model.record, data, key)
    else:
        model = records.build_model(_record(spec, data))
        if spec.weights:
            load_weights(model.net, "pretrained" if spec.weights == "pretrained" else Path(spec.weights), spec.mapping)
    check_fits(model.record, data, key)
    return model


def _record(spec: ModelSpec, data: Data) -> ModelRecord:
    normalize: dict[str, list[float]] | None
    if spec.normalize == "none":
        normalize = None
    elif spec.normalize == "data":
        normalize = {"mean": list(data.mean), "std": list(data.std)}
    else:
        chosen = IMAGENET if spec.normalize == "imagenet" else spec.normalize
        normalize = {"mean": list(chosen.mean), "std": list(chosen.std)}
    return ModelRecord(
        kind=spec.kind,
        arguments=spec.arguments,
        num_classes=len(data.class_names),
        class_names=list(data.class_names),
        image_shape=list(data.image_shape),
        normalize=normalize,
        input_size=spec.input_size,
    )


def build_teachers(stage: TrainStage, data: Data, seed: int, stage_file: Callable[[str], Path]) -> list[Model]:
    """The teachers of a stage; a declared control without weights is the same random net whenever it is built."""
    seed_everything(seed, stage.name, "teacher")
    return [build_model(spec, data, "teacher", stage_file) for spec in stage.teachers]


def _check_record(spec: ModelSpec, record: ModelRecord, data: Data, key: str) -> None:
    """Refuses a spec that asks for something else than the record beside its weights says."""
    asked = _record(spec, data)
    kind, own = registry.canonical("models", spec.kind), record.kind
    if registry.is_file_kind(kind) and registry.is_file_kind(own):  # the record names its copy of the user's file
        kind, own = kind.rpartition(":")[2], own.rpartition(":")[2]
    pairs: dict[str, tuple[Any, Any]] = {"kind": (kind, own)}
    pairs |= {name: (value, record.arguments.get(name, value)) for name, value in spec.arguments.items()}
    if spec.normalize != "data":
        pairs["normalize"] = (asked.normalize, record.normalize)
    if spec.input_size is not None:
        pairs["input_size"] = (spec.input_size, record.input_size)
    problems = [
        Problem(f"got {got!r}, but {spec.weights} holds {has!r}", key=f"{key}.{name}", hint="leave it out, or agree")
        for name, (got, has) in pairs.items()
        if got != has
    ]
    if problems:
        raise ConfigError(*problems)


def _check_classes(record: ModelRecord, data: Data, key: str) -> None:
    """Refuses a model whose classes stand in another order than the data's: every label would mean something else."""
    if record.class_names == data.class_names or len(record.class_names) != len(data.class_names):
        return
    at = next(i for i, (a, b) in enumerate(zip(record.class_names, data.class_names, strict=True)) if a != b)
    message = f"class {at} of the model is '{record.class_names[at]}', of the data '{data.class_names[at]}'"
    raise ConfigError(Problem(message, key=key, hint="name weights that were trained on these classes in this order"))


def check_fits(record: ModelRecord, data: Data, key: str) -> None:
    """Refuses a model for other images or another number of classes than the data have."""
    if record.num_classes != len(data.class_names):
        message = f"the model has {record.num_classes} classes, the data {len(data.class_names)}"
        raise ConfigError(Problem(message, key=key, hint="name weights that were trained on these classes"))
    if record.image_shape[0] != data.image_shape[0]:
        message = f"the model takes {record.image_shape[0]} channels, the data have {data.image_shape[0]}"
        raise ConfigError(Problem(message, key=key))


# -------------------------------------------------------------------------------------------------------------- terms


def _build_terms(specs: Sequence[LossSpec], steps_per_epoch: int) -> list[Term]:
    terms = []
    for spec in specs:
        loss: Loss = registry.create("losses", spec.kind, spec.arguments)
        loss.taps = tuple((t, t) if isinstance(t, str) else (t.student, t.teacher) for t in spec.taps)
        if loss.needs_taps and not loss.taps:
            hint = "add taps: [layer1, ...]; `kdctl explain " + spec.kind + "` says which it is meant for"
            raise ConfigError(Problem("the term needs taps and has none", key=f"losses.{spec.label}", hint=hint))
        loss.steps_per_epoch = steps_per_epoch
        terms.append(Term(spec.label, loss, WeightSchedule(spec.weight, steps_per_epoch)))
    return terms


def _dry_run(
    student: Model, teacher: Teacher | None, terms: Sequence[Term], task: Task, batch: Batch, num_samples: int
) -> None:
    """Makes the adapters of every term from real shapes, then proves that each term's gradient reaches the student.

    Works on a copy of the student in eval mode: no buffer of the real one moves.
    """
    trial = copy.deepcopy(student).eval()
    taps = Taps(trial.net, sorted({s for term in terms for s, _ in term.loss.taps}))
    try:
        with taps.recording() as features:
            outputs = task.forward(trial, batch)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        message = f"the model cannot take images of shape {tuple(batch.inputs.shape[1:])}: {error}"
        hint = "student.input_size resizes images to what the model was made for, for example 224"
        raise ConfigError(Problem(message, key="student", hint=hint)) from error
    seen = task.signals(outputs, batch, features)
    signals = None if teacher is None else teacher(batch)
    if signals is not None and signals.logits.shape != seen.logits.shape:
        got, own = tuple(signals.logits.shape[1:]), tuple(seen.logits.shape[1:])
        raise ConfigError(Problem(f"the teacher's outputs have shape {got}, the student's {own}", key="teacher"))
    for term in terms:
        nets = [] if teacher is None else [model.net for model in teacher.models]
        term.loss.setup(DryRun(task, batch, _detached(seen), signals, num_samples, trial.net, nets))
    for term in terms:
        term.loss.eval()
        _check_gradient(term, trial, seen, signals, batch)
        term.loss.train()


def _check_accumulation(terms: Sequence[Term], stage: TrainStage) -> None:
    for term in terms:
        if term.loss.batchwise and stage.accumulate > 1:
            message = f"the term compares the samples of a batch, and accumulate is {stage.accumulate}"
            hint = "micro-batches would change this loss: set accumulate to 1 and batch_size to what fits"
            raise ConfigError(Problem(message, key=f"losses.{term.name}", hint=hint))


def _detached(signals: Signals) -> Signals:
    features = {tap: value.detach() for tap, value in signals.features.items()}
    return replace(signals, logits=signals.logits.detach(), features=features)


def _check_gradient(term: Term, student: Model, seen: Signals, teacher: Signals | None, batch: Batch) -> None:
    key = f"losses.{term.name}"
    value = term.loss(seen, teacher, batch)
    parameters = [p for p in student.parameters() if p.requires_grad]
    gradients: Sequence[torch.Tensor | None] = []
    if value.requires_grad:
        gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    reached = [g for g in gradients if g is not None]
    if not reached:
        hint = "its taps may lie before every trained weight, or a tensor was detached on the way"
        raise ConfigError(Problem("no gradient of this term reaches the student", key=key, hint=hint))
    if not any(bool(g.any()) for g in reached):
        warnings.warn(f"{key}: its gradient is zero on the first samples", stacklevel=2)


# -------------------------------------------------------------------------------------------------------------- stages


def _synchronise(module: nn.Module) -> None:
    """Has batch normalisation take its statistics from the batches of all processes, in place.

    Raises ConfigError for a subclass, whose own forward pass torch's conversion would drop.
    """
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    for path, part in module.named_modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and type(part) not in (*plain, nn.SyncBatchNorm):
            message = f"{path} is a {type(part).__name__}, of which no synchronised form is known"
            raise ConfigError(Problem(message, key="student", hint="train this student in one process"))
    nn.SyncBatchNorm.convert_sync_batchnorm(module)


@torch.no_grad()
def _try_sharded(student: Model, images: torch.Tensor) -> None:
    """Raises ConfigError where a sharded student cannot be called: it uses weights of a layer from outside."""
    try:
        student.eval()(images)
    except (RuntimeError, AttributeError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        message = f"this student cannot be sharded, for its forward pass uses weights of a layer from outside: {error}"
        raise ConfigError(Problem(message, key="train.sharding", hint="sharding: none")) from error


def _own_device(name: str) -> torch.device:
    """The device that is asked for; of several processes on a machine with CUDA each takes one of its own."""
    device, everyone = choose_device(name), ranks.current()
    if device.type != "cuda" or everyone.size == 1:
        return device
    if device.index is not None:
        message = f"'{name}' is one GPU, and each of {everyone.size} processes takes its own"
        raise ConfigError(Problem(message, key="train.device", hint="device: cuda; CUDA_VISIBLE_DEVICES chooses which"))
    if everyone.local_size > torch.cuda.device_count():
        message = f"{everyone.local_size} processes on this machine, which has {torch.cuda.device_count()} GPUs"
        raise MissingError(message, hint="each process needs one of its own: start fewer, or train on the cpu")
    return torch.device("cuda", everyone.local)


def build_stage(
    experiment: Experiment,
    stage: TrainStage,
    data: Data,
    stage_file: Callable[[str], Path],
    start: Path | None = None,
) -> Built:
    """All objects of one training stage. `start` is the stem of the weights it starts from, None for fresh ones."""
    settings, everyone = experiment.train, ranks.current()
    device, sharded = _own_device(settings.device), sharding.wanted(settings)
    if sharded:
        sharding.check(settings)
    task = build_task(experiment)
    data = data.for_stage(stage.data)
    spec = stage.student or experiment.student

    seed_everything(settings.seed, stage.name, "student")
    student = records.load_model(start) if start else build_model(spec, data, "student", stage_file)
    for path in stage.frozen:
        _submodule(student.net, path).requires_grad_(False)
    models = build_teachers(stage, data, settings.seed, stage_file)

    seed_everything(settings.seed, stage.name, "terms")
    loader = build_loader(experiment, stage, data, device)
    terms = _build_terms(stage.losses, len(loader))
    _check_accumulation(terms, stage)
    taps = [t for term in terms for _, t in term.loss.taps]
    first = _on_cpu(loader.few(_DRY_RUN_SAMPLES))
    _dry_run(
        student, _together([LiveTeacher(m, task, taps) for m in models], taps), terms, task, first, data.index_size
    )

    if device.type == "cuda" and everyone.size > 1:
        for module in (student, *terms):
            _synchronise(module)
    layout = torch.channels_last if settings.layout == "channels_last" else torch.contiguous_format
    if sharded:
        sharding.shard(student.net, device)
    for model in (student, *models):
        model.to(device=device).to(memory_format=layout)  # type: ignore[call-overload]
    if sharded:
        _try_sharded(student, first.inputs.to(device))
    for term in terms:
        term.to(device)
    members = _teachers(experiment, stage, models, task, data, taps)
    teacher = _together(members, taps)
    if settings.compile is True and any(term.loss.taps for term in terms):
        message = "a student with taps cannot be compiled: its features would be lost"
        raise ConfigError(Problem(message, key="train.compile", hint="compile: false, for main run and control alike"))
    method: Method = registry.create(
        "methods", stage.method.kind, stage.method.arguments,
        student=student, teacher=teacher, terms=terms, task=task, frozen=stage.frozen,
        compile=settings.compile is True,
    )  # fmt: skip
    optimizer = build_optimizer(stage.optimizer.kind, stage.optimizer.arguments, method.trained)
    schedule = registry.create("schedules", stage.schedule.kind, stage.schedule.arguments)
    return Built(
        task, data, loader, method, optimizer, schedule.factor, teacher, members, device, str(settings.precision)
    )


def _teachers(
    experiment: Experiment, stage: TrainStage, models: Sequence[Model], task: Task, data: Data, taps: Sequence[str]
) -> list[Teacher]:
    """Each model as a teacher: with its store where the experiment keeps one, else asked at every step."""
    live = [LiveTeacher(model, task, taps) for model in models]
    if experiment.teacher_cache is None:
        return list(live)
    stores = [open_store(experiment, stage, number, model, data, taps) for number, model in enumerate(models)]
    return [CachedTeacher(*pair) for pair in zip(live, stores, strict=True)]


def _together(members: Sequence[Teacher], taps: Sequence[str]) -> Teacher | None:
    """One teacher of several; None of none."""
    if len(members) > 1:
        return Ensemble(members, taps)
    return members[0] if members else None


def _submodule(net: nn.Module, path: str) -> nn.Module:
    try:
        return net.get_submodule(path)
    except AttributeError:
        raise ConfigError(Problem(f"the student has no module '{path}'", key="frozen")) from None


def build_loader(experiment: Experiment, stage: TrainStage, data: Data, device: torch.device) -> TrainLoader:
    """The training batches of a stage; data: the stage's."""
    spec, changed = experiment.data, stage.data
    steps = changed.augment if changed.augment is not None else spec.augment
    return TrainLoader(
        data.train,
        batch_size=changed.batch_size or spec.batch_size,
        augment=Augment([registry.create("augment", s.kind, s.arguments) for s in steps], seed=spec.augment_seed),
        views=changed.views or spec.views,
        order_seed=experiment.train.seed,
        device=device,
        workers=spec.workers,
    )


def _on_cpu(batch: Batch) -> Batch:
    return Batch(batch.inputs.cpu(), batch.targets.cpu(), batch.index.cpu(), batch.view.cpu())


def check_teacher(top1: float, chance: float, spec: TeacherSpec) -> None:
    """Refuses a teacher that is no better than chance, unless it is declared a control."""
    if top1 <= chance and not spec.control:
        message = f"the teacher is no better than chance: {top1:.1f} against {chance:.1f} percent"
        hint = "check its weights, `normalize` and class order; a deliberate control says `control: true`"
        raise ConfigError(Problem(message, key="teacher", hint=hint))
