"""Several teachers combined: every ensemble against its formula in numpy, and the shortest mixture against a solver."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from kdctl import registry
from kdctl.errors import ConfigError
from kdctl.signals import IGNORE, Batch, Signals
from kdctl.teachers import ENSEMBLES
from kdctl.teachers.adaptive import shortest_mixture
from kdctl.teachers.combine import sum_weighted

SAMPLES, CLASSES = 6, 4
TARGETS = [0, 1, 2, 3, IGNORE, 1]


def members(number: int = 3, shape: tuple[int, ...] = (SAMPLES, CLASSES), class_dim: int = 1) -> list[Signals]:
    generator = torch.Generator().manual_seed(3)
    made = [2 * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(number)]
    return [Signals(logits, class_dim=class_dim) for logits in made]


def batch(targets: Any = TARGETS, keep: Tensor | None = None) -> Batch:
    labels = torch.tensor(targets)
    index = torch.arange(len(labels))
    return Batch(torch.zeros(len(labels), 1), labels, index, index * 0, keep=keep)


def create(kind: str, **arguments: Any) -> Any:
    return registry.create("ensembles", kind, arguments)


def weights(kind: str, given: list[Signals] | None = None, seen: Batch | None = None, **arguments: Any) -> NDArray[Any]:
    found: Tensor = create(kind, **arguments).weights(given or members(), seen or batch())
    assert not found.requires_grad
    return found.numpy()


def probabilities(given: list[Signals]) -> NDArray[Any]:
    """(K, N, C)"""
    logits = np.stack([member.logits.numpy() for member in given])
    e = np.exp(logits - logits.max(2, keepdims=True))
    return e / e.sum(2, keepdims=True)


def entropies(given: list[Signals]) -> NDArray[Any]:
    p = probabilities(given)
    return -(p * np.log(p)).sum(2)


def cross_entropies(given: list[Signals]) -> NDArray[Any]:
    """(K, N), NaN where there is no label."""
    p, found = probabilities(given), np.full((len(given), SAMPLES), np.nan)
    for n, label in enumerate(TARGETS):
        if label != IGNORE:
            found[:, n] = -np.log(p[:, n, label])
    return found


@pytest.mark.parametrize("kind", ["mean", "mean_logits", "aekd"])
def test_alike(kind: str) -> None:
    assert weights(kind) == pytest.approx(np.full((3, SAMPLES), 1 / 3))


def test_weighted() -> None:
    assert weights("weighted", weights=[1.0, 2.0, 5.0])[:, 2] == pytest.approx([1 / 8, 2 / 8, 5 / 8])
    with pytest.raises(ConfigError, match="2 weights for 3 teachers"):
        weights("weighted", weights=[1.0, 2.0])


@pytest.mark.parametrize(("variant", "divisor"), [("normalized", 2), ("code", 3)])
def test_ebkd(variant: str, divisor: int) -> None:
    h = entropies(members())
    assert weights("ebkd", variant=variant) == pytest.approx((1 - h / h.sum(0)) / divisor, rel=1e-10)


def test_ebkd_of_teachers_without_any_doubt_is_the_mean() -> None:
    sure = [Signals(torch.tensor([[1e4, 0.0, 0.0]])) for _ in range(3)]
    assert weights("ebkd", sure, batch([0])) == pytest.approx(np.full((3, 1), 1 / 3))


@pytest.mark.parametrize(("variant", "divisor"), [("normalized", 2), ("code", 6)])
def test_ca_mkd(variant: str, divisor: int) -> None:
    e = np.exp(cross_entropies(members()))
    expected = (1 - e / e.sum(0)) / divisor
    expected[:, TARGETS.index(IGNORE)] = (2 / 3) / divisor
    assert weights("ca_mkd", variant=variant) == pytest.approx(expected, rel=1e-10)


def test_best() -> None:
    by_label, by_doubt = cross_entropies(members()), entropies(members())
    chosen = [(by_doubt if label == IGNORE else by_label)[:, n].argmin() for n, label in enumerate(TARGETS)]
    assert len(set(chosen)) > 1
    assert weights("best").tolist() == np.eye(3)[chosen].T.tolist()


def test_class_groups() -> None:
    """Class 0 is the first teacher's, 1 the second's and third's, 2 nobody's and so everybody's, 3 the third's."""
    shares = {0: [1, 0, 0], 1: [0, 0.5, 0.5], 2: [1 / 3] * 3, 3: [0, 0, 1], IGNORE: [1 / 3] * 3}
    found = weights("class_groups", groups=[[0], [1], [1, 3]])
    assert found == pytest.approx(np.array([shares[label] for label in TARGETS]).T)
    with pytest.raises(ConfigError, match="numbered from 0; got 4"):
        weights("class_groups", groups=[[0], [4], []])
    with pytest.raises(ConfigError, match="2 groups for 3 teachers"):
        weights("class_groups", groups=[[0], [1]])


ARGUMENTS: dict[str, dict[str, Any]] = {
    "weighted": {"weights": [1.0, 2.0, 5.0]},
    "class_groups": {"groups": [[0], [1], [1, 3]]},
}


@pytest.mark.parametrize("kind", sorted(ENSEMBLES))
def test_weights_add_up_to_1_and_micro_batches_add_up(kind: str) -> None:
    combination = create(kind, **ARGUMENTS.get(kind, {}))
    given, whole = members(), batch()
    assert combination.weights(given, whole).sum(0).tolist() == pytest.approx([1] * SAMPLES)
    if combination.batchwise:
        return
    values = torch.randn(3, SAMPLES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def combined(rows: slice) -> float:
        part = [Signals(member.logits[rows]) for member in given]
        return float(combination.combine(list(values[:, rows]), part[0], part, whole.take(rows)))

    w = combination.weights(given, whole)
    assert combined(slice(None)) == pytest.approx(float((w * values).sum()), rel=1e-12)
    assert combined(slice(0, 2)) + combined(slice(2, 6)) == pytest.approx(combined(slice(None)), rel=1e-12)


# ------------------------------------------------------------------------------------------------------------- units


def test_a_value_of_the_whole_batch_takes_the_mean_weights() -> None:
    w = torch.tensor([[0.2, 0.4], [0.8, 0.6]])
    assert float(sum_weighted([torch.tensor(1.0), torch.tensor(10.0)], w, batch([0, 0]))) == pytest.approx(7.3)


def test_samples_of_several_rows_take_their_mean_weights() -> None:
    """Maps of 1 x 2 pixels: four rows of two samples; values are a sample's."""
    maps = members(2, (2, CLASSES, 1, 2))
    combination = create("ebkd")
    w = combination.weights(maps, batch([[[0, 1]], [[2, IGNORE]]])).numpy()
    assert w.shape == (2, 4)
    values = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])]
    by_sample = w.reshape(2, 2, 2).mean(2)
    expected = (by_sample * np.array([[1, 2], [3, 5]])).sum()
    found = combination.combine(values, maps[0], maps, batch([[[0, 1]], [[2, IGNORE]]]))
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_padded_rows_belong_to_no_sample() -> None:
    """Three sequences of three tokens; the second has one token that counts, the third none."""
    keep = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()
    w = torch.tensor([[0.1, 0.2, 0.6, 0.9], [0.9, 0.8, 0.4, 0.1]])
    values = [torch.tensor([1.0, 10.0, 100.0]), torch.tensor([2.0, 20.0, 200.0])]
    expected = 0.3 * 1 + 0.7 * 2 + 0.9 * 10 + 0.1 * 20 + 0.5 * 100 + 0.5 * 200
    found = sum_weighted(values, w, batch([[0] * 3] * 3, keep))
    assert float(found) == pytest.approx(expected, rel=1e-6)


