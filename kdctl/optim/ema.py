"""The exponential moving average of a module's weights, which often generalises better than the weights themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class EMA:
    """Averages parameters and floating-point buffers; other buffers are copied.

    After update n (from 1) the average is d * average + (1 - d) * weights with d = min(decay, (1 + n) / (10 + n)), so
    that early averages are not dominated by the initialisation.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self._names = _names(module)
        self._average = {name: value.detach().clone() for name, value in _tensors(module).items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Takes the module's weights into the average; once after each optimizer step."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        kinds: dict[type, tuple[list[Tensor], list[Tensor]]] = {}
        for name, value in _tensors(module).items():
            average = self._average[name]
            if value.is_floating_point():
                averages, values = kinds.setdefault(type(average), ([], []))
                averages.append(average)
                values.append(value)
            else:
                average.copy_(value)
        for averages, values in kinds.values():  # sharded weights and plain buffers, each in one go
            torch._foreach_lerp_(averages, values, 1 - decay)

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchanges the module's weights and the average; a second swap undoes it, exactly."""
        for name, value in _tensors(module).items():
            own = value.detach().clone()
            value.copy_(self._average[name])
            self._average[name].copy_(own)

    def state_dict(self) -> dict[str, Any]:
        average = {name: self._average[first] for name, first in self._names.items()}
        return {"num_updates": self.num_updates, "average": average}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a saved state. Raises KeyError where it is not of the same module."""
        self.num_updates = state["num_updates"]
        for name, average in self._average.items():
            average.copy_(state["average"][name])


def _names(module: nn.Module) -> dict[str, str]:
    """Every name of a saved tensor -> the name that it is averaged under, where modules share it."""
    first = {id(t): name for name, t in _tensors(module).items()}
    return {name: first[id(t)] for name, t in module.state_dict(keep_vars=True).items() if id(t) in first}


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers, each tensor once even where modules share it."""
    saved = module.state_dict(keep_vars=True).keys()
    return {name: t for name, t in [*module.named_parameters(), *module.named_buffers()] if name in saved}
