"""How much is removed where: the largest net that meets a budget, along one way from the whole net to the narrowest.

A way is a list of moments, each with more units removed than the one before; a search by halving finds the first that
costs no more than the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from kdctl.compress.channels.importance import Scores
from kdctl.compress.channels.layout import Channels, Group, Layer
from kdctl.compress.channels.narrow import widths_after
from kdctl.errors import KdctlError

Of = Literal["macs", "parameters", "channels"]
LEAST = 0.1
"""Share of each group that always stays."""
GRID = 200
"""Moments of a way on which every group loses the same share."""


class OutOfReach(KdctlError):
    """No net of the allowed widths meets a budget."""


@dataclass
class Way:
    """num_steps: its last moment. at: the numbers of units that are gone at a moment, from 0 to num_steps."""

    num_steps: int
    at: Callable[[int], set[int]]


class Ranking:
    """The units of each group from the least important on, and how many of them may go.

    round_to: what the number of channels that stay is a multiple of.
    """

    def __init__(self, groups: list[Group], scores: Scores, round_to: int) -> None:
        self.groups = groups
        self.scores = scores
        self.round_to = round_to
        self.ordered = [sorted(group.units, key=lambda u: (scores[u], u)) for group in groups]

    def step(self, index: int) -> int:
        """Units of a group that go at once."""
        return self.round_to // math.gcd(self.round_to, self.groups[index].width)

    def rounded(self, index: int, wanted: float) -> int:
        """How many units of a group are removed where `wanted` were to be: what stays is a multiple, the nearest.

        None are where none were to be, also of a group whose whole width is no multiple.
        """
        if wanted <= 0:
            return 0
        count, step = len(self.groups[index].units), self.step(index)
        stay = math.floor((count - wanted) / step + 0.5) * step
        return count - min(count, max(stay, step * math.ceil(LEAST * count / step)))

    def levels(self, index: int) -> list[int]:
        """Every number of units of a group that can be removed, from 0 on."""
        count = len(self.groups[index].units)
        return sorted({self.rounded(index, wanted) for wanted in range(count + 1)})

    def least(self, index: int, removed: int) -> set[int]:
        return set(self.ordered[index][:removed])


def uniform(ranking: Ranking) -> Way:
    """Every group loses the same share of its units."""

    def at(moment: int) -> set[int]:
        gone: set[int] = set()
        for index, group in enumerate(ranking.groups):
            gone |= ranking.least(index, ranking.rounded(index, len(group.units) * moment / GRID))
        return gone

    return Way(GRID, at)


def overall(ranking: Ranking, price: Callable[[int], float]) -> Way:
    """All units in one order, by their importance for what each costs. price(i): of a unit of the i-th group."""
    worth = [
        (ranking.scores[unit] / price(index), index, place)
        for index in range(len(ranking.groups))
        for place, unit in enumerate(ranking.ordered[index])
    ]
    order = np.array([index for _, index, _ in sorted(worth)], np.int64)

    def at(moment: int) -> set[int]:
        gone: set[int] = set()
        for index, count in enumerate(np.bincount(order[:moment], minlength=len(ranking.groups))):
            gone |= ranking.least(index, ranking.rounded(index, int(count)))
        return gone

    return Way(len(order), at)


def cheapest_first(ranking: Ranking, scan: list[dict[int, float]], cost: Callable[[Collection[int]], float]) -> Way:
    """Step by step the group that is harmed least for what it saves.

    scan: of each group {units removed: harm}; harms and savings of several groups are taken as their sums.
    """
    whole = cost(())
    steps = []
    for index, harms in enumerate(scan):
        saved = {level: whole - cost(ranking.least(index, level)) for level in harms}
        at = 0
        while further := [level for level in harms if level > at]:
            rate, at = min(((harms[u] - harms[at]) / max(saved[u] - saved[at], 1e-12), u) for u in further)
            steps.append((rate, index, at))
    steps.sort()

    def gone(moment: int) -> set[int]:
        levels = {index: level for _, index, level in steps[:moment]}
        return set().union(*(ranking.least(index, level) for index, level in levels.items()))

    return Way(len(steps), gone)


def search(way: Way, cost: Callable[[Collection[int]], float], budget: float, what: str, ranking: Ranking) -> set[int]:
    """What is removed at the first moment of a way that costs no more than the budget; of what that moment alone takes
    away, the groups get back as much as the budget allows, the most important first.

    Raises OutOfReach where not even the last moment's net fits.
    """
    low, high = 0, way.num_steps
    smallest = cost(way.at(high))
    if smallest > budget:
        hint = "a larger budget, a smaller round_to, or fewer layers in skip"
        raise OutOfReach(f"pruning cannot reach {budget:g} {what}: the narrowest net has {smallest:g}", hint=hint)
    while low < high:
        middle = (low + high) // 2
        if cost(way.at(middle)) <= budget:
            high = middle
        else:
            low = middle + 1
    removed = way.at(low)
    last = removed - way.at(low - 1) if low else set()
    parts = [(index, part) for index, units in enumerate(ranking.ordered) if (part := last.intersection(units))]
    for index, part in sorted(parts, key=lambda each: (-max(ranking.scores[unit] for unit in each[1]), each[0])):
        rest = removed - set(ranking.ordered[index])
        least, most = len(removed) - len(rest) - len(part), len(removed) - len(rest)
        for level in (level for level in ranking.levels(index) if least <= level < most):
            if cost(rest | ranking.least(index, level)) <= budget:
                removed = rest | ranking.least(index, level)
                break
    return removed


# -------------------------------------------------------------------------------------------------------------- costs


class Costs:
    """Costs of a narrow net, counted from the widths of its layers. macs, parameters: of the whole one, measured."""

    def __init__(self, channels: Channels, groups: list[Group], macs: int, parameters: int) -> None:
        self._layers, self._groups = channels.layers, groups
        self._rest = {
            "macs": macs - sum(_macs(layer, ()) for layer in self._layers),
            "parameters": parameters - sum(_parameters(layer, ()) for layer in self._layers),
        }

    def of(self, kind: Of) -> Callable[[Collection[int]], float]:
        """The cost of the net without some units."""
        if kind == "channels":
            return self._channels
        count = _macs if kind == "macs" else _parameters
        return lambda removed: self._rest[kind] + sum(count(layer, removed) for layer in self._layers)

    def _channels(self, removed: Collection[int]) -> float:
        gone = set(removed)
        return sum(sum(unit not in gone for unit in group.units) * group.width for group in self._groups)


def _shape(layer: Layer, removed: Collection[int]) -> tuple[int, int, int]:
    """(columns of a row of the weight, rows, kernel size)."""
    weight: Any = layer.module.weight
    inside, out = widths_after(layer, removed)
    groups = int(getattr(layer.module, "groups", 1))
    kernel = math.prod(weight.shape[2:])
    return (1 if layer.inputs is None else inside // groups), out, kernel


def _macs(layer: Layer, removed: Collection[int]) -> int:
    if layer.is_norm or layer.pad is not None:
        return 0
    return math.prod(_shape(layer, removed)) * layer.positions


def _parameters(layer: Layer, removed: Collection[int]) -> int:
    module = layer.module
    if layer.pad is not None:
        return 0
    out = widths_after(layer, removed)[1]
    if layer.is_norm:
        return out * sum(p is not None for p in (module.weight, module.bias))
    return math.prod(_shape(layer, removed)) + (out if module.bias is not None else 0)
