"""Distillation-oriented training: the teacher's gradient has a longer memory than the task's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from kdctl import registry
from kdctl.config.types import Fraction
from kdctl.errors import ConfigError, Problem
from kdctl.methods.base import Parts
from kdctl.methods.distill import Distill
from kdctl.optim.two_momenta import TwoMomenta


class DOT(Distill):
    """A momentum of its own for the gradient of the terms that the teacher speaks in.

    Formula: v_task <- (m - d) v_task + g_task + weight_decay w; v_teacher <- (m + d) v_teacher + g_teacher;
        w <- w - lr (v_task + v_teacher), with the momentum m of the optimizer, which must be sgd without nesterov.
        Two backward passes a step.
    Paper: Zhao, Cui, Song & Liang, DOT: A Distillation-Oriented Trainer, ICCV 2023, eq. 5 and 6.
    Published: difference 0.075 on CIFAR-100, 0.09 on ImageNet; momentum 0.9.

    difference: d, what the teacher's momentum is above, and the task's below, that of the optimizer.
    """

    parallel: ClassVar[bool] = False
    one_gradient: ClassVar[bool] = False

    def __init__(self, *, difference: Fraction = 0.075) -> None:
        self.difference = difference

    def assemble(self, parts: Parts) -> None:
        super().assemble(parts)
        self._teaching = {term.name for term in self.terms if term.loss.needs_teacher}

    def make_optimizer(self, kind: str, arguments: Mapping[str, Any]) -> torch.optim.Optimizer:
        given = dict(arguments)
        if registry.canonical("optimizers", kind) != "sgd" or given.pop("nesterov", False):
            message = f"dot splits the momentum of sgd without nesterov; the optimizer is {kind}"
            hint = "optimizer: {kind: sgd, lr: 0.05, momentum: 0.9, weight_decay: 5e-4, nesterov: false}"
            raise ConfigError(Problem(message, key="optimizer", hint=hint))
        momentum = given.pop("momentum", 0.0)
        if not self.difference <= momentum < 1 - self.difference:
            message = f"momentum {momentum} with difference {self.difference} leaves the range from 0 to below 1"
            raise ConfigError(Problem(message, key="method.difference", hint="momentum: 0.9, difference: 0.075"))
        parameters = [p for p in self.trained.parameters() if p.requires_grad]
        self._optimizer = TwoMomenta(parameters, momentum=momentum, difference=self.difference, **given)
        for group in self._optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return self._optimizer

    def backward(self, losses: Mapping[str, Tensor], run: Callable[[Tensor, bool], None]) -> None:
        task = [loss for name, loss in losses.items() if name not in self._teaching]
        teaching = [loss for name, loss in losses.items() if name in self._teaching]
        if teaching:
            self._optimizer.exchange()
            run(torch.stack(teaching).sum(), bool(task))
            self._optimizer.exchange()
        if task:
            run(torch.stack(task).sum(), False)
