"""Losses that compare how samples lie to each other against formulas written out in numpy, and their edge cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kdctl.errors import ConfigError
from kdctl.losses.relations import BatchNorm, linear_head

Example = Callable[..., Any]
Build = Callable[..., Any]

BATCHWISE = ["rkd", "similarity_preserving", "pkt", "correlation_congruence", "srd"]


def features(given: Any, tap: str = "f") -> tuple[Any, Any]:
    return given[0].features[tap].detach().numpy(), given[1].features[tap].numpy()


def unit(rows: Any) -> Any:
    return rows / np.sqrt((rows**2).sum(-1, keepdims=True))


def huber(a: Any, b: Any) -> float:
    difference = np.abs(a - b)
    return float(np.where(difference < 1, difference**2 / 2, difference - 0.5).mean())


def distances(rows: Any) -> Any:
    each = np.sqrt(((rows[:, None] - rows[None]) ** 2).sum(2))
    return each / each[each > 0].mean()


def angles(rows: Any) -> Any:
    size = len(rows)
    found = np.zeros((size, size, size))
    for i in range(size):
        for j in range(size):
            for k in range(size):
                if i not in (j, k):
                    found[i, j, k] = unit(rows[j] - rows[i]) @ unit(rows[k] - rows[i])
    return found


def published(loss: Any, given: Any) -> float:
    return (loss(*given) / loss.count(given[2])).item()


class TestRKD:
    @pytest.mark.parametrize("variant", ["repdistiller", "mmrazor"])
    def test_formula(self, variant: str, example: Example, build: Build) -> None:
        given = example(size=5, student=(6,), teacher=(3,))
        s, t = (unit(f) if variant == "mmrazor" else f for f in features(given))
        expected = 2 * huber(distances(s), distances(t)) + 3 * huber(angles(s), angles(t))
        loss = build("rkd", given, distance_weight=2, angle_weight=3, variant=variant)
        assert published(loss, given) == pytest.approx(expected, rel=1e-10)

    def test_blind_to_scale_and_place(self, example: Example, build: Build) -> None:
        student, teacher, batch = example(size=5, student=(6,), teacher=(6,))
        loss = build("rkd", (student, teacher, batch))
        teacher.features["f"] = 3 * student.features["f"].detach() + 100
        assert loss(student, teacher, batch).item() == pytest.approx(0, abs=1e-10)

    def test_samples_that_coincide_lie_at_distance_0(self, example: Example, build: Build) -> None:
        """Nearer than rounding allows to tell: through a Gram matrix the difference would be noise."""
        student, teacher, batch = example(size=13, student=(7,), teacher=(7,))
        for signals in (student, teacher):
            rows = 1e4 * signals.features["f"].detach()
            rows[7:] = rows[:6] + 1e-6
            signals.features["f"] = rows
        student.features["f"].requires_grad_(True)
        s, t = features((student, teacher))
        mean = [np.sqrt(((f[:, None] - f[None]) ** 2).sum(2)).sum() / (13 * 12) for f in (s, t)]
        d = [np.sqrt(((f[:, None] - f[None]) ** 2).sum(2)) / m for f, m in zip((s, t), mean, strict=True)]
        loss = build("rkd", (student, teacher, batch), angle_weight=0)
        assert published(loss, (student, teacher, batch)) == pytest.approx(25 * huber(*d), rel=1e-8)
        for signals in (student, teacher):
            assert not loss._distances(signals.features["f"]).diagonal(7).any()
        build("rkd", (student, teacher, batch))(student, teacher, batch).backward()
        assert student.features["f"].grad.isfinite().all()

    def test_near_neighbours_are_exact_in_float32(self, example: Example, build: Build) -> None:
        """Their squared distance is a millionth of what its Gram matrix is made of."""
        student, teacher, batch = example(size=6, student=(16,), teacher=(16,), dtype=torch.float32)
        rows = torch.randn(3, 16, generator=torch.Generator().manual_seed(3))
        noise = torch.randn(6, 16, generator=torch.Generator().manual_seed(4))
        student.features["f"] = (rows.repeat(2, 1) + 1e-3 * noise).requires_grad_(True)
        loss = build("rkd", (student, teacher, batch))
        exact = torch.cdist(*[student.features["f"].double()] * 2, compute_mode="donot_use_mm_for_euclid_dist")
        torch.testing.assert_close(loss._distances(student.features["f"]).double(), exact, rtol=1e-6, atol=0)

    def test_the_angles_need_no_b_by_b_by_d_tensor(self, example: Example, build: Build) -> None:
        given = example(size=8, student=(4000,), teacher=(4000,))
        loss, largest = build("rkd", given), 0

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal largest
            largest = max(largest, tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss(*given)
        assert 8 * 4000 <= largest < 8 * 8 * 4000


class TestSimilarityPreserving:
    def test_formula_sums_over_taps(self, example: Example, build: Build) -> None:
        given = example(size=5, student=[(3, 4, 4), (2, 2)], teacher=[(6, 2, 2), (7,)])
        expected = 0.0
        for tap in "fg":
            s, t = (unit(f @ f.T) for f in (f.reshape(5, -1) for f in features(given, tap)))
            expected += ((s - t) ** 2).sum() / 25
        assert published(build("similarity_preserving", given), given) == pytest.approx(expected, rel=1e-12)

    def test_dead_features_give_finite_gradients(self, example: Example, build: Build) -> None:
        student, teacher, batch = example()
        student.features["f"] = torch.zeros(4, 3, 4, 4, dtype=torch.float64, requires_grad=True)
        build("similarity_preserving", (student, teacher, batch))(student, teacher, batch).backward()
        assert student.features["f"].grad.isfinite().all()


class TestPKT:
    @pytest.mark.parametrize("eps", [1e-7, 1e-2])
    def test_formula(self, eps: float, example: Example, build: Build) -> None:
        given = example(size=5, student=(6,), teacher=(3,))
        both = []
        for f in features(given):
            rows = f / (np.sqrt((f**2).sum(1, keepdims=True)) + eps)
            similarity = (rows @ rows.T + 1) / 2
            both.append(similarity / similarity.sum(1, keepdims=True))
        expected = (both[1] * np.log((both[1] + eps) / (both[0] + eps))).mean()
        assert published(build("pkt", given, eps=eps), given) == pytest.approx(expected, rel=1e-10)

    def test_dead_vectors_give_finite_gradients(self, example: Example, build: Build) -> None:
        student, teacher, batch = example(student=(6,), teacher=(6,))
        student.features["f"] = torch.zeros(4, 6, dtype=torch.float64, requires_grad=True)
        build("pkt", (student, teacher, batch))(student, teacher, batch).backward()
        assert student.features["f"].grad.isfinite().all()


class TestCorrelationCongruence:
    def test_formula(self, example: Example, build: Build) -> None:
        given = example(size=5, student=(6,), teacher=(6,))
        s, t = features(given)
        delta = np.abs(s - t)
        expected = np.mean([(delta[i] * delta[i + 1]).sum() for i in range(4)])
        loss = build("correlation_congruence", given, embed_dim=None)
        assert published(loss, given) == pytest.approx(expected, rel=1e-12)

    def test_formula_of_kdz(self, example: Example, build: Build) -> None:
        given = example(size=5, student=(6,), teacher=(3,))
        kernels = []
        for f in features(given):
            cosines = unit(f) @ unit(f).T
            series = sum((2 * 0.3 * cosines) ** p / math.factorial(p) for p in range(4))
            kernels.append(math.exp(-0.6) * series)
        expected = ((kernels[0] - kernels[1]) ** 2).mean()
        loss = build("correlation_congruence", given, embed_dim=None, variant="kdz", gamma=0.3, order=3)
        assert published(loss, given) == pytest.approx(expected, rel=1e-10)

    def test_both_sides_are_embedded_and_learnt(self, example: Example, build: Build) -> None:
        given = example(size=3, student=(6,), teacher=(4,))
        loss = build("correlation_congruence", given)
        assert {n: tuple(p.shape) for n, p in loss.named_parameters() if n.endswith("weight")} == {
            "embed_s.0.weight": (128, 6),
            "embed_t.0.weight": (128, 4),
        }
        loss(*given).backward()
        assert all(p.grad.any() for p in loss.parameters())

    def test_unlike_vectors_need_an_embedding(self, example: Example, build: Build) -> None:
        given = example(student=(6,), teacher=(4,))
        with pytest.raises(ConfigError, match=r"6 numbers, the teacher's 4 \(set embed_dim\)"):
            build("correlation_congruence", given, embed_dim=None)

    def test_one_sample_has_no_neighbour(self, example: Example, build: Build) -> None:
        given = example(size=1, student=(6,), teacher=(6,))
        assert build("correlation_congruence", given)(*given).item() == 0


class TestICKD:
    @pytest.mark.parametrize("shapes", [((3, 4, 4), (3, 2, 2)), ((6, 3), (6, 3))])
    def test_formula(self, shapes: Any, example: Example, build: Build) -> None:
        given = example(size=4, student=shapes[0], teacher=shapes[1])
        rows = [f.reshape(4, 3, -1) if f.ndim == 4 else f.swapaxes(1, 2) for f in features(given)]
        s, t = (unit(r @ r.swapaxes(1, 2)) for r in rows)
        value = build("ickd", given)(*given)
        assert value.item() == pytest.approx(((s - t) ** 2).sum() / 3, rel=1e-12)

    def test_vectors_are_refused(self, example: Example, build: Build) -> None:
        with pytest.raises(ConfigError, match="channels of a vector"):
            build("ickd", example(student=(6,), teacher=(6,)))


class TestSRD:
    @pytest.mark.parametrize("exponent", [1.0, 4.0])
    def test_formula(self, exponent: float, example: Example, build: Build) -> None:
        given = example(size=6, student=(5,), teacher=(3,))
        loss = build("srd", given, exponent=exponent).train()
        s, t = features(given)
        linear = loss.projectors[0][0]
        s = s @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()
        s, t = ((f - f.mean(0)) / np.sqrt(f.var(0) + 1e-4) for f in (s, t))
        assert published(loss, given) == pytest.approx(2 * np.log((np.abs(s - t) ** exponent).sum()), rel=1e-10)

    def test_equal_embeddings_stay_finite(self, example: Example, build: Build) -> None:
        student, teacher, batch = example(size=1, student=(5,), teacher=(5,), dtype=torch.float32)
        loss = build("srd", (student, teacher, batch), exponent=8.0)
        for signals in (student, teacher):
            signals.features["f"] = torch.zeros(1, 5)
        student.features["f"].requires_grad_(True)
        torch.nn.init.zeros_(loss.projectors[0][0].bias)
        value = loss(student, teacher, batch)
        value.backward()
        assert value.isfinite() and student.features["f"].grad.isfinite().all()


@pytest.mark.parametrize("kind", [k for k in BATCHWISE if k != "similarity_preserving"])
def test_maps_and_tokens_are_averaged(kind: str, example: Example, build: Build) -> None:
    student, teacher, batch = example(size=4, student=(3, 4, 4), teacher=(6, 5))
    loss = build(kind, (student, teacher, batch))
    value = loss(student, teacher, batch)
    student.features["f"], teacher.features["f"] = student.features["f"].mean((2, 3)), teacher.features["f"].mean(1)
    torch.testing.assert_close(loss(student, teacher, batch), value)


@pytest.mark.parametrize("kind", [*BATCHWISE, "ickd"])
def test_similarities_are_in_full_precision_under_autocast(kind: str, example: Example, build: Build) -> None:
    student, teacher, batch = example(size=4, dtype=torch.float32)
    loss = build(kind, (student, teacher, batch))
    expected = loss(student, teacher, batch)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(student, teacher, batch), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", BATCHWISE)
def test_other_ranks_are_refused(kind: str, example: Example, build: Build) -> None:
    with pytest.raises(ConfigError, match="not 5-D"):
        build(kind, example(student=(2, 2, 2, 2)))


def test_batch_norm_of_one_value_a_channel() -> None:
    norm = BatchNorm(3).train()
    with torch.no_grad():
        norm.running_mean.fill_(1.0)
        norm.running_var.fill_(4.0)
    torch.testing.assert_close(norm(torch.full((1, 3), 5.0)), torch.full((1, 3), 2.0))
    assert norm.running_mean.tolist() == [1, 1, 1]
    rows = torch.randn(8, 3)
    torch.testing.assert_close(norm(rows), (rows - rows.mean(0)) / (rows.var(0, correction=0) + 1e-5).sqrt())
    assert norm.running_mean.tolist() != [1, 1, 1]


def test_a_classifier_that_is_not_there_names_those_that_are() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.Linear(4, 2))
    assert linear_head(net, "1") is net[1]
    with pytest.raises(ConfigError, match=r"no module 'fc' .*its linear layers are 1"):
        linear_head(net, "fc")
    with pytest.raises(ConfigError, match="'0' is no linear layer but Conv2d"):
        linear_head(net, "0")
