"""SGD with two momenta: one of the task's gradient, one of the teacher's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kdctl.optim.optimizers import parameter_groups


class TwoMomenta(torch.optim.Optimizer):
    """Stochastic gradient descent in which the gradients of the task and of the teacher decay apart.

    v_task <- (momentum - difference) v_task + g_task + weight_decay w
    v_teacher <- (momentum + difference) v_teacher + g_teacher
    w <- w - lr (v_task + v_teacher)

    The task's gradient is `p.grad`; the teacher's is what `p.grad` was before `exchange`. Source: Zhao et al., DOT: A
    Distillation-Oriented Trainer, ICCV 2023, eq. 5 and 6.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float,
        difference: float,
        weight_decay: float = 0.0,
        decay_norm_and_bias: bool = True,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "difference": difference, "weight_decay": weight_decay}
        super().__init__(parameter_groups(params, decay_norm_and_bias), defaults)
        self._aside: dict[nn.Parameter, Tensor | None] = {}

    def exchange(self) -> None:
        """Swaps the gradient that is gathered in `p.grad` with the one set aside."""
        for parameter in self._parameters():
            parameter.grad, self._aside[parameter] = self._aside.get(parameter), parameter.grad

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._aside.clear()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update from both gradients; a parameter without either stays."""
        for group in self.param_groups:
            for parameter in group["params"]:
                task, teacher = parameter.grad, self._aside.get(parameter)
                if task is None and teacher is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["task"], state["teacher"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                state["task"].mul_(group["momentum"] - group["difference"])
                state["teacher"].mul_(group["momentum"] + group["difference"])
                if task is not None:
                    state["task"].add_(task)
                if group["weight_decay"]:
                    state["task"].add_(parameter, alpha=group["weight_decay"])
                if teacher is not None:
                    state["teacher"].add_(teacher)
                parameter.add_(state["task"], alpha=-group["lr"]).add_(state["teacher"], alpha=-group["lr"])

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]
