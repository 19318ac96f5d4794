"""Low-rank factorisation: layers become chains of smaller ones, with ranks by a budget or by the energy they keep."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal

from kdctl.compress.base import Reshape, Reshaped, Workbench
from kdctl.config.types import Fraction, PositiveInt
from kdctl.errors import ConfigError, KdctlError, Problem

if TYPE_CHECKING:
    from torch import Tensor, nn

    from kdctl.compress.factors.forms import Form, Ranks, Shape
    from kdctl.compress.factors.rank_choice import Option
    from kdctl.models.record import Model


@dataclass(frozen=True)
class _Layer:
    """A layer that may become a chain. before, after: the map (H, W) that it gets and makes; calls: in a forward."""

    path: str
    module: nn.Module
    form: Form
    before: tuple[int, int]
    after: tuple[int, int]
    calls: int


class LowRank(Reshape):
    """Linear layers and convolutions as chains of smaller ones: SVD, Tucker-2, CP, or pairs of 1-D filters.

    keep_ratio: the share of the treated layers' parameters (`of: macs`, multiply-accumulates) that stays; the ranks of
    all layers are chosen together (Kim et al., Efficient Neural Network Compression, CVPR 2019). energy: instead, the
    share of each layer's squared singular values that stays. convolution: what a k x k convolution becomes: `tucker`
    (1x1, k x k, 1x1: Kim et al. 2016), `cp` (1x1, k x 1 and 1 x k depthwise, 1x1: Lebedev et al. 2015), `spatial`
    (k x 1, 1 x k: Jaderberg et al. 2014); 1x1 convolutions and linear layers are split in two by their singular values
    (Denton et al. 2014). layers, skip: patterns of the paths of layers that are treated (none: all), and that are not.
    round_to: ranks are multiples of it where a layer is wide enough.
    A layer stays as it is where no chain of it would be smaller, and where it is depthwise or grouped. Its path gives
    what it gave, so taps hold.
    """

    smoke = {"convolution": "tucker"}

    def __init__(
        self,
        *,
        energy: Fraction | None = None,
        keep_ratio: Fraction = 0.5,
        of: Literal["parameters", "macs"] = "parameters",
        convolution: Literal["tucker", "cp", "spatial"] = "tucker",
        layers: list[str] = [],  # noqa: B006 - read as text, and never changed
        skip: list[str] = [],  # noqa: B006
        round_to: PositiveInt = 4,
    ) -> None:
        if energy is not None and keep_ratio != 0.5:
            message = "ranks come from `keep_ratio` or from `energy`, not from both"
            raise ConfigError(Problem(message, key="energy", hint="leave one of them out"))
        self.keep_ratio = keep_ratio
        self.energy, self.of, self.convolution = energy, of, convolution
        self.layers, self.skip, self.round_to = list(layers), list(skip), round_to

    def reshape(self, model: Model, bench: Workbench) -> Reshaped:
        """The model with chains for layers, which a record rebuilds.

        details: parameters and MACs before and after, and for each layer its path, form, ranks, the share of its energy
        that was kept (exact, not the bound that the ranks were chosen by) and parameters before and after. Raises
        KdctlError where the budget cannot be met, ConfigError where a pattern meets no layer.
        """
        from kdctl.bench.cost import macs, parameters

        before = {"parameters": parameters(model), "macs": macs(model)}
        layers = _find(model, self)
        if self.convolution == "cp":
            bench.say(f"low_rank: fitting CP to {len(layers)} layers, which takes minutes where they are wide")
        chosen = self._choose(layers)
        if all(option.ranks is None for option in chosen):
            hint = "a smaller share, or other layers" if layers else "it has no plain Linear or Conv2d that is called"
            raise KdctlError("no layer of this model becomes smaller as a low-rank chain", hint=hint)
        tensors: dict[str, Tensor] = {}
        edits, report = [], []
        for layer, option in zip(layers, chosen, strict=True):
            if option.ranks is not None:
                edit, weights, kept = _chain(layer, option.ranks)
                edits.append(edit)
                tensors |= weights
                report.append(_describe(layer, option.ranks, kept, weights))
        result = _rebuilt(model, edits, tensors)
        after = {"parameters": parameters(result), "macs": macs(result)}
        details = {name: {"before": before[name], "after": after[name]} for name in before}
        return Reshaped(result, {"convolution": self.convolution, **details, "layers": report})

    def _choose(self, layers: list[_Layer]) -> list[Option]:
        """For each layer what becomes of it."""
        from kdctl.compress.factors.rank_choice import by_energy, within_budget

        options = [_options(layer, self.of, self.round_to) for layer in layers]
        if self.energy is not None:
            return [by_energy(ways, self.energy) for ways in options]
        total = sum(ways[0].cost for ways in options)
        chosen = within_budget(options, self.keep_ratio * total)
        if chosen is None:
            least = sum(min(o.cost for o in ways) for ways in options) / total
            message = f"a share of {self.keep_ratio:g} of these layers' {self.of} is too little: {least:.3f} are left"
            hint = "a larger keep_ratio, a smaller round_to, another convolution, or fewer layers"
            raise KdctlError(f"{message} at the lowest ranks", hint=hint)
        return chosen


def _find(model: Model, stage: LowRank) -> list[_Layer]:
    """The plain layers of the net that a forward calls and that `layers` and `skip` leave, in the order of the net."""
    import torch
    from torch import nn
    from torch.nn.utils.parametrize import is_parametrized

    from kdctl.compress.factors.forms import form

    net = model.net
    if any(edit["edit"] == "fake_quant" for edit in model.record.structure or []):
        hint = "put low_rank before quantisation-aware training"
        raise ConfigError(Problem("a model with learned quantisation cannot be factorised", hint=hint))
    everywhere = [module for _, module in net.named_modules(remove_duplicate=False)]
    shared = Counter(id(p) for module in everywhere for p in module._parameters.values() if p is not None)
    plain = {
        path: module
        for path, module in net.named_modules()
        if type(module) in (nn.Linear, nn.Conv2d)
        and getattr(module, "groups", 1) == 1
        and shared[id(module.weight)] == 1
        and not is_parametrized(module)
    }
    named = _named([path for path, module in net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)], stage)
    wanted = [path for path in plain if path in named]
    maps = _maps(model, wanted)
    found = []
    for path in wanted:
        if path in maps:
            weight = plain[path].weight
            assert isinstance(weight, torch.Tensor)
            matrix = weight.detach().cpu().double()
            matrix = matrix[:, :, None, None] if matrix.dim() == 2 else matrix
            if float(matrix.abs().sum()) > 0:
                found.append(_Layer(path, plain[path], form(matrix, stage.convolution), *maps[path]))
    return found


def _named(paths: list[str], stage: LowRank) -> set[str]:
    """Those of the paths that `layers` names and `skip` does not."""
    for key in ("layers", "skip"):
        for pattern in getattr(stage, key):
            if not fnmatch.filter(paths, pattern):
                message = f"'{pattern}' meets no Linear or Conv2d of the model"
                raise ConfigError(Problem(message, key=key, hint=f"paths are such as {', '.join(paths[:4])}"))
    named = {path for pattern in stage.layers or ["*"] for path in fnmatch.filter(paths, pattern)}
    return named.difference(*(fnmatch.filter(paths, pattern) for pattern in stage.skip))


def _maps(model: Model, paths: list[str]) -> dict[str, tuple[tuple[int, int], tuple[int, int], int]]:
    """For each layer that a forward calls: the map (H, W) that it gets, the one it makes, how often it is called.

    A linear layer's rows (tokens) count as a map's height.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from kdctl.taps import Taps

    reference = next(model.parameters())
    sample = _sample(model, reference)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(sample)
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    prefix = f"{type(model).__name__}.net."
    called = [path for path in paths if flops.get(prefix + path, 0) > 0]
    with torch.no_grad(), Taps(model.net, [p for path in called for p in (path, f"{path}:in")]) as taps:
        with taps.recording() as features:
            model(sample)
    maps = {}
    for path in called:
        weight = model.net.get_submodule(path).weight
        assert isinstance(weight, torch.Tensor)
        before, after = (_map(features[name], weight.dim()) for name in (f"{path}:in", path))
        calls = flops[prefix + path] // (2 * weight.numel() * after[0] * after[1])
        maps[path] = (before, after, calls)
    return maps


