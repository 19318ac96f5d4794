"""Any model of timm, by name: `kind: timm:mobilenetv3_small_100` (extra `timm`).

Taps are the module paths of timm's own class (`blocks.3`, `stages.1`, `norm`, ...).
"""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from kdctl.errors import ConfigError, MissingError, did_you_mean
from kdctl.torchvision_guard import ensure_torchvision


class TimmModel:
    """A model of timm, with its classifier made for the classes of the data.

    name: as in timm.list_models(), with or without a tag. Further arguments go to timm.create_model.
    `weights: pretrained` loads the published weights (with another number of classes: all but the last layer); most
    expect `normalize: imagenet`, on images of one channel `{mean: [0.449], std: [0.226]}`.
    """

    def __new__(cls, *, name: str, num_classes: int, in_channels: int = 3, **arguments: Any) -> nn.Module:  # type: ignore[misc]
        """timm's own module, not an instance of this class."""
        settings = {"num_classes": num_classes, "in_chans": in_channels, **arguments}
        net = _create(_timm(), name, settings)
        net.pretrained_weights = functools.partial(_published, name=name, settings=settings)
        return net

    def __init__(self, *, name: str, num_classes: int, in_channels: int = 3, **arguments: Any) -> None:
        """Says what `__new__` takes, to those who read signatures from source; it never runs."""


def _timm() -> ModuleType:
    ensure_torchvision()
    try:
        import timm
    except ImportError as error:
        raise MissingError("timm is not installed", hint="pip install 'kdctl[timm]'") from error
    return timm


def _create(timm: ModuleType, name: str, settings: dict[str, Any]) -> Any:
    if not timm.is_model(name):
        raise ConfigError(f"timm has no model '{name}'", hint=did_you_mean(name, timm.list_models()))
    try:
        return timm.create_model(name, pretrained=False, **settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"timm:{name} does not take these arguments: {error}") from error


def _published(net: nn.Module, name: str, settings: dict[str, Any]) -> dict[str, Tensor]:
    """The published weights in the shapes of `net`. Raises MissingError where they cannot be had."""
    if os.environ.get("KDCTL_OFFLINE", "0") not in ("", "0"):
        message = f"the weights of timm:{name} may have to be downloaded, which --offline forbids"
        raise MissingError(message, hint="save them as a file first and name it as `weights`")
    try:
        return _timm().create_model(name, pretrained=True, **settings).state_dict()
    except Exception as error:  # timm and its hub raise errors of many libraries
        raise MissingError(f"the weights of timm:{name} could not be had: {error}") from error
