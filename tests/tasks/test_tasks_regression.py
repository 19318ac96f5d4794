"""A number a sample: the squared error, and correlations against scipy and numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kdctl.signals import Batch, Signals
from kdctl.tasks.regression import Regression, pearson, spearman, squared_error

stats = pytest.importorskip("scipy.stats")


def test_correlations_with_ties_and_without_what_has_no_number() -> None:
    random = np.random.default_rng(0)
    said, truth = random.integers(0, 5, 40).astype(float), random.integers(0, 4, 40).astype(float)
    truth += said / 2
    hidden = np.where(np.arange(40) % 7 == 0, np.nan, truth)
    kept = ~np.isnan(hidden)
    assert spearman(said[:, None], hidden) == pytest.approx(100 * stats.spearmanr(said[kept], truth[kept]).statistic)
    assert pearson(said[:, None], hidden) == pytest.approx(100 * np.corrcoef(said[kept], truth[kept])[0, 1])
    assert squared_error(said[:, None], hidden) == pytest.approx(((said - truth)[kept] ** 2).mean())


def test_nothing_that_varies_does_not_correlate() -> None:
    assert spearman(np.ones((4, 1)), np.arange(4.0)) == 0
    assert math.isnan(spearman(np.ones((1, 1)), np.ones(1))) and math.isnan(squared_error(np.ones((1, 1)), [math.nan]))
    assert Regression().chance([1.0, 2.0]) == 0
    assert Regression().agreement(np.arange(4.0)[:, None], -np.arange(4.0)[:, None]) == pytest.approx(-100)


def test_the_loss_is_the_sum_of_squares_of_those_with_a_number() -> None:
    logits = torch.tensor([[1.0], [2.0], [5.0]], requires_grad=True)
    index = torch.arange(3)
    batch = Batch(None, torch.tensor([0.0, math.nan, 3.0]), index, index)
    value, count = Regression().supervised(Signals(logits, "identity"), batch)["mse"]
    assert (value.item(), int(count), int(Regression().num_labelled(batch))) == (5.0, 2, 2)
    value.backward()
    assert logits.grad is not None and logits.grad.flatten().tolist() == [2.0, 0.0, 4.0]


def test_a_number_that_is_none_has_no_rank() -> None:
    assert math.isnan(spearman(np.array([[math.nan], [1], [2], [3]]), np.array([4.0, 1, 2, 3])))
