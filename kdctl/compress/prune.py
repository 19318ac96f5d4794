"""Structured pruning: whole channels, heads and units go, and the layers become narrower."""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Callable, Collection
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdctl.bench import cost as measured
from kdctl.compress.base import Reshape, Reshaped, Workbench
from kdctl.compress.channels.budget import Costs, Of, OutOfReach, Ranking, Way, cheapest_first, overall, search, uniform
from kdctl.compress.channels.importance import importance
from kdctl.compress.channels.layout import NORMS, Channels, Group
from kdctl.compress.channels.narrow import differs, masked, narrow, narrowed
from kdctl.compress.channels.rules import follow
from kdctl.config.types import Fraction, Positive, PositiveInt
from kdctl.errors import ConfigError, KdctlError, Problem
from kdctl.models import structure
from kdctl.models.record import Model
from kdctl.signals import find_logits

_CORRECTIONS = 3
"""Times that a latency is measured and the search repeated."""
_LEVELS = 6
"""Widths of each group that a scan looks at, with no more than so many images."""
_SCANNED = 128


class Prune(Reshape):
    """Removes channels, attention heads and hidden units, the least important first, until a budget holds.

    Which channels can only go together is found by following them through the net (compress/channels); the classes,
    the input, and what cannot be followed stay. What comes out equals the net with the removed channels masked.
    Papers: dependencies and norms over them: Fang et al., DepGraph, CVPR 2023. importance: see importance.py there.
        scope sensitivity: after Yang et al., NetAdapt, ECCV 2018, with the output's noise in the place of accuracy.

    ratio: the share that is removed, of: the multiply-accumulates, the parameters or the channels that may go.
    importance: what decides which channels of a layer go first. round_to: what the channels that stay in a layer are a
    multiple of; processors work on 8 or 16 at once; where that cannot meet the budget, half of it, and so on. scope:
    `global` ranks the channels of all layers together by their importance for what they cost, `uniform` takes the same
    share of each, `sensitivity` scans what the output of each layer's narrower versions loses and takes the cheapest.
    skip: patterns of layers (`layer1.*`) whose outputs stay. latency_ms: in the place of ratio: the largest net that
    takes no longer in ONNX Runtime (fp32, one image, one thread), predicted, then measured. samples: training images
    for taylor, the scan and recalibrate. recalibrate: whether the statistics of batch normalisations are taken anew
    from them, without labels.
    """

    smoke = {"samples": 8, "latency_ms": None}

    def __init__(
        self,
        *,
        ratio: Fraction = 0.5,
        of: Literal["macs", "parameters", "channels"] = "macs",
        importance: Literal["l1", "l2", "bn", "taylor", "random"] = "taylor",
        round_to: PositiveInt = 8,
        scope: Literal["global", "uniform", "sensitivity"] = "global",
        skip: list[str] | None = None,
        latency_ms: Positive | None = None,
        samples: PositiveInt = 512,
        recalibrate: bool = True,
    ) -> None:
        self.ratio, self.of, self.importance, self.round_to, self.scope = ratio, of, importance, round_to, scope
        self.skip, self.latency_ms, self.samples, self.recalibrate = skip or [], latency_ms, samples, recalibrate

    def check(self, model: Model) -> None:
        _groups(self._follow(model))

    def reshape(self, model: Model, bench: Workbench) -> Reshaped:
        """The narrower model. Raises ConfigError for a pattern that names no layer or an importance that the net does
        not have, KdctlError where nothing can be removed, the budget cannot be met, or a layer breaks."""
        model = copy.deepcopy(model).cpu().float().eval()
        channels = self._follow(model)
        kept = _matching(channels, self.skip)
        channels.freeze({int(n) for layer in channels.layers if layer.path in kept for n in layer.outputs})
        broken: dict[str, str] = {}
        result, details = self._attempt(model, channels, bench)
        if result is None:  # a layer does what the following did not see: find it, leave it, and try again
            broken = _breaking(model, channels)
            if not broken:
                raise KdctlError(details["error"])
            for path, why in broken.items():
                bench.say(f"prune: {path} stays as it is, the net breaks without its channels: {why}")
            result, details = self._attempt(model, channels, bench)
        if result is None:
            raise KdctlError(details["error"])
        if self.recalibrate:
            details["recalibrated"] = recalibrate(result, bench, self.samples)
        return Reshaped(result, details | {"broken": broken} if broken else details)

    def _follow(self, model: Model) -> Channels:
        """Which channels go where in a net of images, and whether `skip` names layers of it."""
        if model.record.tokens is not None:
            hint = "prune_heads, drop_layers and low_rank make models of texts smaller"
            raise ConfigError(Problem("prune is for models of images so far; the model takes texts", hint=hint))
        channels = follow(model)
        self._check_skip(channels)
        return channels

    def _attempt(self, model: Model, channels: Channels, bench: Workbench) -> tuple[Model | None, dict[str, Any]]:
        """The narrower model, or None and the error where it does not compute what it should."""
        groups = _groups(channels)
        costs = Costs(channels, groups, _macs(model), measured.parameters(model))
        scores = importance(self.importance, model, channels, groups, bench, self.samples)
        round_to = self.round_to
        while True:
            try:
                removed, about = self._within_budget(model, channels, Ranking(groups, scores, round_to), costs, bench)
                break
            except OutOfReach:
                if round_to == 1:
                    raise
                bench.say(f"prune: multiples of {round_to} channels cannot meet the budget, of {round_to // 2} may")
                round_to //= 2
        if not removed and (self.ratio > 0 or self.latency_ms is not None):
            bench.say("prune: the budget holds already, nothing is removed")
        try:
            result = narrow(model, channels, removed)
        except KdctlError as error:
            return None, {"error": str(error)}
        return result, self._details(model, result, channels, groups) | {"round_to": round_to} | about

    def _within_budget(
        self, model: Model, channels: Channels, ranking: Ranking, costs: Costs, bench: Workbench
    ) -> tuple[set[int], dict[str, Any]]:
        """The units to remove, and what is told of their choice. Raises OutOfReach."""
        way, scan = self._way(model, channels, ranking, costs, bench)
        if self.latency_ms is not None:
            removed, about = self._by_latency(model, channels, way, ranking, bench.say)
            return removed, about | scan
        total = costs.of(self.of)
        return search(way, total, (1 - self.ratio) * total(()), self.of, ranking), scan

    def _way(
        self, model: Model, channels: Channels, ranking: Ranking, costs: Costs, bench: Workbench
    ) -> tuple[Way, dict[str, Any]]:
        of: Of = "macs" if self.latency_ms is not None else self.of
        total = costs.of(of)
        if self.scope == "uniform":
            return uniform(ranking), {}
        if self.scope == "global":
            whole = total(())
            saved = [whole - total(group.units[:1]) for group in ranking.groups]
            return overall(ranking, lambda index: max(saved[index], 1e-12)), {}
        harms = sensitivity(model, channels, ranking, take_samples(model, bench, min(self.samples, _SCANNED)))
        names = [group.name for group in ranking.groups]
        scan = [
            {"layer": name, "units": len(group.units), "noise": {str(k): round(v, 8) for k, v in harm.items()}}
            for name, group, harm in zip(names, ranking.groups, harms, strict=True)
        ]
        return cheapest_first(ranking, harms, total), {"scan": scan}

    def _by_latency(
        self, model: Model, channels: Channels, way: Way, ranking: Ranking, say: Callable[[str], None]
    ) -> tuple[set[int], dict[str, Any]]:
        """What is removed so that the measured latency holds; the prediction is corrected by what was measured."""
        from kdctl.compress.latency.model import LatencyModel

        latency, wanted = LatencyModel(), float(self.latency_ms or 0.0)
        shape = _shape(model)
        latency.profile(model, shape, say)

        def predict(removed: Collection[int]) -> float:
            return latency.predict(narrowed(model, channels, removed), shape)

        def measure(removed: Collection[int]) -> float:
            return latency.measure([narrowed(model, channels, removed)], shape)[0]

        return within(way, ranking, predict, measure, wanted)

    def _details(self, before: Model, after: Model, channels: Channels, groups: list[Group]) -> dict[str, Any]:
        changed, layers = dict(after.net.named_modules()), {}
        for layer in channels.layers:
            old, new = structure.widths(layer.module), structure.widths(changed[layer.path])
            if old is not None and new is not None and not layer.is_norm:
                layers[layer.path] = [old["out"], new["out"]]
        movable = {path for group in groups for path in group.layers}
        return {
            "importance": self.importance,
            "scope": self.scope,
            "channels": layers,
            "fixed": [path for path in layers if path not in movable],
            "macs": [_macs(before), _macs(after)],
            "parameters": [measured.parameters(before), measured.parameters(after)],
        }

    def _check_skip(self, channels: Channels) -> None:
        for pattern in self.skip:
            if not _matching(channels, [pattern]):
                names = ", ".join([layer.path for layer in channels.layers if not layer.is_norm][:6])
                raise ConfigError(Problem(f"no layer is called '{pattern}'; there are {names}, ...", key="skip"))


