"""Post-training quantisation of exported graphs (PyTorch 2 Export, `pt2e`) as XNNPACK computes: symmetric int8 weights.

The graph is annotated by XNNPACK's own quantiser, so that what is quantised is what the delegate runs in int8.
Source: torchao's pt2e and ExecuTorch's XNNPACKQuantizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from kdctl.errors import ConfigError, Problem
from kdctl.export.base import Learned, Quantization

if TYPE_CHECKING:
    from torch import Tensor, fx

_EPS = 2.0**-12
"""The least scale, as XNNPACK's own configuration has it."""
_LAYERS = ("conv1d", "conv2d", "conv_transpose2d", "linear")


def quantized(graph: fx.GraphModule, quantization: Quantization) -> Any:
    """The graph of a model (its layers under `net.`) with quantise and dequantise nodes where XNNPACK computes in int8.

    Ranges of activations come from `quantization.images`; a dynamic graph needs none, but is run once, because its
    weights are looked at as they are used.
    """
    import torch
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    learned = quantization.learned
    floats = {path for path, found in learned.items() if found.input_range is None}
    quantizer = XNNPACKQuantizer().set_global(_configuration(quantization))
    quantizer.set_filter_function(_outside({*quantization.keep, *floats}))
    prepared = prepare_pt2e(graph, quantizer)
    shape = next(node.meta["val"].shape for node in graph.graph.nodes if node.op == "placeholder")
    images = torch.zeros(1, *shape[1:]) if quantization.images is None else torch.from_numpy(quantization.images)
    for image in images.float().split(1):  # what the graph was exported for
        prepared(image)
    for path in learned.keys() - floats:
        _fix(prepared, path, learned[path], quantization)
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


def _outside(paths: set[str]) -> Callable[[fx.Node], bool]:
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


def _fix(prepared: fx.GraphModule, path: str, found: Learned, quantization: Quantization) -> None:
    """Puts what training found into the observers of one layer, in the place of what they saw."""
    import torch

    if found.weight_bits > 8 or found.input_bits != 8:
        message = f"{path} was trained with {found.weight_bits}-bit weights and {found.input_bits}-bit inputs"
        raise ConfigError(Problem(message, key="mode", hint="XNNPACK takes up to 8-bit weights and 8-bit inputs"))
    scale = torch.from_numpy(found.weight_scale).float()
    if quantization.per_channel != bool(scale.ndim):
        message = f"{path} was trained with {'a scale a channel' if scale.ndim else 'one scale'} for its weights"
        raise ConfigError(Problem(message, key="per_channel", hint=f"per_channel: {'true' if scale.ndim else 'false'}"))
    node = _layer(prepared, path)
    _set(prepared, node.args[1], -127 * scale, 127 * scale)
    if quantization.mode == "static" and found.input_range is not None:
        low, high = (torch.tensor(float(bound)) for bound in found.input_range)
        _set(prepared, node.args[0], low, high)


def _layer(prepared: fx.GraphModule, path: str) -> fx.Node:
    for node in prepared.graph.nodes:
        names = str(node.target).split(".")
        if node.op == "call_function" and len(names) > 1 and names[1] in _LAYERS and path in _modules(node):
            return node
    raise ConfigError(Problem(f"no layer {path} is in the exported graph, but training found scales for it"))


def _set(prepared: fx.GraphModule, observed: Any, low: Tensor, high: Tensor) -> None:
    observer = prepared.get_submodule(str(observed.target))
    observer.min_val, observer.max_val = low, high
