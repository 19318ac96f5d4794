"""A frozen model as runtimes like it: no batch normalisation, and shortcuts without parameters as convolutions."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from kdctl.models import structure
from kdctl.models.fold import folded
from kdctl.models.record import Model
from kdctl.models.resnet_cifar import PadShortcut


def plain(model: Model) -> Model:
    """A copy of a model, in eval mode on the CPU, that computes the same up to rounding.

    Batch norms are folded into the layers before them, and a shortcut that drops pixels and pads channels with zeros
    becomes the 1x1 convolution that it equals: delegates leave strided slices and padded channels to slow kernels, and
    what is left there cuts the graph in pieces. Paths of layers stay what they are.
    """
    copied = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    copied.net = folded(copied.net)
    shortcuts = {path: module for path, module in copied.net.named_modules() if type(module) is PadShortcut}
    for path, channels in _channels(copied, shortcuts).items():
        structure.put(copied.net, path, _as_convolution(shortcuts[path], channels))
    return copied.eval()


def _channels(model: Model, shortcuts: dict[str, PadShortcut]) -> dict[str, int]:
    """How many channels enter each shortcut: it does not know, and pruning may have changed it."""
    found: dict[str, int] = {}
    if not shortcuts:
        return found

    def note(path: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[path] = inputs[0].shape[1]

        return hook

    handles = [module.register_forward_pre_hook(note(path)) for path, module in shortcuts.items()]
    try:
        with torch.no_grad():
            model(model.record.example())
    finally:
        for handle in handles:
            handle.remove()
    return found


def _as_convolution(shortcut: PadShortcut, channels: int) -> nn.Conv2d:
    """Weights (out, in, 1, 1) of zeros, with a one where an input channel goes."""
    before, after = shortcut.padding[4:6]
    conv = nn.Conv2d(channels, before + channels + after, 1, shortcut.stride, bias=False).requires_grad_(False)
    conv.weight.zero_()
    taken = torch.arange(channels)
    conv.weight[before + taken, taken, 0, 0] = 1
    return conv.eval()
