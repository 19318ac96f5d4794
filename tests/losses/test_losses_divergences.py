"""Divergences between distributions of classes or tokens against formulas written out in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kdctl.signals import IGNORE, Batch, Signals

KINDS = [
    "forward_kl", "reverse_kl", "symmetric_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl", "tv_distance",
]  # fmt: skip


def probabilities(given: Any, temperature: float = 1.0) -> tuple[Any, Any]:
    rows = [signals.logits.detach().numpy() / temperature for signals in given[:2]]
    powers = [np.exp(row - row.max(1, keepdims=True)) for row in rows]
    return powers[0] / powers[0].sum(1, keepdims=True), powers[1] / powers[1].sum(1, keepdims=True)


def kl(p: Any, q: Any) -> Any:
    return (p * np.log(p / q)).sum()


@pytest.fixture
def given(example: Callable[..., Any]) -> Any:
    return example(size=6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
class TestTemperature:
    def test_forward_kl(self, temperature: float, given: Any, build: Callable[..., Any]) -> None:
        s, t = probabilities(given, temperature)
        value = build("forward_kl", given, temperature=temperature)(*given)
        assert value.item() == pytest.approx(-(temperature**2) * (t * np.log(s)).sum(), rel=1e-12)
        value = build("forward_kl", given, temperature=temperature, variant="kl")(*given)
        assert value.item() == pytest.approx(temperature**2 * kl(t, s), rel=1e-12)

    def test_reverse_kl(self, temperature: float, given: Any, build: Callable[..., Any]) -> None:
        s, t = probabilities(given, temperature)
        value = build("reverse_kl", given, temperature=temperature)(*given)
        assert value.item() == pytest.approx(temperature**2 * kl(s, t), rel=1e-12)

    @pytest.mark.parametrize("forward", [0.0, 0.3, 1.0])
    def test_symmetric_kl(self, forward: float, temperature: float, given: Any, build: Callable[..., Any]) -> None:
        s, t = probabilities(given, temperature)
        value = build("symmetric_kl", given, forward=forward, temperature=temperature)(*given)
        expected = temperature**2 * (forward * kl(t, s) + (1 - forward) * kl(s, t))
        assert value.item() == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 1.0])
    def test_jsd(self, beta: float, temperature: float, given: Any, build: Callable[..., Any]) -> None:
        s, t = probabilities(given, temperature)
        m = beta * t + (1 - beta) * s
        expected = {0.0: kl(t, s), 1.0: kl(s, t)}.get(beta, beta * kl(t, m) + (1 - beta) * kl(s, m))
        value = build("jsd", given, beta=beta, temperature=temperature)(*given)
        assert value.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_the_ends_of_jsd_are_limits(end: float, given: Any, build: Callable[..., Any]) -> None:
    near = abs(end - 1e-6)
    value = build("jsd", given, beta=near)(*given).item() / (near * (1 - near))
    assert value == pytest.approx(build("jsd", given, beta=end)(*given).item(), rel=1e-4)


@pytest.mark.parametrize("lam", [0.0, 0.1, 0.5, 1.0])
def test_skewed(lam: float, given: Any, build: Callable[..., Any]) -> None:
    s, t = probabilities(given)
    value = build("skewed_forward_kl", given, lam=lam)(*given)
    assert value.item() == pytest.approx(-(t * np.log(lam * t + (1 - lam) * s)).sum(), rel=1e-12)
    value = build("skewed_forward_kl", given, lam=lam, variant="kl")(*given)
    assert value.item() == pytest.approx(kl(t, lam * t + (1 - lam) * s), rel=1e-12, abs=1e-12)
    value = build("skewed_reverse_kl", given, lam=lam)(*given)
    assert value.item() == pytest.approx(kl(s, lam * s + (1 - lam) * t), rel=1e-12, abs=1e-12)


def test_tv_distance(given: Any, build: Callable[..., Any]) -> None:
    s, t = probabilities(given)
    assert build("tv_distance", given)(*given).item() == pytest.approx(np.abs(s - t).sum() / 2, rel=1e-12)


@pytest.mark.parametrize("kind", ["forward_kl", "skewed_forward_kl"])
def test_variants_differ_by_the_teachers_entropy_alone(kind: str, given: Any, build: Callable[..., Any]) -> None:
    _, t = probabilities(given)
    values, gradients = [], []
    for variant in ("cross_entropy", "kl"):
        value = build(kind, given, variant=variant)(*given)
        values.append(value.item())
        gradients.append(torch.autograd.grad(value, given[0].logits)[0])
    assert values[0] - values[1] == pytest.approx(-(t * np.log(t)).sum(), rel=1e-12)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-14)
    assert build(kind, given, variant="kl")(given[1], *given[1:]).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("kind", "expected", "bounded"),
    [
        ("forward_kl", 2000.0, False), ("reverse_kl", 2000.0, False), ("symmetric_kl", 2000.0, False),
        ("jsd", np.log(2), True), ("skewed_forward_kl", -np.log(0.1), True), ("skewed_reverse_kl", -np.log(0.1), True),
        ("tv_distance", 1.0, True),
    ],
)  # fmt: skip
def test_opposite_certainties_are_exact(
    kind: str, expected: float, bounded: bool, example: Callable[..., Any], build: Callable[..., Any]
) -> None:
    """softmax([0, 2000]) is 0 and 1 in any precision; divergences stay exact and a bounded one has no more to push."""
    student, teacher, batch = example(size=1, classes=2)
    student.logits = torch.tensor([[2000.0, 0.0]], requires_grad=True)
    teacher.logits = torch.tensor([[0.0, 2000.0]])
    value = build(kind, (student, teacher, batch))(student, teacher, batch)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-6)
    assert student.logits.grad.isfinite().all()
    if bounded:
        assert not student.logits.grad.any()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "symmetric_kl", "jsd"])
def test_temperature_may_be_scheduled(kind: str, given: Any, build: Callable[..., Any]) -> None:
    loss = build(kind, given, temperature={0: 1.0, 10: 5.0})
    loss.epoch = 5
    assert loss(*given).item() == pytest.approx(build(kind, given, temperature=3.0)(*given).item(), rel=1e-12)


class TestTokens:
    """Rows of logits are tokens, of which a mask keeps some."""

    @staticmethod
    def signals(lengths: list[int], padded_to: int, padding: float = 0.0) -> tuple[Signals, Signals, Batch]:
        generator = torch.Generator().manual_seed(0)
        keep = torch.arange(padded_to) < torch.tensor(lengths)[:, None]
        sides = []
        for _ in range(2):
            logits = torch.full((len(lengths), padded_to, 7), padding, dtype=torch.float64)
            for row, length in enumerate(lengths):
                logits[row, :length] = torch.randn(length, 7, generator=generator, dtype=torch.float64)
            sides.append(Signals(logits, keep=keep, class_dim=2))
        index = torch.arange(len(lengths))
        targets = torch.where(keep, 1, IGNORE)
        batch = Batch(torch.zeros(len(lengths), 1), targets, index, torch.zeros_like(index), keep)
        return sides[0], sides[1], batch

    @pytest.mark.parametrize("kind", KINDS)
    def test_padding_changes_nothing(self, kind: str, given: Any, build: Callable[..., Any]) -> None:
        short, padded = self.signals([4, 2, 3], 4), self.signals([4, 2, 3], 9, padding=float("nan"))
        loss = build(kind, given)
        assert int(loss.count(short[2])) == int(loss.count(padded[2])) == 9
        assert loss(*padded).item() == pytest.approx(loss(*short).item(), rel=1e-12)
        padded[0].logits.requires_grad_(True)
        loss(*padded).backward()
        gradient = padded[0].logits.grad
        assert gradient.isfinite().all() and not gradient[1, 2:].any() and gradient[1, :2].any()

    @pytest.mark.parametrize("kind", KINDS)
    def test_split_changes_nothing(self, kind: str, given: Any, build: Callable[..., Any]) -> None:
        student, teacher, batch = self.signals([4, 0, 3], 4)
        loss = build(kind, given)
        total, count = 0.0, 0
        for row in range(3):
            rows = slice(row, row + 1)
            parts = [Signals(s.logits[rows], keep=s.keep[rows], class_dim=2) for s in (student, teacher)]
            total += loss(*parts, batch.take(rows)).item()
            count += int(loss.count(batch.take(rows)))
        assert total == pytest.approx(loss(student, teacher, batch).item(), rel=1e-12)
        assert count == int(loss.count(batch)) == 7
