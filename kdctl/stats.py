"""Is one number larger than another? Means, intervals and the paired test over seeds: plain floats, no dependency.

Runs of a group share seeds: run i of the treatment and run i of the control see the same pixels in the same order.
Their difference is therefore tested pair by pair with Student's t distribution (W. S. Gosset, "The probable error of
a mean", Biometrika 1908), which is what makes a handful of seeds enough. The t distribution comes from the regularised
incomplete beta function, evaluated by its continued fraction (Abramowitz & Stegun, 26.5.8 and 26.7.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

_CONVERGED = 3e-16
_TINY = 1e-300
_MOST_TERMS = 10_000


@dataclass(frozen=True)
class Interval:
    """Mean, standard deviation (n - 1) and 95 % interval of the mean; the last two are None when n < 2."""

    mean: float
    std: float | None
    ci95: tuple[float, float] | None
    n: int

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values for a JSON document; ci95 is a list."""
        return asdict(self) | {"ci95": None if self.ci95 is None else list(self.ci95)}


@dataclass(frozen=True)
class PairedResult(Interval):
    """An Interval of the differences treatment - control, with the two-sided p-value of "no difference".

    Where all differences are the same, but not 0, there is neither interval nor p-value: numbers as coarse as those of
    a small test split agree by chance, and a spread of 0 would pass for certainty.
    """

    p_value: float | None


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean. Raises ValueError without values."""
    if not values:
        raise ValueError("the mean of no values is not defined")
    return math.fsum(values) / len(values)


def std(values: Sequence[float]) -> float:
    """Sample standard deviation, with n - 1 below. Raises ValueError for fewer than two values."""
    if len(values) < 2:
        raise ValueError("a standard deviation needs two values")
    centre = mean(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1))


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function I_x(a, b) for a, b > 0 and x in [0, 1], to about 1e-12."""
    if not (a > 0 and b > 0 and 0 <= x <= 1):
        raise ValueError(f"incomplete_beta needs a, b > 0 and x in [0, 1], got {a}, {b}, {x}")
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):  # the continued fraction converges fast on the other side
        return 1.0 - incomplete_beta(b, a, 1.0 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) / a / _beta_fraction(a, b, x)


def _beta_fraction(a: float, b: float, x: float) -> float:
    """1 + d1/(1 + d2/(1 + ...)) of A&S 26.5.8, summed forwards by the modified Lentz method."""
    fraction, numerator, denominator = 1.0, 1.0, 0.0
    for term in range(1, _MOST_TERMS):
        m = term // 2
        if term % 2:
            d = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            d = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        denominator = 1.0 / ((1.0 + d * denominator) or _TINY)
        numerator = (1.0 + d / numerator) or _TINY
        step = numerator * denominator
        fraction *= step
        if abs(step - 1.0) < _CONVERGED:
            break
    return fraction


def t_tail(t: float, df: float) -> float:
    """P(T > t) of Student's t with `df` degrees of freedom."""
    if df <= 0:
        raise ValueError(f"degrees of freedom must be positive, got {df}")
    if math.isinf(t):
        return 0.0 if t > 0 else 1.0
    square = t * t
    if square < 1:  # df / (df + t^2) would round to 1
        half = 0.5 - 0.5 * incomplete_beta(0.5, df / 2, square / (df + square))
    else:
        half = 0.5 * incomplete_beta(df / 2, 0.5, df / (df + square))
    return half if t >= 0 else 1.0 - half


def t_quantile(probability: float, df: float) -> float:
    """The t for which P(T <= t) = probability; by bisection on the tail, to about 1e-12 relative."""
    if not 0 < probability < 1:
        raise ValueError(f"a probability between 0 and 1 is needed, got {probability}")
    if probability == 0.5:
        return 0.0
    if probability < 0.5:
        return -t_quantile(1.0 - probability, df)
    low, high = 0.0, 1.0
    while t_tail(high, df) > 1.0 - probability:
        low, high = high, 2.0 * high
    while True:
        middle = 0.5 * (low + high)
        if middle in (low, high):
            return middle
        if t_tail(middle, df) > 1.0 - probability:
            low = middle
        else:
            high = middle


