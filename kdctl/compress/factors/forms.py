"""The chains of small layers that can stand for a layer: which ranks there are, what each keeps and costs, the factors.

A weight is (O, I, H, W) in double precision, of a linear layer (O, I, 1, 1). `ranks` are a chain's inner widths.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kdctl.compress.factors import factorise

Ranks = tuple[int, ...]
Shape = tuple[int, int, int, int]

CP_TRIALS = 6
"""Ranks at which CP is tried for the energy that it keeps; between them it is interpolated."""
CP_SWEEPS = {"trial": 12, "fit": 100}
CP_WORK = 2e10
"""Numbers of the weight times rank times sweeps that a fit may take: large layers get fewer sweeps, ten at least."""


class Form:
    """One way to write a weight as a chain."""

    name: str

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.out, self.channels, self.height, self.width = weight.shape

    def energies(self, round_to: int) -> dict[Ranks, float]:
        """For each choice of ranks the share of the weight's squared norm that the chain keeps."""
        raise NotImplementedError

    def shapes(self, ranks: Ranks) -> list[Shape]:
        """The shapes of the factors' weights (out, in, h, w); depthwise ones have in = 1."""
        raise NotImplementedError

    def factors(self, ranks: Ranks) -> list[Tensor]:
        """The weights of the chain, in the order in which they are applied."""
        raise NotImplementedError

    def spans(self, ranks: Ranks) -> tuple[int, int]:
        """The numbers of the factors that move along the height and along the width."""
        raise NotImplementedError


def steps(full: int, round_to: int) -> list[int]:
    """The ranks below a full one: multiples of `round_to`; every one where there are none."""
    return list(range(round_to, full, round_to)) or list(range(1, full))


class Matrix(Form):
    """Singular values of a linear layer or a 1x1 convolution.

    Source: Denton et al., Exploiting Linear Structure Within Convolutional Networks for Efficient Evaluation, 2014.
    """

    name = "svd"

    def energies(self, round_to: int) -> dict[Ranks, float]:
        kept = factorise.energies(self.weight.flatten(1))
        return {(rank,): float(kept[rank - 1]) for rank in steps(len(kept), round_to)}

    def shapes(self, ranks: Ranks) -> list[Shape]:
        return [(ranks[0], self.channels, 1, 1), (self.out, ranks[0], 1, 1)]

    def factors(self, ranks: Ranks) -> list[Tensor]:
        return [factor[:, :, None, None] for factor in factorise.svd(self.weight.flatten(1), *ranks)]

    def spans(self, ranks: Ranks) -> tuple[int, int]:
        return 0, 0


class Spatial(Form):
    """A column of pixels, then a row of them."""

    name = "spatial"

    def energies(self, round_to: int) -> dict[Ranks, float]:
        kept = factorise.energies(factorise.spatial_matrix(self.weight))
        return {(rank,): float(kept[rank - 1]) for rank in steps(len(kept), round_to)}

    def shapes(self, ranks: Ranks) -> list[Shape]:
        return [(ranks[0], self.channels, self.height, 1), (self.out, ranks[0], 1, self.width)]

    def factors(self, ranks: Ranks) -> list[Tensor]:
        return factorise.spatial(self.weight, *ranks)

    def spans(self, ranks: Ranks) -> tuple[int, int]:
        return 0, 1


class Tucker(Form):
    """Fewer channels by a 1x1 convolution, the kernel, the channels again. `ranks`: output, input."""

    name = "tucker"

    def energies(self, round_to: int) -> dict[Ranks, float]:
        kept = factorise.tucker_energies(self.weight)
        found: dict[Ranks, float] = {
            (out, channels): float(kept[out - 1, channels - 1])
            for out in [*steps(self.out, round_to), self.out]
            for channels in [*steps(self.channels, round_to), self.channels]
        }
        del found[self.out, self.channels]
        return found

    def shapes(self, ranks: Ranks) -> list[Shape]:
        out, channels = ranks
        first: list[Shape] = [] if channels == self.channels else [(channels, self.channels, 1, 1)]
        last: list[Shape] = [] if out == self.out else [(self.out, out, 1, 1)]
        return [*first, (out, channels, self.height, self.width), *last]

    def factors(self, ranks: Ranks) -> list[Tensor]:
        return factorise.tucker(self.weight, *ranks)

    def spans(self, ranks: Ranks) -> tuple[int, int]:
        core = 0 if ranks[1] == self.channels else 1
        return core, core


class CP(Form):
    """A sum of outer products of four vectors: all that is between two 1x1 convolutions is depthwise."""

    name = "cp"

    def energies(self, round_to: int) -> dict[Ranks, float]:
        most = math.ceil(self.weight.numel() / sum(self.weight.shape))  # above it the factors are larger
        ranks = steps(most, round_to)
        if not ranks:
            return {}
        tried = sorted({ranks[round(i)] for i in np.geomspace(1, len(ranks), CP_TRIALS) - 1})
        kept = [self._kept(rank) for rank in tried]
        return {(rank,): float(np.interp(rank, tried, kept)) for rank in ranks}

    def _kept(self, rank: int) -> float:
        chain = factorise.cp(self.weight, rank, starts=1, sweeps=self._sweeps("trial", rank))
        missed = self.weight - factorise.product(chain)
        return 1 - float(missed.square().sum() / self.weight.square().sum())

    def shapes(self, ranks: Ranks) -> list[Shape]:
        (rank,) = ranks
        return [
            (rank, self.channels, 1, 1),
            (rank, 1, self.height, 1),
            (rank, 1, 1, self.width),
            (self.out, rank, 1, 1),
        ]

    def factors(self, ranks: Ranks) -> list[Tensor]:
        return factorise.cp(self.weight, ranks[0], sweeps=self._sweeps("fit", *ranks))

    def _sweeps(self, kind: str, rank: int) -> int:
        return max(10, min(CP_SWEEPS[kind], int(CP_WORK / (self.weight.numel() * rank))))

    def spans(self, ranks: Ranks) -> tuple[int, int]:
        return 1, 2


def sites(
    shapes: Sequence[Shape], spans: tuple[int, int], before: tuple[int, int], after: tuple[int, int]
) -> list[int]:
    """At how many places each factor is applied, where the layer makes a map of size `after` (H, W) of one `before`."""
    vertical, horizontal = spans
    return [
        (after[0] if number >= vertical else before[0]) * (after[1] if number >= horizontal else before[1])
        for number in range(len(shapes))
    ]


def form(weight: Tensor, convolution: str) -> Form:
    """The form for a weight: `Matrix` where it has no kernel, else the one that is asked for."""
    if weight.shape[2:] == torch.Size((1, 1)):
        return Matrix(weight)
    return {"tucker": Tucker, "cp": CP, "spatial": Spatial}[convolution](weight)
