"""What a task is: how samples become batches, outputs become signals and numbers, and which number decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from kdctl.errors import ConfigError, Problem
from kdctl.signals import IGNORE, Batch, Signals, find_logits

Metric = Callable[[ArrayLike, ArrayLike], float]
"""(logits, targets) of a whole split -> a number."""


class Task:
    """A task. Metrics take all logits and targets of a split, so a number never depends on the batch size."""

    primary: ClassVar[str]
    """The metric that models are compared by; higher is better."""
    target: ClassVar[str] = "class"
    """What is learnt of a sample, which a data source is told: "class"; "classes", any number of them; "number"; of
    texts "tags", a class a word, "next", the token after each, "hidden", those that are hidden from the model, or
    "embedding", nothing: a class, where a text has one, is what the model is measured by."""
    link: ClassVar[Literal["softmax", "sigmoid", "identity", "embedding"]] = "softmax"
    """How its logits become what is learnt: Signals.link."""

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """What the model says of a batch, in the model's own form."""
        return model(batch.inputs)

    def signals(self, outputs: Any, batch: Batch, features: Mapping[str, Tensor] | None = None) -> Signals:
        """What losses see of the outputs, and of the features at the model's taps: logits (N, C), one row a sample.

        Raises ConfigError where the outputs have none of that shape.
        """
        logits = found_logits(outputs, 2, batch, "pool inside the model, or choose another task")
        return Signals(logits, self.link, dict(features or {}))

    def num_labelled(self, batch: Batch) -> Tensor:
        """How many units of a batch have a label: what each part of `supervised` is summed over."""
        return (batch.targets != IGNORE).sum()

    def supervised(self, student: Signals, batch: Batch, **options: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """The task's own loss: named parts, each its sum over the labelled units and their count."""
        raise NotImplementedError

    def outcome(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """What is kept of a batch's logits to measure them, float32 (R, K), and of each row its target (R, ...)."""
        return logits.float(), batch.targets

    def rows_of(self, batch: Batch) -> Tensor:
        """int64 (N,): how many rows of `outcome` each sample has."""
        return torch.ones_like(batch.index)

    def score(self, metrics: Mapping[str, float]) -> float:
        """What picks the best checkpoint, by the metrics on the validation split; higher is better."""
        return metrics.get(self.primary, float("nan"))

    def metrics(self) -> dict[str, Metric]:
        """Name -> function of (logits, targets), in the order to print them."""
        raise NotImplementedError

    def per_class(self, logits: ArrayLike, targets: ArrayLike) -> list[dict[str, Any]]:
        """Of each class, in order: how many samples have it, and its metrics; nothing where there are none to list."""
        return []

    def agreement(self, logits_a: ArrayLike, logits_b: ArrayLike) -> float:
        """Percent of samples on which two models decide alike."""
        raise NotImplementedError

    def chance(self, targets: ArrayLike) -> float:
        """The primary metric of the best answer that does not look at the input."""
        raise NotImplementedError


def found_logits(outputs: Any, ndim: int, batch: Batch, hint: str) -> Tensor:
    """The logits in what a model returns: the output itself, its `logits`, or the first of a tuple.

    Raises ConfigError where they have not `ndim` dimensions, the first of them the samples.
    """
    logits = find_logits(outputs)
    if not isinstance(logits, Tensor) or logits.ndim != ndim or logits.shape[0] != batch.size:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        shape = {2: "classes", 3: "tokens, classes"}[ndim]
        message = f"the task needs logits of shape ({batch.size}, {shape}); the model gave {got}"
        raise ConfigError(Problem(message, key="task", hint=hint))
    return logits
