"""Schedules as pure functions of progress."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdctl import registry
from kdctl.errors import ConfigError
from kdctl.optim import SCHEDULES
from kdctl.optim.schedules import Constant, Cosine, Linear, MultiStep, OneCycle, WeightSchedule

ARGUMENTS: dict[str, dict[str, Any]] = {"multistep": {"milestones": [1, 2]}}


def curve(schedule: Any, epochs: int, steps: int = 10) -> list[float]:
    return [schedule.factor(i, epochs * steps, steps) for i in range(epochs * steps)]


def test_cosine_is_that_of_torch() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30, eta_min=0.1)
    for factor in curve(Cosine(min_factor=0.1), 3):
        assert factor == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        theirs.step()


def test_warm_up_rises_to_one_and_the_curve_starts_there() -> None:
    factors = curve(Cosine(warmup_epochs=0.5), 3)
    assert factors[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert factors[6] < 1 and factors[-1] > 0
    assert factors[5:] == pytest.approx([(1 + math.cos(math.pi * i / 25)) / 2 for i in range(25)])


def test_a_warm_up_longer_than_the_run_is_cut() -> None:
    assert curve(Constant(warmup_epochs=9), 1, steps=4) == [0.25, 0.5, 0.75, 1.0]


def test_linear() -> None:
    assert curve(Linear(min_factor=0.5), 1, steps=5) == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6])


def test_milestones_are_finished_epochs_in_any_order() -> None:
    factors = curve(MultiStep(milestones=[3, 1.5], gamma=0.1), 4, steps=2)
    assert factors == pytest.approx([1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])


def test_one_cycle() -> None:
    factors = curve(OneCycle(rise=0.25, start_factor=0.2, min_factor=0.1), 2, steps=20)
    assert factors[0] == pytest.approx(0.2) and factors[10] == 1.0
    assert factors[5] == pytest.approx(0.6) and factors[25] == pytest.approx(0.55)
    assert curve(OneCycle(rise=0.0), 1)[0] == 1.0


@pytest.mark.parametrize("kind", sorted(SCHEDULES))
@settings(deadline=None)
@given(epochs=st.integers(1, 5), steps=st.integers(1, 7), warmup=st.floats(0, 6))
def test_factors_are_between_0_and_1_and_need_no_history(kind: str, epochs: int, steps: int, warmup: float) -> None:
    arguments = dict(ARGUMENTS.get(kind, {}))
    if kind != "one_cycle":
        arguments["warmup_epochs"] = warmup
    schedule = registry.create("schedules", kind, arguments)
    factors = curve(schedule, epochs, steps)
    assert all(0 < f <= 1 for f in factors)
    backwards = [schedule.factor(i, epochs * steps, steps) for i in reversed(range(epochs * steps))]
    assert backwards == factors[::-1]


class TestWeights:
    @pytest.mark.parametrize(("epoch", "weight"), [(0, 0), (1, 200), (2.5, 500), (5, 1000), (99, 1000)])
    def test_linear_between_epochs(self, epoch: float, weight: float) -> None:
        assert WeightSchedule({5: 1000, 0: 0}).at(epoch) == pytest.approx(weight)

    def test_constant_before_the_first_epoch(self) -> None:
        schedule = WeightSchedule({2: 1.0, 4: 3.0, 6: 0.0})
        assert [schedule.at(e) for e in (0, 2, 3, 4, 5, 6, 7)] == [1, 1, 2, 3, 1.5, 0, 0]

    def test_a_number(self) -> None:
        assert [WeightSchedule(0.3).at(e) for e in (0, 0.5, 100)] == [0.3, 0.3, 0.3]

    def test_an_empty_map_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="at least one moment"):
            WeightSchedule({})
