"""What torch's functions do with the channels of tensors: one rule for each kind of function, and `follow`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdctl.compress.channels.following import Follower, Rule, tensors, varying
from kdctl.compress.channels.layout import Channels, Numbers
from kdctl.models.record import Model
from kdctl.models.resnet_cifar import PadShortcut


@torch.no_grad()
def follow(model: Model) -> Channels:
    """The channels of the layers of a model's net, from one forward pass in eval mode."""
    images = torch.full((1, *model.record.image_shape), 0.5)
    follower = Follower(model.net, lambda name: _RULES.get(name, _unknown))
    with follower.watching(), follower:
        outputs = model(images)
    for tensor in tensors(outputs):
        follower.freeze(follower.of(tensor))
    for layer in follower.layers.values():
        layer.outputs = follower.roots(layer.outputs)
        layer.inputs = None if layer.inputs is None else follower.roots(layer.inputs)
    heads = [(path, name, follower.roots(numbers)) for path, name, numbers in follower.heads]
    return Channels(list(follower.layers.values()), heads)


def _unknown(f: Follower, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    for tensor in tensors([list(args), kwargs]):
        if f.knows(tensor):
            f.freeze(f.of(tensor))


def _elementwise(f: Follower, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    given = [t for t in tensors([list(args), kwargs]) if t.numel() > 1 or f.knows(t)]
    if any(f.knows(t) for t in given):
        f.put(result, f.meet([f.of(t) for t in given]))


def _move(f: Follower, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """Values change places only: the numbers take the same way."""
    if not f.knows(args[0]):
        return
    before = f.of(args[0])
    moved = getattr(torch.Tensor, name)(before, *args[1:], **kwargs)
    outcomes = list(tensors(moved))
    if len(outcomes) == 1:
        lost = set(before.unique().tolist()) - set(outcomes[0].unique().tolist())
        if lost:
            f.freeze(before)
        outcomes = [_split(f, before, outcomes[0])]
    elif _differ(outcomes):  # equal parts stay equal where the same places of each are removed
        if len({part.shape for part in outcomes}) == 1:
            for part in outcomes[1:]:
                f.tie(outcomes[0], part)
        else:
            f.freeze(before)
    for tensor, numbers in zip(tensors(result), outcomes, strict=True):
        f.put(tensor, numbers)


def _differ(parts: list[Tensor]) -> bool:
    first = set(parts[0].unique().tolist())
    return any(set(part.unique().tolist()) != first for part in parts[1:])


def _split(f: Follower, before: Tensor, after: Tensor) -> Tensor:
    """Ties what must go together where a width was split into several dimensions, of which one can shrink.

    That is the heads, where the running module is an attention, and else the last: groups of a shuffle stay as many.
    """
    dims = varying(after)
    if len(dims) <= max(1, len(varying(before))):
        return after
    head = f.head({d: after.shape[d] for d in dims})
    kept = dims[-1] if head is None else head
    for dim in dims:
        if dim != kept:
            f.tie(after, after.narrow(dim, 0, 1).expand(after.shape))
    tied = torch.from_numpy(f.roots(after.contiguous().numpy()))
    if head is not None:
        f.note_heads(tied, head)
    return tied


def _dim(args: tuple[Any, ...], kwargs: dict[str, Any], default: Any) -> Any:
    """The dimension of a call, which torch takes as `axis` too."""
    return kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else default))


def _cat(f: Follower, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    given = list(args[0] if args else kwargs["tensors"])
    if not any(f.knows(t) for t in given):
        return
    dim = _dim(args, kwargs, 0)
    numbers = [f.of(t) for t in given]
    joined = torch.cat(numbers, dim)
    along = dim % joined.dim()
    if any(along != d for part in numbers for d in varying(part)):  # beside each other along something else
        for part in numbers:
            f.freeze(part)
    f.put(result, joined)


def _pad(f: Follower, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    before, padding = f.of(args[0]), list(kwargs.get("pad", args[1] if len(args) > 1 else ()))
    if not f.knows(args[0]):
        return
    if before.dim() != 4 or any(d > 1 for d in varying(before)):
        return _unknown(f, name, args, kwargs, result)
    numbers = before[:, :, :1, :1]
    low, high = padding[4:6] if len(padding) >= 6 else (0, 0)
    if low < 0 or high < 0:
        return _unknown(f, name, args, kwargs, result)
    sides = [torch.zeros(low, dtype=torch.int64), torch.zeros(high, dtype=torch.int64)]
    module = f.running()
    if type(module) is PadShortcut:
        sides = [torch.from_numpy(f.new(low)), torch.from_numpy(f.new(high))]
    channels = torch.cat([sides[0], numbers[0, :, 0, 0], sides[1]])
    if type(module) is PadShortcut:
        f.add_layer(module, None, channels.numpy()).pad = (low, high)
    f.put(result, channels[None, :, None, None])
    return None


def _spatial(f: Follower, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """What works within each channel and changes its sides: pooling, interpolation."""
    tensor = args[0] if args else kwargs["input"]
    if not f.knows(tensor) or not isinstance(result, Tensor):
        return _unknown(f, name, args, kwargs, result)
    numbers = f.of(tensor)
    inside = 2 if numbers.dim() >= 4 else numbers.dim() - 1
    if any(d >= inside for d in varying(numbers)) or numbers.dim() != result.dim():
        return _unknown(f, name, args, kwargs, result)
    for d in range(inside, numbers.dim()):
        numbers = numbers.narrow(d, 0, 1)
    f.put(result, numbers)
    return None


def _reduce(f: Follower, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    tensor = args[0] if args else kwargs["input"]
    given = _dim(args, kwargs, None)
    if not f.knows(tensor) or not isinstance(result, Tensor):
        return _unknown(f, name, args, kwargs, result)
    dims = range(tensor.dim()) if given is None else [given] if isinstance(given, int) else list(given)
    reduced = {d % tensor.dim() for d in dims}
    numbers = f.of(tensor)
    if reduced & set(varying(numbers)):
        return f.freeze(numbers)
    for d in reduced:
        numbers = numbers.narrow(d, 0, 1)
    f.put(result, numbers.reshape(result.shape) if result.dim() < tensor.dim() else numbers)
    return None


def _along(f: Follower, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """What compares the values along one dimension: softmax."""
    tensor = args[0] if args else kwargs["input"]
    dim = _dim(args, kwargs, None)
    if not f.knows(tensor):
        return
    numbers = f.of(tensor)
    if dim is None or dim % tensor.dim() in varying(numbers):
        f.freeze(numbers)
    f.put(result, numbers)


def _layer_norm(f: Follower, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    numbers, shape = f.of(args[0]), kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())
    if any(d >= numbers.dim() - len(shape) for d in varying(numbers)):
        f.freeze(numbers)
    if f.knows(args[0]):
        f.put(result, numbers)


def _columns(numbers: Tensor, dim: int) -> Numbers | None:
    """The numbers along a dimension, None where they differ along another."""
    if any(d != dim for d in varying(numbers)):
        return None
    index = tuple(slice(None) if d == dim else 0 for d in range(numbers.dim()))
    return numbers[index].contiguous().numpy().copy()


def _weighted(f: Follower, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """Convolutions and linear layers."""
    tensor = args[0] if args else kwargs["input"]
    module = f.owner(kwargs.get("weight", args[1] if len(args) > 1 else None))
    dim = tensor.dim() - 1 if name == "linear" else 1
    numbers = f.of(tensor)
    inputs = _columns(numbers, dim)
    if module is None or inputs is None or tensor.dim() < (1 if name == "linear" else 3):
        f.freeze(numbers)
        inputs = np.zeros(tensor.shape[dim], np.int64)
    if module is None:
        return
    count = result.shape[dim]
    positions = result.numel() // count
    groups = int(getattr(module, "groups", 1))
    outputs = f.new(count)
    if groups > 1 and groups == len(inputs):
        f.tie(torch.from_numpy(inputs.repeat(count // groups)), torch.from_numpy(outputs))
        f.add_layer(module, None, outputs, positions)
    else:
        if groups > 1:  # as many groups as before, and each of one size
            for side in (torch.from_numpy(inputs), torch.from_numpy(outputs)):
                by_group = side.view(groups, -1)
                f.tie(by_group, by_group[:1].expand(by_group.shape))
        f.add_layer(module, inputs, outputs, positions)
    shape = [1] * result.dim()
    shape[dim] = count
    f.put(result, torch.from_numpy(outputs).view(shape))


def _batch_norm(f: Follower, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    module, numbers = f.owner(kwargs.get("running_mean", args[1] if len(args) > 1 else None)), f.of(args[0])
    channels = _columns(numbers, 1)
    if module is None or channels is None:
        f.freeze(numbers)
    elif f.knows(args[0]):
        f.add_layer(module, None, channels)
    f.put(result, numbers)


def _matmul(f: Follower, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    first, second = args[:2]
    if f.knows(first) or f.knows(second):
        f.put(result, _product(f, f.of(first), f.of(second), result.shape))


def _product(f: Follower, a: Tensor, b: Tensor, shape: Any) -> Tensor:
    """The numbers of a product (..., m, k) @ (..., k, n): what is summed over, and what it is repeated for (the heads),
    has to agree; m and n keep theirs."""
    nothing = torch.zeros((), dtype=torch.int64).expand(shape)
    if min(a.dim(), b.dim()) < 2:
        f.freeze(a)
        f.freeze(b)
        return nothing
    rows, cols = a.dim() - 2, b.dim() - 1
    outer_a, outer_b = rows in varying(a), cols in varying(b)
    inner = any(d != rows for d in varying(a)) or any(d != cols for d in varying(b))
    if not inner and not (outer_a and outer_b):
        return (a[..., :, :1] if outer_a else b[..., :1, :]).expand(shape)
    if outer_a or outer_b:
        f.freeze(a)
        f.freeze(b)
        return nothing
    met = f.meet([a[..., 0, :], b[..., :, 0]])
    along = varying(met)
    if met.dim() - 1 not in along:
        return met[..., :1, None].expand(shape)
    if len(along) > 1:
        f.freeze(met)
    return nothing


def _attention(f: Follower, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    query, key = f.of(args[0]), f.of(args[1])
    if kwargs.get("enable_gqa") or len(args) > 6 or query.dim() - 1 in varying(query):
        return _unknown(f, name, args, kwargs, result)
    scores = _product(f, query, key.transpose(-2, -1), (*query.shape[:-1], key.shape[-2]))
    f.put(result, _product(f, torch.from_numpy(f.roots(scores.contiguous().numpy())), f.of(args[2]), result.shape))
    return None


_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        "relu relu_ relu6 relu6_ hardtanh hardtanh_ gelu silu silu_ sigmoid sigmoid_ tanh tanh_ hardswish hardswish_ "
        "hardsigmoid hardsigmoid_ leaky_relu leaky_relu_ elu elu_ selu celu mish softplus exp log sqrt rsqrt pow "
        "__pow__ abs neg clamp clamp_ clip dropout dropout_ dropout1d dropout2d dropout3d alpha_dropout "
        "feature_dropout contiguous clone detach float double to type type_as add add_ sub sub_ mul mul_ div div_ "
        "true_divide __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ "
        "__rtruediv__ __itruediv__ rsub maximum minimum".split(),
        _elementwise,
    ),
    **dict.fromkeys(
        "view reshape flatten unflatten transpose permute swapaxes swapdims movedim t chunk split tensor_split unbind "
        "narrow select squeeze unsqueeze expand __getitem__ flip".split(),
        _move,
    ),
    **dict.fromkeys(
        "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
        "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d interpolate".split(),
        _spatial,
    ),
    **dict.fromkeys(["cat", "concat", "concatenate"], _cat),
    **dict.fromkeys(["mean", "sum", "amax", "amin"], _reduce),
    **dict.fromkeys(["softmax", "log_softmax"], _along),
    **dict.fromkeys(["conv1d", "conv2d", "conv3d", "linear"], _weighted),
    **dict.fromkeys(["matmul", "bmm", "__matmul__"], _matmul),
    "pad": _pad, "layer_norm": _layer_norm, "batch_norm": _batch_norm, "scaled_dot_product_attention": _attention,
}  # fmt: skip
"""By the function's name. Of an unknown one the channels stay; so do those of a tensor that its result meets."""
