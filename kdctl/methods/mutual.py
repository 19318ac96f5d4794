"""Deep mutual learning: students that teach each other while all of them learn."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from kdctl.clock import Clock
from kdctl.config.types import PositiveInt
from kdctl.device import compiled
from kdctl.errors import ConfigError, Problem
from kdctl.methods.base import Method, Parts, Term, over_streams
from kdctl.methods.moving import MovingTeacher, moved_beside
from kdctl.models.record import Model
from kdctl.signals import Batch, Signals
from kdctl.taps import Taps
from kdctl.tasks.base import Task
from kdctl.teachers.base import Teacher


@dataclass
class _Learner:
    """One of the students: its terms, its taps as student and as teacher, and its forward pass."""

    terms: list[Term]
    taps: Taps
    forward: nn.Module


class Mutual(Method):
    """Students of one kind that learn together, each taught by all others: no teacher is needed.

    Formula: of K students, student k minimises its own terms + 1 / (K - 1) sum over l != k of each term that needs a
        teacher, with what student l says at this step as a constant. All are updated at once.
    Paper: Zhang, Xiang, Hospedales & Lu, Deep Mutual Learning, CVPR 2018, eq. 8 and 9.
    Published: K 2, losses ce and kd of weight 1 at temperature 1 (CIFAR-100, Market-1501).

    Every term of `losses` holds for every student. Metrics name those of the student by their name, and those of the
    others <term>.peer2, <term>.peer3, ... Learnt parts of a term are a student's own, one for all that teach it. The
    first student is the one that is validated and shipped; `balance` looks at its terms alone. The paper updates one
    student after the other.

    peers: students beside the one that is shipped; K - 1.
    """

    provides_teacher: ClassVar[bool] = True

    def __init__(self, *, peers: PositiveInt = 1) -> None:
        self.num_peers = peers

    def prepare(self, student: Model, teachers: Sequence[Model], fresh: Callable[[int], Model]) -> Model:
        if teachers:
            hint = "leave the teacher out, or set method: distill"
            message = "the students teach each other, and a teacher is given too"
            raise ConfigError(Problem(message, key="teacher", hint=hint))
        self._peers = [fresh(number) for number in range(1, self.num_peers + 1)]
        return student

    def rehearse(self, teacher: Teacher | None, task: Task, taps: Sequence[str]) -> Teacher | None:
        return MovingTeacher(copy.deepcopy(self._peers[0]), task, taps)

    def assemble(self, parts: Parts) -> None:
        self.student = parts.student
        self.task = parts.task
        self.clock = Clock()
        for peer in self._peers:
            moved_beside(peer, parts.student, parts.device)
        models = [self.student, *self._peers]
        self._learners = [
            self._learner(model, _terms_of(parts.terms, number, model), parts.compile)
            for number, model in enumerate(models, start=1)
        ]
        self.terms = [term for learner in self._learners for term in learner.terms]
        self.elsewhere = {term.name for learner in self._learners[1:] for term in learner.terms}
        self.trained = nn.ModuleDict(
            {
                "student": self.student.net,
                "peers": nn.ModuleList([peer.net for peer in self._peers]),
                "terms": nn.ModuleList(self.terms),
            }
        )
        self.frozen = [self.student.net.get_submodule(path) for path in parts.frozen]

    def _learner(self, model: Model, terms: list[Term], compile: bool) -> _Learner:
        mine = {s for term in terms for s, _ in term.loss.taps}
        asked = {t for term in terms if term.loss.needs_teacher for _, t in term.loss.taps}
        return _Learner(terms, Taps(model.net, sorted(mine | asked)), compiled(model) if compile else model)

    def step(self, batch: Batch, epoch: float) -> dict[str, Tensor]:
        seen = [self._see(learner, batch) for learner in self._learners]
        said = [signals.map(Tensor.detach) for signals in seen]
        sums: dict[str, Tensor] = {}
        for number, learner in enumerate(self._learners):
            others = said[:number] + said[number + 1 :]
            for term in learner.terms:
                if term.weight.at(epoch) == 0:
                    continue
                term.loss.epoch = epoch
                teachers: Sequence[Signals | None] = others if term.loss.needs_teacher else [None]
                values = [over_streams(term.loss, seen[number], teacher, batch) for teacher in teachers]
                sums[term.name] = torch.stack(values).mean()
        return sums

    def _see(self, learner: _Learner, batch: Batch) -> Signals:
        with learner.taps.recording() as features:
            outputs = self.task.forward(learner.forward, batch)
        signals = self.task.signals(outputs, batch, features)
        return signals if batch.strong is None else replace(signals, strong=self._see(learner, batch.strongly()))


def _terms_of(terms: Sequence[Term], number: int, model: Model) -> list[Term]:
    """The terms of student `number` (from 1): the given ones for the first, copies for the others."""
    if number == 1:
        return list(terms)
    copies = [copy.deepcopy(term) for term in terms]
    for term in copies:
        term.name = f"{term.name}.peer{number}"
        term.loss.bind(model.net)
    return copies
