"""Weights as products of smaller ones: singular values, Tucker-2 and CP, each the best fit in least squares.

A convolution's weight is (O, I, H, W): output and input channels, height and width of the kernel. A chain is the list
of the factors' weights in the order in which they are applied, each (out, in, h, w), or (out, in) for linear layers; a
depthwise factor is (R, 1, h, w). Results have the precision of what is given: double is recommended.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

CP_RIDGE = 1e-6
"""Added to the diagonal, which is 1, of each least-squares problem of CP, so that it has a solution."""
FIRST_SWEEPS = 8
"""How long each random start of CP is followed before the best is chosen."""
TOLERANCE = 1e-5
"""Alternating least squares end when a sweep lowers the error by less than this share of the weight's norm squared."""


def energies(matrix: Tensor) -> Tensor:
    """For each rank 1, 2, ... the share of the squared singular values that it keeps: (min(rows, columns),)."""
    squares = torch.linalg.svdvals(matrix).square()
    return squares.cumsum(0) / squares.sum()


def svd(matrix: Tensor, rank: int) -> list[Tensor]:
    """A matrix (O, I) as a chain of (rank, I) and (O, rank), the nearest there is (Eckart & Young 1936)."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return [root[:, None] * right[:rank], left[:, :rank] * root]


def spatial_matrix(weight: Tensor) -> Tensor:
    """(O, I, H, W) as the matrix (O * W, I * H) whose rank counts the pairs of one-dimensional filters."""
    out, channels, height, width = weight.shape
    return weight.permute(0, 3, 1, 2).reshape(out * width, channels * height)


def spatial(weight: Tensor, rank: int) -> list[Tensor]:
    """A chain of (rank, I, H, 1) and (O, rank, 1, W).

    Source: Jaderberg et al., Speeding up Convolutional Neural Networks with Low Rank Expansions, BMVC 2014, scheme 2.
    """
    out, channels, height, width = weight.shape
    vertical, horizontal = svd(spatial_matrix(weight), rank)
    horizontal = horizontal.view(out, width, rank).permute(0, 2, 1)
    return [vertical.view(rank, channels, height, 1), horizontal[:, :, None, :].contiguous()]


# ------------------------------------------------------------------------------------------------------------- Tucker-2


def tucker_energies(weight: Tensor) -> Tensor:
    """(O, I): the share of the energy that the ranks (o + 1, i + 1) keep at the least.

    It is that of the truncated higher-order SVD, which the sweeps of `tucker` can only raise.
    """
    left, right = _bases(weight)
    squares = _core(weight, left, right).square().sum((2, 3))
    return squares.cumsum(0).cumsum(1) / squares.sum()


def tucker(weight: Tensor, rank_out: int, rank_in: int, sweeps: int = 5) -> list[Tensor]:
    """A chain of (rank_in, I, 1, 1), the core (rank_out, rank_in, H, W) and (O, rank_out, 1, 1).

    A full rank has no factor of its own: with rank_in = I the chain begins with the core, with rank_out = O it ends so.
    Bases are those of the higher-order SVD, then alternately the best for each other (higher-order orthogonal
    iteration, De Lathauwer et al. 2000). Source: Kim et al., Compression of Deep Convolutional Neural
    Networks for Fast and Low Power Mobile Applications, ICLR 2016.
    """
    out, channels = weight.shape[:2]
    left, right = _bases(weight)
    left, right = left[:, :rank_out], right[:, :rank_in]
    for _ in range(sweeps if rank_out < out and rank_in < channels else 0):
        left = _leading(torch.einsum("oihw,ir->orhw", weight, right).flatten(1), rank_out)
        right = _leading(torch.einsum("oihw,or->irhw", weight, left).flatten(1), rank_in)
    first = [] if rank_in == channels else [right.T[:, :, None, None]]
    last = [] if rank_out == out else [left[:, :, None, None]]
    core = torch.einsum("oihw,or->rihw", weight, left) if last else weight
    core = torch.einsum("oihw,ir->orhw", core, right) if first else core
    return [*first, core, *last]


def _bases(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of the output (O, O) and input channels (I, I), the most important directions first."""
    return _leading(weight.flatten(1), weight.shape[0]), _leading(weight.transpose(0, 1).flatten(1), weight.shape[1])


def _leading(matrix: Tensor, rank: int) -> Tensor:
    """The first `rank` left singular vectors of a matrix, also where it has fewer columns than rows."""
    return torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)[:, :rank]


