"""What a loss term is.

A term gives the sum of its loss over a micro-batch and, ahead of it and from the batch alone, the count of what it sums
over (samples, tokens, pixels). The loop divides by the count of the whole batch, over accumulation and ranks, so
padding, micro-batches and processes never change the loss. (The count comes ahead because a micro-batch's gradient
must be scaled by the total before the next micro-batch is seen.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from kdctl.config.types import Scheduled
from kdctl.optim.schedules import curve_at
from kdctl.signals import Batch, Signals


@dataclass
class DryRun:
    """One batch through copies of the models in eval mode, from which a term makes its adapters."""

    task: Any
    batch: Batch
    student: Signals
    teacher: Signals | None
    num_samples: int
    """Every sample index is below this number: the size of a memory that keeps something of each."""
    student_net: nn.Module | None = None
    """The bare net of the student, for terms that look at more than its signals; never to be changed."""
    teacher_nets: Sequence[nn.Module] = ()
    """The bare nets of the teachers, for terms that use a part of them (a classifier); never to be changed."""


class Loss(nn.Module):
    """A term of the loss. Its parameters are adapters: trained beside the student, not shipped with it."""

    needs_teacher: ClassVar[bool] = True
    needs_targets: ClassVar[bool] = False
    needs_taps: ClassVar[bool | None] = False
    """None: taps may be given and may be left out."""
    needs_logits: ClassVar[bool] = True
    """Whether it looks at the teacher's logits; one that compares features alone does not."""
    batchwise: ClassVar[bool] = False
    """Defined on a batch as a whole (relations, contrast): micro-batches would change it."""
    links: ClassVar[tuple[str, ...]] = ("softmax", "sigmoid", "identity")
    """The kinds of logits it is meant for; "embedding" where it looks at none, for these may be of different widths."""

    sees_members: ClassVar[bool] = False
    """Whether it looks at several teachers one by one (`Signals.members`) instead of at what they say together."""
    sees_streams: ClassVar[bool] = False
    """Whether it looks at the strongly augmented version itself (`Signals.strong`). Others are applied to both."""

    reads_classifier: ClassVar[bool] = False
    """Whether it looks at the rows of the teacher's classifier, which stand in the teacher's own order of classes."""

    leaves_padding_out: ClassVar[bool] = False
    """Whether it may be given states of tokens some of which are padding."""

    taps: tuple[tuple[str, str], ...] = ()
    """(student tap, teacher tap) pairs, set by `build` from the term's `taps:`."""
    epoch: float = 0.0
    """The fractional number of epochs done, set by the method before each call."""
    steps_per_epoch: int = 1

    def setup(self, dry_run: DryRun) -> None:
        """Makes adapters from real shapes. Raises ConfigError where shapes cannot be made to fit."""

    def bind(self, student_net: nn.Module) -> None:
        """Shows the term the bare net that trains, once it is set up; for one that uses a part of it."""

    def count(self, batch: Batch) -> int | Tensor:
        """How many units the sum of `forward` runs over in this batch."""
        return batch.num_rows()

    def forward(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        """The sum of the loss over the units of the batch: a scalar."""
        return self.values(student, teacher, batch).sum()

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        """The loss of each unit: of each row of logits (R,), or of each sample (N,) where features are compared.

        What a combination of several teachers weighs unit by unit. A term that is defined on the batch as a whole
        overrides `forward` instead.
        """
        raise NotImplementedError

    def now(self, value: Scheduled) -> float:
        """A number, or what its schedule says at this moment."""
        return curve_at(value, self.epoch, self.steps_per_epoch)

    def labels(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The label of each row of logits (R,) int64, 0 where there is none, and which rows have one (R,) bool."""
        return batch.row_labels()

    def logit_pair(self, student: Signals, teacher: Signals | None) -> tuple[Tensor, Tensor]:
        """The rows of logits (R, C) of student and teacher; the teacher's are constants."""
        assert teacher is not None  # build gives a teacher to every term that needs one
        return student.rows(), teacher.rows().detach()

    def feature_pairs(self, student: Signals, teacher: Signals | None) -> list[tuple[Tensor, Tensor]]:
        """The tapped features of student and teacher, pair by pair; the teacher's are constants."""
        assert teacher is not None
        return [(student.feature(s), teacher.feature(t).detach()) for s, t in self.taps]
