"""Ranges and steps of quantisation: which part of a tensor's values its few levels cover. Plain numpy, no torch.

A range [low, high] always holds zero, which is one of its levels. Counts are histograms with equal bins over `full`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdctl.errors import KdctlError

Calibration = Literal["minmax", "percentile", "entropy", "mse"]
Floats = NDArray[np.float32]
Counts = NDArray[np.int64]
Range = tuple[float, float]

BINS = 4096
LEVELS = 256
PERCENTILE = 99.99
"""Percent of a tensor's values that `percentile` keeps inside the range; the rest is cut equally at both ends."""


@dataclass
class Spread:
    """The values of one tensor, met in two passes over the same data: first `stretch` sees all, then `count` does.

    low, high: the extremes, zero inside. counts: (BINS,) between them; zeros: how many values are exactly zero, which
    are not among the counts.
    """

    low: float = 0.0
    high: float = 0.0
    counts: Counts = field(default_factory=lambda: np.zeros(BINS, np.int64))
    zeros: int = 0

    def stretch(self, values: NDArray[Any]) -> None:
        """Widens the extremes to some values, of any shape. Raises KdctlError where one of them is not finite."""
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        if not np.isfinite((self.low, self.high)).all() or np.isnan(values.sum()):
            raise KdctlError("calibration met values that are not finite: the model or its input is broken")

    def count(self, values: NDArray[Any]) -> None:
        """Counts some values between the extremes."""
        if self.high > self.low:
            others = values[values != 0]
            self.zeros += values.size - others.size
            self.counts += np.histogram(others, BINS, (self.low, self.high))[0]

    def range(self, method: Calibration, levels: int = LEVELS) -> Range:
        """The range by a method; minmax does without `count`."""
        full = (self.low, self.high)
        if method == "minmax" or not self.counts.any():
            return full
        if method == "entropy":
            return least_entropy(self.counts, full, levels)
        if method == "mse":
            return least_mse(self.counts, full, levels)
        counts = self.counts.copy()
        counts[_bin_of_zero(full, len(counts))] += self.zeros
        return central(counts, full)


def _bin_of_zero(full: Range, bins: int) -> int:
    low, high = full
    return min(bins - 1, int(-low / (high - low) * bins))


def central(counts: Counts, full: Range, percentile: float = PERCENTILE) -> Range:
    """The range that leaves out (100 - percentile) / 2 percent of the values at each end."""
    edges = np.linspace(*full, len(counts) + 1)
    share = np.cumsum(counts) / counts.sum()
    tail = (100 - percentile) / 200
    first, last = int(np.searchsorted(share, tail, side="right")), int(np.searchsorted(share, 1 - tail))
    return min(0.0, float(edges[first])), max(0.0, float(edges[min(last, len(counts) - 1) + 1]))


def least_entropy(counts: Counts, full: Range, levels: int = LEVELS) -> Range:
    """The range f * [low, high], f in (1/8, 1], whose levels keep most of the distribution.

    For each f the values outside are clipped onto the edges (P), the bins inside are averaged over each level's share
    of them (Q), and f with the least KL(P || Q) is taken (Migacz, 8-bit Inference with TensorRT, 2017, made two-sided).
    `counts` leaves out exact zeros: they are represented exactly in any range, and as a spike they would draw it in.
    """
    low, high = full
    zero = round(-low / (high - low) * len(counts))
    best, best_divergence = full, np.inf
    for fraction in np.linspace(1.0, 0.125, 113):
        start, stop = zero - round(zero * fraction), zero + round((len(counts) - zero) * fraction)
        if stop - start < levels:
            break
        divergence = _divergence(counts, start, stop, levels)
        if divergence < best_divergence:
            best, best_divergence = (low * float(fraction), high * float(fraction)), divergence
    return best


