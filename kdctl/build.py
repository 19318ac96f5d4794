"""From an Experiment to objects: the one place where configuration and code meet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdctl import ranks, registry, sharding
from kdctl.assembly.inherit import inherit
from kdctl.assembly.models import build_model, build_teachers, check_causal, check_fits, check_teacher, seed_everything
from kdctl.assembly.terms import build_terms, check_accumulation, check_labels, check_taps, dry_run, teacher_taps
from kdctl.config.schema import Experiment, RunSettings, TrainStage
from kdctl.data.augment import Augment
from kdctl.data.loader import TrainLoader
from kdctl.data.prepare import Data, prepare
from kdctl.device import choose_device
from kdctl.errors import ConfigError, MissingError, Problem, counted, did_you_mean
from kdctl.methods.base import Method, Parts, Term
from kdctl.models import record as records
from kdctl.models.record import Model
from kdctl.signals import Batch
from kdctl.tasks.base import Task
from kdctl.teachers.base import Teacher
from kdctl.teachers.cached import CachedTeacher
from kdctl.teachers.ensemble import Ensemble
from kdctl.teachers.live import LiveTeacher
from kdctl.teachers.shuffled import ShuffledTeacher
from kdctl.teachers.store import open_store

__all__ = [
    "Built",
    "build_data",
    "build_loader",
    "build_model",
    "build_stage",
    "build_task",
    "build_teachers",
    "check_fits",
    "check_teacher",
    "seed_everything",
    "teacher_taps",
]

_DRY_RUN_SAMPLES = 8


@dataclass
class Built:
    """The objects of a stage, ready to train."""

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
    inherited: str = ""
    """What the student has of its teacher before it trains; empty where that is nothing."""

    @property
    def teachers(self) -> list[Model]:
        """The models that teach."""
        return [model for member in self.members for model in member.models]


def build_task(experiment: Experiment) -> Task:
    return registry.create("tasks", experiment.task.kind, experiment.task.arguments)


def build_data(experiment: Experiment) -> Data:
    return prepare(experiment.data, target=build_task(experiment).target)


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
        there = counted(torch.cuda.device_count(), "GPU")
        message = f"{everyone.local_size} processes on this machine, which has {there}"
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
    settings = experiment.train
    device, sharded = _own_device(settings.device), sharding.wanted(settings)
    if sharded:
        sharding.check(settings)
    task = build_task(experiment)
    data = data.for_stage(stage.data)
    method: Method = registry.create("methods", stage.method.kind, stage.method.arguments)
    _check_method(method, stage, settings)

    seed_everything(settings.seed, stage.name, "student")
    student, models, inherited = _build_models(experiment, stage, data, stage_file, start, method)
    seed_everything(settings.seed, stage.name, "terms")
    loader = method.loader(build_loader(experiment, stage, data, device))
    terms = build_terms(stage.losses, len(loader), stage.ensemble, len(models))
    check_accumulation(terms, stage)
    check_labels(terms, data.train)
    check_taps(stage.losses, student, models)
    first = _on_cpu(loader.few(_DRY_RUN_SAMPLES))
    taps = [teacher_taps(stage, number) for number in range(max(len(models), 1))]
    live = [LiveTeacher(model, task, own) for model, own in zip(models, taps, strict=False)]
    dry_run(student, method.rehearse(_together(live), task, taps[0]), terms, task, first, data.index_size)

    if device.type == "cuda" and ranks.current().size > 1:
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
        term.loss.bind(student.net)
    members = _teachers(experiment, stage, models, task, data, taps)
    given = zip(members, stage.teachers, strict=True)
    teacher = _together([ShuffledTeacher(member) if spec.shuffled else member for member, spec in given])
    _check_compile(settings.compile is True, terms)
    compile, steps = settings.compile is True, len(loader)
    precision = str(settings.precision)
    frozen, epochs = stage.frozen, stage.epochs
    method.assemble(Parts(student, teacher, terms, task, device, frozen, compile, steps, precision, epochs))
    optimizer = method.make_optimizer(stage.optimizer.kind, stage.optimizer.arguments)
    schedule = registry.create("schedules", stage.schedule.kind, stage.schedule.arguments)
    step_factor = schedule.factor
    return Built(task, data, loader, method, optimizer, step_factor, teacher, members, device, precision, inherited)


def _build_models(
    experiment: Experiment, stage: TrainStage, data: Data, stage_file: Callable[[str], Path], start: Path | None,
    method: Method,
) -> tuple[Model, list[Model], str]:  # fmt: skip
    """The model that trains, as the stage's method wants it, the teachers, and what it begins with of them."""
    seed, spec = experiment.train.seed, stage.student or experiment.student
    student = records.load_model(start) if start else build_model(spec, data, "student", stage_file)

    def fresh(number: int) -> Model:
        seed_everything(seed, stage.name, "student", f"peer {number}")
        return build_model(spec.model_copy(update={"weights": None, "stage": None}), data, "student")

    for path in stage.frozen:
        _submodule(student.net, path).requires_grad_(False)
    models = build_teachers(stage, data, seed, stage_file)
    if data.whole.head == "vocabulary" and not data.whole.drawn:
        for key, model in (("student", student), *(("teacher", teacher) for teacher in models)):
            check_causal(model, key)
    inherited = inherit(student, spec.inherit, models, data.train) if spec.inherit and start is None else ""
    seed_everything(seed, stage.name, "method")
    return method.prepare(student, models, fresh), models, inherited


