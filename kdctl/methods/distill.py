"""The default method: one student, a weighted sum of terms, a teacher where a term needs one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kdctl.methods.base import Method, Term
from kdctl.models.record import Model
from kdctl.signals import Batch, Signals
from kdctl.taps import Taps
from kdctl.tasks.base import Task
from kdctl.teachers.live import LiveTeacher


class Distill(Method):
    """Trains a student on the weighted sum of its terms (Hinton, Vinyals, Dean, 2015, and everything after).

    The teacher is held outside the trained tree and is asked only where a term with weight needs it.
    """

    def __init__(
        self,
        *,
        student: Model,
        teacher: LiveTeacher | None,
        terms: Sequence[Term],
        task: Task,
        frozen: Sequence[str] = (),
    ) -> None:
        self.student = student
        self.task = task
        self.terms = list(terms)
        self.trained = nn.ModuleDict({"student": student.net, "terms": nn.ModuleList(terms)})
        self._teacher = teacher
        self._taps = Taps(student.net, sorted({s for term in terms for s, _ in term.loss.taps}))
        self._frozen = [student.net.get_submodule(path) for path in frozen]

    def counts(self, batch: Batch) -> dict[str, int | Tensor]:
        return {term.name: term.loss.count(batch) for term in self.terms}

    def weights(self, epoch: float) -> dict[str, float]:
        return {term.name: term.weight.at(epoch) for term in self.terms}

    def train(self) -> None:
        super().train()
        for module in self._frozen:
            module.eval()

    def step(self, batch: Batch, epoch: float) -> dict[str, Tensor]:
        active = [term for term in self.terms if term.weight.at(epoch) != 0]
        teacher = self._ask_teacher(batch, active)
        with self._taps.recording() as features:
            outputs = self.task.forward(self.student, batch)
        student = self.task.signals(outputs, batch, features)
        return {term.name: term.loss(student, teacher, batch) for term in active}

    def _ask_teacher(self, batch: Batch, terms: Sequence[Term]) -> Signals | None:
        if self._teacher is None or not any(term.loss.needs_teacher for term in terms):
            return None
        return self._teacher(batch)
