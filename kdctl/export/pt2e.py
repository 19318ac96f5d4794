"""Post-training quantisation of exported graphs (PyTorch 2 Export, `pt2e`) as XNNPACK computes: symmetric int8 weights.

The graph is annotated by XNNPACK's own quantiser, so that what is quantised is what the delegate runs in int8.
Source: torchao's pt2e and ExecuTorch's XNNPACKQuantizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kdctl.errors import ConfigError, Problem
from kdctl.export.base import Learned, Quantization

if TYPE_CHECKING:
    from torch import fx

_EPS = 2.0**-12
"""The least scale, as XNNPACK's own configuration has it."""
_LAYERS = ("conv1d", "conv2d", "conv_transpose2d", "linear")


def quantized(graph: fx.GraphModule, quantization: Quantization) -> Any:
    """The graph of a model (its layers under `net.`) with quantise and dequantise nodes where XNNPACK computes in int8.

    Ranges of activations come from `quantization.images`; a dynamic graph needs none, but is run once, because its
    weights are looked at as they are used. Raises ConfigError where XNNPACK has no form for what training found.
    """
    import torch
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    for path, found in quantization.learned.items():
        _check(path, found, quantization)
    quantizer = XNNPACKQuantizer().set_global(_configuration(quantization))
    quantizer.set_filter_function(_outside(quantization.keep))
    prepared = prepare_pt2e(graph, quantizer)
    shape = next(node.meta["val"].shape for node in graph.graph.nodes if node.op == "placeholder")
    images = torch.zeros(1, *shape[1:]) if quantization.images is None else torch.from_numpy(quantization.images)
    for image in images.float().split(1):  # what the graph was exported for
        prepared(image)
    _fix(prepared, quantization)
    return convert_pt2e(prepared)


def _configuration(quantization: Quantization) -> Any:
    """XNNPACK's configuration with the observer that the calibration asks for."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import get_symmetric_quantization_config
    from torchao.quantization.pt2e import HistogramObserver, MinMaxObserver

    dynamic = quantization.mode == "dynamic"
    config = get_symmetric_quantization_config(is_per_channel=quantization.per_channel, is_dynamic=dynamic)
    if dynamic:
        return config
    observer = MinMaxObserver if quantization.calibration == "minmax" else HistogramObserver
    ranges = dataclasses.replace(config.input_activation, observer_or_fake_quant_ctr=observer.with_args(eps=_EPS))
    return dataclasses.replace(config, input_activation=ranges, output_activation=ranges)


def _outside(paths: Collection[str]) -> Callable[[fx.Node], bool]:
    """Whether a node lies in none of the modules of the net."""

    def outside(node: fx.Node) -> bool:
        return not any(inside == path or inside.startswith(f"{path}.") for inside in _modules(node) for path in paths)

    return outside


def _modules(node: fx.Node) -> Iterator[str]:
    """Paths, in the net, of the modules that a node was traced in."""
    for path, _ in node.meta.get("nn_module_stack", {}).values():
        name = path.removeprefix("L['self'].").removeprefix("net.")
        if name:
            yield name


# ----------------------------------------------------------------------------------------------------- learned scales


def _check(path: str, found: Learned, quantization: Quantization) -> None:
    """Raises ConfigError where XNNPACK cannot keep what training found for a layer."""
    if found.input_range is None and quantization.mode == "static":
        message = f"{path} was trained with {found.weight_bits}-bit weights alone, its input in float"
        hint = "static computes from both in int8: train with quantised inputs, use mode: dynamic, or keep the layer"
        raise ConfigError(Problem(message, key="mode", hint=hint))
    if found.weight_bits > 8 or found.input_bits != 8:
        message = f"{path} was trained with {found.weight_bits}-bit weights and {found.input_bits}-bit inputs"
        raise ConfigError(Problem(message, key="mode", hint="XNNPACK takes up to 8-bit weights and 8-bit inputs"))
    channels = bool(found.weight_scale.ndim)
    if quantization.per_channel != channels:
        message = f"{path} was trained with {'a scale a channel' if channels else 'one scale'} for its weights"
        raise ConfigError(Problem(message, key="per_channel", hint=f"per_channel: {'true' if channels else 'false'}"))


def _fix(prepared: fx.GraphModule, quantization: Quantization) -> None:
    """Puts what training found in the place of what observers saw: the weights' steps and, if static, input ranges."""
    import torch

    layers = {_layer(prepared, path): found for path, found in quantization.learned.items()}
    for (node, found), path in zip(layers.items(), quantization.learned, strict=True):
        top = 127 * torch.from_numpy(found.weight_scale).float()
        observer = _observer(prepared, node.args[1])
        if observer is None:
            message = f"XNNPACK leaves {path} in float with mode: {quantization.mode}, but it was trained in int8"
            raise ConfigError(Problem(message, key="mode", hint=f"use mode: static, or keep: [{path}]"))
        observer.min_val, observer.max_val = -top, top
    if quantization.mode == "static":
        for observer in {_observer(prepared, node.args[0]): None for node in layers}:
            _widen(prepared, observer, layers)


def _observer(prepared: fx.GraphModule, node: Any) -> Any:
    """The observer that a node is a call of; None of any other node."""
    return prepared.get_submodule(node.target) if node.op == "call_module" else None


def _widen(prepared: fx.GraphModule, observer: Any, layers: Mapping[fx.Node, Learned]) -> None:
    """Gives a tensor the least range that holds those of all its readers: learned, or else the calibrated one.

    Tensors with the same levels (before and after a pooling) share an observer. It is replaced by one that holds just
    this range: a histogram's would search for another.
    """
    import torch
    from torchao.quantization.pt2e import MinMaxObserver

    nodes = [node for node in prepared.graph.nodes if _observer(prepared, node) is observer]
    scale, zero = (value.float() for value in observer.calculate_qparams())
    seen = tuple(float(scale * (level - zero)) for level in (observer.quant_min, observer.quant_max))
    readers = [reader for node in nodes for reader in node.users if not any(after in nodes for after in reader.users)]
    wanted = [layers[reader].input_range or seen if reader in layers else seen for reader in readers]
    options = {name: getattr(observer, name) for name in ("dtype", "qscheme", "quant_min", "quant_max")}
    fixed = MinMaxObserver(**options, eps=_EPS)
    fixed.min_val = torch.tensor(min(low for low, _ in wanted))
    fixed.max_val = torch.tensor(max(high for _, high in wanted))
    for node in nodes:
        prepared.set_submodule(node.target, fixed)


def _layer(prepared: fx.GraphModule, path: str) -> fx.Node:
    for node in prepared.graph.nodes:
        names = str(node.target).split(".")
        if node.op == "call_function" and len(names) > 1 and names[1] in _LAYERS and path in _modules(node):
            return node
    raise ConfigError(Problem(f"no layer {path} is in the exported graph, but training found scales for it"))
