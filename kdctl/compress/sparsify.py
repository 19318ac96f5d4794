"""Unstructured and N:M sparsity in one shot: weights become zero, shapes stay."""

from __future__ import annotations

import copy
import gzip
from typing import Any, Literal

import torch
from torch import Tensor

from kdctl.compress.base import Reshape, Reshaped, Workbench
from kdctl.config.types import Fraction
from kdctl.methods import masks
from kdctl.models.record import Model

NOTE = (
    "dense kernels multiply by zeros too: nothing is faster without a runtime for sparse weights, "
    "and the file is smaller only packed"
)


class Sparsify(Reshape):
    """Sets the smallest weights to zero, at once; `method: {kind: sparse}` does it while it trains and keeps them so.

    Han et al., Learning Both Weights and Connections for Efficient Neural Networks, NeurIPS 2015. N:M: Mishra et al.,
    Accelerating Sparse Deep Neural Networks, 2021.
    sparsity: the share that becomes zero. pattern: `any`, or N:M, which sets its own sparsity: of every M neighbours
    along the input the N largest stay. scope: whether the smallest of all layers together go, or of each alike. skip:
    patterns of layers that stay dense. A later stage that trains fills the zeros again, unless its method is `sparse`.
    """

    def __init__(
        self,
        *,
        sparsity: Fraction = 0.5,
        pattern: Literal["any", "2:4", "4:8", "1:4"] = "any",
        scope: Literal["global", "layer"] = "global",
        skip: list[str] | None = None,
    ) -> None:
        self.sparsity, self.pattern, self.scope, self.skip = sparsity, pattern, scope, skip or []

    def check(self, model: Model) -> None:
        masks.weights(model.net, self.skip, self.pattern)

    def reshape(self, model: Model, bench: Workbench) -> Reshaped:
        """The sparse model. Raises ConfigError for a pattern in skip that names no layer, KdctlError where no layer can
        have the zeros."""
        result = copy.deepcopy(model).cpu().float().eval()
        chosen = masks.weights(result.net, self.skip, self.pattern)
        sparsity = self.sparsity if self.pattern == "any" else 1.0
        for path, mask in masks.magnitude(chosen, sparsity, self.pattern, self.scope).items():
            with torch.no_grad():
                chosen[path].mul_(mask)
        bench.say(f"sparsify: {NOTE}")
        return Reshaped(result, {"pattern": self.pattern, **zeros(result, list(chosen)), "note": NOTE})


def zeros(model: Model, layers: list[str]) -> dict[str, Any]:
    """How sparse the weights of some layers are, and what that is worth.

    sparsity: the share of zeros in all parameters; layers: in each layer's weight. bytes, gzip_bytes: of all parameters
    in fp32, as they are and packed.
    """
    parameters = [p.detach() for p in model.net.parameters()]
    data = b"".join(p.numpy().tobytes() for p in parameters)

    def share(tensors: list[Tensor]) -> float:
        return round(sum(int((t == 0).sum()) for t in tensors) / sum(t.numel() for t in tensors), 6)

    each: dict[str, Any] = {path: model.net.get_submodule(path).weight for path in layers}
    return {
        "sparsity": share(parameters),
        "layers": {path: share([weight]) for path, weight in each.items()},
        "bytes": len(data),
        "gzip_bytes": len(gzip.compress(data, 6, mtime=0)),
    }
