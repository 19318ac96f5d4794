"""Which weights of a net are zero: masks by magnitude, free or N of every M, and the cubic schedule."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from kdctl.errors import ConfigError, KdctlError, Problem

Pattern = Literal["any", "2:4", "4:8", "1:4"]
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def weights(net: nn.Module, skip: Sequence[str], pattern: Pattern) -> dict[str, nn.Parameter]:
    """The weights that can become sparse, by the paths of their layers: those of convolutions and linear layers but for
    the patterns in `skip`, and for N:M those whose inputs a group of M divides.

    Raises ConfigError for a pattern that names no layer, KdctlError where nothing is left.
    """
    layers = {
        path: m for path, m in net.named_modules() if isinstance(m, _LAYERS) and isinstance(m.weight, nn.Parameter)
    }
    for each in skip:
        if not fnmatch.filter(layers, each):
            raise ConfigError(
                Problem(f"no layer is called '{each}'; there are {', '.join(list(layers)[:6])}", key="skip")
            )
    wide = 1 if pattern == "any" else int(pattern.partition(":")[2])
    chosen: dict[str, nn.Parameter] = {
        path: module.weight  # type: ignore[misc]
        for path, module in layers.items()
        if module.weight.shape[1] % wide == 0 and not any(fnmatch.fnmatchcase(path, each) for each in skip)
    }
    if not chosen:
        raise KdctlError(f"no layer of this net can be sparse in the pattern {pattern}")
    return chosen


def cubic(final: float, done: float, begin: float, end: float) -> float:
    """The sparsity after t = `done` steps: 0 until t_0 = `begin`, s_f from t_1 = `end` on, between them
    s_f - s_f (1 - (t - t_0) / (t_1 - t_0))^3.

    Zhu & Gupta, To Prune, or Not to Prune, ICLR 2018 workshop, equation 1, with s_i = 0.
    """
    if done >= end:
        return final
    return final - final * (1 - max(0.0, done - begin) / (end - begin)) ** 3


@torch.no_grad()
def magnitude(
    chosen: dict[str, nn.Parameter], sparsity: float, pattern: Pattern, scope: Literal["global", "layer"]
) -> dict[str, Tensor]:
    """Bool masks of the weights that stay, the largest by magnitude.

    sparsity: the share that goes, exactly but for rounding down: of all weights together (`global`) or of each layer's.
    For N:M it is the share of the M - N that go of every M neighbours along the input: 1 makes the pattern complete.
    """
    if pattern != "any":
        keep, wide = map(int, pattern.split(":"))
        gone = int(sparsity * (wide - keep) + 1e-9)
        return {path: _of_every(weight, gone, wide) for path, weight in chosen.items()}
    if scope == "layer":
        return {path: _largest(weight.abs(), sparsity) for path, weight in chosen.items()}
    flat = _largest(torch.cat([weight.abs().flatten() for weight in chosen.values()]), sparsity)
    parts = flat.split([weight.numel() for weight in chosen.values()])
    return {path: part.view_as(w) for (path, w), part in zip(chosen.items(), parts, strict=True)}


def _largest(values: Tensor, sparsity: float) -> Tensor:
    order = values.flatten().argsort(stable=True)
    mask = torch.ones(values.numel(), dtype=torch.bool, device=values.device)
    mask[order[: int(sparsity * values.numel() + 1e-9)]] = False
    return mask.view(values.shape)


def _of_every(weight: Tensor, gone: int, wide: int) -> Tensor:
    last = weight.abs().movedim(1, -1)
    ranks = last.reshape(-1, wide).argsort(dim=1, stable=True).argsort(dim=1)
    return (ranks >= gone).view(last.shape).movedim(-1, 1).contiguous()
