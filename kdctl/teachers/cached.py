"""A teacher that is asked once for each view of a sample, and then read from its store."""

from __future__ import annotations

from collections.abc import Collection

import torch

from kdctl.signals import Batch, Signals
from kdctl.teachers.base import Teacher
from kdctl.teachers.live import LiveTeacher
from kdctl.teachers.store import Store


class CachedTeacher(Teacher):
    """Answers from the store; what it lacks is asked of the live teacher, for the missing samples alone, and stored.

    What it gives has always gone through the store's rounding, so the run that fills it and all that follow see the
    same numbers. A question for something that the store does not keep goes to the live teacher as a whole.
    """

    def __init__(self, live: LiveTeacher, store: Store) -> None:
        self.live, self.store = live, store
        self.models, self.taps = live.models, live.taps

    @torch.no_grad()
    def __call__(self, batch: Batch, taps: Collection[str] | None = None, logits: bool = True) -> Signals:
        wanted = self.taps if taps is None else tuple(taps)
        if not self.store.contents.holds(wanted, logits):
            return self.live(batch, wanted, logits)
        self.fill(batch)
        stored, features = self.store.signals(batch, wanted, logits)
        places = batch.inputs.shape[1:] if self.live.models[0].record.head in ("token", "vocabulary") else ()
        empty = torch.empty(batch.size, *places, 0, device=batch.index.device)
        return self.live.task.signals(empty if stored is None else stored, batch, features)

    @torch.no_grad()
    def fill(self, batch: Batch) -> int:
        """Asks for the samples of a batch that are missing in the store; how many these were."""
        missing = self.store.missing(batch)
        count = 0 if missing is None else int(missing.sum())
        if missing is not None and count:
            contents = self.store.contents
            rows = torch.nonzero(missing).flatten()
            part = batch if count == batch.size else batch.take(rows.to(batch.index.device))
            self.store.add(part, self.live(part, contents.taps, contents.logits))
        return count

    def flush(self) -> None:
        self.store.flush()
