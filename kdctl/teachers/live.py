"""A teacher that is asked at every step: frozen, in eval mode, outside the trained tree."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from kdctl.models.fold import folded
from kdctl.models.record import Model
from kdctl.signals import Batch, Signals
from kdctl.taps import Taps
from kdctl.tasks.base import Task
from kdctl.teachers.base import Teacher


class LiveTeacher(Teacher):
    """One frozen model, asked without its batch normalisation where that folds into other layers: what it says is the
    same up to rounding. taps: the module paths of its net that become features.
    """

    def __init__(self, model: Model, task: Task, taps: Sequence[str] = ()) -> None:
        self.models = [model.eval().requires_grad_(False)]
        self.task = task
        self.taps = tuple(sorted(set(taps)))
        net = folded(model.net, {tap.partition("#")[0].partition(":")[0] for tap in self.taps})
        self._asked = model
        if net is not model.net:
            self._asked = Model(net, model.record, model.base).to(next(net.parameters()).device).eval()
        self._taps = Taps(net, self.taps)

    @torch.no_grad()
    def __call__(self, batch: Batch, taps: Collection[str] | None = None, logits: bool = True) -> Signals:
        wanted = self.taps if taps is None else taps
        if not wanted:
            return self.task.signals(self.task.forward(self._asked, batch), batch)
        with self._taps.recording() as features:
            outputs = self.task.forward(self._asked, batch)
        return self.task.signals(outputs, batch, {tap: features[tap] for tap in wanted})