def _groups(channels: Channels) -> list[Group]:
    """The units that go together. Raises KdctlError where there are none."""
    groups = channels.groups()
    if not groups:
        hint = "layers whose channels meet an unknown operation, a layer normalisation or the classes stay"
        raise KdctlError("there is nothing to prune in this net", hint=hint)
    return groups


def within(
    way: Way,
    ranking: Ranking,
    predict: Callable[[Collection[int]], float],
    measure: Callable[[Collection[int]], float],
    wanted: float,
) -> tuple[set[int], dict[str, Any]]:
    """What is removed at the first moment of a way whose measured cost is at most `wanted`, and the numbers.

    The search goes by the prediction; each measurement that exceeds the budget lowers what the prediction may be.
    Raises KdctlError where it still does after a few.
    """
    allowed, narrowest, tried = wanted, predict(way.at(way.num_steps)), []
    for _ in range(_CORRECTIONS):
        removed = search(way, predict, allowed, "ms of latency", ranking)
        predicted, found = predict(removed), measure(removed)
        tried.append({"predicted_ms": round(predicted, 4), "measured_ms": round(found, 4)})
        if found <= wanted:
            return removed, {"latency": {"wanted_ms": wanted, "tried": tried}}
        allowed = max(min(allowed, predicted) * wanted / found, narrowest)
    hint = "a busy machine measures long times; try again, or allow more"
    raise KdctlError(f"{wanted:g} ms were not met: {tried[-1]['measured_ms']:g} ms were measured", hint=hint)


