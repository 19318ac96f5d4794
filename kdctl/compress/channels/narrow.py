"""A model without some of its channels: the layers are cut, the record says how, and what comes out is proven.

Removing a channel means that nothing takes it any more: the narrow model computes what the wide one does with the
channel's columns set to zero in every layer that takes it (so biases and normalisations before them go too).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdctl.compress.channels.layout import Channels, Layer, Numbers
from kdctl.errors import KdctlError
from kdctl.models import structure
from kdctl.models.record import Model, build_model
from kdctl.signals import find_logits

Mask = NDArray[np.bool_]

TOLERANCE = 1e-6
"""Of the largest output, in float64: how far a narrow model may be from the masked one."""


def narrow(model: Model, channels: Channels, removed: Collection[int]) -> Model:
    """A new model without the units `removed`, in eval mode, built from its own record.

    Raises KdctlError where the net that its record builds does not compute what the masked one does.
    """
    edits = _edits(channels, removed)
    record = dataclasses.replace(model.record, structure=[*(model.record.structure or []), *edits])
    with torch.random.fork_rng([]):
        result = build_model(record, model.base)
    state = _cut(model.net, channels, removed)
    try:
        result.net.load_state_dict(state)
    except RuntimeError as error:
        raise KdctlError(f"the pruned weights do not fit the net that is built for them: {error}") from error
    result.eval()
    place = differs(result, masked(model, channels, removed))
    if place is not None:
        hint = "skip: [its layers] leaves them as they are"
        raise KdctlError(f"the pruned net does not compute what the masked one does ({place})", hint=hint)
    return result


def narrowed(model: Model, channels: Channels, removed: Collection[int]) -> Model:
    """The same on a copy of the model, quickly: neither built from its record nor compared."""
    result = copy.deepcopy(model)
    with torch.random.fork_rng([]):
        structure.apply(result.net, _edits(channels, removed))
    result.net.load_state_dict(_cut(model.net, channels, removed))
    return result.eval()


def masked(model: Model, channels: Channels, removed: Collection[int]) -> Model:
    """A copy of the model in which no layer takes the removed channels: their columns are zero."""
    result = copy.deepcopy(model).eval()
    for layer in channels.layers:
        if layer.inputs is None:
            continue
        weight: Any = result.net.get_submodule(layer.path).weight
        gone = ~_kept(layer.inputs, removed)
        with torch.no_grad():
            for rows, columns in _by_group(layer, weight):
                weight[rows][:, torch.from_numpy(gone[columns])] = 0.0
    return result


def differs(first: Model, second: Model) -> str | None:
    """None where two models give the same for random images, else what is wrong."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, *first.record.image_shape, generator=generator, dtype=torch.float64)
    net = copy.deepcopy(first).double()
    with torch.no_grad():
        expected = find_logits(copy.deepcopy(second).double()(images))
        try:
            found = find_logits(net(images))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            return f"in {_place(net.net, error)}: {error}"
    difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    return None if difference <= TOLERANCE else f"the outputs differ by {difference:.1e} of the largest"


def _place(net: nn.Module, error: BaseException) -> str:
    """The innermost module whose forward an exception came out of."""
    paths = {id(module): path for path, module in net.named_modules()}
    place, frame = "the net", error.__traceback__
    while frame is not None:
        place = paths.get(id(frame.tb_frame.f_locals.get("self")), "") or place
        frame = frame.tb_next
    return place


# ------------------------------------------------------------------------------------------------------------ cutting


def _kept(numbers: Numbers, removed: Collection[int]) -> Mask:
    kept: Mask = ~np.isin(numbers, list(removed))
    return kept


def _groups(layer: Layer) -> int:
    return int(getattr(layer.module, "groups", 1)) if layer.inputs is not None else 1


def _by_group(layer: Layer, weight: Tensor) -> list[tuple[slice, slice]]:
    """(rows of the weight, channels of the input) of each group of a convolution."""
    assert layer.inputs is not None
    groups = _groups(layer)
    rows, columns = weight.shape[0] // groups, len(layer.inputs) // groups
    return [(slice(g * rows, (g + 1) * rows), slice(g * columns, (g + 1) * columns)) for g in range(groups)]


def widths_after(layer: Layer, removed: Collection[int]) -> tuple[int, int]:
    """(in, out) of a layer without the removed units; `in` is 0 where it takes each channel alone."""
    inside = 0 if layer.inputs is None else int(_kept(layer.inputs, removed).sum())
    return inside, int(_kept(layer.outputs, removed).sum())


def _edits(channels: Channels, removed: Collection[int]) -> list[dict[str, Any]]:
    edits: list[dict[str, Any]] = []
    for layer in channels.layers:
        inside, out = widths_after(layer, removed)
        if layer.pad is not None:
            kept = _kept(layer.outputs, removed)
            low, high = int(kept[: layer.pad[0]].sum()), int(kept[len(kept) - layer.pad[1] :].sum())
            if (low, high) != layer.pad:
                padding = [0, 0, 0, 0, low, high]
                edits.append({"edit": "set", "path": layer.path, "name": "padding", "value": padding})
            continue
        before = structure.widths(layer.module)
        after = {"in": inside, "out": out, "groups": _groups(layer)}
        if before is not None and layer.inputs is None and "in" in before:  # depthwise: as many groups as inputs
            factor = before["out"] // before["in"]
            after |= {"in": out // factor, "groups": out // factor}
        after = {name: value for name, value in after.items() if name in (before or {})}
        if before != after:
            edits.append({"edit": "resize", "path": layer.path, **after})
    for path, name, numbers in {(p, n): (p, n, numbers) for p, n, numbers in channels.heads}.values():
        if not _kept(numbers, removed).all():
            value = int(_kept(numbers, removed).sum())
            edits.append({"edit": "set", "path": path, "name": name, "value": value})
    return edits


def _cut(net: nn.Module, channels: Channels, removed: Collection[int]) -> dict[str, Tensor]:
    """The net's tensors without the removed channels."""
    state = dict(net.state_dict())
    for layer in channels.layers:
        out = torch.from_numpy(_kept(layer.outputs, removed))
        for name in ("bias", "running_mean", "running_var", *(["weight"] if layer.inputs is None else [])):
            key = f"{layer.path}.{name}"
            if isinstance(state.get(key), Tensor):
                state[key] = state[key][out]
        if layer.inputs is None:
            continue
        weight = state[f"{layer.path}.weight"]
        kept = _kept(layer.inputs, removed)
        parts = []
        for rows, columns in _by_group(layer, weight):
            parts.append(weight[rows][out[rows]][:, torch.from_numpy(kept[columns])])
        state[f"{layer.path}.weight"] = torch.cat(parts)
    return state
