"""int8 for TorchScript, by the quantised kernels that PyTorch brings itself (torch.ao.quantization, deprecated there).

Static: weights symmetric, activations with ranges from calibration images (Jacob et al., Quantization and Training of
Neural Networks for Efficient Integer-Arithmetic-Only Inference, 2018). Dynamic: linears, ranges found at each call.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.ao import quantization as ao
from torch.ao.quantization.observer import UniformQuantizationObserverBase
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from kdctl.errors import ConfigError, KdctlError, Problem
from kdctl.export.base import Mode, Quantization
from kdctl.models.record import Model
from kdctl.quant import ranges

BATCH = 32
_ENGINES = {"static": ("onednn", "qnnpack"), "dynamic": ("x86", "onednn", "qnnpack")}
"""The first that there is. Static: onednn's kernels take activations of 8 bits, those of x86 only 7. Dynamic: the bits
are the same, and x86 is the fastest (measured on a small transformer: 1.2 ms against 1.7)."""


def engine(wanted: str | None, mode: Mode) -> str:
    """The name of the int8 kernels to pack for. Raises KdctlError where this PyTorch has none."""
    for name in (wanted,) if wanted else _ENGINES[mode]:
        if name in torch.backends.quantized.supported_engines:
            return name
    raise KdctlError("this PyTorch has no int8 kernels", hint="take the target onnx")


def quantize(model: Model, image_shape: tuple[int, ...], how: Quantization) -> None:
    """Puts int8 layers into the model's net, in place. Raises KdctlError where images or the forward do not fit."""
    unknown = sorted(path for path in how.keep if path not in dict(model.net.named_modules()))
    if unknown:
        raise ConfigError(Problem(f"the model has no layers {', '.join(unknown)}", key="keep"))
    if how.mode == "dynamic":
        _dynamic(model, how)
    else:
        _static(model, image_shape, how)


def _dynamic(model: Model, how: Quantization) -> None:
    config = ao.per_channel_dynamic_qconfig if how.per_channel else ao.default_dynamic_qconfig
    linears = {p: config for p, m in model.net.named_modules() if type(m) is nn.Linear and p not in how.keep}
    if not linears:
        message = "the model has no linear layers, which are all that dynamic quantisation for TorchScript takes"
        raise KdctlError(message, hint="mode: static")
    model.net = ao.quantize_dynamic(model.net, linears)


def _static(model: Model, image_shape: tuple[int, ...], how: Quantization) -> None:
    images = how.calibration_images(image_shape)
    mapping = ao.get_default_qconfig_mapping(torch.backends.quantized.engine)
    weight = ao.default_per_channel_weight_observer if how.per_channel else ao.default_weight_observer
    mapping.set_global(ao.QConfig(activation=partial(Observer, method=how.calibration), weight=weight))
    for path in how.keep:
        mapping.set_module_name(path, None)
    try:  # not folded before: what is left of a norm would keep a convolution from its ReLU
        model.net = prepare_fx(model.net, mapping, (torch.zeros(2, *model.record.net_shape),))
    except Exception as error:
        raise KdctlError(
            f"static int8 for TorchScript needs a forward that torch.fx can follow, and this one it cannot: {error}",
            hint="mode: dynamic, or the target onnx or openvino",
        ) from error
    for counting in (False, True) if how.calibration != "minmax" else (False,):
        for module in model.net.modules():
            if isinstance(module, Observer):
                module.counting = counting
        for start in range(0, len(images), BATCH):
            model(torch.from_numpy(np.ascontiguousarray(images[start : start + BATCH], np.float32)))
    model.net = convert_fx(model.net)


class Observer(UniformQuantizationObserverBase):
    """Watches one tensor for its range by our own methods of calibration; all data pass once, or twice if counted."""

    def __init__(self, method: Any = "minmax", dtype: torch.dtype = torch.quint8, **given: Any) -> None:
        super().__init__(dtype=dtype, qscheme=torch.per_tensor_affine, reduce_range=False, **given)
        self.method = method
        self.counting = False
        self.spread = ranges.Spread()

    def forward(self, x: Tensor) -> Tensor:
        values = x.detach().numpy()
        if self.counting:
            self.spread.count(values)
        else:
            self.spread.stretch(values)
        return x

    def calculate_qparams(self, **given: Any) -> tuple[Tensor, Tensor]:
        low, high = self.spread.range(self.method)
        scale, zero_point = self._calculate_qparams(torch.tensor(low), torch.tensor(high))
        return scale, zero_point
