"""The default method: one student, a weighted sum of terms, a teacher where a term needs one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdctl import ranks
from kdctl.clock import Clock
from kdctl.device import compiled
from kdctl.methods.base import Method, Parts, Term, count_units, over_streams
from kdctl.ranks import Ranks
from kdctl.signals import IGNORE, Batch, Signals
from kdctl.taps import Taps

Seen = tuple[Signals, Signals | None, Batch]
"""What a term is called with: the student's signals, the teacher's, and the batch."""


class Distill(Method):
    """Trains a student on the weighted sum of its terms (Hinton, Vinyals, Dean, 2015, and everything after).

    The teacher is held outside the trained tree and is asked only where a term with weight needs it, and only for what
    it needs.
    """

    parallel: ClassVar[bool] = True

    def assemble(self, parts: Parts) -> None:
        self._ranks = ranks.current()
        self.student = parts.student
        self.task = parts.task
        self.terms = list(parts.terms)
        self.trained = nn.ModuleDict({"student": self.student.net, "terms": nn.ModuleList(self.terms)})
        self.clock = Clock()
        self._teacher = parts.teacher
        self._taps = Taps(self.student.net, sorted({s for term in self.terms for s, _ in term.loss.taps}))
        self.frozen = [self.student.net.get_submodule(path) for path in parts.frozen]
        for term in self.terms:
            for parameter in term.parameters() if term.loss.batchwise and self._ranks.size > 1 else ():
                # Every process has the whole gradient of these, and the processes' gradients are summed.
                parameter.register_hook(lambda gradient: gradient / self._ranks.size)
        self._forward = compiled(self.student) if parts.compile else self.student

    def begin_step(self, batch: Batch, epoch: float) -> Batch:
        tokens = self.student.record.tokens
        if self._ranks.size == 1 or tokens is None or not any(term.loss.batchwise for term in self.terms):
            return batch
        longest = int(self._ranks.gathered(torch.tensor([batch.inputs.shape[1]])).max())
        return _padded(batch, longest, tokens.pad)

    def counts(self, batch: Batch) -> dict[str, int | Tensor]:
        counts = super().counts(batch)
        if self._ranks.size == 1:
            return counts
        own = torch.stack([torch.as_tensor(count, device=batch.index.device).double() for count in counts.values()])
        total: dict[str, int | Tensor] = dict(zip(counts, self._ranks.total(own), strict=True))
        if any(term.loss.batchwise for term in self.terms):
            whole = _whole_batch(batch, self._ranks)
            total |= {term.name: count_units(term.loss, whole) for term in self.terms if term.loss.batchwise}
        return total

    def step(self, batch: Batch, epoch: float) -> dict[str, Tensor]:
        active = [term for term in self.terms if term.weight.at(epoch) != 0]
        for term in active:
            term.loss.epoch = epoch
        taught = [term for term in active if term.loss.needs_teacher]
        with self.clock.section("teacher"):
            teacher = self._ask_teacher(batch, taught)
            if batch.strong is not None and teacher is not None:
                teacher = replace(teacher, strong=self._ask_teacher(batch.strongly(), taught))
        student = self.see(batch)
        if batch.strong is not None:
            student = replace(student, strong=self.see(batch.strongly()))
        apart = self._ranks.size == 1 or not any(term.loss.batchwise for term in active)
        whole = None if apart else _whole(student, teacher, batch, self._ranks)
        return {term.name: self._sum(term, (student, teacher, batch), whole) for term in active}

    def see(self, batch: Batch) -> Signals:
        """What the student says of a batch, and its features."""
        with self._taps.recording() as features:
            outputs = self.task.forward(self._forward, batch)
        return self.task.signals(outputs, batch, features)

    def _ask_teacher(self, batch: Batch, terms: Sequence[Term]) -> Signals | None:
        if self._teacher is None or not terms:
            return None
        taps = {tap for term in terms for _, tap in term.loss.taps}
        return self._teacher(batch, taps, any(term.loss.needs_logits for term in terms))

    def _sum(self, term: Term, own: Seen, whole: Seen | None) -> Tensor:
        """The term's sum over this process's samples. One that compares samples is computed on all of them by every
        process; its value is shared out among them, its gradient (by a process's own samples) is not."""
        if whole is None or not term.loss.batchwise:
            return over_streams(term.loss, *own)
        value = over_streams(term.loss, *whole)
        return value - value.detach() * (1 - 1 / self._ranks.size)


def _padded(batch: Batch, length: int, pad: int) -> Batch:
    """The batch with its texts as long as the longest of all processes, without which they could not be gathered."""
    own = batch.inputs.shape[1]

    def longer(values: Tensor, padding: int) -> Tensor:
        return F.pad(values, (0, length - own), value=padding)

    of_tokens = {n: longer(v, 0) for n, v in batch.extra.items() if v.ndim == 2 and v.shape[1] == own}
    keep = None if batch.keep is None else longer(batch.keep, 0)
    targets = batch.targets if batch.keep is None else longer(batch.targets, IGNORE)
    return replace(batch, inputs=longer(batch.inputs, pad), targets=targets, keep=keep, extra=batch.extra | of_tokens)


def _whole_batch(batch: Batch, everyone: Ranks) -> Batch:
    """The batch of all processes, but for its inputs, which stay this process's own."""
    return replace(
        batch,
        targets=everyone.gathered(batch.targets),
        index=everyone.gathered(batch.index),
        view=everyone.gathered(batch.view),
        keep=None if batch.keep is None else everyone.gathered(batch.keep),
        extra={name: everyone.gathered(value) for name, value in batch.extra.items()},
    )


def _whole(student: Signals, teacher: Signals | None, batch: Batch, everyone: Ranks) -> Seen:
    """What a term sees of the whole batch; gradients flow to this process's own samples."""
    seen = None if teacher is None else teacher.map(everyone.gathered)
    return student.map(everyone.whole), seen, _whole_batch(batch, everyone)
