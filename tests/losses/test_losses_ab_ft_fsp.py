"""ab, factor_transfer and fsp against formulas written out in numpy."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kdctl.errors import ConfigError

Make = Callable[..., Any]
LEVELS: Any = [(3, 4, 4), (4, 2, 2), (5, 2, 2)]


def arrays(signals: Any) -> list[Any]:
    return [f.detach().numpy() for f in signals.features.values()]


def normalized(rows: Any) -> Any:
    return rows / np.sqrt((rows**2).sum(1, keepdims=True))


class TestAB:
    def hinge(self, s: Any, t: Any, margin: float) -> Any:
        on, off = (t > 0) & (s <= margin), (t <= 0) & (s > -margin)
        return ((s - margin) ** 2 * on + (s + margin) ** 2 * off).reshape(len(s), -1)

    @pytest.mark.parametrize("margin", [0.5, 1.0])
    def test_formula(self, margin: float, example: Make, build: Make) -> None:
        given = example(size=2, student=LEVELS, teacher=LEVELS)
        pairs = zip(arrays(given[0]), arrays(given[1]), [0.25, 0.5, 1], strict=True)
        expected = sum(w * self.hinge(s, t, margin).sum(1) * 3 / 1000 for s, t, w in pairs)
        loss = build("ab", given, margin=margin)
        assert not list(loss.parameters())
        assert loss.values(*given).tolist() == pytest.approx(expected.tolist(), rel=1e-12)

    def test_mean_variant(self, example: Make, build: Make) -> None:
        given = example(size=2, student=LEVELS, teacher=LEVELS)
        pairs = list(zip(arrays(given[0]), arrays(given[1]), strict=True))
        expected = np.mean([self.hinge(s, t, 1.0).mean(1) for s, t in pairs], 0)
        assert build("ab", given, variant="kd_zoo").values(*given).tolist() == pytest.approx(expected.tolist())

    def test_zero_beyond_the_margin_on_the_teachers_side(self, example: Make, build: Make) -> None:
        student, teacher, batch = example()
        teacher.features["f"] = teacher.features["f"].sign() * 1e-3
        student.features["f"] = teacher.features["f"].sign() * 1.5
        loss = build("ab", (student, teacher, batch))
        assert loss(student, teacher, batch).item() == 0
        student.features["f"] = -student.features["f"]
        assert loss(student, teacher, batch).item() == pytest.approx(4 * 48 * 2.5**2 * 3 / 1000)

    def test_a_unit_at_zero_is_off(self, example: Make, build: Make) -> None:
        student, teacher, batch = example()
        teacher.features["f"] = torch.zeros_like(teacher.features["f"])
        student.features["f"] = torch.full_like(teacher.features["f"], -1.0)
        assert build("ab", (student, teacher, batch))(student, teacher, batch).item() == 0

    @pytest.mark.parametrize(
        ("student", "teacher"), [((2, 4, 4), (3, 4, 4)), ((3, 8, 8), (3, 4, 4)), ((5,), (7,)), ((6, 3), (4, 5))]
    )
    def test_connectors_where_shapes_differ(self, student: Any, teacher: Any, example: Make, build: Make) -> None:
        given = example(student=student, teacher=teacher)
        loss = build("ab", given).train()
        loss(*given).backward()
        assert all(p.grad is not None for p in loss.parameters()) and list(loss.parameters())
        assert any(isinstance(m, nn.BatchNorm2d) for m in loss.modules()) == (len(teacher) == 3)


class TestFactorTransfer:
    @pytest.mark.parametrize(("p1", "p2"), [(2, 1), (1, 2), (3, 3)])
    def test_formula_of_repdistiller(self, p1: int, p2: int, example: Make, build: Make) -> None:
        given = example(size=3, teacher=(6, 4, 4))
        s, t = (normalized((f[0] ** p1).mean(1).reshape(3, -1)) for f in map(arrays, given[:2]))
        value = build("factor_transfer", given, p1=p1, p2=p2, paraphraser=False)(*given)
        assert value.item() == pytest.approx((np.abs(s - t) ** p2).mean(1).sum(), rel=1e-12)

    @pytest.mark.parametrize("p2", [1, 2])
    def test_formula_of_the_paper(self, p2: int, example: Make, build: Make) -> None:
        given = example(size=3)
        s, t = (normalized(f[0].reshape(3, -1)) for f in map(arrays, given[:2]))
        value = build("factor_transfer", given, p2=p2, variant="paper", paraphraser=False)(*given)
        assert value.item() == pytest.approx((np.abs(s - t) ** p2).mean(1).sum(), rel=1e-12)

    def test_the_paper_needs_equal_channels_or_a_translator(self, example: Make, build: Make) -> None:
        given = example(teacher=(6, 4, 4))
        with pytest.raises(ConfigError, match="the channels differ"):
            build("factor_transfer", given, variant="paper", paraphraser=False)
        assert build("factor_transfer", given, variant="paper")(*given).isfinite()

    def test_with_a_paraphraser(self, example: Make, build: Make) -> None:
        given = example(size=3, student=(2, 4, 4), teacher=(5, 2, 2))
        loss = build("factor_transfer", given, k=0.6, reconstruction=0.25, variant="paper")
        parts, (s,), (t,) = loss.adapters[0], *(list(g.features.values()) for g in given[:2])
        with torch.no_grad():
            factor, mine = parts.encoder(t), parts.translator(s)
            error = ((parts.decoder(factor) - t).square().sum((1, 2, 3)) / t.square().sum((1, 2, 3))).numpy()
        assert factor.shape == (3, 3, 2, 2) and mine.shape == (3, 3, 4, 4)
        small = mine.numpy().reshape(3, 3, 2, 2, 2, 2).mean((3, 5))
        gap = normalized(small.reshape(3, -1)) - normalized(factor.numpy().reshape(3, -1))
        expected = np.abs(gap).mean(1) + 0.25 * error
        assert loss.values(*given).tolist() == pytest.approx(expected.tolist(), rel=1e-10)

    def test_the_paraphraser_learns_from_its_own_error_alone(self, example: Make, build: Make) -> None:
        given = example(teacher=(4, 4, 4))
        loss = build("factor_transfer", given, reconstruction=0.5)
        parts, target = loss.adapters[0], given[1].features["f"]
        own = [*parts.encoder.parameters(), *parts.decoder.parameters()]
        gap = parts.decoder(parts.encoder(target)) - target
        error = 0.5 * (gap.square().flatten(1).sum(1) / target.square().flatten(1).sum(1)).sum()
        expected = torch.autograd.grad(error, own)
        found = torch.autograd.grad(loss(*given), [*own, *parts.translator.parameters(), given[0].features["f"]])
        torch.testing.assert_close(found[: len(own)], expected)
        assert all(bool(gradient.any()) for gradient in found[len(own) :])

    def test_gradients_of_translator_and_student(self, example: Make, build: Make) -> None:
        student, teacher, batch = example(size=2, student=(2, 2, 2), teacher=(4, 2, 2))
        loss = build("factor_transfer", (student, teacher, batch))
        weights = [*loss.adapters[0].translator.parameters(), student.features["f"]]

        def value(*_: Any) -> Any:
            return loss(student, teacher, batch)

        assert torch.autograd.gradcheck(value, weights)

    def test_the_student_waits_for_the_paraphraser(self, example: Make, build: Make) -> None:
        given = example(teacher=(4, 4, 4))
        loss = build("factor_transfer", given, paraphraser_epochs=2.0)
        for epoch, waits in ((0.0, True), (1.9, True), (2.0, False)):
            loss.epoch, given[0].features["f"].grad = epoch, None
            loss.zero_grad()
            loss(*given).backward()
            assert bool(given[0].features["f"].grad.any()) != waits
            assert all(p.grad is not None for p in loss.parameters())

    def test_vectors_are_refused(self, example: Make, build: Make) -> None:
        with pytest.raises(ConfigError, match="not of vectors"):
            build("factor_transfer", example(student=(7,), teacher=(7,)))


class TestFSP:
    def flows(self, signals: Any, pool: Callable[..., Any]) -> list[Any]:
        maps = arrays(signals)
        maps[0] = pool(maps[0].reshape(*maps[0].shape[:2], 2, 2, 2, 2), (3, 5))
        return [np.einsum("bchw,bdhw->bcd", a, b) / 4 for a, b in pairwise(maps)]

    def test_formula_of_repdistiller(self, example: Make, build: Make) -> None:
        given = example(size=3, student=LEVELS, teacher=LEVELS)
        pairs = zip(*(self.flows(signals, np.mean) for signals in given[:2]), strict=True)
        expected = sum(((s - t) ** 2).mean((1, 2)) for s, t in pairs)
        loss = build("fsp", given)
        assert not list(loss.parameters())
        assert loss.values(*given).tolist() == pytest.approx(expected.tolist(), rel=1e-12)

    def test_formula_of_torchdistill(self, example: Make, build: Make) -> None:
        given = example(size=3, student=LEVELS, teacher=LEVELS)
        pairs = zip(*(self.flows(signals, np.max) for signals in given[:2]), strict=True)
        expected = sum(np.sqrt(((s - t) ** 2).sum(1)).sum(1) for s, t in pairs)
        assert build("fsp", given, variant="torchdistill").values(*given).tolist() == pytest.approx(expected.tolist())

    def test_torchdistill_has_finite_gradients_at_the_teacher(self, example: Make, build: Make) -> None:
        student, _, batch = example(student=LEVELS)
        build("fsp", (student, student, batch), variant="torchdistill")(student, student, batch).backward()
        assert all(f.grad.isfinite().all() for f in student.features.values())

    def test_a_layer_of_other_channels_has_an_adapter(self, example: Make, build: Make) -> None:
        given = example(student=[(2, 4, 4), (4, 2, 2)], teacher=[(3, 8, 8), (4, 4, 4)])
        kinds = [type(adapter) for adapter in build("fsp", given).adapters]
        assert kinds == [nn.Conv2d, nn.Identity]

    def test_one_layer_does_not_flow(self, example: Make, build: Make) -> None:
        with pytest.raises(ConfigError, match="one pair of taps"):
            build("fsp", example())

    def test_vectors_are_refused(self, example: Make, build: Make) -> None:
        with pytest.raises(ConfigError, match="not vectors"):
            build("fsp", example(student=[(3, 4, 4), (7,)], teacher=[(3, 4, 4), (7,)]))
