"""Several teachers that answer with one voice."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from kdctl.errors import ConfigError, Problem
from kdctl.signals import Batch, Signals
from kdctl.teachers.base import Teacher


class Ensemble(Teacher):
    """The mean of the members' logits, in float32. Each member is live or stored by itself.

    Features are those of a single teacher: taps raise ConfigError.
    """

    def __init__(self, members: Sequence[Teacher], taps: Sequence[str] = ()) -> None:
        self.members = list(members)
        self.models = [model for member in members for model in member.models]
        self.taps = ()
        if taps:
            named = ", ".join(sorted(set(taps)))
            message = f"{len(self.members)} teachers have no common features, and a term taps {named}"
            raise ConfigError(Problem(message, key="teacher", hint="features are those of a single teacher"))

    @torch.no_grad()
    def __call__(self, batch: Batch, taps: Collection[str] | None = None, logits: bool = True) -> Signals:
        signals, *others = [member(batch, (), logits) for member in self.members]
        signals.logits = torch.stack([s.logits.float() for s in (signals, *others)]).mean(0)
        return signals

    def flush(self) -> None:
        for member in self.members:
            member.flush()