def _divergence(counts: Counts, start: int, stop: int, levels: int) -> float:
    """KL(P || Q) of the counts clipped to bins start..stop against their version with few levels."""
    inside = counts[start:stop].astype(np.float64)
    clipped = inside.copy()
    clipped[0] += counts[:start].sum()
    clipped[-1] += counts[stop:].sum()
    level = np.arange(len(inside)) * levels // len(inside)
    occupied = inside > 0
    mass = np.bincount(level, inside, levels)
    bins = np.bincount(level, occupied, levels)
    spread = np.where(occupied, (mass / np.maximum(bins, 1))[level], 0.0)
    p, q = clipped / clipped.sum(), spread / max(spread.sum(), 1.0)
    rows = p > 0
    return float((p[rows] * np.log(p[rows] / np.maximum(q[rows], 1e-9))).sum())


def least_mse(counts: Counts, full: Range, levels: int = LEVELS) -> Range:
    """The range whose levels are nearest to the values in mean square: clipping weighed against rounding.

    Each end is tried at 1/64 to 64/64 of its extreme, first both together, then each with the other fixed till neither
    moves (Banner et al., Post training 4-bit quantization, 2019, minimise this error in closed form for Gaussian and
    Laplace tensors; here it is that of the values met). `counts` leaves out exact zeros, which cost nothing.
    """
    fractions = np.linspace(1 / 64, 1.0, 64)
    width = (full[1] - full[0]) / len(counts)
    centres = full[0] + width * (np.arange(len(counts)) + 0.5)
    occupied = counts > 0
    centres, weights = centres[occupied], counts[occupied].astype(np.float64)

    def error(low: float, high: float) -> float:
        return squared_error(centres, weights, (low * full[0], high * full[1]), levels)

    start = min(fractions, key=lambda f: error(f, f))
    low = high = float(start)
    for _ in range(4):
        before = (low, high)
        if full[0] < 0:
            low = float(min(fractions, key=lambda f: error(f, high)))
        if full[1] > 0:
            high = float(min(fractions, key=lambda f: error(low, f)))
        if (low, high) == before:
            break
    return low * full[0], high * full[1]


def squared_error(values: NDArray[np.floating[Any]], weights: NDArray[np.float64], limits: Range, levels: int) -> float:
    """The weighted sum of (value - its level)^2. The values may be the centres of bins narrower than a level."""
    low, high = limits
    if high <= low:
        return float((weights * values**2).sum())
    step = (high - low) / (levels - 1)
    zero = round(-low / step)
    level = np.clip(np.rint(values / step) + zero, 0, levels - 1)
    return float((weights * (values - (level - zero) * step) ** 2).sum())


# -------------------------------------------------------------------------------------------------------------- weights


def weight_scales(rows: Floats, bits: int, search: bool = False) -> Floats:
    """The step of each row of weights (R, n), whose levels are -(2^(bits-1) - 1) .. 2^(bits-1) - 1 times it: (R,).

    The largest magnitude gets the last level; with `search`, it is the step of 1/2 to 1 of that with the least squared
    error of the row. A row of zeros gets the largest step of the others (a bias is stored in multiples of it), 1 where
    all are zeros.
    """
    top = 2 ** (bits - 1) - 1
    full = np.abs(rows).max(axis=1, initial=0.0) / top
    dead = full <= np.finfo(np.float32).tiny
    full = np.where(dead, 1.0 if dead.all() else full.max(initial=0.0), full).astype(np.float32)
    if not search:
        return full
    best, least = full, np.full(len(rows), np.inf)
    for fraction in np.linspace(1.0, 0.5, 51):
        scale = (full * fraction).astype(np.float32)
        error = ((rows - to_grid(rows, scale, bits) * scale[:, None]) ** 2).sum(axis=1)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best.astype(np.float32)


def to_grid(rows: Floats, scale: Floats, bits: int) -> NDArray[np.int8]:
    """Weights (R, n) as whole multiples of their row's step (R,), clipped to the levels of `weight_scales`."""
    top = 2 ** (bits - 1) - 1
    return np.clip(np.rint(rows / scale[:, None]), -top, top).astype(np.int8)
