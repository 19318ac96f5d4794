"""How alike the representations of two nets are, layer by layer: centred kernel alignment.

Linear CKA (Kornblith et al., "Similarity of neural network representations revisited", ICML 2019) of all samples at
once, with the unbiased estimator of HSIC (Song et al., "Feature selection via dependence maximization", JMLR 2012,
eq. 5): the plain one is near 1 for any two layers with more features than samples. A feature is flattened whole, of
texts, which differ in length, it is the mean over the tokens; what is kept of a layer is its Gram matrix (N, N), so its
size does not matter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdctl.analysis.samples import some_of
from kdctl.data.base import Split
from kdctl.data.loader import clean_batches
from kdctl.errors import ConfigError, counted
from kdctl.models.record import Model
from kdctl.taps import Taps

MOST_TAPS = 8
_FEW_TAPS = 4
FEATURE_BYTES = 1 << 29
"""What the features of the layers that are recorded at once may take."""
_LEAST = 4
"""The estimator divides by N - 3."""
_BATCH = 128


def layer_similarity(
    student: Model, teacher: Model, samples: Split, budget: int = FEATURE_BYTES
) -> tuple[list[str], list[str], list[list[float]], int]:
    """The taps of student and teacher, their linear CKA (S, T) in [0, 1], and how many samples it was taken of.

    budget: bytes of features that are held at once. The nets run more than once where all layers would take more; and
    fewer samples are taken where a single layer would. Raises ConfigError with fewer than four samples, or where no
    layer gives a tensor.
    """
    nets = (student.eval(), teacher.eval())
    taps = [choose_taps(net, samples) for net in nets]
    sizes = [feature_bytes(net, own, samples) for net, own in zip(nets, taps, strict=True)]
    if not all(taps):
        raise ConfigError("layers cannot be compared: no layer of a net gives a tensor with a row a sample")
    rows = some_of(samples, budget // max(max(own) for own in sizes))  # fewer samples: each class in its proportion
    count = len(rows)
    if count < _LEAST:
        raise ConfigError(f"layers cannot be compared with {counted(count, 'sample')}: it takes {_LEAST}")
    centred = [
        [gram for group in grouped(own, size, budget // count) for gram in _centred_grams(net, group, rows)]
        for net, own, size in zip(nets, taps, sizes, strict=True)
    ]
    matrix = [[alignment(one, other) for other in centred[1]] for one in centred[0]]
    return taps[0], taps[1], matrix, count


# ----------------------------------------------------------------------------------------------------------------- taps


def choose_taps(model: Model, samples: Split) -> list[str]:
    """At most eight places of a net that stand for its depth.

    The net is taken apart into its modules; containers (nn.Sequential, nn.ModuleList) that hold blocks are taken apart
    in turn, and while there are fewer than four places the module with the most layers is. Of these, blocks (which have
    modules of their own) are taken where there are two or more, else all layers with a matrix or kernel; and the last
    of all, which gives the logits as a rule. Of a module that gives a tuple the first item is taken. What is not
    called, or gives no tensor with a row a sample, is left out; of more than eight, eight are taken at even distances,
    first and last among them.
    """
    parts = _children("", model.net)
    while len(_places(parts)) < _FEW_TAPS:
        number = max(range(len(parts)), key=lambda n: _num_layers(parts[n][1]), default=None)
        if number is None or _num_layers(parts[number][1]) < 2:
            break
        parts[number : number + 1] = _children(*parts[number]) or [(parts[number][0], nn.Identity())]
    images = next(iter(clean_batches(samples, batch_size=2, device=torch.device("cpu")))).inputs
    return _spread([tap for path in _places(parts) if (tap := _tap_of(model, path, images)) is not None])


def _children(path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules in a module by path, in the order of definition, those of containers that hold blocks for these."""
    found: list[tuple[str, nn.Module]] = []
    for name, child in module.named_children():
        place = f"{path}.{name}" if path else name
        found += _children(place, child) if _holds_blocks(child) else [(place, child)]
    return found


def _holds_blocks(module: nn.Module) -> bool:
    """Whether a module is a container with blocks in it, or nothing but a list of them, as encoders of texts are."""
    inside = list(module.children())
    if len(inside) == 1 and isinstance(inside[0], nn.ModuleList):
        return _holds_blocks(inside[0])
    return isinstance(module, nn.Sequential | nn.ModuleList) and any(map(_has_children, inside))


