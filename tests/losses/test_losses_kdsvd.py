"""kdsvd against a computation in numpy, and the gradient of its singular vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kdctl.errors import ConfigError
from kdctl.losses.kdsvd import right_singular_vectors

Make = Callable[..., Any]


def by_hand(student: list[Any], teacher: list[Any], k: int, matrix: Callable[[Any], Any]) -> float:
    """The value of one sample, from its maps (C, H, W) layer by layer."""
    total, before = 0.0, None
    for s, t in zip(student, teacher, strict=True):
        _, values, t_rows = svd(matrix(t))
        _, _, s_rows = svd(matrix(s))
        scale = values[:k] / np.sqrt((values[:k] ** 2).sum())
        aligned = []
        for row in t_rows[:k]:
            cosines = s_rows[: k + 3] @ row
            best = np.argmax(np.abs(cosines))
            aligned.append(np.sign(cosines[best]) * s_rows[best])
        now = (np.array(aligned).T * scale, t_rows[:k].T * scale)
        if before is not None:
            r = [np.exp(-((v[:, None] - w[None]) ** 2) / 8) for v, w in zip(now, before, strict=True)]
            total += ((r[0] - r[1]) ** 2).sum()
        before = now
    return total


def svd(matrix: Any) -> list[Any]:
    """By torch: the value depends on the signs of the teacher's vectors, which numpy's library may choose otherwise."""
    return [
        part.numpy() for part in torch.linalg.svd(torch.from_numpy(np.ascontiguousarray(matrix)), full_matrices=False)
    ]


def channels_as_columns(feature_CHW: Any) -> Any:
    return feature_CHW.reshape(feature_CHW.shape[0], -1).T


def width_as_columns(feature_CHW: Any) -> Any:
    return feature_CHW.reshape(-1, feature_CHW.shape[2])


class TestKDSVD:
    @pytest.mark.parametrize("k", [1, 2])
    @pytest.mark.parametrize(
        ("variant", "matrix"), [("repdistiller", channels_as_columns), ("mdistiller", width_as_columns)]
    )
    def test_formula(self, k: int, variant: str, matrix: Any, example: Make, build: Make) -> None:
        shapes = [(6, 4, 4), (5, 4, 4), (7, 2, 2)]
        given = example(size=3, student=shapes, teacher=shapes)
        maps = [[f.detach().numpy() for f in signals.features.values()] for signals in given[:2]]
        expected = [by_hand([f[i] for f in maps[0]], [f[i] for f in maps[1]], k, matrix) for i in range(3)]
        loss = build("kdsvd", given, k=k, variant=variant)
        assert not list(loss.parameters())
        assert loss.values(*given).tolist() == pytest.approx(expected, rel=1e-9)

    def test_mdistiller_averages_the_larger_map_down(self, example: Make, build: Make) -> None:
        given = example(size=1, student=[(2, 8, 8), (3, 4, 4)], teacher=[(5, 4, 4), (6, 4, 4)])
        s, t = ([f.detach().numpy()[0] for f in signals.features.values()] for signals in given[:2])
        s[0] = s[0].reshape(2, 4, 2, 4, 2).mean((2, 4))
        value = build("kdsvd", given, variant="mdistiller")(*given)
        assert value.item() == pytest.approx(by_hand(s, t, 1, width_as_columns), rel=1e-9)

    def test_too_few_singular_vectors(self, example: Make, build: Make) -> None:
        shapes = [(3, 4, 4), (4, 1, 1)]
        with pytest.raises(ConfigError, match="1 singular vectors, fewer than k = 2"):
            build("kdsvd", example(student=shapes, teacher=shapes), k=2)

    def test_one_layer_has_no_next(self, example: Make, build: Make) -> None:
        with pytest.raises(ConfigError, match="one pair of taps"):
            build("kdsvd", example())

    def test_a_student_that_diverged_has_no_loss_but_no_error(self, example: Make, build: Make) -> None:
        shapes = [(6, 4, 4), (5, 2, 2)]
        student, teacher, batch = example(size=3, student=shapes, teacher=shapes)
        loss = build("kdsvd", (student, teacher, batch))
        broken = {tap: feature.detach().clone() for tap, feature in student.features.items()}
        broken["g"][1, 0, 0, 0] = torch.inf
        student.features = {tap: feature.requires_grad_(True) for tap, feature in broken.items()}
        assert loss(student, teacher, batch).isnan()

    @pytest.mark.parametrize("variant", ["repdistiller", "mdistiller"])
    def test_dead_channels_leave_a_gradient_that_is_finite(self, variant: str, example: Make, build: Make) -> None:
        shapes = [(6, 4, 4), (5, 2, 2)]
        student, teacher, batch = example(size=3, student=shapes, teacher=shapes)
        dead = {tap: feature.detach().clone() for tap, feature in student.features.items()}
        dead["f"][0, 2:] = 0  # several singular values are zero
        dead["g"][1] = 0  # all of them
        dead["f"][2] = torch.eye(4).double().repeat(6, 1, 1)  # no two differ
        student.features = {tap: feature.requires_grad_(True) for tap, feature in dead.items()}
        build("kdsvd", (student, teacher, batch), variant=variant)(student, teacher, batch).backward()
        gradients = [feature.grad for feature in student.features.values()]
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert gradients[0][0].any() and gradients[1][2].any()


class TestRightSingularVectors:
    @pytest.mark.parametrize(("rows", "columns"), [(6, 4), (3, 7), (5, 5)])
    def test_values_and_gradient_are_those_of_torch(self, rows: int, columns: int) -> None:
        torch.manual_seed(0)
        matrix = torch.randn(2, rows, columns, dtype=torch.float64, requires_grad=True)
        mine = right_singular_vectors(matrix, 2)
        theirs = torch.linalg.svd(matrix, full_matrices=False).Vh[:, :2].transpose(1, 2)
        torch.testing.assert_close(mine, theirs)
        weights = torch.randn_like(mine)
        found, expected = (torch.autograd.grad((v * weights).sum(), matrix)[0] for v in (mine, theirs))
        torch.testing.assert_close(found, expected)

    def test_a_gradient_where_that_of_torch_is_not_a_number(self) -> None:
        torch.manual_seed(0)
        matrix = torch.randn(1, 6, 5, dtype=torch.float64)
        matrix[:, :, 3:] = 0  # two zero singular values
        weights = torch.randn(1, 5, 1, dtype=torch.float64)

        def value(live: torch.Tensor) -> torch.Tensor:
            return (right_singular_vectors(live, 1) * weights).sum()

        live = matrix.clone().requires_grad_(True)
        theirs = torch.linalg.svd(live, full_matrices=False).Vh[:, :1].transpose(1, 2)
        assert torch.autograd.grad((theirs * weights).sum(), live)[0].isnan().any()
        assert torch.autograd.gradcheck(value, live)