def interval(values: Sequence[float]) -> Interval:
    """Mean of `values` with the 95 % t interval of that mean. Raises ValueError without values."""
    centre, n = mean(values), len(values)
    if n < 2:
        return Interval(centre, None, None, n)
    spread = std(values)
    half_width = t_quantile(0.975, n - 1) * spread / math.sqrt(n)
    return Interval(centre, spread, (centre - half_width, centre + half_width), n)


def paired(treatment: Sequence[float], control: Sequence[float]) -> PairedResult:
    """Paired t-test of treatment - control; item i of both comes from the same seed.

    Raises ValueError when the two differ in length or are empty.
    """
    if len(treatment) != len(control):
        raise ValueError(f"pairs are needed, got {len(treatment)} and {len(control)} values")
    differences = [t - c for t, c in zip(treatment, control, strict=True)]
    of_mean = interval(differences)
    p_value = None
    if of_mean.std is not None:
        noise = _rounding([*treatment, *control])
        if of_mean.std <= noise:
            return _without_spread(0.0 if abs(of_mean.mean) <= noise else of_mean.mean, 0.0, of_mean.n)
        p_value = _two_sided_p(of_mean.mean, of_mean.std / math.sqrt(of_mean.n), of_mean.n - 1)
    return PairedResult(of_mean.mean, of_mean.std, of_mean.ci95, of_mean.n, p_value)


def welch(treatment: Sequence[float], control: Sequence[float]) -> PairedResult:
    """Welch's t-test of mean(treatment) - mean(control), whose values belong to no pairs and may spread differently.

    Degrees of freedom by Welch and Satterthwaite (B. L. Welch, Biometrika 1947). `n` is the number of values of the
    smaller side, `std` is None: there are no single differences. Where a side has but one value, or where neither side
    spreads, there is neither interval nor p-value. Raises ValueError where a side has none.
    """
    difference, n = mean(treatment) - mean(control), min(len(treatment), len(control))
    if n < 2:
        return PairedResult(difference, None, None, n, None)
    first, second = std(treatment) ** 2 / len(treatment), std(control) ** 2 / len(control)
    error, noise = math.sqrt(first + second), _rounding([*treatment, *control])
    if error <= noise:
        return _without_spread(0.0 if abs(difference) <= noise else difference, None, n)
    df = (first + second) ** 2 / (first**2 / (len(treatment) - 1) + second**2 / (len(control) - 1))
    half_width = t_quantile(0.975, df) * error
    bounds = (difference - half_width, difference + half_width)
    return PairedResult(difference, None, bounds, n, _two_sided_p(difference, error, df))


def _rounding(values: Sequence[float]) -> float:
    """What differences of these values may be off by because floats are rounded: 97.5 - 97.2 is not 97.2 - 96.9."""
    return 1e-12 * max(map(abs, values))


def _without_spread(difference: float, spread: float | None, n: int) -> PairedResult:
    """The result of values that all differ alike: certain that there is no difference, silent about one."""
    same = difference == 0
    return PairedResult(difference, spread, (0.0, 0.0) if same else None, n, 1.0 if same else None)


def _two_sided_p(difference: float, standard_error: float, df: float) -> float:
    return min(1.0, 2.0 * t_tail(abs(difference) / standard_error, df))


def is_gain(result: Interval) -> bool:
    """Whether the whole interval lies above zero."""
    return result.ci95 is not None and result.ci95[0] > 0


def verdict(result: PairedResult, unit: str = "points") -> str:
    """One sentence on what the seeds show: a gain, a loss, no evidence of a gain, or that one seed cannot tell."""
    if result.n < 2:
        return f"one seed cannot tell: {result.mean:+.2f} {unit} is within what another seed may change; use --seeds"
    if result.ci95 is None or result.p_value is None:
        return f"no interval: all {result.n} seeds differ by {result.mean:+.2f} {unit}; more seeds show the spread"
    low, high = result.ci95
    numbers = (
        f"{result.mean:+.2f} {unit}, 95 % interval [{low:+.2f}, {high:+.2f}], "
        f"n = {result.n} seeds, p {_p_text(result.p_value)}"
    )
    if low <= 0 <= high:
        return f"no evidence of a gain: {numbers}"
    return f"a gain: {numbers}" if low > 0 else f"a loss: {numbers}"


def _p_text(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else f"= {p_value:.3f}"
