"""Layers that compute as if their weights and inputs were integers, and learn the steps between them.

A layer of this kind takes the place of a convolution or linear layer and keeps its path, its weights and their names:
taps, frozen parts and saved weights mean what they meant. A tap of the layer is what it computes from the rounded
numbers, `path:in` its input before rounding, `path.input_quantizer` after it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdctl.quant.learned import Learned
from kdctl.quant.quantizers import (
    FollowedInputs,
    InputQuantizer,
    LargestWeights,
    LearnedInputs,
    LearnedWeights,
    WeightQuantizer,
)
from kdctl.quant.ranges import Calibration, Spread

Quantizer = Literal["lsq", "plain"]
Convolution = nn.Conv1d | nn.Conv2d


class FakeQuant(nn.Module):
    """What a quantised layer has beside its weights. quantizing: whether it rounds, or computes in float."""

    weight: Tensor
    weight_quantizer: WeightQuantizer
    input_quantizer: InputQuantizer | None
    quantizing: bool = True

    def rounded_weight(self) -> Tensor:
        return self.weight_quantizer(self.weight)

    def rounded_input(self, x: Tensor) -> Tensor:
        return x if self.input_quantizer is None else self.input_quantizer(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.quantizing:
            return self._compute(self.rounded_input(x), self.rounded_weight())
        if self.input_quantizer is not None and self.input_quantizer.watch is not None:
            self.input_quantizer(x)
        return self._compute(x, self.weight)

    def _compute(self, x: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError


class FakeQuantLinear(FakeQuant, nn.Linear):
    def _compute(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)


class FakeQuantConv1d(FakeQuant, nn.Conv1d):
    def _compute(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(x, weight, self.bias)


class FakeQuantConv2d(FakeQuant, nn.Conv2d):
    def _compute(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._conv_forward(x, weight, self.bias)


_QUANTISED: dict[type, type] = {
    nn.Linear: FakeQuantLinear,
    nn.Conv1d: FakeQuantConv1d,
    nn.Conv2d: FakeQuantConv2d,
}


_KINDS: dict[str, tuple[type[WeightQuantizer], type[InputQuantizer]]] = {
    "lsq": (LearnedWeights, LearnedInputs),
    "plain": (LargestWeights, FollowedInputs),
}


def can_wrap(layer: nn.Module) -> bool:
    """Whether `wrap` takes the layer: a convolution or linear layer, and no class derived from one."""
    return type(layer) in _QUANTISED


def wrap(
    layer: nn.Module,
    *,
    weight_bits: int = 8,
    activation_bits: int | None = 8,
    per_channel: bool = True,
    quantizer: Quantizer = "lsq",
    symmetric: bool = False,
) -> nn.Module:
    """The layer with its weights and its input rounded; it takes over the parameters of the one that is given.

    Weights w become s clamp(round(w / s), -t, t), t = 2^(weight_bits-1) - 1, with a step s for each output channel, or
    for all without per_channel. The input becomes one of 2^activation_bits levels of which zero is one (None: it stays
    in float): from an offset upwards or, symmetric, -2^(bits-1) to 2^(bits-1) - 1 times its step. quantizer: `lsq`
    learns steps and offset; `plain` takes them from the largest weights and from the extremes of the inputs met.

    Source: Esser et al., Learned Step Size Quantization, ICLR 2020; Bhalgat et al., LSQ+, CVPR workshops 2020; Jacob et
    al., Quantization and Training of Neural Networks, CVPR 2018.
    Raises TypeError for a layer of another kind, ValueError for bits outside of 2 to 8 or an unknown quantizer.
    """
    if not can_wrap(layer):
        raise TypeError(f"a {type(layer).__name__} cannot be quantised")
    for bits in (weight_bits, activation_bits):
        if bits is not None and not 2 <= bits <= 8:
            raise ValueError(f"{bits} bits; allowed: 2 to 8")
    if quantizer not in ("lsq", "plain"):
        raise ValueError(f"no quantizer '{quantizer}'; allowed: lsq, plain")
    made: FakeQuant = _like(layer, _QUANTISED[type(layer)])
    weights, inputs = _KINDS[quantizer]
    made.weight_quantizer = weights(weight_bits, per_channel, made.weight)
    made.input_quantizer = None if activation_bits is None else inputs(activation_bits, symmetric)
    for part in made.children():
        part.requires_grad_(made.weight.requires_grad).to(made.weight.device)
    return made.train(layer.training)


def _like(layer: nn.Module, kind: type) -> Any:
    """A layer of another class with the same arguments, and the same tensors as its weight and bias."""
    if isinstance(layer, nn.Linear):
        made = kind(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    else:
        assert isinstance(layer, Convolution)
        made = kind(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            layer.groups, layer.bias is not None, layer.padding_mode, device="meta",
        )  # fmt: skip
    made.weight, made.bias = layer.weight, layer.bias
    return made


# ------------------------------------------------------------------------------------------------------------- of a net


def layers(net: nn.Module) -> Iterator[tuple[str, FakeQuant]]:
    """The quantised layers of a net and their paths, each once."""
    for path, module in net.named_modules():
        if isinstance(module, FakeQuant):
            yield path, module


def is_quantized(net: nn.Module) -> bool:
    """Whether a net has layers of `wrap`."""
    return next(layers(net), None) is not None


def steps(net: nn.Module) -> list[nn.Parameter]:
    """The learned steps and offsets of a net."""
    found = []
    for _, layer in layers(net):
        for part in (layer.weight_quantizer, layer.input_quantizer):
            found += [] if part is None else list(part.parameters())
    return found


def calibrate(net: nn.Module, run: Callable[[], None], method: Calibration) -> None:
    """Sets the steps of all weights, and the ranges of all inputs by what they are when the net computes in float.

    run: calls the net on samples; it is called twice where the method needs more than the extremes. A layer that it
    does not reach keeps its range. Raises KdctlError where a value is not finite.
    """
    found = dict(layers(net))
    spreads = {path: Spread() for path, layer in found.items() if layer.input_quantizer is not None}
    try:
        for layer in found.values():
            layer.quantizing = False
        for stage in ("stretch", "count") if method != "minmax" else ("stretch",):
            for path, spread in spreads.items():
                found[path].input_quantizer.watch = getattr(spread, stage)  # type: ignore[union-attr]
            run()
    finally:
        for layer in found.values():
            layer.quantizing = True
            if layer.input_quantizer is not None:
                layer.input_quantizer.watch = None
    for path, layer in found.items():
        layer.weight_quantizer.fit(layer.weight, search=method != "minmax")
        if layer.input_quantizer is not None and spreads[path].high > spreads[path].low:
            layer.input_quantizer.set_range(*spreads[path].range(method, 2**layer.input_quantizer.bits))


def observe(net: nn.Module, observing: bool) -> None:
    """Lets the ranges of `plain` inputs follow what they meet in train mode, or stay as they are."""
    for _, layer in layers(net):
        if isinstance(layer.input_quantizer, FollowedInputs):
            layer.input_quantizer.observing = observing


@torch.no_grad()
def release(net: nn.Module) -> tuple[nn.Module, dict[str, Learned]]:
    """A copy of the net with plain layers whose weights are whole multiples of their step, and what was learned, by
    path. The net itself is left as it is; one without quantised layers gives a copy and nothing."""
    plain = copy.deepcopy(net)
    learned = {}
    for path, layer in list(layers(plain)):
        weight = layer.rounded_weight().detach()
        step = layer.weight_quantizer.used_step(layer.weight).detach()
        scale = step.float().cpu().numpy()
        inputs = layer.input_quantizer
        learned[path] = Learned(
            weight_scale=scale if layer.weight_quantizer.per_channel else scale.reshape(()),
            weight_bits=layer.weight_quantizer.bits,
            input_range=None if inputs is None else inputs.range(),
            input_bits=8 if inputs is None else inputs.bits,
        )
        kind = next(before for before, after in _QUANTISED.items() if type(layer) is after)
        made = _like(layer, kind).train(layer.training)
        made.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        if not path:
            return made, learned
        parent, _, name = path.rpartition(".")
        setattr(plain.get_submodule(parent), name, made)
    return plain, learned
