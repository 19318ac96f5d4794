"""Random signals of a student and a teacher, and losses set up on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kdctl import registry
from kdctl.losses.base import DryRun, Loss
from kdctl.signals import Batch, Signals
from kdctl.tasks.classification import Classification

Example = tuple[Signals, Signals, Batch]


@pytest.fixture
def example() -> Callable[..., Example]:
    """Signals of both models and the batch: float64, one tap `f` of the given shapes, the student's with gradients."""

    def make(
        size: int = 4,
        classes: int = 5,
        student: tuple[int, ...] = (3, 4, 4),
        teacher: tuple[int, ...] = (3, 4, 4),
        scale: float = 1.0,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ) -> Example:
        generator = torch.Generator().manual_seed(seed)

        def signals(shape: tuple[int, ...], learns: bool) -> Signals:
            logits = (scale * torch.randn(size, classes, generator=generator, dtype=torch.float64)).to(dtype)
            feature = torch.randn(size, *shape, generator=generator, dtype=torch.float64).to(dtype)
            return Signals(logits.requires_grad_(learns), features={"f": feature.requires_grad_(learns)})

        targets = torch.arange(size) % classes
        index = torch.arange(size)
        batch = Batch(torch.zeros(size, 1), targets, index, torch.zeros_like(index))
        return signals(student, True), signals(teacher, False), batch

    return make


@pytest.fixture
def build() -> Callable[..., Loss]:
    """A loss of the table, set up on an example (its one tap `f` in both models), in eval mode."""

    def make(kind: str, given: Example, **arguments: Any) -> Loss:
        student, teacher, batch = given
        loss: Loss = registry.create("losses", kind, arguments)
        loss.taps = (("f", "f"),) if loss.needs_taps else ()
        torch.manual_seed(0)
        loss.setup(DryRun(Classification(), batch, student, teacher, 64))
        return loss.to(student.logits.dtype if student.logits.dtype == torch.float64 else torch.float32).eval()

    return make