# -------------------------------------------------------------------------------------------------------------- aekd


@pytest.mark.parametrize("num_teachers", [2, 3, 4, 5])
@pytest.mark.parametrize("largest", [1.0, 0.6, 0.4, 0.1])
def test_the_shortest_mixture_is_what_a_solver_finds(num_teachers: int, largest: float) -> None:
    generator = np.random.default_rng(num_teachers)
    bound = max(largest, 1 / num_teachers)
    for trial in range(8):
        lengths = generator.uniform(0.1, 10, (num_teachers, 1))
        vectors = lengths * generator.normal(size=(num_teachers, 3 + 4 * (trial % 2)))
        gram = vectors @ vectors.T
        found = shortest_mixture(gram, largest)
        assert found.sum() == pytest.approx(1, abs=1e-12) and found.min() >= 0 and found.max() <= bound + 1e-12
        solved = minimize(
            lambda w, g=gram: w @ g @ w, np.full(num_teachers, 1 / num_teachers), jac=lambda w, g=gram: 2 * g @ w,
            method="SLSQP", bounds=[(0, bound)] * num_teachers, options={"ftol": 1e-14, "maxiter": 500},
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        )  # fmt: skip
        assert found @ gram @ found == pytest.approx(solved.fun, rel=1e-5, abs=1e-6 * np.trace(gram) / num_teachers)


def test_equal_gradients_weigh_alike_and_opposite_ones_cancel() -> None:
    assert shortest_mixture(np.ones((3, 3)), 1.0) == pytest.approx([1 / 3] * 3)
    assert shortest_mixture(np.zeros((3, 3)), 1.0) == pytest.approx([1 / 3] * 3)
    assert shortest_mixture(np.array([[1.0, -2], [-2, 4]]), 1.0) == pytest.approx([2 / 3, 1 / 3])
    assert shortest_mixture(np.array([[1.0, -2], [-2, 4]]), 0.5) == pytest.approx([0.5, 0.5])
    assert shortest_mixture(np.array([[1.0, np.nan], [np.nan, 4]]), 1.0) == pytest.approx([0.5, 0.5])


def test_aekd_mixes_the_gradients_by_the_logits() -> None:
    """Values whose gradients by the student's logits are known: value k is the row sum of a_k z."""
    slopes = torch.randn(2, SAMPLES, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits = torch.zeros(SAMPLES, CLASSES, dtype=torch.float64, requires_grad=True)
    values = [(slope * logits + 1).sum(1) for slope in slopes]
    flat = slopes.flatten(1).numpy()
    difference = flat[0] - flat[1]
    first = float(np.clip(-(flat[1] @ difference) / (difference @ difference), 0, 1))
    found = create("aekd", largest=1.0).combine(values, Signals(logits), members(2), batch())
    assert first not in (0, 1)
    found.backward()
    assert logits.grad is not None
    expected = first * slopes[0] + (1 - first) * slopes[1]
    torch.testing.assert_close(logits.grad, expected, rtol=1e-6, atol=1e-8)
