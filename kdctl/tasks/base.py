"""What a task is: how samples become batches, outputs become signals and numbers, and which number decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from numpy.typing import ArrayLike
from torch import Tensor, nn

from kdctl.signals import IGNORE, Batch, Signals

Metric = Callable[[ArrayLike, ArrayLike], float]
"""(logits, targets) of a whole split -> a number."""


class Task:
    """A task. Metrics take all logits and targets of a split, so a number never depends on the batch size."""

    primary: ClassVar[str]
    """The metric that picks the best checkpoint; higher is better."""

    def collate(self, samples: Sequence[tuple[Any, Any, int]]) -> Batch:
        """A batch of clean samples, each (input, target, index)."""
        raise NotImplementedError

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """What the model says of a batch, in the model's own form."""
        return model(batch.inputs)

    def signals(self, outputs: Any, batch: Batch, features: Mapping[str, Tensor] | None = None) -> Signals:
        """What losses see of the outputs, and of the features at the model's taps."""
        raise NotImplementedError

    def num_labelled(self, batch: Batch) -> Tensor:
        """How many units of a batch have a label: what each part of `supervised` is summed over."""
        return (batch.targets != IGNORE).sum()

    def supervised(self, student: Signals, batch: Batch, **options: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """The task's own loss: named parts, each its sum over the labelled units and their count."""
        raise NotImplementedError

    def metrics(self) -> dict[str, Metric]:
        """Name -> function of (logits, targets), in the order to print them."""
        raise NotImplementedError

    def per_class(self, logits: ArrayLike, targets: ArrayLike) -> list[dict[str, Any]]:
        """Of each class, in order: how many samples have it, and its metrics."""
        raise NotImplementedError

    def agreement(self, logits_a: ArrayLike, logits_b: ArrayLike) -> float:
        """Percent of samples on which two models decide alike."""
        raise NotImplementedError

    def chance(self, targets: ArrayLike) -> float:
        """The primary metric of the best answer that does not look at the input."""
        raise NotImplementedError
