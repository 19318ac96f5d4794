"""A placebo: a teacher whose answers are given to the wrong samples."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from kdctl.signals import Batch, Signals
from kdctl.teachers.base import Teacher


class ShuffledTeacher(Teacher):
    """Tells of each sample what another teacher says of the sample before it in the batch.

    The soft labels and features keep their distribution and lose all that they say of their sample, so a student that
    gains from them does not gain from the teacher's knowledge. Batches are drawn anew each epoch, and with them the
    pairs; nothing is random beside. A batch of one sample keeps its own answer.
    """

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.models, self.taps = teacher.models, teacher.taps

    def __call__(self, batch: Batch, taps: Collection[str] | None = None, logits: bool = True) -> Signals:
        return self.teacher(batch, taps, logits).map(_moved_on)

    def flush(self) -> None:
        self.teacher.flush()


def _moved_on(values: Tensor) -> Tensor:
    return values.roll(1, 0)
