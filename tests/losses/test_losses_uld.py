"""uld by hand: which class is meant does not count, and vocabularies may differ."""

from __future__ import annotations

import pytest
import torch

from kdctl.losses.uld import ULD
from kdctl.signals import Batch, Signals


def signals(*rows: list[float], learns: bool = False) -> Signals:
    """Logits whose probabilities are these."""
    return Signals(torch.tensor(rows, dtype=torch.float64).log().requires_grad_(learns))


def batch(size: int) -> Batch:
    index = torch.arange(size)
    return Batch(torch.zeros(size, 1), index, index, index)


def test_by_hand_with_a_larger_vocabulary_in_the_teacher() -> None:
    given = (
        signals([0.5, 0.2, 0.3], [0.1, 0.8, 0.1], learns=True),
        signals([0.1, 0.6, 0.1, 0.2], [0.8, 0.1, 0.05, 0.05]),
        batch(2),
    )
    loss = ULD()
    # ranked: .5 .3 .2 0 against .6 .2 .1 .1, and .8 .1 .1 0 against .8 .1 .05 .05
    assert loss.values(*given).tolist() == pytest.approx([0.4, 0.1])
    loss(*given).backward()
    assert given[0].logits.grad is not None and given[0].logits.grad[0].any()
    turned = (given[1], given[0], given[2])
    assert ULD()(*turned).item() == pytest.approx(0.5)


def test_the_order_of_classes_does_not_count() -> None:
    given = (signals([0.5, 0.2, 0.3]), signals([0.2, 0.3, 0.5]), batch(1))
    assert ULD()(*given).item() == pytest.approx(0, abs=1e-12)


def test_temperature_softens_both() -> None:
    given = (signals([0.81, 0.16, 0.03]), signals([0.49, 0.36, 0.15]), batch(1))
    p_s, p_t = (torch.tensor(p, dtype=torch.float64).sqrt() for p in ([0.81, 0.16, 0.03], [0.49, 0.36, 0.15]))
    expected = (p_s / p_s.sum() - p_t / p_t.sum()).abs().sum().item()
    assert ULD(temperature=2.0)(*given).item() == pytest.approx(expected)