def _core(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return torch.einsum("oihw,or,is->rshw", weight, left, right)


# ------------------------------------------------------------------------------------------------------------------- CP


def cp(weight: Tensor, rank: int, starts: int = 3, sweeps: int = 100, seed: int = 0) -> list[Tensor]:
    """A chain of (R, I, 1, 1), depthwise (R, 1, H, 1), depthwise (R, 1, 1, W) and (O, R, 1, 1).

    The sum of R outer products of four vectors, by alternating least squares: the best of several random starts after a
    few sweeps goes on. Source: Lebedev et al., Speeding-up Convolutional Neural Networks Using Fine-tuned
    CP-Decomposition, ICLR 2015.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        [torch.randn(n, rank, generator=generator, dtype=torch.float64).to(weight) for n in weight.shape]
        for _ in range(starts)
    ]
    first = min(sweeps, FIRST_SWEEPS)
    begun = [_alternate(weight, factors, first) for factors in drawn]
    factors, _ = min(begun, key=lambda fit: fit[1])
    out, channels, vertical, horizontal = _alternate(weight, factors, sweeps - first)[0]
    return [
        channels.T[:, :, None, None],
        vertical.T[:, None, :, None],
        horizontal.T[:, None, None, :],
        out[:, :, None, None],
    ]


def _alternate(weight: Tensor, factors: list[Tensor], sweeps: int) -> tuple[list[Tensor], float]:
    """Better factors (O, R), (I, R), (H, R), (W, R), the last with the scale, and the share of the energy they miss."""
    a, b, c, d = (*(_unit(factor) for factor in factors[:3]), factors[3])
    height, width = weight.shape[2:]
    rank = a.shape[1]
    flat, total = weight.flatten(2), weight.square().sum()
    error = 1.0
    for _ in range(sweeps):
        d = _unit(d)
        kernel = torch.einsum("hr,wr->hwr", c, d).flatten(0, 1)
        b = _unit(_solve(torch.einsum("oip,or->ipr", flat, a).mul(kernel).sum(1), a, c, d))
        rest = torch.einsum("oip,ir->opr", flat, b)
        a = _unit(_solve(rest.mul(kernel).sum(1), b, c, d))
        rest = rest.mul(a[:, None]).sum(0).view(height, width, rank)
        c = _unit(_solve(rest.mul(d).sum(1), a, b, d))
        rest = rest.mul(c[:, None]).sum(0)
        d = _solve(rest, a, b, c)
        kept = 2 * rest.mul(d).sum() - _gram(a, b, c, d).sum()
        before, error = error, float(1 - kept / total)
        if before - error < TOLERANCE:
            break
    return [a, b, c, d], error


def _unit(factor: Tensor) -> Tensor:
    return factor / factor.norm(dim=0).clamp_min(torch.finfo(factor.dtype).tiny)


def _gram(*factors: Tensor) -> Tensor:
    """(R, R): the inner products of the outer products."""
    gram = factors[0].T @ factors[0]
    for factor in factors[1:]:
        gram = gram * (factor.T @ factor)
    return gram


def _solve(products: Tensor, *others: Tensor) -> Tensor:
    """The factor (n, R) that is best beside the others, which have columns of length 1."""
    gram = _gram(*others)
    gram.diagonal().add_(CP_RIDGE)
    return torch.cholesky_solve(products.T, torch.linalg.cholesky(gram)).T


# --------------------------------------------------------------------------------------------------------------- chains


def product(chain: Sequence[Tensor]) -> Tensor:
    """The weight that a chain stands for. In each direction only one of its kernels may be longer than 1."""
    result = chain[0]
    for factor in chain[1:]:
        if factor.dim() == 2:
            result = factor @ result
            continue
        pattern = "ryx,rihw->riyhxw" if _depthwise(factor, len(result)) else "oryx,rihw->oiyhxw"
        wide = torch.einsum(pattern, factor[:, 0] if pattern.startswith("ryx") else factor, result)
        result = wide.flatten(4, 5).flatten(2, 3)
    return result


def balanced(chain: Sequence[Tensor], sweeps: int = 20) -> list[Tensor]:
    """The same product, with weights into and out of each inner channel of equal norm: no factor learns faster than
    the others for its scale alone, and none is hard to quantise for it."""
    result = [factor.clone() for factor in chain]
    for _ in range(sweeps):
        for first, second in pairwise(result):
            depthwise = _depthwise(second, len(first))
            into = first.flatten(1).norm(dim=1)
            out_of = (second if depthwise else second.transpose(0, 1)).flatten(1).norm(dim=1)
            usable = (into > 0) & (out_of > 0)
            scale = torch.where(usable, out_of / into, 1.0).sqrt()
            first.mul_(scale.view(-1, *[1] * (first.dim() - 1)))
            shape = [-1, 1] if depthwise else [1, -1]
            second.div_(scale.view(*shape, *[1] * (second.dim() - 2)))
    return result


def _depthwise(factor: Tensor, channels: int) -> bool:
    """Whether a factor takes each of its `channels` input channels by itself."""
    return factor.dim() == 4 and factor.shape[1] == 1 and channels > 1
