"""What a net computes for one image, as operators with their sizes: one forward pass, watched below the modules.

The walk sees what ONNX Runtime will execute after its fusions, not what PyTorch does: batch norms are part of the layer
before them, an activation behind a convolution or sum and a sum behind a convolution are part of that operator, views
are free. Pruned and low-rank nets and sums that are no modules need no special case.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kdctl.errors import KdctlError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True)
class Operator:
    """One operator of a net.

    kind `conv`: size (in, out, groups, kernel height, width, stride h, w, padding h, w, dilation h, w, input height,
    width). `gemm`: (rows, in, out), a matrix product with weights. `matmul`: (batch, rows, inner, columns), a product
    of two features. Any other kind, one that passes over its numbers: (numbers,).
    """

    kind: str
    size: tuple[int, ...]

    @property
    def key(self) -> str:
        """`conv 16-32-1-3-3-...`: its name in a file of times."""
        return f"{self.kind} {'-'.join(map(str, self.size))}"


def operators(model: nn.Module, image_shape: Sequence[int], block: int = 0) -> list[Operator]:
    """The operators of a model for one image (C, H, W), in order; the model is left as it is.

    block: how many channels ONNX Runtime's blocked layout holds together, 0 where it has none; where the layout has to
    change between two operators there is a `reorder`. Raises KdctlError for an operator that has no known cost.
    """
    copied = copy.deepcopy(model).cpu().float().eval()
    images = torch.zeros(1, *image_shape)
    walk = _Walk(images, block)
    with torch.no_grad(), walk:
        copied(images)
    return walk.found


@dataclass
class _Origin:
    """Where a feature comes from. layer: a convolution (or its batch norm) whose next sum or activation is fused with
    it; sum: a sum whose next activation is. blocked: it lies in the blocked layout."""

    layer: bool = False
    sum: bool = False
    blocked: bool = False


class _Walk(TorchDispatchMode):
    def __init__(self, images: Tensor, block: int) -> None:
        super().__init__()
        self.block = block
        self.found: list[Operator] = []
        self.origins: dict[int, _Origin] = {id(images): _Origin()}
        self.alive: list[Any] = [images]  # so that no id is given twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        flat = [*args, *(kwargs or {}).values()]
        given = [t for a in flat for t in (a if isinstance(a, list | tuple) else [a]) if self._is_feature(t)]
        if given:
            outputs = [t for t in (result if isinstance(result, list | tuple) else [result]) if isinstance(t, Tensor)]
            origin = self._account(name, given, args, outputs)
            for output in outputs:
                self.origins[id(output)] = origin
                self.alive.append(output)
        return result

    def _is_feature(self, value: Any) -> bool:
        """Whether it hangs on the image; what does not is a constant of the graph."""
        return isinstance(value, Tensor) and id(value) in self.origins

    def _account(self, name: str, given: list[Tensor], args: Any, outputs: list[Tensor]) -> _Origin:
        origin = self.origins[id(given[0])]
        if name == "convolution":
            return self._convolution(args, given[0])
        if name in _NORMS and origin.layer:
            return origin
        if name in _FUSED and (origin.layer or origin.sum):
            return _Origin(blocked=origin.blocked)
        if name in _FREE:
            return _Origin(blocked=origin.blocked and name not in _RESHAPES)
        if name in _PRODUCTS:
            self._reorder_out(given)
            self._product(name, args, outputs[0])
            return _Origin()
        if name == "add" and len(given) == 2 and any(self.origins[id(t)].layer for t in given):
            return _Origin(sum=True, blocked=origin.blocked)
        kind = _passes(name, args, given[0])
        if kind is None:
            raise KdctlError(
                f"the latency model does not know the operator {name}",
                hint="choose the structure by MACs or parameters, and measure it",
            )
        stays = kind in _BLOCKED or kind.startswith(("max_pool", "avg_pool"))
        if not stays:
            self._reorder_out(given)
        reads = kind in ("global_pool",)
        self.found.append(Operator(kind, (given[0].numel() if reads else outputs[0].numel(),)))
        return _Origin(blocked=stays and origin.blocked)

    def _convolution(self, args: Any, features: Tensor) -> _Origin:
        _, weight, _, stride, padding, dilation, transposed, _, groups = args
        if transposed or weight.ndim != 4:
            raise KdctlError("the latency model knows two-dimensional convolutions only, and none that is transposed")
        inputs, height, width = features.shape[1:]
        size = (inputs, weight.shape[0], groups, *weight.shape[2:], *stride, *padding, *dilation, height, width)
        layout = conv_layout(inputs, weight.shape[0], groups, self.block)
        before = self.origins[id(features)].blocked
        if before != (layout == "blocked"):
            self.found.append(Operator("reorder", (features.numel(),)))
        self.found.append(Operator("conv", tuple(int(n) for n in size)))
        return _Origin(layer=True, blocked=layout != "plain")

    def _product(self, name: str, args: Any, output: Tensor) -> None:
        tensors = [a for a in args if isinstance(a, Tensor)]
        left, right = tensors[-2:] if name in ("addmm", "baddbmm") else tensors[:2]
        inner = left.shape[-1]
        if name in _ATTENTION:
            heads, rows, columns = math.prod(left.shape[:-2]), left.shape[-2], right.shape[-2]
            self.found.append(Operator("matmul", (heads, rows, inner, columns)))
            self.found.append(Operator("softmax", (heads * rows * columns,)))
            self.found.append(Operator("matmul", (heads, rows, columns, inner)))
        elif self._is_feature(right):
            self.found.append(Operator("matmul", (math.prod(left.shape[:-2]), left.shape[-2], inner, right.shape[-1])))
        else:
            self.found.append(Operator("gemm", (output.numel() // output.shape[-1], inner, output.shape[-1])))

    def _reorder_out(self, given: list[Tensor]) -> None:
        for tensor in given:
            if self.origins[id(tensor)].blocked:
                self.found.append(Operator("reorder", (tensor.numel(),)))


def conv_layout(inputs: int, outputs: int, groups: int, block: int) -> str:
    """How ONNX Runtime computes a convolution: `blocked`, `thin` (reads plain, writes blocked) or `plain`.

    Source: core/optimizer/nchwc_transformer.cc of ONNX Runtime 1.2x: the blocked kernels want channels in fours, those
    of a group too; with fewer input channels than a block the plain image is read.
    """
    if not block or (groups > 1 and not (inputs == outputs == groups) and (inputs // groups) % block):
        return "plain"
    if groups == 1 and inputs < block:
        return "thin"
    return "plain" if inputs % 4 or (groups > 1 and outputs % 4) else "blocked"


# ---------------------------------------------------------------------------------------------- names of PyTorch's core

_NORMS = {"native_batch_norm", "_native_batch_norm_legit_no_training", "_batch_norm_no_update", "cudnn_batch_norm"}
_FUSED = {"relu", "hardtanh", "clamp", "clamp_min", "leaky_relu", "sigmoid", "tanh", "hardsigmoid"}
_RESHAPES = {"view", "_unsafe_view", "_reshape_alias", "squeeze", "unsqueeze", "expand", "reshape"}
_FREE = _RESHAPES | {
    "detach",
    "alias",
    "lift_fresh",
    "clone",
    "contiguous",
    "dropout",
    "t",
    "_to_copy",
    "copy",
    "empty_like",
}
_ATTENTION = {"_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math"}
_PRODUCTS = {"addmm", "mm", "bmm", "baddbmm"} | _ATTENTION
_BLOCKED = {"add", "relu", "sigmoid", "global_pool"}
_PASSES: Mapping[str, str] = {
    "add": "add", "mul": "mul", "sub": "mul", "div": "mul", "rsub": "mul",
    "relu": "relu", "hardtanh": "relu", "clamp": "relu", "clamp_min": "relu", "leaky_relu": "relu",
    "native_batch_norm": "mul", "_native_batch_norm_legit_no_training": "mul", "_batch_norm_no_update": "mul",
    "sigmoid": "sigmoid", "tanh": "sigmoid", "hardsigmoid": "relu", "hardswish": "sigmoid", "silu": "sigmoid",
    "gelu": "gelu", "native_layer_norm": "layer_norm", "_softmax": "softmax",
    "cat": "copy", "constant_pad_nd": "copy", "slice": "copy", "select": "copy", "split": "copy", "permute": "copy",
    "transpose": "copy", "split_with_sizes": "copy", "chunk": "copy", "unbind": "copy",
    "_adaptive_avg_pool2d": "global_pool",
}  # fmt: skip


def _passes(name: str, args: Any, features: Tensor) -> str | None:
    """The kind of an operator that passes over its numbers."""
    if name == "mean":
        return "global_pool"
    kernel: Callable[[], int] = lambda: max(args[1])  # noqa: E731
    if name == "max_pool2d_with_indices":
        return f"max_pool{kernel()}"
    if name == "avg_pool2d":
        return f"avg_pool{kernel()}"
    return _PASSES.get(name)
