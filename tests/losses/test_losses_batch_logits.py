"""Losses on the logits of a whole batch (dist, mlld), against formulas written out in numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kdctl.errors import ConfigError
from kdctl.signals import Signals

Example = Callable[..., Any]
Build = Callable[..., Any]


def softmax(rows: Any) -> Any:
    powers = np.exp(rows - rows.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def logits(given: Any) -> tuple[Any, Any]:
    return given[0].logits.detach().numpy(), given[1].logits.numpy()


class TestDIST:
    @pytest.mark.parametrize(("temperature", "beta", "gamma"), [(1.0, 1.0, 0.0), (1.0, 0.0, 1.0), (4.0, 2.0, 0.5)])
    def test_formula(self, temperature: float, beta: float, gamma: float, example: Example, build: Build) -> None:
        given = example(size=6)
        s, t = (softmax(z / temperature) for z in logits(given))
        rows = np.mean([np.corrcoef(s[i], t[i])[0, 1] for i in range(6)])
        columns = np.mean([np.corrcoef(s[:, c], t[:, c])[0, 1] for c in range(5)])
        expected = 6 * temperature**2 * (beta * (1 - rows) + gamma * (1 - columns))
        loss = build("dist", given, temperature=temperature, beta=beta, gamma=gamma)
        assert loss(*given).item() == pytest.approx(expected, rel=1e-5)

    def test_it_is_0_at_the_teacher_and_2_opposite_to_it(self, example: Example, build: Build) -> None:
        student, _, batch = example(classes=2, scale=3.0)
        loss = build("dist", (student, student, batch))
        assert loss(student, student, batch).item() == pytest.approx(0, abs=1e-5)
        assert loss(Signals(-student.logits), student, batch).item() / 4 == pytest.approx(2 + 2, abs=1e-5)

    @pytest.mark.parametrize(("size", "classes"), [(4, 10), (256, 10), (256, 37)])
    def test_a_student_of_equal_logits_gets_no_huge_gradient(
        self, size: int, classes: int, example: Example, build: Build
    ) -> None:
        given = example(size=size, classes=classes, dtype=torch.float32)
        given[0].logits.data.zero_()
        loss = build("dist", given)
        value = loss(*given)
        value.backward()
        assert value.item() == size * 2
        assert given[0].logits.grad.abs().max() < 10

    def test_a_single_sample_has_no_relation_within_classes(self, example: Example, build: Build) -> None:
        given = example(size=1)
        loss = build("dist", given, beta=0.0, gamma=1.0)
        loss(*given).backward()
        assert loss(*given).item() == 1
        assert not given[0].logits.grad.any()


def levels(s: Any, t: Any, temperatures: Any, samples: Any, related: Any, classes: Any) -> float:
    """The three levels pair by pair, each pair counted where the mask keeps its second member."""
    total = 0.0
    for temperature in temperatures:
        p, q = softmax(s / temperature), softmax(t / temperature)
        size, num_classes = p.shape
        for i in range(size):
            total += samples[i] * temperature**2 * (q[i] * np.log(q[i] / p[i])).sum() / size
            for j in range(size):
                total += related[j] * (q[i] @ q[j] - p[i] @ p[j]) ** 2 / size
        for c in range(num_classes):
            for d in range(num_classes):
                total += classes[d] * (q[:, c] @ q[:, d] - p[:, c] @ p[:, d]) ** 2 / num_classes
    return total


def masks(t: Any, quantile: float) -> tuple[Any, Any]:
    p = softmax(t)
    sure, common = p.max(1), p.sum(0)
    return sure <= np.percentile(sure, 100 * quantile), common <= np.percentile(common, 100 * quantile)


class TestMLLD:
    @pytest.fixture
    def given(self, example: Example) -> Any:
        return example(size=6, scale=2.0)

    @pytest.mark.parametrize(
        ("temperatures", "quantile"), [((4.0, 3.0, 5.0, 2.0, 6.0), 0.5), ((1.0,), 0.3), ((2.0,), 1.0)]
    )
    def test_formula(self, temperatures: Any, quantile: float, given: Any, build: Build) -> None:
        s, t = logits(given)
        samples, classes = masks(t, quantile)
        expected = 6 * levels(s, t, temperatures, samples, samples, classes)
        loss = build("mlld", given, temperatures=temperatures, quantile=quantile)
        assert loss(*given).item() == pytest.approx(expected, rel=1e-10)
        assert int(loss.count(given[2])) == 6

    def test_masks_mask(self, given: Any, build: Build) -> None:
        """The published code multiplies a mean by that of the mask, so every sample pulls (METHODS.md, defect 7)."""
        student, teacher, batch = given
        kept = masks(teacher.logits.numpy(), 0.5)[0]
        loss = build("mlld", given, temperatures=(1e6,))  # so hot that relations vanish beside the divergence
        loss(student, teacher, batch).backward()
        pulled = student.logits.grad.abs().sum(1).numpy()
        assert 0 < kept.sum() < 6
        assert (pulled[kept] > 1e-2).all() and (pulled[~kept] < 1e-5).all()

    def test_the_strong_version_is_compared_with_itself_throughout(
        self, given: Any, example: Example, build: Build
    ) -> None:
        strong = example(size=6, scale=2.0, seed=7)
        student, teacher = replace(given[0], strong=strong[0]), replace(given[1], strong=strong[1])
        samples, classes = masks(logits(given)[1], 0.5)
        temperatures = (4.0, 3.0, 5.0, 2.0, 6.0)
        expected = levels(*logits(given), temperatures, samples, samples, classes)
        expected += levels(*logits(strong), temperatures, np.ones(6), samples, np.ones(5))
        loss = build("mlld", given)
        assert loss.sees_streams
        assert loss(student, teacher, given[2]).item() == pytest.approx(6 * expected, rel=1e-10)

    def test_both_versions_pull_and_the_teacher_does_not_move(self, given: Any, example: Example, build: Build) -> None:
        strong = example(size=6, seed=7)
        student, teacher = replace(given[0], strong=strong[0]), replace(given[1], strong=strong[1])
        for signals in (teacher, teacher.strong):
            signals.logits.requires_grad_(True)
        build("mlld", given)(student, teacher, given[2]).backward()
        assert student.logits.grad.any() and student.strong.logits.grad.any()
        assert teacher.logits.grad is None and teacher.strong.logits.grad is None

    def test_one_row_a_sample(self, given: Any, build: Build) -> None:
        maps = [Signals(torch.randn(6, 5, 2, 2, dtype=torch.float64)) for _ in range(2)]
        maps[1].features = given[1].features
        with pytest.raises(ConfigError, match="one row of logits a sample"):
            build("mlld", (*maps, given[2]))
