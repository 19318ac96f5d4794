"""byot and uskd, in which the student is its own teacher, against formulas written out in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kdctl.errors import ConfigError
from kdctl.signals import IGNORE

Example = Callable[..., Any]
Build = Callable[..., Any]


def softmax(rows: Any) -> Any:
    powers = np.exp(rows - rows.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


class TestBYOT:
    @pytest.fixture
    def exits(self, example: Example) -> Any:
        return example(size=4, student=[(2, 4, 4), (3, 5), (6,)], teacher=(6,))

    def test_formula(self, exits: Any, build: Build) -> None:
        student, _, batch = exits
        loss = build("byot", exits, temperature=2.0, ce_weight=0.5, kd_weight=0.2, feature_weight=0.1)
        batch.targets[1] = IGNORE
        deepest, last = student.logits.detach().numpy(), student.features["h"].detach().numpy()
        expected = np.zeros(4)
        for leave, tap in zip(loss.exits, "fg", strict=True):
            embedding, logits = (part.detach().numpy() for part in leave(student.features[tap]))
            assert embedding.shape == (4, 6) and logits.shape == (4, 5)
            s, t = softmax(logits / 2), softmax(deepest / 2)
            expected += 0.5 * -np.log(softmax(logits)[range(4), batch.targets.clamp_min(0).numpy()])
            expected += 0.2 * 4 * (t * np.log(t / s)).sum(1)
            expected += 0.1 * np.sqrt(((embedding - last) ** 2).sum(1))
        assert loss(student, None, batch).item() == pytest.approx(expected[[0, 2, 3]].sum(), rel=1e-10)
        assert int(loss.count(batch)) == 3

    def test_the_last_layer_learns_nothing_from_its_exits(self, exits: Any, build: Build) -> None:
        student = exits[0]
        build("byot", exits)(*exits).backward()
        assert student.features["f"].grad.any() and student.features["g"].grad.any()
        assert student.features["h"].grad is None and student.logits.grad is None

    def test_the_exits_learn(self, exits: Any, build: Build) -> None:
        loss = build("byot", exits).train()
        loss(*exits).backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in loss.parameters())

    def test_one_tap_is_no_exit(self, example: Example, build: Build) -> None:
        with pytest.raises(ConfigError, match="one tap is no exit"):
            build("byot", example(student=[(6,)], teacher=[(6,)]))

    def test_an_exit_at_its_target_has_finite_gradients(self, exits: Any, build: Build) -> None:
        student = exits[0]
        loss = build("byot", exits)
        for parameter in loss.parameters():
            torch.nn.init.zeros_(parameter)
        student.features["h"] = torch.zeros(4, 6, dtype=torch.float64)
        loss(*exits).backward()
        assert student.features["f"].grad.isfinite().all()


@pytest.mark.parametrize("kind", ["byot", "uskd"])
def test_pixels_are_refused(kind: str, example: Example, build: Build) -> None:
    student, teacher, batch = example(student=[(2, 4, 4)] * (1 + (kind == "byot")))
    student.logits = torch.zeros(4, 5, 2, 2, dtype=torch.float64)
    with pytest.raises(ConfigError, match="one row of logits a sample"):
        build(kind, (student, teacher, batch))


class TestUSKD:
    def expected(self, loss: Any, given: Any, variant: str, labelled: list[int]) -> float:
        student, _, batch = given
        feature = student.features["f"].detach().mean((2, 3))
        s, w = softmax(student.logits.detach().numpy()), softmax(loss.weak_head(feature).detach().numpy())
        total, classes = 0.0, s.shape[1]
        y = batch.targets.clamp_min(0).numpy()
        mean = np.mean([s[n, y[n]] ** 2 for n in labelled])
        for n in labelled:
            view = np.log(s[n]) if variant == "code" else s[n]
            score = w[n] / (1 - w[n, y[n]] + 1e-6) + view / (1 - view[y[n]] + 1e-6)
            rank = {int(k): r for r, k in enumerate(np.argsort(-score), start=1)}
            others = [k for k in range(classes) if k != y[n]]
            zipf = np.array([1 / rank[k] for k in others])
            target = -(1 + s[n, y[n]] ** 2 - mean) * np.log(s[n, y[n]])
            rest = -(zipf / zipf.sum() * np.log(s[n, others] / s[n, others].sum())).sum()
            smooth = 0.9 * np.eye(classes)[y[n]] + 0.1 / classes
            total += 2 * target + 0.3 * rest - 0.5 * (smooth * np.log(w[n])).sum()
        return total

    @pytest.mark.parametrize("variant", ["code", "paper"])
    @pytest.mark.parametrize("labelled", [[0, 1, 2, 3, 4, 5], [0, 2, 5]])
    def test_formula(self, variant: str, labelled: list[int], example: Example, build: Build) -> None:
        given = example(size=6, classes=7)
        loss = build("uskd", given, alpha=2.0, beta=0.3, mu=0.5, variant=variant)
        for n in set(range(6)) - set(labelled):
            given[2].targets[n] = IGNORE
        value = loss(given[0], None, given[2])
        assert value.item() == pytest.approx(self.expected(loss, given, variant, labelled), rel=1e-10)
        assert int(loss.count(given[2])) == len(labelled)

    def test_the_variants_rank_differently(self, example: Example, build: Build) -> None:
        given = example(size=6, classes=7)
        values = {variant: build("uskd", given, variant=variant)(*given).item() for variant in ("code", "paper")}
        assert values["code"] != values["paper"]

    def test_the_soft_labels_are_constants(self, example: Example, build: Build) -> None:
        """With the target alone the gradient is that of p times a cross entropy."""
        student, teacher, batch = example(size=3)
        build("uskd", (student, teacher, batch), beta=0.0, mu=0.0)(student, teacher, batch).backward()
        s = student.logits.detach().softmax(1)
        s_y = s[range(3), batch.targets]
        p = 1 + s_y**2 - (s_y**2).mean()
        expected = p[:, None] * (s - torch.nn.functional.one_hot(batch.targets, 5))
        torch.testing.assert_close(student.logits.grad, expected)

    def test_the_weak_head_stands_on_one_tap(self, example: Example, build: Build) -> None:
        with pytest.raises(ConfigError, match="on one tap, not 2"):
            build("uskd", example(student=[(6,), (6,)], teacher=[(6,), (6,)]))
