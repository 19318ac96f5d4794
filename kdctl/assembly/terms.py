"""Terms of the loss as an experiment asks for them, set up by a dry run that proves each to reach the student."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from kdctl import registry
from kdctl.config.schema import Component, LossSpec, TapPair, TrainStage
from kdctl.data.base import Split
from kdctl.errors import ConfigError, Problem, counted
from kdctl.losses.base import DryRun, Loss
from kdctl.losses.tokens import check_padding
from kdctl.methods.base import Term
from kdctl.models.record import Model
from kdctl.optim.schedules import WeightSchedule
from kdctl.signals import Batch, Signals
from kdctl.taps import Taps
from kdctl.taps import check as check_tap
from kdctl.tasks.base import Task
from kdctl.teachers.base import Teacher
from kdctl.teachers.several import Several

_LATE = 1e9
"""An epoch at which every warm-up is over."""


def build_terms(
    specs: Sequence[LossSpec], steps_per_epoch: int, ensemble: Component | None = None, num_teachers: int = 1
) -> list[Term]:
    """The terms of a stage, not set up yet. ensemble: how several teachers are combined."""
    terms = []
    for spec in specs:
        loss = _build_loss(spec, 0, num_teachers)
        if ensemble is not None and num_teachers > 1 and _one_by_one(loss, ensemble):
            losses = [loss, *(_build_loss(spec, number, num_teachers) for number in range(1, num_teachers))]
            loss = Several(losses, registry.create("ensembles", ensemble.kind, ensemble.arguments))
        if loss.needs_taps and not loss.taps:
            hint = "add taps: [layer1, ...]; `kdctl explain " + spec.kind + "` says which it is meant for"
            raise ConfigError(Problem("the term needs taps and has none", key=f"losses.{spec.label}", hint=hint))
        loss.steps_per_epoch = steps_per_epoch
        terms.append(Term(spec.label, loss, WeightSchedule(spec.weight, steps_per_epoch)))
    return terms


def dry_run(
    student: Model, teacher: Teacher | None, terms: Sequence[Term], task: Task, batch: Batch, num_samples: int
) -> None:
    """Makes the adapters of every term from real shapes, then proves that each term's gradient reaches the student.

    Works on a copy of the student in eval mode: no buffer of the real one moves.
    """
    trial = copy.deepcopy(student).eval()
    taps = Taps(trial.net, sorted({s for term in terms for s, _ in term.loss.taps}))

    def see(batch: Batch) -> Signals:
        with _tapped("student", terms), taps.recording() as features:
            outputs = task.forward(trial, batch)
        return task.signals(outputs, batch, features)

    def said(batch: Batch) -> Signals | None:
        with _tapped("teacher", terms):
            return None if teacher is None else teacher(batch)

    try:
        seen = see(batch)
        if batch.strong is not None:
            seen = replace(seen, strong=see(batch.strongly()))
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        message = f"the model cannot take images of shape {tuple(batch.inputs.shape[1:])}: {error}"
        hint = "student.input_size resizes images to what the model was made for, for example 224"
        raise ConfigError(Problem(message, key="student", hint=hint)) from error
    signals = said(batch)
    if signals is not None and batch.strong is not None:
        signals = replace(signals, strong=said(batch.strongly()))
    unlike = signals is not None and signals.logits.shape != seen.logits.shape
    if signals is not None and unlike and task.link != "embedding":
        got, own = tuple(signals.logits.shape[1:]), tuple(seen.logits.shape[1:])
        raise ConfigError(Problem(f"the teacher's outputs have shape {got}, the student's {own}", key="teacher"))
    for term in terms:
        nets = [] if teacher is None else [model.net for model in teacher.models]
        with _of_term(term):
            run = DryRun(task, batch, _detached(seen), signals, num_samples, trial.net, nets)
            check_padding(term.loss, run)
            _check_classifier(term.loss, [] if teacher is None else teacher.models)
            _check_places(term.loss, run, [] if teacher is None else teacher.models)
            term.loss.setup(run)
    for term in terms:
        term.loss.eval()
        term.loss.bind(trial.net)
        term.loss.epoch = _LATE
        with _of_term(term):
            _check_gradient(term, trial, seen, signals, batch)
        term.loss.epoch = 0.0
        term.loss.train()


def _check_classifier(loss: Loss, teachers: Sequence[Model]) -> None:
    """Refuses a term on the rows of a classifier whose classes stand in another order than those of the data."""
    reads = any(isinstance(part, Loss) and part.reads_classifier for part in loss.modules())
    if reads and any(model.record.class_order is not None for model in teachers):
        message = "the term reads the rows of the teacher's classifier, and its classes stand in another order"
        raise ConfigError(Problem(message, hint="a teacher without `classes`, or a term on logits"))


def _check_places(loss: Loss, run: DryRun, teachers: Sequence[Model]) -> None:
    """Refuses to compare features of tokens where a teacher reads by another tokenizer: their places differ."""
    if run.teacher is None or all(model.record.reads is None for model in teachers):
        return
    for _, tap in loss.taps:
        feature = run.teacher.features.get(tap)
        if feature is not None and feature.ndim > 2:
            message = f"'{tap}' is of each token, and the teacher reads by another tokenizer: its tokens are others"
            raise ConfigError(Problem(message, key="taps", hint="a term on logits, or a tap of the whole text, (N, D)"))


def check_taps(losses: Sequence[LossSpec], student: Model, teachers: Sequence[Model]) -> None:
    """Raises ConfigError, for all terms of a stage at once, where a tap names no module of its model."""
    problems = []
    for spec in losses:
        places = [(f"the student ({_kind(student)})", student, student_tap(tap)) for tap in spec.taps]
        for number, model in enumerate(teachers if _is_taught(spec) else []):
            which = f"teacher {number + 1}" if len(teachers) > 1 else "the teacher"
            for tap in spec.taps:
                with _of_term(spec):
                    places.append((f"{which} ({_kind(model)})", model, teacher_tap(tap, number)))
        for who, model, path in places:
            try:
                check_tap(model.net, path, who)
            except ConfigError as error:
                problems += [replace(p, key=f"losses.{spec.label}.taps") for p in error.problems]
    if problems:
        raise ConfigError(*dict.fromkeys(problems))


def _kind(model: Model) -> str:
    return registry.shown_kind(model.record.kind)


@contextmanager
def _of_term(term: Term | LossSpec) -> Iterator[None]:
    """Puts the term before the key of a problem inside."""
    key = f"losses.{term.name if isinstance(term, Term) else term.label}"
    try:
        yield
    except ConfigError as error:
        elsewhere = ("losses", "ensemble", "teacher_cache")
        raise ConfigError(
            *(
                p
                if p.key and p.key.partition(".")[0] in elsewhere
                else replace(p, key=f"{key}.{p.key}" if p.key else key)
                for p in error.problems
            )
        ) from error


@contextmanager
def _tapped(who: str, terms: Sequence[Term]) -> Iterator[None]:
    """Says of which model a tap is that its forward pass did not reach, or that holds no tensor, and in which term."""
    try:
        yield
    except ConfigError as error:
        problems = []
        for problem in error.problems:
            found = re.search(r"tap '([^']*)'", problem.message) if problem.key == "taps" else None
            if found is not None:
                side = 0 if who == "student" else 1
                own = [t.name for t in terms if any(pair[side] == found[1] for pair in t.loss.taps)]
                key = f"losses.{own[0]}.taps" if own else "losses"
                problem = replace(problem, message=f"{who}: {problem.message}", key=key)
            problems.append(problem)
        raise ConfigError(*problems) from error


def _is_taught(spec: LossSpec) -> bool:
    return bool(registry.load(registry.find("losses", spec.kind)).needs_teacher)  # type: ignore[attr-defined]


def _build_loss(spec: LossSpec, number: int, num_teachers: int) -> Loss:
    """The loss of a term against teacher `number`."""
    loss: Loss = registry.create("losses", spec.kind, spec.arguments)
    teachers = range(num_teachers) if loss.sees_members else [number]
    loss.taps = tuple((student_tap(tap), teacher_tap(tap, k)) for tap in spec.taps for k in teachers)
    return loss


def student_tap(tap: str | TapPair) -> str:
    return tap if isinstance(tap, str) else tap.student


def teacher_tap(tap: str | TapPair, number: int) -> str:
    """The place in teacher `number` that a tap of a term names."""
    if isinstance(tap, str):
        return tap
    if isinstance(tap.teacher, str):
        return tap.teacher
    if number >= len(tap.teacher):
        message = f"{counted(len(tap.teacher), 'place')}, and none for teacher {number + 1}"
        raise ConfigError(Problem(message, key="taps", hint="a list has one place a teacher, in their order"))
    return tap.teacher[number]


def teacher_taps(stage: TrainStage, number: int) -> list[str]:
    """All places in teacher `number` that the terms of a stage look at."""
    return sorted({teacher_tap(tap, number) for spec in stage.losses if _is_taught(spec) for tap in spec.taps})


def _one_by_one(loss: Loss, ensemble: Component) -> bool:
    """Whether a term is to be compared with each of several teachers, not with the mean of their logits."""
    spoken = ensemble.kind == "mean_logits" and not loss.taps
    return loss.needs_teacher and not loss.sees_members and not spoken


def check_accumulation(terms: Sequence[Term], stage: TrainStage) -> None:
    for term in terms:
        if term.loss.batchwise and stage.accumulate > 1:
            message = f"the term compares the samples of a batch, and accumulate is {stage.accumulate}"
            hint = "micro-batches would change this loss: set accumulate to 1 and batch_size to what fits"
            raise ConfigError(Problem(message, key=f"losses.{term.name}", hint=hint))


def check_labels(terms: Sequence[Term], train: Split) -> None:
    """Refuses terms that learn from labels alone where no training sample has one."""
    if terms and all(term.loss.needs_targets for term in terms) and not train.has_labels:
        message = "no training sample has a label, and every term learns from labels"
        raise ConfigError(Problem(message, key="data", hint="label some samples, or add a term such as kd"))


def _detached(signals: Signals) -> Signals:
    return signals.map(torch.Tensor.detach)


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
