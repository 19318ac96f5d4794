"""Optimizers: torch's, fused where that exists, with weight decay on every parameter or on weights alone."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdctl import registry, sharding
from kdctl.config.types import Fraction, NonNegative, Positive
from kdctl.errors import ConfigError


def build_optimizer(
    kind: str, arguments: Mapping[str, Any], modules: nn.Module, base: Path | None = None
) -> torch.optim.Optimizer:
    """An optimizer of all parameters of `modules` that require a gradient, each once.

    Every group has `initial_lr`, which a schedule multiplies. Raises ConfigError where nothing trains, or where the
    optimizer does not take the arguments.
    """
    params = [p for p in modules.parameters() if p.requires_grad]
    if not params:
        raise ConfigError("there is no parameter to train", hint="unfreeze a part of the student: see `frozen`")
    optimizer = registry.create("optimizers", kind, arguments, base, params=params)
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if isinstance(optimizer, torch.optim.SparseAdam) or (closure and closure.default is closure.empty):
        hint = "sgd, adam, adamw and most of torch.optim do"
        raise ConfigError(f"optimizer '{kind}' does not take one step from one batch's gradient", hint=hint)
    mixed = len({sharding.is_part(p) for p in params}) > 1
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
        if mixed and "foreach" in group:  # no kernel takes sharded and plain tensors together
            group["foreach"] = False
    return optimizer


class _Fused(torch.optim.Optimizer):
    """Loads state into the memory layout of the parameters.

    The fused CPU kernels walk parameter, gradient and state in memory order: state saved from a contiguous model would
    silently be applied to other weights of a channels_last one.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            for name, value in state.items():
                if (
                    isinstance(value, Tensor)
                    and value.shape == parameter.shape
                    and value.stride() != parameter.stride()
                ):
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


class SGD(_Fused, torch.optim.SGD):
    """Stochastic gradient descent with momentum.

    nesterov: look ahead along the momentum (needs one). weight_decay: added to the gradient as weight_decay * w.
    decay_norm_and_bias: false spares biases and scales of normalisation (every parameter of one dimension) from decay;
    the CIFAR literature decays all.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: Positive,
        momentum: Fraction = 0.0,
        weight_decay: NonNegative = 0.0,
        nesterov: bool = False,
        decay_norm_and_bias: bool = True,
    ) -> None:
        groups = parameter_groups(params, decay_norm_and_bias)
        super().__init__(
            groups, lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=_can_fuse(groups)
        )

    def step(self, closure: Any = None) -> Any:
        """One update. A parameter whose first gradient comes later than that of others starts with a momentum of zero,
        which is what torch's own unfused step gives it; its fused one fails."""
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None] if group["momentum"] else []
            fresh = [p for p in moved if self.state[p].get("momentum_buffer") is None]
            for parameter in fresh if len(fresh) < len(moved) else ():
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return super().step(closure)


class Adam(_Fused, torch.optim.Adam):
    """Adam (Kingma & Ba, ICLR 2015); weight decay is part of the gradient.

    decay_norm_and_bias: false spares biases and scales of normalisation (every parameter of one dimension) from decay.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: Positive = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: Positive = 1e-8,
        weight_decay: NonNegative = 0.0,
        amsgrad: bool = False,
        decay_norm_and_bias: bool = True,
    ) -> None:
        groups = parameter_groups(params, decay_norm_and_bias)
        super().__init__(
            groups, lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, fused=_can_fuse(groups)
        )


class AdamW(_Fused, torch.optim.AdamW):
    """Adam with decoupled weight decay (Loshchilov & Hutter, ICLR 2019): each step takes lr * weight_decay * w away.

    decay_norm_and_bias: false spares biases and scales of normalisation (every parameter of one dimension) from decay.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: Positive = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: Positive = 1e-8,
        weight_decay: NonNegative = 0.01,
        amsgrad: bool = False,
        decay_norm_and_bias: bool = True,
    ) -> None:
        groups = parameter_groups(params, decay_norm_and_bias)
        super().__init__(
            groups, lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, fused=_can_fuse(groups)
        )


def parameter_groups(params: Iterable[nn.Parameter], decay_norm_and_bias: bool) -> list[dict[str, Any]]:
    """One group of all, or one with weight decay and one (of parameters with fewer than two dimensions) without."""
    listed = list(params)
    if decay_norm_and_bias:
        return [{"params": listed}]
    decayed = [p for p in listed if p.ndim >= 2]
    spared = [p for p in listed if p.ndim < 2]
    return [group for group in ({"params": decayed}, {"params": spared, "weight_decay": 0.0}) if group["params"]]


def _can_fuse(groups: Iterable[Mapping[str, Any]]) -> bool | None:
    """True where one kernel can do the whole step (three to six times faster on a CPU), None for torch's own choice."""
    params = [p for group in groups for p in group["params"]]
    if any(sharding.is_part(p) for p in params):
        return None
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in params) or None
