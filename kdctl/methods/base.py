"""What a method is: the owner of one training step. `fit` runs any method and knows none of them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from kdctl.clock import Clock
from kdctl.losses.base import Loss
from kdctl.models.record import Model
from kdctl.optim.schedules import WeightSchedule
from kdctl.signals import Batch


class Term(nn.Module):
    """A loss with its name and its weight over the epochs."""

    def __init__(self, name: str, loss: Loss, weight: WeightSchedule) -> None:
        super().__init__()
        self.name = name
        self.loss = loss
        self.weight = weight


class Method:
    """Owns the modules that train and turns a batch into named sums of loss.

    student: the model that is validated and shipped.
    terms: the terms of its loss. trained: every module whose parameters the optimizer moves, by name; all of it goes
    into checkpoints. clock: where the seconds of its parts are counted.
    """

    student: Model
    terms: list[Term]
    trained: nn.ModuleDict
    clock: Clock

    def counts(self, batch: Batch) -> dict[str, int | Tensor]:
        """What the sum of each term runs over in the whole batch, that of all processes."""
        raise NotImplementedError

    def step(self, batch: Batch, epoch: float) -> dict[str, Tensor]:
        """The sum of each term over one micro-batch, differentiable; `epoch` is the fractional number of epochs.

        With several processes: over this process's part, so that the sum of all is that of the whole batch.
        """
        raise NotImplementedError

    def weights(self, epoch: float) -> dict[str, float]:
        """The weight of each term at this moment."""
        raise NotImplementedError

    def train(self) -> None:
        """Puts what trains into train mode; frozen parts keep their mode."""
        self.trained.train()

    def parameters(self) -> Iterable[nn.Parameter]:
        return (p for p in self.trained.parameters() if p.requires_grad)

    def finalize(self) -> Model:
        """The model to ship, without adapters."""
        return self.student
