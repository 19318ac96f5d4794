"""Losses that take the label's class apart (dkd, nkd, wkd_logit), against formulas written out in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kdctl.errors import ConfigError
from kdctl.losses.dkd import target_and_rest, without_target
from kdctl.losses.wkd_logit import transport_cost
from kdctl.signals import IGNORE

Example = Callable[..., Any]
Build = Callable[..., Any]


def softmax(rows: Any) -> Any:
    powers = np.exp(rows - rows.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def rows(given: Any) -> list[tuple[Any, Any, int]]:
    """(student's logits, teacher's logits, label) of each labelled sample."""
    student, teacher, batch = given
    s, t, labels = student.logits.detach().numpy(), teacher.logits.numpy(), batch.targets.tolist()
    return [row for row in zip(s, t, labels, strict=True) if row[2] != IGNORE]


def kl(p: Any, q: Any) -> float:
    return float((p * np.log(p / q)).sum())


@pytest.fixture
def given(example: Example) -> Any:
    made = example(size=7)
    made[2].targets[2] = IGNORE
    return made


def test_the_target_is_taken_out_in_order() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    others = without_target(logits, torch.tensor([0, 1, 2]))
    assert others.tolist() == [[2, 3], [4, 6], [7, 8]]
    probabilities = target_and_rest(logits, torch.tensor([0, 1, 2])).softmax(1)
    torch.testing.assert_close(probabilities[:, 0], logits.softmax(1).diagonal())


class TestDKD:
    @pytest.mark.parametrize(("temperature", "alpha", "beta"), [(1.0, 1.0, 0.5), (4.0, 0.3, 8.0)])
    def test_formula(self, temperature: float, alpha: float, beta: float, given: Any, build: Build) -> None:
        expected = 0.0
        for s, t, y in rows(given):
            p_s, p_t = softmax(s / temperature), softmax(t / temperature)
            target = kl(np.array([p_t[y], 1 - p_t[y]]), np.array([p_s[y], 1 - p_s[y]]))
            within = kl(np.delete(p_t, y) / (1 - p_t[y]), np.delete(p_s, y) / (1 - p_s[y]))
            expected += temperature**2 * (alpha * target + beta * within)
        loss = build("dkd", given, temperature=temperature, alpha=alpha, beta=beta)
        assert loss(*given).item() == pytest.approx(expected, rel=1e-12)
        assert int(loss.count(given[2])) == 6

    def test_kd_is_a_weighting_of_its_parts(self, given: Any, build: Build) -> None:
        """KL = KL(b_t || b_s) + (1 - p_t,y) KL(q_t || q_s)."""
        _, teacher, batch = given
        batch.targets = batch.targets.clamp_min(0)
        target = build("dkd", given, temperature=4.0, alpha=1.0, beta=0.0).values(*given)
        within = build("dkd", given, temperature=4.0, alpha=0.0, beta=1.0).values(*given)
        rest = 1 - (teacher.logits / 4).softmax(1).gather(1, batch.targets[:, None]).squeeze(1)
        torch.testing.assert_close(build("kd", given).values(*given), target + rest * within)

    def test_two_classes_have_nothing_within_the_rest(self, example: Example, build: Build) -> None:
        given = example(classes=2)
        assert build("dkd", given, alpha=0.0, beta=8.0)(*given).item() == 0
        whole = build("dkd", given, temperature=4.0, alpha=1.0, beta=8.0)(*given)
        assert whole.item() == pytest.approx(build("kd", given, temperature=4.0)(*given).item(), rel=1e-12) != 0

    @pytest.mark.parametrize("part", [{"alpha": 1.0, "beta": 0.0}, {"alpha": 0.0, "beta": 1.0}])
    def test_confident_logits_have_their_exact_value(self, part: Any, example: Example, build: Build) -> None:
        """Logarithms of probabilities that are 0 in float32 made the published code infinite (METHODS.md, defect 6)."""
        given = example(size=1, classes=3, dtype=torch.float32)
        given[0].logits.data = torch.tensor([[0.0, 600.0, 0.0]])
        given[1].logits = torch.tensor([[600.0, 0.0, -600.0]])
        value = build("dkd", given, temperature=1.0, **part)(*given)
        value.backward()
        assert value.item() == pytest.approx(600.0 if part["alpha"] else np.log1p(np.exp(-600)), abs=1e-4)
        assert given[0].logits.grad.isfinite().all() and bool(given[0].logits.grad.any()) == bool(part["alpha"])

    def test_warmup(self, given: Any, build: Build) -> None:
        loss, whole = build("dkd", given, warmup_epochs=20.0), build("dkd", given)(*given).item()
        for epoch, share in ((0.0, 0.0), (5.0, 0.25), (20.0, 1.0), (30.0, 1.0)):
            loss.epoch = epoch
            assert loss(*given).item() == pytest.approx(share * whole, rel=1e-12)


class TestNKD:
    @pytest.mark.parametrize(("temperature", "gamma"), [(1.0, 1.5), (3.0, 0.5)])
    def test_formula(self, temperature: float, gamma: float, given: Any, build: Build) -> None:
        expected = 0.0
        for s, t, y in rows(given):
            q_s, q_t = (softmax(np.delete(z, y) / temperature) for z in (s, t))
            expected -= softmax(t)[y] * np.log(softmax(s)[y]) + gamma * temperature**2 * (q_t * np.log(q_s)).sum()
        loss = build("nkd", given, temperature=temperature, gamma=gamma)
        assert loss(*given).item() == pytest.approx(expected, rel=1e-12)
        assert int(loss.count(given[2])) == 6

    def test_two_classes_have_the_target_alone(self, example: Example, build: Build) -> None:
        given = example(classes=2)
        expected = -sum(softmax(t)[y] * np.log(softmax(s)[y]) for s, t, y in rows(given))
        assert build("nkd", given, gamma=9.0)(*given).item() == pytest.approx(expected, rel=1e-12)


def sinkhorn(s: Any, t: Any, cost: Any, entropy: float, iterations: int) -> float:
    """The cost of Sinkhorn's flow, as in the textbook: scalings of a kernel, the flow written out."""
    kernel = np.exp(-cost / entropy)
    u = np.full(len(s), 1 / len(s))
    for _ in range(iterations):
        v = t / (kernel.T @ u)
        u = s / (kernel @ v)
    return float((u[:, None] * kernel * v[None, :] * cost).sum())


