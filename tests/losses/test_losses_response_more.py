"""Losses on rows of logits beyond kd, against formulas written out in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kdctl.errors import ConfigError
from kdctl.losses.balanced_kd import log_effective_number
from kdctl.signals import IGNORE

Example = Callable[..., Any]
Build = Callable[..., Any]


def softmax(rows: Any) -> Any:
    powers = np.exp(rows - rows.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def logits(given: Any) -> tuple[Any, Any]:
    return given[0].logits.detach().numpy(), given[1].logits.numpy()


def kl(p: Any, q: Any) -> Any:
    return (p * np.log(p / q)).sum(-1)


@pytest.fixture
def given(example: Example) -> Any:
    return example(size=6)


class TestWSLD:
    @pytest.fixture
    def weight(self, given: Any) -> Any:
        picked = (range(6), given[2].targets.numpy())
        known_s, known_t = (-np.log(softmax(z)[picked]) for z in logits(given))
        return 1 - np.exp(-known_s / (known_t + 1e-7))

    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    def test_formula(self, temperature: float, weight: Any, given: Any, build: Build) -> None:
        s, t = (softmax(z / temperature) for z in logits(given))
        given[2].targets[1] = IGNORE
        expected = -(temperature**2) * weight * (t * np.log(s)).sum(1)
        loss = build("wsld", given, temperature=temperature)
        assert loss(*given).item() == pytest.approx(np.delete(expected, 1).sum(), rel=1e-10)
        assert int(loss.count(given[2])) == 5

    def test_the_weight_is_a_constant(self, weight: Any, given: Any, build: Build) -> None:
        build("wsld", given, temperature=4.0)(*given).backward()
        s, t = (softmax(z / 4) for z in logits(given))
        np.testing.assert_allclose(given[0].logits.grad.numpy(), 4 * weight[:, None] * (s - t), rtol=1e-9, atol=1e-12)

    def test_a_student_that_knows_the_label_pulls_nothing(self, example: Example, build: Build) -> None:
        given = example(size=1, classes=3, dtype=torch.float32)
        given[0].logits.data = torch.tensor([[900.0, 0.0, 0.0]])
        assert build("wsld", given)(*given).item() == 0


class TestTTM:
    @pytest.mark.parametrize("temperature", [1.0, 5.0])
    def test_formulas(self, temperature: float, given: Any, build: Build) -> None:
        s, t = (softmax(z) for z in logits(given))
        powered = t ** (1 / temperature)
        smoothness = powered.sum(1)
        divergence = kl(powered / smoothness[:, None], s)
        ttm, wttm = (build(kind, given, temperature=temperature) for kind in ("ttm", "wttm"))
        np.testing.assert_allclose(ttm.values(*given).detach().numpy(), divergence, rtol=1e-10)
        np.testing.assert_allclose(wttm.values(*given).detach().numpy(), smoothness * divergence, rtol=1e-10)

    def test_smooth_teachers_weigh_more(self, example: Example, build: Build) -> None:
        """u is 1 for a sure teacher, and C^(1 - 1 / T) for one that does not know."""
        given = example(size=2, classes=4)
        given[1].logits = torch.tensor([[500.0, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)
        shares = build("wttm", given, temperature=2.0).values(*given) / build("ttm", given, temperature=2.0).values(
            *given
        )
        torch.testing.assert_close(shares.detach(), torch.tensor([1.0, 2.0], dtype=torch.float64))


class TestCTKD:
    def test_it_is_kd_at_the_learnt_temperature(self, given: Any, build: Build) -> None:
        loss = build("ctkd", given, start=2.0, span=10.0)
        loss.epoch = 3.0
        assert loss.theta.item() == 1
        for theta in (1.0, -2.0):
            loss.theta.data.fill_(theta)
            temperature = 2 + 10 / (1 + math.exp(-theta))
            expected = build("kd", given, temperature=temperature)(*given)
            assert loss(*given).item() == pytest.approx(expected.item(), rel=1e-12)

    @pytest.mark.parametrize(
        ("epoch", "reversal"), [(0.0, 0.0), (2.5, math.cos(math.pi / 4) / 2 - 0.5), (5.0, -0.5), (10, -1), (99, -1)]
    )
    def test_the_temperature_gets_the_reversed_gradient(
        self, epoch: float, reversal: float, given: Any, build: Build
    ) -> None:
        loss = build("ctkd", given, decay_epochs=10.0)
        loss.epoch = epoch
        loss(*given).backward()
        with torch.no_grad():
            values = []
            for step in (1e-5, -1e-5):
                loss.theta.fill_(1 + step)
                values.append(loss(*given).item())
        slope = (values[0] - values[1]) / 2e-5
        assert abs(slope) > 1e-3
        assert loss.theta.grad.item() == pytest.approx(reversal * slope, rel=1e-6, abs=1e-12)

    def test_a_step_of_descent_makes_it_harder(self, given: Any, build: Build) -> None:
        loss = build("ctkd", given, decay_epochs=0.0)
        before = loss(*given)
        before.backward()
        with torch.no_grad():
            loss.theta -= 0.1 * loss.theta.grad
        assert loss(*given).item() > before.item()

    def test_the_student_gets_the_gradient_of_kd(self, given: Any, build: Build) -> None:
        student = given[0]
        loss = build("ctkd", given)
        loss.epoch = 20.0
        loss(*given).backward()
        mine, student.logits.grad = student.logits.grad, None
        build("kd", given, temperature=1 + 20 / (1 + math.exp(-1)))(*given).backward()
        torch.testing.assert_close(mine, student.logits.grad)

    def test_its_temperature_is_saved(self, given: Any, build: Build) -> None:
        assert list(build("ctkd", given).state_dict()) == ["theta"]


class TestTopKKL:
    @pytest.mark.parametrize("k", [1, 2, 3])
    def test_formula(self, k: int, given: Any, build: Build) -> None:
        s, t = (softmax(z / 2) for z in logits(given))
        expected = 0.0
        for s_row, t_row in zip(s, t, strict=True):
            top = np.argsort(-t_row)[:k]
            parts = [np.append(row[top], 1 - row[top].sum()) for row in (s_row, t_row)]
            expected += 4 * kl(parts[1], parts[0])
        assert build("top_k_kl", given, k=k, temperature=2.0)(*given).item() == pytest.approx(expected, rel=1e-10)

    @pytest.mark.parametrize("k", [4, 5, 50])
    def test_all_classes_are_kd(self, k: int, given: Any, build: Build) -> None:
        expected = build("kd", given)(*given).item()
        assert build("top_k_kl", given, k=k)(*given).item() == pytest.approx(expected, rel=1e-12)

    def test_a_rest_without_mass_has_its_exact_value(self, example: Example, build: Build) -> None:
        given = example(size=1, classes=3, dtype=torch.float32)
        given[0].logits.data = torch.tensor([[900.0, 0.0, 0.0]])
        given[1].logits = torch.tensor([[0.0, 900.0, 0.0]])
        value = build("top_k_kl", given, k=1, temperature=1.0)(*given)
        value.backward()
        assert value.item() == 900
        assert given[0].logits.grad.tolist() == [[1, -1, 0]]


class TestBalancedKD:
    COUNTS = (1000, 300, 40, 5, 1)

    @pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999, 1.0])
    def test_formula(self, beta: float, given: Any, build: Build) -> None:
        counts = np.array(self.COUNTS, dtype=float)
        weights = 1 / counts if beta == 1 else (1 - beta) / (1 - beta**counts)
        s, t = (softmax(z / 2) for z in logits(given))
        q = t * weights
        expected = 4 * kl(q / q.sum(1, keepdims=True), s).sum()
        loss = build("balanced_kd", given, class_counts=self.COUNTS, beta=beta, temperature=2.0)
        assert loss(*given).item() == pytest.approx(expected, rel=1e-9)

    def test_without_counts_it_is_kd(self, given: Any, build: Build) -> None:
        expected = build("kd", given, temperature=3.0)(*given).item()
        assert build("balanced_kd", given, temperature=3.0)(*given).item() == pytest.approx(expected, rel=1e-12)

    def test_effective_numbers_of_large_classes_are_exact(self) -> None:
        counts = torch.tensor([1.0, 1e6], dtype=torch.float64)
        numbers = log_effective_number(counts, 1 - 1e-9).exp()
        torch.testing.assert_close(numbers, torch.tensor([1.0, 1e6 - 5e2], dtype=torch.float64), rtol=1e-6, atol=0)

    def test_another_number_of_classes_is_refused(self, given: Any, build: Build) -> None:
        with pytest.raises(ConfigError, match="class_counts: class_counts has 2 numbers, the student 5 classes"):
            build("balanced_kd", given, class_counts=(3, 4))


class TestBinaryKD:
    @pytest.mark.parametrize("temperature", [1.0, 3.0])
    def test_formula(self, temperature: float, given: Any, build: Build) -> None:
        s, t = (1 / (1 + np.exp(-z / temperature)) for z in logits(given))
        expected = temperature**2 * (t * np.log(t / s) + (1 - t) * np.log((1 - t) / (1 - s))).sum()
        loss = build("binary_kd", given, temperature=temperature)
        assert loss(*given).item() == pytest.approx(expected, rel=1e-10)

    def test_confident_logits_have_their_exact_value(self, example: Example, build: Build) -> None:
        given = example(size=1, classes=2, dtype=torch.float32)
        given[0].logits.data = torch.tensor([[700.0, -700.0]])
        given[1].logits = torch.tensor([[-700.0, 700.0]])
        value = build("binary_kd", given)(*given)
        value.backward()
        assert value.item() == 1400
        assert given[0].logits.grad.tolist() == [[1, -1]]


class TestTfReg:
    @pytest.mark.parametrize(("correct", "temperature"), [(0.99, 20.0), (0.9, 1.0)])
    def test_formula(self, correct: float, temperature: float, given: Any, build: Build) -> None:
        given[2].targets[4] = IGNORE
        expected = 0.0
        for row, label in zip(softmax(logits(given)[0]), given[2].targets.tolist(), strict=True):
            if label != IGNORE:
                made = np.where(np.arange(5) == label, correct, (1 - correct) / 4)
                expected += kl(softmax(made / temperature), row)
        loss = build("tf_reg", given, correct=correct, temperature=temperature)
        assert loss(given[0], None, given[2]).item() == pytest.approx(expected, rel=1e-10)
        assert not loss.needs_teacher and int(loss.count(given[2])) == 5
