"""The paired test: against scipy, by simulation, and in words."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
from scipy import special
from scipy import stats as reference

from kdctl import stats


@pytest.mark.parametrize("a", [0.5, 1, 2.5, 10, 250])
@pytest.mark.parametrize("b", [0.5, 1, 7.25, 300])
def test_incomplete_beta_against_scipy(a, b):
    for x in (0, 1e-12, 1e-3, 0.1, 0.37, 0.5, 0.9, 0.999, 1):
        assert stats.incomplete_beta(a, b, x) == pytest.approx(special.betainc(a, b, x), rel=1e-10, abs=1e-300)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 9, 29, 120, 5000])
def test_t_against_scipy(df):
    for t in (-40, -2.1, -0.3, 0, 1e-6, 0.7, 1.96, 12.7, 1e4):
        assert stats.t_tail(t, df) == pytest.approx(reference.t.sf(t, df), rel=1e-9)
    for p in (1e-6, 0.005, 0.025, 0.3, 0.5, 0.8, 0.975, 0.9995):
        assert stats.t_quantile(p, df) == pytest.approx(reference.t.ppf(p, df), rel=1e-9, abs=1e-12)


def test_extreme_t_values():
    assert stats.t_tail(math.inf, 3) == 0
    assert stats.t_tail(-math.inf, 3) == 1


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_paired_against_scipy(n):
    rng = random.Random(n)
    control = [rng.gauss(90, 2) for _ in range(n)]
    treatment = [c + rng.gauss(0.5, 0.6) for c in control]
    ours = stats.paired(treatment, control)
    theirs = reference.ttest_rel(treatment, control)
    assert ours.n == n
    assert ours.p_value == pytest.approx(theirs.pvalue, rel=1e-9)
    low, high = theirs.confidence_interval(0.95)
    assert ours.ci95 == pytest.approx((low, high), rel=1e-9)
    assert ours.mean == pytest.approx(sum(treatment) / n - sum(control) / n)


def test_std_has_n_minus_one_below():
    assert stats.std([1.0, 3.0]) == pytest.approx(math.sqrt(2))
    assert stats.interval([1.0, 3.0]).std == pytest.approx(math.sqrt(2))


def test_interval_covers_the_truth_in_95_of_100_experiments():
    rng = random.Random(20)
    truth, covered, p_below = 0.3, 0, 0
    for _ in range(1000):
        control = [rng.gauss(80, 5) for _ in range(5)]
        treatment = [c + rng.gauss(truth, 0.8) for c in control]
        result = stats.paired(treatment, control)
        covered += result.ci95[0] <= truth <= result.ci95[1]
        shifted = stats.paired([t - truth for t in treatment], control)  # no difference left: p is uniform
        p_below += shifted.p_value < 0.05
    assert 930 <= covered <= 970
    assert 30 <= p_below <= 70


@pytest.mark.parametrize(("seeds", "truth"), [(3, 0.0), (5, 2.0), (10, 0.0)])
def test_intervals_of_accuracies_cover_the_truth_and_rarely_claim_what_is_not(seeds, truth):
    """Accuracies are coarse, bounded and share their seed's luck; 1,000 experiments on 500 test samples each."""
    rng = np.random.default_rng(seeds)
    covered, claimed = 0, 0
    for _ in range(1000):
        luck = rng.normal(0.80, 0.02, seeds)
        control, treatment = (100 * rng.binomial(500, p) / 500 for p in (luck, luck + truth / 100))
        result = stats.paired(treatment.tolist(), control.tolist())
        covered += result.ci95[0] <= truth <= result.ci95[1]
        claimed += stats.is_gain(result)
    assert 930 <= covered <= 970
    assert truth > 0 or claimed <= 40  # 25 are expected of an interval of 95 % on each side


def test_pairing_removes_what_seeds_share():
    control = [70.0, 80.0, 90.0, 75.0]
    result = stats.paired([71.0, 81.1, 90.9, 76.0], control)
    assert result.p_value < 0.001
    assert result.ci95[0] > 0.8


def test_one_value_has_no_interval():
    assert stats.interval([3.0]) == stats.Interval(3.0, None, None, 1)
    assert "one seed cannot tell" in stats.verdict(stats.paired([92.0], [90.0]))


