"""Which ranks the layers of a model get: those that lose least for what all of them may cost together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Option:
    """One way to write a layer. ranks: of its factors, none where it stays as it is. kept: share of its energy."""

    ranks: tuple[int, ...] | None
    cost: float
    kept: float

    @property
    def loss(self) -> float:
        """-log of the energy kept: the sum over layers is least where the product of what they keep is greatest.

        Source: Kim, Khan and Kyung, Efficient Neural Network Compression, CVPR 2019.
        """
        return -math.log(max(self.kept, 1e-12))


def within_budget(layers: Sequence[Sequence[Option]], budget: float) -> list[Option] | None:
    """For each layer one of its options, together at most `budget`; None where the cheapest ones are more.

    From the dearest options on, always the step that loses least for what it saves, along the lower convex hull of
    each layer's (cost, loss): the optimum of the problem's Lagrangian. What is left of the budget is then given back.
    """
    hulls = [_hull(options) for options in layers]
    chosen = [hull[0] for hull in hulls]
    walk = [(_slope(a, b), number, b) for number, hull in enumerate(hulls) for a, b in pairwise(hull)]
    cost = sum(option.cost for option in chosen)
    changed: list[int] = []
    for _, number, option in sorted(walk, key=lambda step: step[:2]):
        if cost <= budget:
            break
        cost += option.cost - chosen[number].cost
        chosen[number] = option
        changed.append(number)
    if cost > budget:
        return None
    for number in dict.fromkeys(reversed(changed)):
        allowed = chosen[number].cost + budget - cost
        better = min((o for o in layers[number] if o.cost <= allowed), key=lambda o: (o.loss, o.cost))
        cost += better.cost - chosen[number].cost
        chosen[number] = better
    return chosen


def by_energy(options: Sequence[Option], energy: float) -> Option:
    """The cheapest option that keeps a share of the energy."""
    return min((o for o in options if o.kept >= energy), key=lambda o: (o.cost, -o.kept))


def _hull(options: Sequence[Option]) -> list[Option]:
    """The options of the lower convex hull of (cost, loss), the dearest and best first, the cheapest last."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (-o.cost, o.loss)):
        if hull and option.cost == hull[-1].cost:
            continue
        while hull and (option.loss <= hull[-1].loss or _bends_out(hull, option)):
            hull.pop()
        hull.append(option)
    return hull


def _bends_out(hull: list[Option], option: Option) -> bool:
    """Whether the hull's last option lies on or above the line from the one before it to a further one."""
    return len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], option)


def _slope(dearer: Option, cheaper: Option) -> float:
    """What is lost for each unit that is saved."""
    return (cheaper.loss - dearer.loss) / (dearer.cost - cheaper.cost)
