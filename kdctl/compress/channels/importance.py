"""How much each unit of tied channels matters: one number a unit, higher matters more."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdctl.compress.channels.layout import Channels, Group, Numbers
from kdctl.errors import ConfigError, KdctlError, Problem

if TYPE_CHECKING:
    from kdctl.compress.base import Workbench
    from kdctl.models.record import Model
    from kdctl.signals import Batch

Importance = Literal["l1", "l2", "bn", "taylor", "random"]
Scores = NDArray[np.float64]
MICRO_BATCH = 16


def importance(
    kind: Importance, model: Model, channels: Channels, groups: list[Group], bench: Workbench, samples: int
) -> Scores:
    """A score for each number of the channels; only those of units in `groups` mean something.

    l1, l2: the norm of all weights that make or take the unit's channels, divided by its mean over a layer, summed (Li
    et al., Pruning Filters for Efficient ConvNets, ICLR 2017; over tied layers: Fang et al., DepGraph, CVPR 2023). bn:
    the mean |scale| of its normalisations (Liu et al., Network Slimming, ICCV 2017). taylor: the first-order estimate
    of what the loss loses without it, (sum of gradient times weight over all that take it)^2, over `samples` labelled
    images (Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019). random: of a fixed seed.
    Raises ConfigError where the net has no normalisation to read (bn) and KdctlError where a score is not finite.
    """
    size = 1 + max((int(n.max(initial=0)) for n in _all_numbers(channels)), default=0)
    if kind == "random":
        scores = np.random.default_rng(0).random(size)
    elif kind == "bn":
        scores = _scales(channels, groups, size)
    elif kind == "taylor":
        scores = _taylor(model, channels, bench, samples, size)
    else:
        scores = _norms(channels, 1 if kind == "l1" else 2, size)
    if not np.isfinite([scores[u] for g in groups for u in g.units]).all():
        raise KdctlError("the weights are not finite: the model is broken")
    return scores


def _all_numbers(channels: Channels) -> Iterator[Numbers]:
    for layer in channels.layers:
        yield layer.outputs
        if layer.inputs is not None:
            yield layer.inputs


def _columns(weight: Tensor, count: int) -> Tensor:
    """A weight (out, in / groups, ...) as (in, weights that take the channel)."""
    groups = count // weight.shape[1]
    by_group = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return by_group.permute(0, 2, 1, 3).reshape(count, -1)


def _norms(channels: Channels, power: int, size: int) -> Scores:
    total = np.zeros(size)
    for layer in channels.layers:
        if layer.pad is not None or layer.is_norm:
            continue
        weight: Tensor = layer.module.weight.detach().double()  # type: ignore[operator]
        sides = [(layer.outputs, weight.flatten(1))]
        if layer.inputs is not None:
            sides.append((layer.inputs, _columns(weight, len(layer.inputs))))
        for numbers, rows in sides:
            sums = np.bincount(numbers, rows.abs().pow(power).sum(1).numpy(), size)
            here = np.unique(numbers)
            norms = sums[here] ** (1 / power)
            total[here] += norms / max(float(norms.mean()), 1e-12)
    return total


def _scales(channels: Channels, groups: list[Group], size: int) -> Scores:
    total, terms = np.zeros(size), np.zeros(size)
    for layer in channels.layers:
        if layer.is_norm and layer.module.weight is not None:
            scale: Tensor = layer.module.weight.detach()  # type: ignore[operator]
            total += np.bincount(layer.outputs, scale.abs().double().numpy(), size)
            terms += np.bincount(layer.outputs, minlength=size)
    bare = [group.name for group in groups if not terms[group.units].all()]
    if bare:
        message = f"importance bn reads batch normalisation, and there is none after {bare[0]}"
        raise ConfigError(Problem(message, key="importance", hint="l2, l1 or taylor"))
    return total / np.maximum(terms, 1)


def _taylor(model: Model, channels: Channels, bench: Workbench, samples: int, size: int) -> Scores:
    copied = copy.deepcopy(model).eval().requires_grad_(True)
    takers = [layer for layer in channels.layers if layer.inputs is not None]
    weights: list[Any] = [copied.net.get_submodule(layer.path).weight for layer in takers]
    total = np.zeros(size)
    for batch in micro_batches(_labelled(bench.batches()), samples):
        copied.zero_grad(set_to_none=True)
        signals = bench.task.signals(bench.task.forward(copied, batch), batch)
        with torch.enable_grad():
            parts = bench.task.supervised(signals, batch)
        torch.stack([value / count.clamp_min(1) for value, count in parts.values()]).sum().backward()
        gain = np.zeros(size)
        for layer, weight in zip(takers, weights, strict=True):
            if weight.grad is not None and layer.inputs is not None:
                product = _columns((weight.grad * weight.detach()).double(), len(layer.inputs)).sum(1)
                gain += np.bincount(layer.inputs, product.numpy(), size)
        total += gain**2
    if not total.any():
        hint = "l2, l1 and bn need no labels"
        raise KdctlError("importance taylor found no gradient: the images have no labels, or there are none", hint=hint)
    return total


def _labelled(batches: Iterator[Batch]) -> Iterator[Batch]:
    """What has a label of batches in which that comes first."""
    for batch in batches:
        rows = batch.labelled()
        if not rows.any():
            return
        yield batch.take(rows)


def micro_batches(batches: Iterator[Batch], samples: int) -> Iterator[Batch]:
    """Small batches of the first `samples`."""
    seen = 0
    for batch in batches:
        for part in batch.micro_batches(-(-batch.size // MICRO_BATCH)):
            if seen >= samples:
                return
            seen += part.size
            yield part
