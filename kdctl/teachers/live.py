"""A teacher that is asked at every step: frozen, in eval mode, outside the trained tree."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from kdctl.models.record import Model
from kdctl.signals import Batch, Signals
from kdctl.taps import Taps
from kdctl.tasks.base import Task
from kdctl.teachers.base import Teacher


class LiveTeacher(Teacher):
    """One frozen model. taps: the module paths of its net that become features."""

    def __init__(self, model: Model, task: Task, taps: Sequence[str] = ()) -> None:
        self.models = [model.eval().requires_grad_(False)]
        self.task = task
        self.taps = tuple(sorted(set(taps)))
        self._taps = Taps(model.net, self.taps)

    @torch.no_grad()
    def __call__(self, batch: Batch, taps: Collection[str] | None = None, logits: bool = True) -> Signals:
        with self._taps.recording() as features:
            outputs = self.task.forward(self.models[0], batch)
        wanted = features if taps is None else {tap: features[tap] for tap in taps}
        return self.task.signals(outputs, batch, wanted)
