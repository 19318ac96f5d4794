"""nst and mmd against formulas written out in numpy, and what they may take of memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdctl.errors import ConfigError
from kdctl.losses.nst import NST

Make = Callable[..., Any]


def features(given: Any) -> tuple[Any, Any]:
    return given[0].features["f"].detach().numpy(), given[1].features["f"].numpy()


def unit(rows: Any) -> Any:
    return rows / np.sqrt((rows**2).sum(-1, keepdims=True))


def discrepancy(x: Any, y: Any, kernel: Callable[[Any, Any], float]) -> float:
    """The maximum mean discrepancy of two sets of vectors, pair by pair."""

    def mean(a: Any, b: Any) -> float:
        return float(np.mean([[kernel(u, v) for v in b] for u in a]))

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def gaussian(variance: Any, u: Any, v: Any) -> float:
    return float(np.exp(-((u - v) ** 2).sum() / (2 * variance)))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


class TestNST:
    @pytest.mark.parametrize("degree", [1, 2, 3])
    @pytest.mark.parametrize(("channels", "side"), [((3, 5), 4), ((6, 7), 2)], ids=["many places", "many channels"])
    def test_formula(self, degree: int, channels: tuple[int, int], side: int, example: Make, build: Make) -> None:
        given = example(size=2, student=(channels[0], side, side), teacher=(channels[1], side, side))
        s, t = (unit(f.reshape(2, f.shape[1], -1)) for f in features(given))
        expected = [discrepancy(a, b, lambda x, y: (x @ y) ** degree) for a, b in zip(s, t, strict=True)]
        loss = build("nst", given, degree=degree)
        assert loss.values(*given).tolist() == pytest.approx(expected, rel=1e-10)

    def test_gaussian_kernel(self, example: Make, build: Make) -> None:
        given = example(size=2, student=(3, 2, 2), teacher=(5, 2, 2))
        expected = []
        for x, y in zip(*(unit(f.reshape(2, f.shape[1], -1)) for f in features(given)), strict=True):
            variance = np.mean([[((u - v) ** 2).sum() for v in y] for u in x])
            expected.append(discrepancy(x, y, partial(gaussian, variance)))
        loss = build("nst", given, kernel="gaussian")
        assert loss.values(*given).tolist() == pytest.approx(expected, rel=1e-10)
        same = (given[0], given[0], given[2])
        assert build("nst", same, kernel="gaussian")(*same).item() == pytest.approx(0, abs=1e-12)

    def test_the_larger_map_is_averaged_down(self, example: Make, build: Make) -> None:
        given = example(size=2, student=(3, 4, 4), teacher=(2, 2, 2))
        s, t = features(given)
        pooled = s.reshape(2, 3, 2, 2, 2, 2).mean((3, 5))
        x, y = (unit(f.reshape(2, f.shape[1], -1)) for f in (pooled, t))
        expected = sum(discrepancy(a, b, lambda u, v: (u @ v) ** 2) for a, b in zip(x, y, strict=True))
        assert build("nst", given)(*given).item() == pytest.approx(expected, rel=1e-10)

    @pytest.mark.parametrize("kernel", ["poly", "gaussian"])
    @pytest.mark.parametrize(("channels", "side"), [(64, 8), (64, 4), (16, 16)])
    def test_no_tensor_beyond_channels_by_channels(self, kernel: Any, channels: int, side: int) -> None:
        """Published implementations broadcast to B x C x C x HW."""
        size = 4
        mine, target = (torch.randn(size, channels, side, side, requires_grad=True) for _ in range(2))
        with Largest() as largest:
            NST(kernel=kernel).distance(mine, target).sum().backward()
        assert largest.elements <= max(size * channels**2, size * channels * side**2)

    def test_dead_channels_give_finite_gradients(self, example: Make, build: Make) -> None:
        student, teacher, batch = example()
        student.features["f"] = torch.zeros(4, 3, 4, 4, dtype=torch.float64, requires_grad=True)
        for kernel in ("poly", "gaussian"):
            build("nst", (student, teacher, batch), kernel=kernel)(student, teacher, batch).backward()
            assert student.features["f"].grad.isfinite().all()

    def test_vectors_are_refused(self, example: Make, build: Make) -> None:
        with pytest.raises(ConfigError, match="no places"):
            build("nst", example(student=(7,), teacher=(7,)))


class TestMMD:
    @pytest.mark.parametrize("heuristic", ["median", "mean"])
    @pytest.mark.parametrize("normalize", [True, False])
    def test_formula(self, heuristic: str, normalize: bool, example: Make, build: Make) -> None:
        given = example(size=4)
        s, t = (f.reshape(4, -1) for f in features(given))
        if normalize:
            s, t = unit(s), unit(t)
        squares = [((t[i] - t[j]) ** 2).sum() for i in range(4) for j in range(4) if i != j]
        typical = np.mean(squares) if heuristic == "mean" else np.sort(squares)[(len(squares) - 1) // 2]

        def kernel(x: Any, y: Any) -> float:
            return float(np.mean([np.exp(-((x - y) ** 2).sum() / (b * typical)) for b in (1 / 3, 1, 3)]))

        loss = build("mmd", given, kernels=3, factor=3.0, heuristic=heuristic, normalize=normalize)
        value = loss(*given) / loss.count(given[2])
        assert value.item() == pytest.approx(discrepancy(s, t, kernel), rel=1e-9)

    def test_blind_to_the_order_of_samples(self, example: Make, build: Make) -> None:
        student, teacher, batch = example(size=4)
        loss = build("mmd", (student, teacher, batch))
        before = loss(student, teacher, batch).item()
        teacher.features["f"] = teacher.features["f"][[2, 0, 3, 1]]
        assert loss(student, teacher, batch).item() == pytest.approx(before, rel=1e-12)
        assert before > 0.01

    def test_a_teacher_with_one_answer_for_all(self, example: Make, build: Make) -> None:
        student, teacher, batch = example(size=3)
        teacher.features["f"] = torch.zeros_like(teacher.features["f"])
        loss = build("mmd", (student, teacher, batch))
        value = loss(student, teacher, batch)
        value.backward()
        assert value.isfinite() and value > 0
        assert student.features["f"].grad.isfinite().all() and student.features["f"].grad.any()
