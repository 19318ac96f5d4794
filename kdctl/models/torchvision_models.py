"""Any classification model of torchvision, by name: `kind: torchvision:resnet18`.

Taps are the module paths of torchvision's own class (`layer1`, `features.3`, `avgpool`, ...).
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from kdctl.errors import ConfigError, MissingError, Problem, did_you_mean
from kdctl.torchvision_guard import ensure_torchvision

_INCEPTION = {"aux_logits": False, "transform_input": True}
"""These two were trained on inputs in [-1, 1], and return more than logits with their auxiliary classifiers."""
DEFAULTS = {"googlenet": {**_INCEPTION, "init_weights": True}, "inception_v3": {**_INCEPTION, "init_weights": True}}


class TorchvisionModel:
    """A classification model of torchvision, with its classifier made for the classes of the data.

    name: as in torchvision.models. Further arguments go to torchvision's own function. `weights: pretrained` loads the
    published weights (with another number of classes: all but the last layer), which expect `normalize: imagenet`.
    Images of one channel work: the first convolution then sums its pretrained filters over the colours, and expects
    `normalize: {mean: [0.449], std: [0.226]}`.
    """

    def __new__(cls, *, name: str, num_classes: int, in_channels: int = 3, **arguments: Any) -> nn.Module:  # type: ignore[misc]
        """torchvision's own module, not an instance of this class."""
        models = ensure_torchvision().models
        names = classification_names(models)
        if name not in names:
            raise ConfigError(f"torchvision has no classification model '{name}'", hint=did_you_mean(name, names))
        settings = {**DEFAULTS.get(name, {}), **arguments}
        try:
            net = models.get_model(name, weights=None, num_classes=num_classes, **settings)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"torchvision:{name} does not take these arguments: {error}") from error
        if in_channels != 3:
            _replace_first_convolution(net, in_channels)
        net.pretrained_weights = functools.partial(_published, name=name, num_classes=num_classes)
        return net

    def __init__(self, *, name: str, num_classes: int, in_channels: int = 3, **arguments: Any) -> None:
        """Says what `__new__` takes, to those who read signatures from source; it never runs."""


def classification_names(models: ModuleType) -> list[str]:
    """Names of torchvision's classification models."""
    return models.list_models(module=models)


def _first_convolution(net: nn.Module) -> tuple[str, nn.Conv2d]:
    return next((name, m) for name, m in net.named_modules() if isinstance(m, nn.Conv2d))


def _replace_first_convolution(net: nn.Module, in_channels: int) -> None:
    name, old = _first_convolution(net)
    shape: dict[str, Any] = {n: getattr(old, n) for n in ("out_channels", "kernel_size", "stride", "padding")}
    new = nn.Conv2d(in_channels, **shape, bias=old.bias is not None)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    net.set_submodule(name, new)


def _published(net: nn.Module, name: str, num_classes: int) -> dict[str, Tensor]:
    """The published weights, made to fit `net`. Raises MissingError where they can neither be found nor downloaded."""
    weights = ensure_torchvision().models.get_model_weights(name).DEFAULT
    cached = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(urlparse(weights.url).path))
    if os.environ.get("KDCTL_OFFLINE", "0") not in ("", "0") and not cached.is_file():
        message = f"the weights of torchvision:{name} have to be downloaded, which --offline forbids"
        raise MissingError(Problem(message, key="weights", hint=f"put {weights.url} at {cached}"))
    try:
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise MissingError(f"the weights of torchvision:{name} could not be downloaded: {error}") from error
    return fit_published(state, net, num_classes)


def fit_published(state: dict[str, Tensor], net: nn.Module, num_classes: int) -> dict[str, Tensor]:
    """Published weights made to fit: a last layer for another number of classes keeps its own values, a first
    convolution of one channel gets the sum over the colours, auxiliary classifiers are left out."""
    own = net.state_dict()
    first = _first_convolution(net)[0] + ".weight"
    fitted = {}
    for name, value in state.items():
        if name in own and own[name].shape[:1] == (num_classes,) and value.shape[:1] != (num_classes,):
            value = own[name]
        elif name == first and own[name].shape[1] == 1:
            value = value.sum(dim=1, keepdim=True)
        if name in own or not name.lower().startswith("aux"):
            fitted[name] = value
    return fitted
