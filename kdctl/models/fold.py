"""A frozen net without its batch normalisation: each is folded into the convolution or linear layer before it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterator

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.nn.utils.parametrize import is_parametrized

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def folded(net: nn.Module, keep: Collection[str] = ()) -> nn.Module:
    """A copy of a net in eval mode that computes the same, up to rounding, with fewer passes over its features.

    keep: paths of modules that stay as they are (those with taps). The net itself is given back where nothing can be
    folded, or where its forward cannot be followed (torch.fx).
    """
    pairs = [pair for pair in _pairs(net) if not set(pair) & set(keep)]
    if not pairs or net.training:
        return net
    result = copy.deepcopy(net)
    for layer, norm in pairs:
        before, after = result.get_submodule(layer), result.get_submodule(norm)
        fuse = fuse_linear_bn_eval if isinstance(before, nn.Linear) else fuse_conv_bn_eval
        _put(result, layer, fuse(before, after))  # type: ignore[arg-type, type-var]
        _put(result, norm, nn.Identity())
    return result.eval().requires_grad_(False)


def _pairs(net: nn.Module) -> Iterator[tuple[str, str]]:
    """(layer, norm): the norm takes what the layer gives, nothing else does, and both are called once."""
    try:
        nodes = list(fx.Tracer().trace(net).nodes)
    except Exception:  # whatever a forward does with a proxy instead of a tensor
        return
    calls = Counter(id(net.get_submodule(str(node.target))) for node in nodes if node.op == "call_module")
    read = [str(node.target) for node in nodes if node.op == "get_attr"]
    for node in nodes:
        if node.op != "call_module" or type(norm := net.get_submodule(str(node.target))) not in _NORMS:
            continue
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        layer = net.get_submodule(str(before.target))
        plain = type(layer) in _LAYERS and norm.running_var is not None and not _hooked(layer) and not _hooked(norm)
        looked_at = any(path.startswith((f"{before.target}.", f"{node.target}.")) for path in read)
        if plain and not looked_at and calls[id(layer)] == 1 and calls[id(norm)] == 1:
            yield str(before.target), str(node.target)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or is_parametrized(module))


def _put(net: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(net.get_submodule(parent), name, module)
