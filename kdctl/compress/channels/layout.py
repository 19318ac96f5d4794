"""The channels of a net: which layers have them, and which can only go together."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import nn

Numbers = NDArray[np.int64]

SLICED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass
class Layer:
    """A layer with channels, and their numbers.

    inputs: (in,) of a convolution or linear layer that combines channels, None of one that does not: a depthwise
    convolution, a normalisation, a zero padding. outputs: (out,). positions: in how many places of an image each output
    channel is computed. pad: of a PadShortcut, how many of its outputs are zeros before and behind.
    """

    path: str
    module: nn.Module
    inputs: Numbers | None
    outputs: Numbers
    positions: int = 0
    pad: tuple[int, int] | None = None

    @property
    def is_norm(self) -> bool:
        return isinstance(self.module, NORMS)


@dataclass
class Group:
    """Units that are interchangeable: each is a set of tied channels with as many in each of the same layers.

    units: their numbers. layers: paths of the layers whose output channels they are. width: channels of one unit in the
    layer where it has most (a head of attention: its width).
    """

    units: list[int]
    layers: list[str]
    width: int

    @property
    def name(self) -> str:
        """The first of its layers."""
        return self.layers[0]


@dataclass
class Channels:
    """The layers of a net with their channels' numbers; those that are tied have the same.

    heads: (module's path, attribute, numbers of the heads) where a number of heads has to follow.
    """

    layers: list[Layer]
    heads: list[tuple[str, str, Numbers]] = field(default_factory=list)

    def groups(self) -> list[Group]:
        """The units that may be removed, in the order of the forward pass; a unit that is alone in its kind stays."""
        places: dict[int, Counter[tuple[int, str]]] = {}
        for index, layer in enumerate(self.layers):
            for side, numbers in (("in", layer.inputs), ("out", layer.outputs)):
                for number in [] if numbers is None else numbers.tolist():
                    places.setdefault(number, Counter())[index, side] += 1
        alike: dict[tuple[tuple[tuple[int, str], int], ...], list[int]] = {}
        for number, counts in places.items():
            if number != 0:
                alike.setdefault(tuple(sorted(counts.items())), []).append(number)
        found = []
        for signature, units in alike.items():
            out = {index: count for (index, side), count in signature if side == "out"}
            made = [i for i in out if isinstance(self.layers[i].module, SLICED)]
            ended = any(side == "in" for (_, side), _ in signature)
            if made and ended and len(units) > 1:
                order = made + [i for i in out if i not in made]
                found.append(Group(units, [self.layers[i].path for i in order], max(out.values())))
        return found

    def freeze(self, numbers: set[int]) -> None:
        """Makes channels stay."""
        for layer in self.layers:
            layer.outputs = _without(layer.outputs, numbers)
            if layer.inputs is not None:
                layer.inputs = _without(layer.inputs, numbers)


def _without(numbers: Numbers, frozen: set[int]) -> Numbers:
    return np.where(np.isin(numbers, list(frozen)), 0, numbers)
