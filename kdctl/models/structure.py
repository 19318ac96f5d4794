"""What compression did to a net, as plain values: a list of edits that turn a freshly built net into the smaller one.

An edit is a map with `edit`, `path` (a module of the net) and what it needs:

    {edit: resize, path, in, out, groups}     a convolution or linear layer of other widths; of a normalisation `out`
    {edit: replace, path, layers: [...]}      a chain of layers in the place of one: {kind: Conv2d or Linear, arguments}
    {edit: set, path, name, value}            a plain attribute of a module, such as its number of heads
    {edit: skip, path}                        a module that does nothing any more
    {edit: bias, path}                        a convolution or linear layer that gets a bias
    {edit: fake_quant, path, ...}             a layer with learned quantisation: the arguments of quant.fake.wrap

The record of a model holds them, so that its weights fit the net that is built from it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from kdctl.errors import ConfigError, Problem
from kdctl.quant import fake

Edit = dict[str, Any]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_LAYERS = {"Conv1d": nn.Conv1d, "Conv2d": nn.Conv2d, "Conv3d": nn.Conv3d, "Linear": nn.Linear}
_PLAIN = (int, float, str, bool, list, tuple)


def apply(net: nn.Module, edits: Sequence[Edit]) -> None:
    """Makes the edits in the net, in place and in order. Weights of what is new are fresh.

    Raises ConfigError for an edit that does not fit the net.
    """
    for edit in edits:
        try:
            _EDITS[edit["edit"]](net, edit)
        except Exception as error:  # whatever damaged values come to in the constructors of layers
            raise ConfigError(Problem(f"the record's edit {edit} does not fit the model: {error!r}")) from error


def widths(module: nn.Module) -> dict[str, int] | None:
    """The widths of a layer or normalisation, as a `resize` has them; None of any other module."""
    if isinstance(module, _CONVOLUTIONS):
        return {"in": module.in_channels, "out": module.out_channels, "groups": module.groups}
    if isinstance(module, nn.Linear):
        return {"in": module.in_features, "out": module.out_features}
    if isinstance(module, _BATCH_NORMS):
        return {"out": module.num_features}
    if isinstance(module, nn.LayerNorm):
        return {"out": module.normalized_shape[-1]}
    if isinstance(module, nn.GroupNorm):
        return {"out": module.num_channels, "groups": module.num_groups}
    return None


def put(net: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module in the place of another, under every name that the net has for that one.

    Raises AttributeError where there is none.
    """
    old = net.get_submodule(path)
    if old is net:
        raise AttributeError("a net cannot stand in its own place")
    for parent in list(net.modules()):
        for name in [name for name, child in parent._modules.items() if child is old]:
            setattr(parent, name, module)


# -------------------------------------------------------------------------------------------------------------- edits


def _resize(net: nn.Module, edit: Edit) -> None:
    old = net.get_submodule(edit["path"])
    new: nn.Module
    if isinstance(old, _CONVOLUTIONS):
        transposed = {"output_padding": old.output_padding} if isinstance(old, nn.ConvTranspose2d) else {}
        new = type(old)(
            edit["in"], edit["out"], old.kernel_size, old.stride, old.padding,  # type: ignore[arg-type]
            dilation=old.dilation, groups=edit["groups"], bias=old.bias is not None, padding_mode=old.padding_mode,  # type: ignore[arg-type]
            **transposed,  # type: ignore[arg-type]
        )  # fmt: skip
    elif isinstance(old, nn.Linear):
        new = nn.Linear(edit["in"], edit["out"], bias=old.bias is not None)
    elif isinstance(old, _BATCH_NORMS):
        new = type(old)(edit["out"], old.eps, old.momentum, old.affine, old.track_running_stats)
    elif isinstance(old, nn.LayerNorm):
        shape = [*old.normalized_shape[:-1], edit["out"]]
        new = nn.LayerNorm(shape, old.eps, old.elementwise_affine, old.bias is not None)
    elif isinstance(old, nn.GroupNorm):
        new = nn.GroupNorm(edit["groups"], edit["out"], old.eps, old.affine)
    else:
        raise ValueError(f"a {type(old).__name__} has no width")
    put(net, edit["path"], new.train(old.training))


def _replace(net: nn.Module, edit: Edit) -> None:
    old = net.get_submodule(edit["path"])
    if not edit["layers"]:
        raise ValueError("a chain of no layers")
    chain = nn.Sequential(*(_LAYERS[layer["kind"]](**_arguments(layer)) for layer in edit["layers"]))
    put(net, edit["path"], chain.train(old.training))


def _arguments(layer: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in layer.items() if name != "kind"}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _set(net: nn.Module, edit: Edit) -> None:
    module, name = net.get_submodule(edit["path"]), edit["name"]
    value = module.__dict__[name]  # neither a parameter, a buffer, a module nor a method
    if not isinstance(value, _PLAIN) or name.startswith("_") or name == "training":
        raise ValueError(f"{name} is no plain attribute")
    new = tuple(edit["value"]) if isinstance(value, tuple) else edit["value"]
    if type(new) is not type(value):
        raise ValueError(f"{name} is of type {type(value).__name__}")
    setattr(module, name, new)


class Skipped(nn.Module):
    """Hands on the first of several arguments, as a layer of a transformer that is left out does."""

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        return x


def skip(net: nn.Module, path: str) -> None:
    """Puts a module that hands on its first argument in the place of another."""
    arguments = inspect.signature(net.get_submodule(path).forward).parameters
    put(net, path, nn.Identity() if len(arguments) < 2 else Skipped())


def _skip(net: nn.Module, edit: Edit) -> None:
    skip(net, edit["path"])


def _bias(net: nn.Module, edit: Edit) -> None:
    layer = net.get_submodule(edit["path"])
    if not isinstance(layer, (*_CONVOLUTIONS, nn.Linear)) or layer.bias is not None:
        raise ValueError(f"a {type(layer).__name__} that has a bias, or can have none")
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    layer.bias = nn.Parameter(layer.weight.new_zeros(channels))


def _fake_quant(net: nn.Module, edit: Edit) -> None:
    arguments = {name: value for name, value in edit.items() if name not in ("edit", "path")}
    put(net, edit["path"], fake.wrap(net.get_submodule(edit["path"]), **arguments))


_EDITS = {
    "resize": _resize,
    "replace": _replace,
    "set": _set,
    "skip": _skip,
    "bias": _bias,
    "fake_quant": _fake_quant,
}