def _places(parts: Sequence[tuple[str, nn.Module]]) -> list[str]:
    """The blocks among the parts, or where there are not two of them all layers; and the last part."""
    layers = [(path, part) for path, part in parts if _num_layers(part)]
    blocks = [path for path, part in layers if _has_children(part)]
    return [path for path, _ in layers if len(blocks) < 2 or path in blocks or path == layers[-1][0]]


def _num_layers(module: nn.Module) -> int:
    """How many matrices and kernels there are in a module."""
    return sum(p.ndim > 1 for p in module.parameters())


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


@torch.no_grad()
def _tap_of(model: Model, path: str, images: Tensor) -> str | None:
    """The tap of what a module gives, or of the first item of it; None where that is no tensor with a row a sample."""
    for tap in (path, f"{path}#1.0"):
        with Taps(model.net, [tap]) as taps, contextlib.suppress(ConfigError):
            with taps.recording() as features:
                model(images)
            feature = features[tap]
            if feature.ndim > 1 and len(feature) == len(images) and feature.is_floating_point():
                return tap
    return None


def _spread(paths: Sequence[str]) -> list[str]:
    if len(paths) <= MOST_TAPS:
        return list(paths)
    return [paths[round(i * (len(paths) - 1) / (MOST_TAPS - 1))] for i in range(MOST_TAPS)]


# ------------------------------------------------------------------------------------------------------------- features


@torch.no_grad()
def feature_bytes(model: Model, paths: Sequence[str], samples: Split) -> list[int]:
    """Bytes of one sample's feature at each tap, in fp32."""
    images = next(iter(clean_batches(samples, batch_size=2, device=torch.device("cpu")))).inputs
    with Taps(model.net, paths) as taps, taps.recording() as features:
        model(images)
    return [4 * _rows(model, features[path], images)[0].numel() for path in paths]


def _rows(model: Model, feature: Tensor, inputs: Tensor) -> Tensor:
    """A feature as rows (N, D), in fp32; of tokens (N, L, D) the mean over those that are no padding."""
    tokens, feature = model.record.tokens, feature.float()
    if tokens is not None and feature.ndim == 3 and feature.shape[:2] == inputs.shape:
        there = tokens.is_text(inputs)[:, :, None].float()
        return (feature * there).sum(1) / there.sum(1).clamp_min(1)
    return feature.flatten(1)


def grouped(paths: Sequence[str], sizes: Sequence[int], budget: int) -> list[list[str]]:
    """The taps in order, cut into as few groups as hold to the budget of bytes a sample."""
    groups: list[list[str]] = []
    used = budget
    for path, size in zip(paths, sizes, strict=True):
        if used + size > budget:
            groups.append([])
            used = 0
        groups[-1].append(path)
        used += size
    return groups


@torch.no_grad()
def _centred_grams(model: Model, paths: Sequence[str], samples: Split) -> list[Tensor]:
    """The U-centred Gram matrix (N, N) of the features at each tap."""
    found: dict[str, list[Tensor]] = {path: [] for path in paths}
    with Taps(model.net, paths) as taps:
        for batch in clean_batches(samples, batch_size=_BATCH, device=torch.device("cpu")):
            with taps.recording() as features:
                model(batch.inputs)
            for path in paths:
                found[path].append(_rows(model, features[path], batch.inputs).clone())
    return [u_centred(gram(torch.cat(found.pop(path)))) for path in paths]


def gram(features: Tensor) -> Tensor:
    """Inner products (N, N) of features (N, D) from which their mean is taken, which keeps the digits that count."""
    features = features - features.mean(0)
    return features @ features.T


def u_centred(matrix: Tensor) -> Tensor:
    """A Gram matrix (N, N), N above 3, so centred that the mean product of two such is the unbiased HSIC.

    The diagonal is left out and every row adds up to 0 (Szekely and Rizzo, "Partial distance correlation with methods
    for dissimilarities", 2014, definition 2); inner products of such matrices are those of Song et al., eq. 5.
    """
    n = len(matrix)
    matrix = matrix.to(torch.float64, copy=True)
    matrix.fill_diagonal_(0)
    rows = matrix.sum(1)
    centred = matrix - rows[:, None] / (n - 2) - rows / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    return centred.fill_diagonal_(0).float()


def alignment(one: Tensor, other: Tensor) -> float:
    """Linear CKA of two U-centred Gram matrices, 0 where the estimate is below or one of them is all zero."""
    products = [(a.flatten() @ b.flatten()).item() for a, b in ((one, other), (one, one), (other, other))]
    scale = (products[1] * products[2]) ** 0.5
    return min(max(products[0] / scale, 0.0), 1.0) if scale > 0 else 0.0