def sensitivity(model: Model, channels: Channels, ranking: Ranking, images: Tensor) -> list[dict[int, float]]:
    """Of each group {units removed: noise}: the squared error of the logits by their square, it alone narrower."""
    whole = logits_of(model, images)
    power = float(whole.pow(2).sum())
    found = []
    for index in range(len(ranking.groups)):
        levels = ranking.levels(index)
        chosen = sorted({levels[round(i)] for i in np.linspace(0, len(levels) - 1, min(_LEVELS, len(levels)))})
        noise = dict.fromkeys(chosen, 0.0)
        for level in (level for level in chosen if level):
            logits = logits_of(narrowed(model, channels, ranking.least(index, level)), images)
            noise[level] = float((logits - whole).pow(2).sum()) / max(power, 1e-30)
        found.append(noise)
    return found


@torch.no_grad()
def recalibrate(model: Model, bench: Workbench, samples: int) -> int:
    """Takes the statistics of all batch normalisations anew, as means over batches of training images; how many images.

    Nothing else changes, and a net without normalisations stays as it is.
    """
    norms = [m for m in model.modules() if isinstance(m, NORMS) and m.running_mean is not None]
    if not norms:
        return 0
    momenta = [norm.momentum for norm in norms]
    images = take_samples(model, bench, samples)
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for part in images.split(128):
        if len(part) > 1 or len(images) == 1:
            model(part)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    return len(images)


def _breaking(model: Model, channels: Channels) -> dict[str, str]:
    """{layer: why} of the groups without half of whose units, alone, the net breaks; they are frozen."""
    found = {}
    for group in channels.groups():
        removed = set(group.units[: math.ceil(len(group.units) / 2)])
        try:
            problem = differs(narrowed(model, channels, removed), masked(model, channels, removed))
        except (KdctlError, RuntimeError) as error:
            problem = str(error)
        if problem is not None:
            found[group.name] = problem
            channels.freeze(set(group.units))
    return found


def _matching(channels: Channels, patterns: list[str]) -> set[str]:
    return {layer.path for layer in channels.layers for pattern in patterns if fnmatch.fnmatchcase(layer.path, pattern)}


def take_samples(model: Model, bench: Workbench, samples: int) -> Tensor:
    """The first `samples` images of the bench (N, C, H, W), or its texts padded to the longest, int64 (N, L).

    Raises KdctlError where there is none.
    """
    taken: list[NDArray[Any]] = []
    tokens = model.record.tokens
    for batch in bench.images():
        if tokens is not None:
            batch = np.pad(batch, ((0, 0), (0, tokens.length - batch.shape[1])), constant_values=tokens.pad)
        taken.append(batch)
        if sum(map(len, taken)) >= samples:
            break
    if not taken:
        raise KdctlError("there are no training samples to prune with")
    return torch.from_numpy(np.concatenate(taken)[:samples])


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """What a model says of images, or of texts, a part of them at a time."""
    return torch.cat([find_logits(model(part)) for part in images.split(128)])


def _shape(model: Model) -> tuple[int, int, int]:
    channels, height, width = model.record.image_shape
    return channels, height, width


def _macs(model: Model) -> int:
    return measured.macs(model, _shape(model))
