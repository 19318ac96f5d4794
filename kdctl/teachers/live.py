"""A teacher that is asked at every step: frozen, in eval mode, outside the trained tree."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kdctl.errors import ConfigError, Problem
from kdctl.models.record import Model
from kdctl.signals import Batch, Signals
from kdctl.taps import Taps
from kdctl.tasks.base import Task


class LiveTeacher:
    """One or several frozen models; several answer with the mean of their logits.

    It is no nn.Module on purpose: nothing that walks the trained modules (train(), optimizers, checkpoints) can reach
    it. Runs under no_grad, not inference mode: losses save its outputs for their backward pass.
    Features are those of a single teacher; an ensemble has logits alone, and taps on it raise ConfigError.
    """

    def __init__(self, models: Sequence[Model], task: Task, taps: Sequence[str] = ()) -> None:
        self.models = list(models)
        self.task = task
        if len(self.models) > 1 and taps:
            message = (
                f"{len(self.models)} teachers have no common features, and a term taps {', '.join(sorted(set(taps)))}"
            )
            raise ConfigError(Problem(message, key="teacher", hint="features are those of a single teacher"))
        for model in self.models:
            model.eval().requires_grad_(False)
        self._taps = Taps(self.models[0].net, sorted(set(taps)))

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Signals:
        with self._taps.recording() as features:
            signals = self.task.signals(self.task.forward(self.models[0], batch), batch, features)
        if len(self.models) > 1:
            others = [self.task.signals(self.task.forward(m, batch), batch).logits for m in self.models[1:]]
            signals.logits = torch.stack([signals.logits, *others]).float().mean(0)
        return signals