def test_plain_values_for_json():
    assert stats.interval([3.0]).as_dict() == {"mean": 3.0, "std": None, "ci95": None, "n": 1}
    document = stats.paired([2.0, 3.0], [1.0, 3.0]).as_dict()
    assert json.loads(json.dumps(document)) == document
    assert set(document) == {"mean", "std", "ci95", "n", "p_value"}


def test_identical_values():
    result = stats.paired([90.0, 91.0], [90.0, 91.0])
    assert (result.mean, result.ci95, result.p_value) == (0.0, (0.0, 0.0), 1.0)
    assert stats.verdict(result).startswith("no evidence of a gain")


def test_a_spread_of_zero_is_not_called_a_gain():
    result = stats.paired([91.0, 92.0], [90.0, 91.0])
    assert (result.mean, result.std, result.ci95, result.p_value) == (1.0, 0.0, None, None)
    text = stats.verdict(result)
    assert text.startswith("no interval: all 2 seeds differ by +1.00") and "more seeds" in text


def test_rounding_is_no_spread():
    """One more sample of 360 right in each seed: the floats' differences are not the same in their last digits."""
    treatment, control = ([100 * right / 360 for right in some] for some in ((350, 351, 349), (349, 350, 348)))
    differences = {t - c for t, c in zip(treatment, control, strict=True)}
    assert len(differences) > 1
    result = stats.paired(treatment, control)
    assert result.ci95 is None and not stats.is_gain(result)
    assert stats.verdict(result).startswith("no interval: all 3 seeds differ by +0.28")
    assert stats.paired([0.1 + 0.2, 0.5], [0.3, 0.5]).ci95 == (0.0, 0.0)
    assert stats.welch([0.1 + 0.2, 0.3], [0.9, 0.9]).ci95 is None


@pytest.mark.parametrize(
    ("differences", "start"),
    [
        ([1.0, 1.2, 0.9, 1.1], "a gain: +1.05 points"),
        ([-1.0, -1.2, -0.9, -1.1], "a loss: -1.05 points"),
        ([1.0, -1.2, 0.9, -0.1], "no evidence of a gain: +0.15 points"),
    ],
)
def test_verdict(differences, start):
    text = stats.verdict(stats.paired(differences, [0.0] * len(differences)))
    assert text.startswith(start)
    assert "n = 4 seeds" in text and "95 % interval" in text


def test_verdict_names_the_unit():
    assert "-0.50 mIoU" in stats.verdict(stats.paired([0.0, 1.0], [1.0, 1.0]), unit="mIoU")


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.mean([]),
        lambda: stats.std([1.0]),
        lambda: stats.paired([1.0], [1.0, 2.0]),
        lambda: stats.paired([], []),
        lambda: stats.t_quantile(1.0, 3),
        lambda: stats.t_tail(1.0, 0),
        lambda: stats.incomplete_beta(0, 1, 0.5),
        lambda: stats.incomplete_beta(1, 1, 1.5),
    ],
)
def test_undefined_values_are_refused(call):
    with pytest.raises(ValueError):
        call()


@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 5), (20, 4)])
def test_welch_against_scipy(n, m):
    rng = random.Random(n + m)
    treatment, control = [rng.gauss(91, 0.4) for _ in range(n)], [rng.gauss(90, 2) for _ in range(m)]
    expected = reference.ttest_ind(treatment, control, equal_var=False)
    bounds = expected.confidence_interval(0.95)
    result = stats.welch(treatment, control)
    assert result.mean == pytest.approx(sum(treatment) / n - sum(control) / m)
    assert result.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    assert result.ci95 == pytest.approx((bounds.low, bounds.high), rel=1e-9)
    assert (result.n, result.std) == (min(n, m), None)


def test_welch_at_its_limits():
    assert stats.welch([3.0], [1.0, 2.0]) == stats.PairedResult(1.5, None, None, 1, None)
    assert stats.welch([2.0, 2.0], [1.0, 1.0]) == stats.PairedResult(1.0, None, None, 2, None)
    assert stats.welch([2.0, 2.0], [2.0, 2.0]).p_value == 1.0
    with pytest.raises(ValueError):
        stats.welch([], [1.0])
