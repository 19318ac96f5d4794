"""Teachers that change while the student learns, and what methods with several nets share."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NoReturn

import torch
from torch import nn

from kdctl.errors import ConfigError, Problem
from kdctl.models.record import Model
from kdctl.signals import Batch, Signals
from kdctl.taps import Taps
from kdctl.tasks.base import Task
from kdctl.teachers.base import Teacher


class MovingTeacher(Teacher):
    """A model that is asked as it is at the moment, in eval mode; its weights are the method's to change.

    What terms see as its net refuses to give its layers away: a term that copied one would go on with old weights.
    """

    def __init__(self, model: Model, task: Task, taps: Sequence[str] = ()) -> None:
        self.model = model.eval().requires_grad_(False)
        self.models = [Model(_Closed(), model.record, model.base)]
        self.task = task
        self.taps = tuple(sorted(set(taps)))
        self._taps = Taps(model.net, self.taps)

    @torch.no_grad()
    def __call__(self, batch: Batch, taps: Collection[str] | None = None, logits: bool = True) -> Signals:
        wanted = self.taps if taps is None else taps
        with self._taps.recording() as features:
            outputs = self.task.forward(self.model, batch)
        return self.task.signals(outputs, batch, {tap: features[tap] for tap in wanted})


class _Closed(nn.Module):
    """Stands where terms look for the layers of a teacher that changes."""

    def get_submodule(self, target: str) -> NoReturn:
        message = f"the term takes over the teacher's '{target}', and with this method the teacher changes in training"
        raise ConfigError(Problem(message, key="losses", hint="another term, or method: distill with a teacher"))


def moved_beside(model: nn.Module, student: nn.Module, device: torch.device) -> None:
    """Puts a model on the device, in the memory layout of the student."""
    model.to(device)
    maps = [p for p in student.parameters() if p.ndim == 4]
    if any(p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in maps):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
