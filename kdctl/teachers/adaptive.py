"""Teachers weighted so that their gradients agree: the shortest mixture of their directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdctl.config.types import Fraction
from kdctl.signals import Batch, Signals
from kdctl.teachers.combine import Combination, sum_weighted, uniform

_ITERATIONS = 200
_TOLERANCE = 1e-10


class Adaptive(Combination):
    """Weights of a batch that follow the direction on which the teachers' gradients agree.

    Formula: minimise || sum over k of w_k g_k ||^2 with sum w_k = 1 and 0 <= w_k <= C, where g_k is the gradient of
        the term against teacher k by what it sees of the student (logits, features).
    Paper: Du et al., Agree to Disagree: Adaptive Ensemble Knowledge Distillation in Gradient Space, NeurIPS 2020,
        eq. 5. The codes call a support-vector solver on every batch; the K x K problem is solved here directly.

    largest: C, the most that one teacher may weigh; 1 lets one teacher have all, 1 / K is the mean.
    """

    batchwise: ClassVar[bool] = True

    def __init__(self, *, largest: Fraction = 0.6) -> None:
        self.largest = largest

    def weights(self, members: Sequence[Signals], batch: Batch) -> Tensor:
        return uniform(members)

    def combine(self, values: Sequence[Tensor], student: Signals, members: Sequence[Signals], batch: Batch) -> Tensor:
        weights_KR = self.weights(members, batch)
        seen = [value for value in (student.logits, *student.features.values()) if value.requires_grad]
        if seen and all(value.requires_grad for value in values):
            gradients = torch.stack([_gradient(value.sum(), seen) for value in values])
            chosen = shortest_mixture((gradients @ gradients.T).cpu().numpy(), self.largest)
            weights_KR = torch.from_numpy(chosen).to(weights_KR)[:, None].expand_as(weights_KR)
        return sum_weighted(values, weights_KR, batch)


def _gradient(value: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """The gradient by all inputs as one vector in float64."""
    found = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.detach().double().flatten() for gradient in found])


def shortest_mixture(gram_KK: NDArray[np.float64], largest: float) -> NDArray[np.float64]:
    """The weights w that minimise w' G w with sum w = 1 and 0 <= w <= largest (at least 1 / K), G a Gram matrix.

    Moves weight between the pair of teachers that gains most, as sequential minimal optimisation does, until the best
    pair gains nothing.
    """
    num_teachers = len(gram_KK)
    bound = max(largest, 1 / num_teachers)
    scale = float(np.trace(gram_KK)) / num_teachers
    weights = np.full(num_teachers, 1 / num_teachers)
    if not np.isfinite(gram_KK).all() or scale <= 0:
        return weights
    gram = gram_KK / scale
    for _ in range(_ITERATIONS):
        slope = gram @ weights
        give = int(np.argmax(np.where(weights > 0, slope, -np.inf)))
        take = int(np.argmin(np.where(weights < bound, slope, np.inf)))
        gain = slope[give] - slope[take]
        if gain <= _TOLERANCE:
            break
        curve = gram[give, give] + gram[take, take] - 2 * gram[give, take]
        move = gain / curve if curve > 1e-15 else np.inf
        move = min(move, weights[give], bound - weights[take])
        weights[give] -= move
        weights[take] += move
    return weights
