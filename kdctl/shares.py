"""How much of the student's gradient comes from each term, and weights that give each term the share it is to have."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def gradients(losses: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]) -> dict[str, Tensor]:
    """Each term's gradient by the student's parameters, as one vector; the graph is kept.

    One backward pass a term. A term that does not reach the student has zeros.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    vectors: dict[str, Tensor] = {}
    for name, loss in losses.items():
        found: Iterable[Tensor | None] = [None] * len(trained)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(trained, found, strict=True)]
        vectors[name] = torch.cat([part.detach().float().flatten() for part in parts])
    return vectors


def shares(norms: Mapping[str, float]) -> dict[str, float]:
    """Each norm as a part of their sum; empty where there is no gradient at all, or one that is not finite."""
    total = sum(norms.values())
    return {name: norm / total for name, norm in norms.items()} if total > 0 and math.isfinite(total) else {}


def balancing_factors(norms: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """What multiplies each term so that its part of the gradient's norm is its part of the weights.

    norms: of the weighted terms. The sum of the norms stays what it is. A term without gradient keeps the factor 1.
    """
    moving = {name: norm for name, norm in norms.items() if norm > 0 and math.isfinite(norm)}
    total, weight = sum(moving.values()), sum(abs(weights[name]) for name in moving)
    if not weight:
        return dict.fromkeys(norms, 1.0)
    return {n: total * abs(weights[n]) / weight / moving[n] if n in moving else 1.0 for n in norms}