class TestWKDLogit:
    @pytest.fixture
    def given(self, example: Example) -> Any:
        made = example(size=6, student=(5,), teacher=(4,))
        made[2].targets[2] = IGNORE
        return made

    @pytest.fixture
    def cosines(self, given: Any, build: Build) -> Any:
        weight = build("srrl", given).head_weight.numpy()  # the classifier of the teacher's net
        unit = weight / np.linalg.norm(weight, axis=1, keepdims=True)
        return unit @ unit.T

    @pytest.mark.parametrize(
        ("sharpen", "entropy", "iterations", "temperature", "gamma"),
        [(0.0, 0.05, 10, 2.0, 1.0), (0.0, 0.5, 1, 1.0, 3.0), (3.0, 0.1, 5, 4.0, 0.5)],
    )
    def test_formula(
        self, sharpen: float, entropy: float, iterations: int, temperature: float, gamma: float, given: Any,
        cosines: Any, build: Build,
    ) -> None:  # fmt: skip
        cost = np.maximum(1 - cosines, 0)
        if sharpen:
            cost = 1 - np.exp(-sharpen * cost)
        expected = 0.0
        for s, t, y in rows(given):
            q_s, q_t = (softmax(np.delete(z, y) / temperature) for z in (s, t))
            others = np.delete(np.delete(cost, y, 0), y, 1)
            expected -= softmax(t)[y] * np.log(softmax(s)[y])
            expected += gamma * sinkhorn(q_s, q_t, others, entropy, iterations)
        settings = {"temperature": temperature, "gamma": gamma, "entropy": entropy, "iterations": iterations}
        loss = build("wkd_logit", given, sharpen=sharpen, **settings)
        assert loss(*given).item() == pytest.approx(expected, rel=1e-6)
        assert int(loss.count(given[2])) == 5

    def test_mass_goes_the_way_of_the_classes(self) -> None:
        """All mass on one class and all on another: the cost is their distance, in float32 too."""
        cost = torch.tensor([[0.0, 0.2, 1.0], [0.2, 0.0, 1.5], [1.0, 1.5, 0.0]])
        sure = (torch.eye(3) * 200).log_softmax(1)
        for start in range(3):
            moved = transport_cost(sure[[start] * 3], sure, cost, 0.05, 10)
            torch.testing.assert_close(moved, cost[start], rtol=1e-5, atol=1e-6)

    def test_gamma_follows_a_schedule(self, given: Any, build: Build) -> None:
        loss = build("wkd_logit", given, gamma={0: 1.0, 10: 3.0})
        loss.epoch = 5.0
        assert loss(*given).item() == pytest.approx(build("wkd_logit", given, gamma=2.0)(*given).item(), rel=1e-12)

    def test_the_classifier_must_give_the_classes(self, given: Any, example: Example, build: Build) -> None:
        with pytest.raises(ConfigError, match="no module 'classifier'"):
            build("wkd_logit", given, head="classifier")
        student = example(size=6, classes=4, student=(5,), teacher=(4,))[0]
        with pytest.raises(ConfigError, match="has 5 outputs, the student 4 classes"):
            build("wkd_logit", (student, *given[1:]))

    def test_entropy_too_small_for_float32(self, given: Any, build: Build) -> None:
        with pytest.raises(ConfigError, match=r"entropy: 0\.001 is too small"):
            build("wkd_logit", given, entropy=0.001)

    def test_the_teachers_classifier_is_neither_trained_nor_saved(self, given: Any, build: Build) -> None:
        loss = build("wkd_logit", given)
        assert not list(loss.parameters()) and not loss.state_dict()
