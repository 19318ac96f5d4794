"""Random signals of a student and a teacher, and losses set up on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from kdctl import registry
from kdctl.losses.base import DryRun, Loss
from kdctl.signals import Batch, Signals
from kdctl.tasks.classification import Classification

Example = tuple[Signals, Signals, Batch]
TAPS = "fghij"
"""The names of the taps: the first is `f`."""


@pytest.fixture
def example() -> Callable[..., Example]:
    """Signals of both models and the batch: float64, taps f, g, ... of the given shapes, the student's with gradients.

    student, teacher: the shape of the feature at `f`, or a list of shapes at f, g, ... positive: features >= 0.
    """

    def make(
        size: int = 4,
        classes: int = 5,
        student: tuple[int, ...] | list[tuple[int, ...]] = (3, 4, 4),
        teacher: tuple[int, ...] | list[tuple[int, ...]] = (3, 4, 4),
        scale: float = 1.0,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
        positive: bool = False,
    ) -> Example:
        generator = torch.Generator().manual_seed(seed)

        def signals(shapes: Sequence[tuple[int, ...]], learns: bool) -> Signals:
            logits = (scale * torch.randn(size, classes, generator=generator, dtype=torch.float64)).to(dtype)
            features = {}
            for tap, shape in zip(TAPS, shapes, strict=False):
                feature = torch.randn(size, *shape, generator=generator, dtype=torch.float64)
                features[tap] = (feature.abs() if positive else feature).to(dtype).requires_grad_(learns)
            return Signals(logits.requires_grad_(learns), features=features)

        targets = torch.arange(size) % classes
        index = torch.arange(size)
        batch = Batch(torch.zeros(size, 1), targets, index, torch.zeros_like(index))
        mine, other = (shapes if isinstance(shapes, list) else [shapes] for shapes in (student, teacher))
        return signals(mine, True), signals(other, False), batch

    return make


class TeacherNet(nn.Module):
    """A net whose classifier `fc` is all that losses take of it: from the last feature's channels to the classes."""

    def __init__(self, given: Example) -> None:
        super().__init__()
        feature = list(given[1].features.values())[-1]
        channels = feature.shape[2] if feature.ndim == 3 else feature.shape[1]
        generator = torch.Generator().manual_seed(1)
        self.fc = nn.Linear(channels, given[1].logits.shape[1], dtype=feature.dtype)
        with torch.no_grad():
            self.fc.weight.copy_(torch.randn(self.fc.weight.shape, generator=generator))
            self.fc.bias.copy_(torch.randn(self.fc.bias.shape, generator=generator))


@pytest.fixture
def build() -> Callable[..., Loss]:
    """A loss of the table, set up on an example (its taps of the same names in both models), in eval mode."""

    def make(kind: str, given: Example, **arguments: Any) -> Loss:
        student, teacher, batch = given
        loss: Loss = registry.create("losses", kind, arguments)
        loss.taps = tuple((tap, tap) for tap in student.features) if loss.needs_taps is not False else ()
        torch.manual_seed(0)
        net = TeacherNet(given)
        loss.setup(DryRun(Classification(), batch, student, teacher, 64, net, [net]))
        loss.bind(net)
        return loss.to(student.logits.dtype if student.logits.dtype == torch.float64 else torch.float32).eval()

    return make
