"""Ranges of activations for static quantisation, in two streaming passes over a few hundred images.

Memory stays bounded: images go through the network in batches small enough for all their activations to fit.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdctl.errors import KdctlError

Calibration = Literal["minmax", "percentile", "entropy"]
Floats = NDArray[np.float32]
Range = tuple[float, float]

BINS = 4096
LEVELS = 256
PERCENTILE = 99.99
"""Percent of a tensor's values that `percentile` keeps inside the range; the rest is cut equally at both ends."""
ACTIVATION_BYTES = 256 * 2**20


def ranges(session: Any, tensors: list[str], images: Floats, method: Calibration) -> dict[str, Range]:
    """The range [low, high] of each tensor, zero always inside, over all images.

    session: an ONNX Runtime session of which `tensors` are outputs and `images` the only input.
    minmax: the extremes. percentile: see PERCENTILE. entropy: see `least_entropy`.
    Raises KdctlError when a tensor is not finite.
    """
    batch = _batch_size(session, tensors, images)
    low = dict.fromkeys(tensors, 0.0)
    high = dict.fromkeys(tensors, 0.0)
    for name, values in _activations(session, tensors, images, batch):
        low[name], high[name] = min(low[name], float(values.min())), max(high[name], float(values.max()))
        if not np.isfinite((low[name], high[name])).all() or np.isnan(values.sum()):
            raise KdctlError("calibration met values that are not finite: the model or its input is broken")
    if method == "minmax":
        return {name: (low[name], high[name]) for name in tensors}
    counts = {name: np.zeros(BINS, np.int64) for name in tensors}
    for name, values in _activations(session, tensors, images, batch):
        if high[name] > low[name]:
            kept = values[values != 0] if method == "entropy" else values
            counts[name] += np.histogram(kept, BINS, (low[name], high[name]))[0]
    choose = central if method == "percentile" else least_entropy
    return {n: choose(counts[n], (low[n], high[n])) if high[n] > low[n] else (low[n], high[n]) for n in tensors}


def _batch_size(session: Any, tensors: list[str], images: Floats) -> int:
    one = session.run(tensors, {session.get_inputs()[0].name: images[:1]})
    return max(1, min(64, ACTIVATION_BYTES // max(1, sum(v.nbytes for v in one))))


def _activations(session: Any, tensors: list[str], images: Floats, batch: int) -> Any:
    name = session.get_inputs()[0].name
    for start in range(0, len(images), batch):
        yield from zip(tensors, session.run(tensors, {name: images[start : start + batch]}), strict=True)


def central(counts: NDArray[np.int64], full: Range) -> Range:
    """The range that leaves out (100 - PERCENTILE) / 2 percent of the values at each end."""
    edges = np.linspace(*full, len(counts) + 1)
    share = np.cumsum(counts) / counts.sum()
    tail = (100 - PERCENTILE) / 200
    first, last = int(np.searchsorted(share, tail, side="right")), int(np.searchsorted(share, 1 - tail))
    return min(0.0, float(edges[first])), max(0.0, float(edges[min(last, len(counts) - 1) + 1]))


def least_entropy(counts: NDArray[np.int64], full: Range) -> Range:
    """The range f * [low, high], f in (1/8, 1], whose 256 levels keep most of the distribution.

    For each f the values outside are clipped onto the edges (P), the bins inside are averaged over each level's share
    of them (Q), and f with the least KL(P || Q) is taken (Migacz, 8-bit Inference with TensorRT, 2017, made two-sided).
    `counts` leaves out exact zeros: they are represented exactly in any range, and as a spike they would draw it in.
    """
    low, high = full
    zero = round(-low / (high - low) * len(counts))
    best, best_divergence = full, np.inf
    for fraction in np.linspace(1.0, 0.125, 113):
        start, stop = zero - round(zero * fraction), zero + round((len(counts) - zero) * fraction)
        if stop - start < LEVELS:
            break
        divergence = _divergence(counts, start, stop)
        if divergence < best_divergence:
            best, best_divergence = (low * float(fraction), high * float(fraction)), divergence
    return best


def _divergence(counts: NDArray[np.int64], start: int, stop: int) -> float:
    """KL(P || Q) of the counts clipped to bins start..stop against their 256-level version."""
    inside = counts[start:stop].astype(np.float64)
    clipped = inside.copy()
    clipped[0] += counts[:start].sum()
    clipped[-1] += counts[stop:].sum()
    level = np.arange(len(inside)) * LEVELS // len(inside)
    occupied = inside > 0
    mass = np.bincount(level, inside, LEVELS)
    bins = np.bincount(level, occupied, LEVELS)
    spread = np.where(occupied, (mass / np.maximum(bins, 1))[level], 0.0)
    p, q = clipped / clipped.sum(), spread / max(spread.sum(), 1.0)
    rows = p > 0
    return float((p[rows] * np.log(p[rows] / np.maximum(q[rows], 1e-9))).sum())
