"""supervised, kd and logit_mse against formulas written out in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kdctl.errors import ConfigError
from kdctl.losses.kd import kl_divergence, standardized
from kdctl.signals import IGNORE


def softmax(rows: Any) -> Any:
    powers = np.exp(rows - rows.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def logits(given: Any) -> tuple[Any, Any]:
    return given[0].logits.detach().numpy(), given[1].logits.numpy()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy(smoothing: float, example: Callable[..., Any], build: Callable[..., Any]) -> None:
    given = example(size=6)
    loss = build("supervised", given, label_smoothing=smoothing)
    given[2].targets[2] = IGNORE
    log_p = np.log(softmax(logits(given)[0]))
    labelled = [0, 1, 3, 4, 5]
    target = np.full((6, 5), smoothing / 5)
    target[range(6), given[2].targets.clamp_min(0)] += 1 - smoothing
    assert loss(*given).item() == pytest.approx(-(target * log_p)[labelled].sum(), rel=1e-12)
    assert int(loss.count(given[2])) == 5


def test_cross_entropy_needs_no_teacher(example: Callable[..., Any], build: Callable[..., Any]) -> None:
    student, teacher, batch = example()
    loss = build("supervised", (student, teacher, batch))
    assert not loss.needs_teacher
    assert loss(student, None, batch) == loss(student, teacher, batch)


def test_unlabelled_rows_pull_nothing(example: Callable[..., Any], build: Callable[..., Any]) -> None:
    given = example(size=4)
    loss = build("supervised", given, label_smoothing=0.1)
    given[2].targets[1] = IGNORE
    loss(*given).backward()
    rows = given[0].logits.grad.abs().sum(1)
    assert rows[1] == 0 and bool((rows[[0, 2, 3]] > 0).all())


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd(temperature: float, example: Callable[..., Any], build: Callable[..., Any]) -> None:
    given = example(size=6)
    s, t = (softmax(z / temperature) for z in logits(given))
    expected = temperature**2 * (t * np.log(t / s)).sum()
    assert build("kd", given, temperature=temperature)(*given).item() == pytest.approx(expected, rel=1e-12)


def test_kd_of_standardized_logits(example: Callable[..., Any], build: Callable[..., Any]) -> None:
    given = example(size=6)
    z = [(z - z.mean(1, keepdims=True)) / (z.std(1, ddof=1, keepdims=True) + 1e-7) for z in logits(given)]
    s, t = (softmax(rows / 2) for rows in z)
    loss = build("kd", given, temperature=2.0, standardize=True)
    assert loss(*given).item() == pytest.approx(4 * (t * np.log(t / s)).sum(), rel=1e-12)


def test_the_gradient_of_kd_keeps_its_size_over_temperature(
    example: Callable[..., Any], build: Callable[..., Any]
) -> None:
    """For large T the gradient of T^2 KL tends to (z_s - z_t) / C with centred logits (Hinton et al., section 2.1)."""
    student, teacher, batch = example()
    build("kd", (student, teacher, batch), temperature=1e4)(student, teacher, batch).backward()
    difference = student.logits.detach() - teacher.logits
    expected = (difference - difference.mean(1, keepdim=True)) / 5
    torch.testing.assert_close(student.logits.grad, expected, rtol=1e-3, atol=1e-6)


def test_kl_is_exact_where_probabilities_vanish() -> None:
    """softmax([0, 2000]) is 0 and 1 in any precision, yet the divergence is 2000 and its gradient is that of a max."""
    student = torch.tensor([[2000.0, 0.0]], requires_grad=True)
    value = kl_divergence(student, torch.tensor([[0.0, 2000.0]]))
    value.sum().backward()
    assert value.item() == 2000
    assert student.grad.tolist() == [[1.0, -1.0]]


def test_standardized_rows_have_mean_0_and_deviation_1() -> None:
    rows = standardized(torch.tensor([[1.0, 2.0, 6.0], [1e4, 1e4 + 1, 1e4 + 2]], dtype=torch.float64))
    assert rows.mean(1).abs().max() < 1e-9
    torch.testing.assert_close(rows.std(1), torch.ones(2, dtype=torch.float64), rtol=1e-6, atol=0)


def test_an_untrained_head_of_equal_logits_gives_finite_gradients() -> None:
    rows = torch.full((2, 5), 3.0, requires_grad=True)
    standardized(rows).square().sum().backward()
    assert rows.grad.isfinite().all()


def test_kd_of_maps_sums_over_pixels(example: Callable[..., Any], build: Callable[..., Any]) -> None:
    student, teacher, batch = example(size=2)
    loss = build("kd", (student, teacher, batch))
    both = [torch.randn(2, 5, 3, 4, dtype=torch.float64) for _ in range(2)]
    student.logits, teacher.logits = both
    per_pixel = 0.0
    for y in range(3):
        for x in range(4):
            student.logits, teacher.logits = (z[:, :, y, x] for z in both)
            per_pixel += loss(student, teacher, batch).item()
    student.logits, teacher.logits = both
    assert loss(student, teacher, batch).item() == pytest.approx(per_pixel, rel=1e-12)


def test_logit_mse(example: Callable[..., Any], build: Callable[..., Any]) -> None:
    given = example(size=6)
    s, t = logits(given)
    assert build("logit_mse", given)(*given).item() == pytest.approx(6 * ((s - t) ** 2).mean(), rel=1e-12)


def test_kd_of_two_standardized_logits_is_refused(example: Callable[..., Any], build: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="of two classes") as caught:
        build("kd", example(classes=2), standardize=True)
    assert caught.value.problems[0].key == "standardize"
    build("kd", example(classes=2))
