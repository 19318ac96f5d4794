"""A teacher that is asked at every step: frozen, in eval mode, outside the trained tree."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from kdctl.models.fold import folded
from kdctl.models.lower import lowered
from kdctl.models.record import Model
from kdctl.signals import Batch, Signals
from kdctl.taps import Taps
from kdctl.tasks.base import Task
from kdctl.teachers.base import Teacher


class LiveTeacher(Teacher):
    """One frozen model, asked without its batch normalisation where that folds into other layers: what it says is the
    same up to rounding. Under autocast its matrices are cast once, not at every call. taps: the module paths of its net
    that become features.
    """

    def __init__(self, model: Model, task: Task, taps: Sequence[str] = ()) -> None:
        self.models = [model.eval().requires_grad_(False)]
        self.task = task
        self.taps = tuple(sorted(set(taps)))
        self._model = model
        self._net = folded(model.net, {tap.partition("#")[0].partition(":")[0] for tap in self.taps})
        self._taps = Taps(self._net, ())
        self._in(None)

    def _in(self, dtype: torch.dtype | None) -> None:
        """Makes what is asked under autocast to this precision, None for none. A class of the user's own stays as it
        is: it may do anything with its weights."""
        self._dtype = dtype
        self._taps.remove()
        net = self._net if dtype is None or ":" in self._model.record.kind else lowered(self._net, dtype)
        self._asked = self._model
        if net is not self._model.net:
            self._asked = self._model.around(net).to(next(net.parameters()).device).eval()
        self._taps = Taps(net, self.taps)

    @torch.no_grad()
    def __call__(self, batch: Batch, taps: Collection[str] | None = None, logits: bool = True) -> Signals:
        device = batch.index.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if dtype != self._dtype:
            self._in(dtype)
        wanted = self.taps if taps is None else taps
        if not wanted:
            return self.task.signals(self.task.forward(self._asked, batch), batch)
        with self._taps.recording() as features:
            outputs = self.task.forward(self._asked, batch)
        return self.task.signals(outputs, batch, {tap: features[tap] for tap in wanted})
