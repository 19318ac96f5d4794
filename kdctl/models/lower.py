"""A frozen net whose matrices are already in the precision in which autocast multiplies."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def lowered(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a frozen net that says the same, bit for bit, under autocast to this precision, and sooner.

    Autocast casts the weights of a frozen net anew at every call: it keeps the casts of those alone that learn. Here
    linear layers and convolutions hold them cast; all other weights are those of the net itself, not copied.
    """
    weights = [*net.parameters(), *net.buffers()]
    result = copy.deepcopy(net, {id(value): value for value in weights})
    for layer in result.modules():
        if type(layer) in _LAYERS and not is_parametrized(layer):
            for name, value in layer.named_parameters(recurse=False):
                setattr(layer, name, nn.Parameter(value.detach().to(dtype), requires_grad=False))
    return result
