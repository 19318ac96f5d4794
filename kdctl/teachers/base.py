"""What a teacher is."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from kdctl.models.record import Model
from kdctl.signals import Batch, Signals


class Teacher(Protocol):
    """Gives the signals of a batch, as constants.

    It is no nn.Module on purpose: nothing that walks the trained modules (train(), optimizers, checkpoints) can reach
    it. Its models are frozen and in eval mode. Runs under no_grad, not inference mode: losses save its outputs for
    their backward pass.

    taps: which features are wanted; None for all that it was made with. logits: whether these are wanted; where they
    are not, those given may be empty (N, 0).
    """

    models: list[Model]
    taps: tuple[str, ...]
    """All features that it can be asked for."""

    def __call__(self, batch: Batch, taps: Collection[str] | None = None, logits: bool = True) -> Signals: ...

    def flush(self) -> None:
        """Puts what is to be kept on the disk."""
        return None
