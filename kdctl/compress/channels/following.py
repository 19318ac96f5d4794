"""Following the number of every channel through one forward pass.

Beside each tensor runs another of the same shape that holds the number of the channel that a value belongs to. What
only moves values (views, concatenations, shuffles, slices) moves the numbers alike; what combines values of two
channels one by one (residual sums, gates) ties them together; a convolution or linear layer ends its input's channels
and starts new ones. Tied channels can only be removed together: the dependencies of Fang et al., DepGraph: Towards Any
Structural Pruning, CVPR 2023, but of single channels and not of layers, so that zero padding, shuffles and
concatenations are exact. What is not understood ties its channels to number 0, which is never removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from kdctl.compress.channels.layout import NORMS, SLICED, Layer, Numbers

Rule = Callable[["Follower", str, tuple[Any, ...], dict[str, Any], Any], None]
"""(the follower, the function's name, its arguments, its result) -> nothing; puts the numbers of the result."""

_HEADS = ("heads", "num_heads", "num_attention_heads", "n_heads")
_HEAD_WIDTHS = ("head_dim", "attention_head_size", "head_size")


class Follower(TorchFunctionMode):
    """Runs with the forward pass and keeps the numbers of each tensor's channels.

    rule: what does for the numbers, by a function's name, what the function does for the tensors.
    """

    def __init__(self, net: nn.Module, rule: Callable[[str], Rule]) -> None:
        super().__init__()
        self._rule = rule
        self.layers: dict[str, Layer] = {}
        self.heads: list[tuple[str, str, Numbers]] = []
        self._paths = {id(m): path for path, m in net.named_modules()}
        self._owners: dict[int, nn.Module] = {}
        for module in net.modules():
            if isinstance(module, SLICED):
                self._owners[id(module.weight)] = module
            elif isinstance(module, NORMS) and module.running_mean is not None:
                self._owners[id(module.running_mean)] = module
        self._parent = [0]
        self._numbers: dict[int, tuple[Tensor, Tensor]] = {}
        self._stack: list[nn.Module] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keeps the stack of running modules: hooks for all modules at once, gone afterwards."""
        before = register_module_forward_pre_hook(lambda module, _: self._stack.append(module))
        after = register_module_forward_hook(lambda *_: self._pop(), always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _pop(self) -> None:
        self._stack.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if next(tensors(result), None) is not None:
            self._rule(name)(self, name, args, kwargs, result)
        return result

    # ------------------------------------------------------------------------------------------ numbers of tensors

    def of(self, tensor: Tensor) -> Tensor:
        """The numbers of a tensor, of its shape; zeros where nothing is known of it."""
        known = self._numbers.get(id(tensor))
        numbers = torch.zeros((), dtype=torch.int64).expand(tensor.shape) if known is None else known[1]
        return torch.from_numpy(self.roots(numbers.contiguous().numpy())) if known is not None else numbers

    def knows(self, tensor: Tensor) -> bool:
        return id(tensor) in self._numbers

    def put(self, tensor: Tensor, numbers: Tensor) -> None:
        self._numbers[id(tensor)] = (tensor, numbers.expand(tensor.shape))

    def new(self, count: int) -> Numbers:
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return np.arange(first, first + count)

    def roots(self, numbers: Numbers) -> Numbers:
        """What stands for each number: the least of those that it is tied to."""
        parent = np.asarray(self._parent)
        while not np.array_equal(higher := parent[parent], parent):
            parent = higher
        self._parent = parent.tolist()
        return parent[numbers]

    def tie(self, first: Tensor, second: Tensor) -> None:
        """Ties the numbers of two tensors of one shape, place by place."""
        size = len(self._parent)
        keys = (first.to(torch.int64) * size + second).reshape(-1).unique()
        for key in keys.tolist():
            a, b = self._root(key // size), self._root(key % size)
            self._parent[max(a, b)] = min(a, b)

    def _root(self, number: int) -> int:
        while self._parent[number] != number:
            number = self._parent[number]
        return number

    def freeze(self, numbers: Tensor) -> None:
        self.tie(numbers, torch.zeros((), dtype=torch.int64).expand(numbers.shape))

    def meet(self, tensors: list[Tensor]) -> Tensor:
        """Ties numbers of tensors that are combined element by element; the numbers of the result."""
        shape = torch.broadcast_shapes(*(t.shape for t in tensors))
        aligned = [t.reshape((1,) * (len(shape) - t.dim()) + tuple(t.shape)) for t in tensors]
        result = aligned[0]
        for numbers in aligned[1:]:
            if repeats(numbers, result):
                continue
            if repeats(result, numbers):
                result = numbers
                continue
            result, numbers = result.expand(shape), numbers.expand(shape)
            differing = {*varying(result), *varying(numbers)}
            first, second = result, numbers
            for d in set(range(len(shape))) - differing:
                first, second = first.narrow(d, 0, 1), second.narrow(d, 0, 1)
            self.tie(first, second)
            result = torch.from_numpy(self.roots(result.contiguous().numpy()))
        return result

    # ------------------------------------------------------------------------------------------------------ layers

    def add_layer(self, module: nn.Module, inputs: Numbers | None, outputs: Numbers, positions: int = 0) -> Layer:
        """Records a layer; a second call of one ties its channels to those of the first."""
        path = self._paths[id(module)]
        known = self.layers.get(path)
        if known is None:
            self.layers[path] = Layer(path, module, inputs, outputs, positions)
            return self.layers[path]
        self.tie(torch.from_numpy(known.outputs), torch.from_numpy(outputs))
        if known.inputs is not None and inputs is not None:
            self.tie(torch.from_numpy(known.inputs), torch.from_numpy(inputs))
        known.positions += positions
        return known

    def owner(self, tensor: Any) -> nn.Module | None:
        return self._owners.get(id(tensor))

    def running(self) -> nn.Module | None:
        return self._stack[-1] if self._stack else None

    def head(self, sizes: dict[int, int]) -> int | None:
        """Of dimensions {dimension: size} that a width was split into: the one that counts the heads of attention."""
        module = self.running()
        for dim in sizes if module is not None else ():
            names = [n for n in _HEADS if isinstance(getattr(module, n, None), int)]
            if any(getattr(module, n) == sizes[dim] for n in names):
                return dim
            behind = [sizes[d] for d in sizes if d > dim]
            if behind and any(getattr(module, n, None) == behind[-1] for n in _HEAD_WIDTHS):
                return dim
        return None

    def note_heads(self, numbers: Tensor, dim: int) -> None:
        module = self.running()
        for name in _HEADS if module is not None else ():
            if module is not None and module.__dict__.get(name) == numbers.shape[dim]:
                index = [slice(None) if d == dim else 0 for d in range(numbers.dim())]
                self.heads.append((self._paths[id(module)], name, numbers[tuple(index)].numpy().copy()))


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def varying(numbers: Tensor) -> list[int]:
    """The dimensions along which the numbers differ."""
    return [
        d for d in range(numbers.dim()) if numbers.shape[d] > 1 and bool((numbers != numbers.narrow(d, 0, 1)).any())
    ]


def repeats(small: Tensor, large: Tensor) -> bool:
    """Whether `small` has no channels, and is one value wide wherever the other's numbers differ."""
    if small.any():
        return False
    shift = large.dim() - small.dim()
    return all(d < shift or small.shape[d - shift] == 1 for d in varying(large))
