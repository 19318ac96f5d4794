"""A term against several teachers: one copy of it for each, with adapters of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from torch import Tensor, nn

from kdctl.errors import ConfigError, Problem
from kdctl.losses.base import DryRun, Loss
from kdctl.losses.tokens import check_padding
from kdctl.signals import Batch, Signals
from kdctl.teachers.combine import Combination


class Several(Loss):
    """The values of a term against each teacher, combined.

    losses: the term, once for each teacher in their order, with the taps of that teacher. Logits are asked for where
    the term looks at them or the teachers are weighed by them.
    """

    leaves_padding_out: ClassVar[bool] = True  # `setup` asks each of its losses

    def __init__(self, losses: Sequence[Loss], combination: Combination) -> None:
        super().__init__()
        self.losses = nn.ModuleList(losses)
        self.combination = combination
        first = losses[0]
        for name in ("needs_targets", "needs_taps", "links", "sees_streams"):
            setattr(self, name, getattr(first, name))
        self.needs_logits = first.needs_logits or combination.needs_logits  # type: ignore[misc]
        self.batchwise = first.batchwise or combination.batchwise  # type: ignore[misc]
        self.taps = tuple(dict.fromkeys(pair for loss in losses for pair in loss.taps))

    def setup(self, dry_run: DryRun) -> None:
        assert dry_run.teacher is not None
        if dry_run.task.link not in self.combination.links:
            message = "it weighs teachers by their probabilities of classes of which a sample has one"
            hint = "this task has none: take mean_logits, mean or weighted"
            raise ConfigError(Problem(message, key="ensemble.kind", hint=hint))
        seen = zip(self._each(), _members(dry_run.teacher), dry_run.teacher_nets, strict=True)
        for loss, teacher, net in seen:
            own = replace(dry_run, teacher=teacher, teacher_nets=[net])
            check_padding(loss, own)
            loss.setup(own)

    def bind(self, student_net: nn.Module) -> None:
        for loss in self._each():
            loss.bind(student_net)

    def count(self, batch: Batch) -> int | Tensor:
        return self._each()[0].count(batch)

    def forward(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        assert teacher is not None
        values = []
        for loss, member in zip(self._each(), _members(teacher), strict=True):
            loss.epoch, loss.steps_per_epoch = self.epoch, self.steps_per_epoch
            whole = loss.batchwise or type(loss).values is Loss.values  # a user's own may give sums alone
            values.append((loss if whole else loss.values)(student, member, batch))
        members = [replace(member, logits=member.logits.detach()) for member in teacher.members]
        own = replace(student, features={tap: student.features[tap] for tap, _ in self.taps})
        return self.combination.combine(values, own, members, batch)

    def _each(self) -> list[Loss]:
        return [loss for loss in self.losses if isinstance(loss, Loss)]


def _members(teacher: Signals) -> list[Signals]:
    """What each teacher says, of the strongly augmented version too where there is one."""
    if teacher.strong is None:
        return list(teacher.members)
    return [replace(m, strong=s) for m, s in zip(teacher.members, teacher.strong.members, strict=True)]