def _sample(model: Model, reference: Tensor) -> Tensor:
    """One input of the model, on the device of a tensor and, of an image, in its type."""
    sample = model.record.example().to(reference.device)
    return sample.to(reference.dtype) if sample.is_floating_point() else sample


def _map(feature: Tensor, dims: int) -> tuple[int, int]:
    if dims == 2:
        return feature.numel() // feature.shape[-1], 1
    return feature.shape[-2], feature.shape[-1]


def _options(layer: _Layer, of: str, round_to: int) -> list[Option]:
    """The layer as it is, then every chain that costs less."""
    from kdctl.compress.factors.forms import sites
    from kdctl.compress.factors.rank_choice import Option

    def cost(shapes: Sequence[Shape], places: list[int]) -> float:
        each = [prod(shape) * (1 if of == "parameters" else place) for shape, place in zip(shapes, places, strict=True)]
        return sum(each) * (1 if of == "parameters" else layer.calls)

    form = layer.form
    whole = cost([(form.out, form.channels, form.height, form.width)], [layer.after[0] * layer.after[1]])
    options = [Option(None, whole, 1.0)]
    for ranks, kept in form.energies(round_to).items():
        shapes = form.shapes(ranks)
        price = cost(shapes, sites(shapes, form.spans(ranks), layer.before, layer.after))
        if price < whole:
            options.append(Option(ranks, price, min(kept, 1.0)))
    return options


