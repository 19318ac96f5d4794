"""Self-distillation: the student is taught by what it was before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from kdctl.config.types import Fraction
from kdctl.errors import ConfigError, Problem
from kdctl.methods.base import Parts
from kdctl.methods.distill import Distill
from kdctl.methods.moving import MovingTeacher, moved_beside
from kdctl.models.record import Model, build_model
from kdctl.optim.schedules import WeightSchedule
from kdctl.tasks.base import Task
from kdctl.teachers.base import Teacher


class SelfDistill(Distill):
    """The teacher is the student's own past: an average over its steps, or what it was an epoch ago.

    Formula: ema: after update n the teacher is d * teacher + (1 - d) * student with d = min(decay, n / (n + 1)),
        statistics of batch normalisation included. last_epoch: the teacher is the student as the epoch before left it;
        in the first epoch there is none, and terms that need one weigh 0. It is asked in eval mode.
    Paper: ema: Tarvainen & Valpola, Mean Teachers Are Better Role Models, NeurIPS 2017. last_epoch: Kim et al.,
        Self-Knowledge Distillation with Progressive Refinement of Targets (PS-KD), ICCV 2021.
    Published: ema: decay 0.99 while the student improves quickly, 0.999 afterwards. last_epoch: with a = 0.8 t / 300
        in epoch t of 300, ce of weight 1 - a and kd of weight a at temperature 1, here ce {0: 1, 300: 0.2} and
        kd {0: 0, 300: 0.8}.

    Two more forms of self-distillation need no method: an own classifier at each stage (byot), and made-up teachers
    (tf_reg, uskd) are terms of `losses`.

    teacher: `ema` or `last_epoch`.
    decay: of the average; last_epoch does not use it.
    """

    parallel: ClassVar[bool] = False
    provides_teacher: ClassVar[bool] = True

    def __init__(self, *, teacher: Literal["ema", "last_epoch"] = "ema", decay: Fraction = 0.999) -> None:
        self.kind = teacher
        self.decay = decay
        self._updates = 0

    def prepare(self, student: Model, teachers: Sequence[Model], fresh: Callable[[int], Model]) -> Model:
        if teachers:
            message = "the student's own past is its teacher, and a teacher is given too"
            hint = "leave the teacher out, or set method: distill"
            raise ConfigError(Problem(message, key="teacher", hint=hint))
        # Other weights than the student's until the dry run of the terms is over: equal ones would have no gradient.
        self._past = build_model(student.record, student.base)
        return student

    def rehearse(self, teacher: Teacher | None, task: Task, taps: Sequence[str]) -> Teacher | None:
        self._own_teacher = MovingTeacher(self._past, task, taps)
        return self._own_teacher

    def assemble(self, parts: Parts) -> None:
        terms = list(parts.terms)
        if self.kind == "last_epoch":
            if all(term.loss.needs_teacher for term in terms):
                message = "in the first epoch there is no teacher yet, and every term needs one"
                raise ConfigError(Problem(message, key="losses", hint="add {kind: ce}, or method.teacher: ema"))
            for term in terms:
                term.weight = _FromEpoch1(term.weight) if term.loss.needs_teacher else term.weight
        moved_beside(self._past, parts.student, parts.device)
        _mix(self._past.net, parts.student.net, 0.0)
        super().assemble(replace(parts, teacher=self._own_teacher, terms=terms))

    def begin_epoch(self, epoch: int) -> None:
        if self.kind == "last_epoch":
            _mix(self._past.net, self.student.net, 0.0)

    def end_step(self) -> None:
        if self.kind == "ema":
            self._updates += 1
            _mix(self._past.net, self.student.net, min(self.decay, self._updates / (self._updates + 1)))

    def state_dict(self) -> dict[str, Any]:
        return {"past": self._past.net.state_dict(), "updates": self._updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._past.net.load_state_dict(state["past"])
        self._updates = state["updates"]


class _FromEpoch1(WeightSchedule):
    """The weight of a term that has no teacher in the first epoch."""

    def __init__(self, inner: WeightSchedule) -> None:
        super().__init__(inner.weight, inner.steps_per_epoch)

    def at(self, epoch: float) -> float:
        return 0.0 if epoch < 1 else super().at(epoch)


@torch.no_grad()
def _mix(past: nn.Module, now: nn.Module, decay: float) -> None:
    """past <- decay * past + (1 - decay) * now, for all weights and statistics; counters are copied."""
    for old, new in zip([*past.parameters(), *past.buffers()], [*now.parameters(), *now.buffers()], strict=True):
        if old.is_floating_point() and decay:
            old.lerp_(new, 1 - decay)
        else:
            old.copy_(new)