def _check_method(method: Method, stage: TrainStage, settings: RunSettings) -> None:
    """Refuses what a method, or balancing, does not go with."""
    if stage.balance == "gradient" and sharding.wanted(settings):
        message = "terms are balanced by their gradients, which are not measured where weights are sharded"
        raise ConfigError(Problem(message, key="balance", hint="balance: none, or train.sharding: none"))
    if not method.one_gradient and (stage.clip_norm is not None or settings.precision == "fp16"):
        message = f"the method {stage.method.kind} has two gradients, which are neither clipped nor scaled as one"
        raise ConfigError(Problem(message, key="method", hint="leave out train.clip_norm, and train in fp32 or bf16"))
    if ranks.current().size > 1 and not method.parallel:
        message = f"the method {stage.method.kind} trains in one process, and there are {ranks.current().size}"
        raise ConfigError(Problem(message, key="method", hint="train without --nproc"))


def _check_compile(compile: bool, terms: Sequence[Term]) -> None:
    if compile and any(term.loss.taps for term in terms):
        message = "a student with taps cannot be compiled: its features would be lost"
        raise ConfigError(Problem(message, key="train.compile", hint="compile: false, for main run and control alike"))


def _teachers(
    experiment: Experiment, stage: TrainStage, models: Sequence[Model], task: Task, data: Data,
    taps: Sequence[Sequence[str]],
) -> list[Teacher]:  # fmt: skip
    """Each model as a teacher: with its store where the experiment keeps one, else asked at every step."""
    live = [LiveTeacher(model, task, own) for model, own in zip(models, taps, strict=False)]
    if experiment.teacher_cache is None:
        return list(live)
    stores = [
        open_store(experiment, stage, number, model, data, own)
        for number, (model, own) in enumerate(zip(models, taps, strict=False))
    ]
    return [CachedTeacher(*pair) for pair in zip(live, stores, strict=True)]


def _together(members: Sequence[Teacher]) -> Teacher | None:
    """One teacher of several; None of none."""
    if len(members) > 1:
        return Ensemble(members)
    return members[0] if members else None


def _submodule(net: nn.Module, path: str) -> nn.Module:
    try:
        return net.get_submodule(path)
    except AttributeError:
        names = [name for name, _ in net.named_modules() if name]
        hint = did_you_mean(path, names) or f"modules are {', '.join(name for name, _ in net.named_children())}, ..."
        raise ConfigError(Problem(f"the student has no module '{path}'", key="frozen", hint=hint)) from None


def build_loader(experiment: Experiment, stage: TrainStage, data: Data, device: torch.device) -> TrainLoader:
    """The training batches of a stage; data: the stage's."""
    spec, changed = experiment.data, stage.data
    steps = changed.augment if changed.augment is not None else spec.augment
    strong = changed.strong_augment if changed.strong_augment is not None else spec.strong_augment
    return TrainLoader(
        data.train,
        batch_size=changed.batch_size or spec.batch_size,
        augment=_augment(steps, spec.augment_seed),
        strong=_augment(strong, spec.augment_seed) if strong else None,
        views=changed.views or spec.views,
        order_seed=experiment.train.seed,
        device=device,
        workers=spec.workers,
    )


def _augment(steps: Sequence[Any], seed: int) -> Augment:
    return Augment([registry.create("augment", s.kind, s.arguments) for s in steps], seed=seed)


def _on_cpu(batch: Batch) -> Batch:
    strong = None if batch.strong is None else batch.strong.cpu()
    extra = {name: value.cpu() for name, value in batch.extra.items()}
    given = (batch.inputs.cpu(), batch.targets.cpu(), batch.index.cpu(), batch.view.cpu())
    return Batch(*given, keep=None if batch.keep is None else batch.keep.cpu(), strong=strong, extra=extra)
