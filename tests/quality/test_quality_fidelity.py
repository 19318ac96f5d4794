"""Fidelity against scipy, and counted by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax
from scipy.stats import entropy

from kdctl.quality.fidelity import describe_fidelity, js_divergence, kl_divergence
from kdctl.signals import IGNORE


def chosen(*classes: int) -> Any:
    return 3.0 * np.eye(4)[list(classes)]


def test_divergences_are_those_of_scipy() -> None:
    random = np.random.default_rng(0)
    s, t = (3 * random.standard_normal((50, 6)) for _ in range(2))
    p, q = softmax(t, 1), softmax(s, 1)
    assert kl_divergence(s, t) == pytest.approx(entropy(p, q, axis=1).mean(), rel=1e-9)
    assert js_divergence(s, t) == pytest.approx((jensenshannon(p, q, axis=1) ** 2).mean(), rel=1e-9)
    assert js_divergence(s, t) == pytest.approx(js_divergence(t, s), rel=1e-12)
    assert kl_divergence(s, s + 5) == pytest.approx(0, abs=1e-12)


def test_divergences_at_the_edge() -> None:
    one, other = [[2000.0, 0.0]], [[0.0, 2000.0]]
    assert kl_divergence(one, other) == pytest.approx(2000) and js_divergence(one, other) == pytest.approx(math.log(2))
    assert math.isnan(kl_divergence([[math.nan, 0.0]], one)) and math.isnan(js_divergence(one, [[math.nan, 0.0]]))
    assert math.isnan(kl_divergence(np.zeros((0, 3)), np.zeros((0, 3))))


def test_shares_by_hand() -> None:
    """Truth 0 throughout: both right; student alone; teacher alone twice; both wrong alike, and differently."""
    student, teacher = chosen(0, 0, 1, 2, 3, 1), chosen(0, 1, 0, 0, 3, 2)
    found = describe_fidelity(student, teacher, np.zeros(6))
    shares = {name: round(found[name] * 6 / 100, 9) for name in found if name not in ("kl", "js", "inherited_errors")}
    assert shares == {
        "agreement": 2, "both_right": 1, "student_only": 1, "teacher_only": 2, "both_wrong": 2, "same_wrong": 1,
    }  # fmt: skip
    assert found["inherited_errors"] == pytest.approx(100 / 3)
    assert found["kl"] == kl_divergence(student, teacher) > 0


def test_unlabelled_samples_agree_and_are_neither_right_nor_wrong() -> None:
    student, teacher = chosen(0, 1, 2, 3), chosen(0, 1, 2, 0)
    found = describe_fidelity(student, teacher, [0, IGNORE, IGNORE, 3])
    assert found["agreement"] == 75 and found["both_right"] == 50 and found["student_only"] == 50
    none = describe_fidelity(student, teacher, [IGNORE] * 4)
    assert none["agreement"] == 75 and math.isnan(none["both_right"]) and math.isnan(none["inherited_errors"])


def test_a_teacher_without_errors_hands_none_down() -> None:
    found = describe_fidelity(chosen(0, 2), chosen(0, 1), [0, 1])
    assert math.isnan(found["inherited_errors"]) and found["same_wrong"] == 0 and found["teacher_only"] == 50


def test_a_row_that_is_nan_is_wrong_and_agrees_with_nothing() -> None:
    broken = chosen(0, 1)
    broken[1] = np.nan
    found = describe_fidelity(broken, broken, [0, 1])
    assert found["agreement"] == 50 and found["both_wrong"] == 50 and found["same_wrong"] == 0
    assert found["inherited_errors"] == 0


def test_shares_add_up() -> None:
    random = np.random.default_rng(1)
    s, t, y = random.integers(0, 3, (99, 5)), random.integers(0, 3, (99, 5)), random.integers(0, 5, 99)
    found = describe_fidelity(s, t, y)
    assert sum(found[n] for n in ("both_right", "student_only", "teacher_only", "both_wrong")) == pytest.approx(100)
    assert found["same_wrong"] <= found["both_wrong"]
    assert found["agreement"] == pytest.approx(found["both_right"] + found["same_wrong"])