# -------------------------------------------------------------------------------------------------------- the new model


def _chain(layer: _Layer, ranks: Ranks) -> tuple[dict[str, Any], dict[str, Tensor], float]:
    """The edit that makes the chain, its tensors by their names in the net, and the share of the energy it keeps."""
    from torch import nn

    from kdctl.compress.factors.factorise import balanced, product

    factors = balanced(layer.form.factors(ranks))
    missed = product(factors) - layer.form.weight
    kept = 1 - float(missed.square().sum() / layer.form.weight.square().sum())
    module, spans = layer.module, layer.form.spans(ranks)
    assert isinstance(module, nn.Linear | nn.Conv2d)
    layers, tensors = [], {}
    for number, factor in enumerate(factors):
        last = number == len(factors) - 1
        bias = last and module.bias is not None
        if isinstance(module, nn.Linear):
            layers.append({"kind": "Linear", "in_features": factor.shape[1], "out_features": len(factor), "bias": bias})
            factor = factor[:, :, 0, 0]
        else:
            channels = module.in_channels if number == 0 else len(factors[number - 1])
            layers.append(_convolution(module, factor, channels, bias, [number == span for span in spans]))
        tensors[f"{layer.path}.{number}.weight"] = factor.to(module.weight.dtype)
    if module.bias is not None:
        tensors[f"{layer.path}.{len(factors) - 1}.bias"] = module.bias.detach()
    return {"edit": "replace", "path": layer.path, "layers": layers}, tensors, kept


def _convolution(module: nn.Conv2d, factor: Tensor, channels: int, bias: bool, moves: list[bool]) -> dict[str, Any]:
    """Arguments of a factor as a layer. moves: whether it is the one that goes along the height, along the width."""
    padding: Any = module.padding
    if not isinstance(padding, str):
        padding = [p if move else 0 for p, move in zip(padding, moves, strict=True)]
    return {
        "kind": "Conv2d",
        "in_channels": channels,
        "out_channels": len(factor),
        "kernel_size": list(factor.shape[2:]),
        "stride": [s if move else 1 for s, move in zip(module.stride, moves, strict=True)],
        "padding": padding,
        "dilation": [d if move else 1 for d, move in zip(module.dilation, moves, strict=True)],
        "groups": channels // factor.shape[1],
        "bias": bias,
        "padding_mode": module.padding_mode,
    }


def _describe(layer: _Layer, ranks: Ranks, kept: float, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "path": layer.path,
        "kind": layer.form.name,
        "ranks": list(ranks),
        "energy": round(kept, 6),
        "parameters_before": sum(p.numel() for p in layer.module.parameters()),
        "parameters_after": sum(t.numel() for t in tensors.values()),
    }


def _rebuilt(model: Model, edits: list[dict[str, Any]], tensors: dict[str, Tensor]) -> Model:
    """The model that the record with these edits builds, with the old weights and the new ones."""
    import torch

    from kdctl.models.record import build_model

    record = dataclasses.replace(model.record, structure=[*(model.record.structure or []), *edits])
    result = build_model(record, model.base)
    gone = tuple(f"{edit['path']}." for edit in edits)
    state = {name: value for name, value in model.net.state_dict().items() if not name.startswith(gone)}
    result.net.load_state_dict(state | tensors)
    reference = next(model.parameters())
    result = result.to(reference.device, reference.dtype).eval()
    with torch.no_grad():
        try:
            logits = result(_sample(model, reference))
        except (AttributeError, RuntimeError, TypeError) as error:
            hint = "its forward looks into a layer that became a chain: name that layer in `skip`"
            raise KdctlError(f"the factorised model does not run: {error}", hint=hint) from None
    if isinstance(logits, torch.Tensor) and not bool(torch.isfinite(logits).all()):
        raise KdctlError("the factorised model gives values that are not finite", hint="a larger share, or tucker")
    return result
