"""Several teachers, asked together."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from kdctl.signals import Batch, Signals
from kdctl.teachers.base import Teacher


class Ensemble(Teacher):
    """The mean of the members' logits, in float32, and what each member says by itself (`Signals.members`).

    Each member is live or stored by itself. Features are those of the members.
    """

    def __init__(self, members: Sequence[Teacher]) -> None:
        self.members = list(members)
        self.models = [model for member in members for model in member.models]
        self.taps = tuple(sorted({tap for member in members for tap in member.taps}))

    @torch.no_grad()
    def __call__(self, batch: Batch, taps: Collection[str] | None = None, logits: bool = True) -> Signals:
        wanted = set(self.taps if taps is None else taps)
        said = [member(batch, tuple(wanted & set(member.taps)), logits) for member in self.members]
        mean = torch.stack([signals.logits.float() for signals in said]).mean(0)
        first = said[0]
        return Signals(mean, first.link, {}, first.keep, first.class_dim, tuple(said))

    def flush(self) -> None:
        for member in self.members:
            member.flush()
