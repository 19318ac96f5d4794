"""Pruning of transformers: whole heads of attention and units of the feed-forward layers go."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from kdctl.bench import cost as measured
from kdctl.compress.base import Reshape, Reshaped, Workbench
from kdctl.compress.channels.importance import micro_batches
from kdctl.config.types import Fraction, NonNegative, PositiveInt
from kdctl.errors import ConfigError, KdctlError, Problem
from kdctl.models.record import Model, build_model
from kdctl.models.structure import Edit
from kdctl.signals import Batch, Signals, find_logits
from kdctl.taps import Taps

Scores = NDArray[np.float64]
Scope = Literal["global", "uniform"]

_ATTENTION = (
    (("query", "key", "value"), "..output.dense"),
    (("query", "key", "value"), ".output"),
    (("q", "k", "v"), ".proj"),
    (("q_lin", "k_lin", "v_lin"), ".out_lin"),
)
"""Names of what makes queries, keys and values, and of what mixes the heads: a path from the module, or its parent."""
_FEED_FORWARD = (("intermediate.dense", "output.dense"), ("widen", "narrow"), ("fc1", "fc2"), ("lin1", "lin2"))
"""Names of the layer that makes the hidden units, and of the one that takes them."""
_COUNTS = ("heads", "num_attention_heads", "n_heads")
_HEAD_WIDTHS = ("head_dim", "attention_head_size")
_WHOLE_WIDTHS = ("all_head_size",)

TOLERANCE = 1e-6
"""Of the largest output, in float64: how far the pruned model may be from the one whose heads and units are zero."""


@dataclass(frozen=True)
class Part:
    """What can lose pieces: an attention its heads, a feed-forward layer its units.

    path: the module in the net. makers: paths of the linear layers whose outputs are the pieces, one after the other.
    taker: of the one that takes them. count: pieces; width: numbers in a piece.
    """

    path: str
    makers: tuple[str, ...]
    taker: str
    count: int
    width: int

    def places(self, pieces: Sequence[int]) -> Tensor:
        """The numbers of these pieces among the makers' outputs, int64."""
        return (torch.tensor(pieces)[:, None] * self.width + torch.arange(self.width)).flatten()


class PruneHeads(Reshape):
    """Removes attention heads and feed-forward units of a transformer, those that matter least.

    The layers become narrower; a head keeps its size, so attention is scaled as before. What comes out equals the net
    with the outputs of those heads and units set to zero. At least one head stays in each layer. For `bert`, `gpt`,
    `tiny_transformer`, and of the transformers library BERT and its kin (RoBERTa, ELECTRA, ...) and DistilBERT.
    Papers: Michel, Levy & Neubig, Are Sixteen Heads Really Better than One?, NeurIPS 2019; without labels: Theis et
        al., Faster Gaze Prediction With Dense Networks and Fisher Pruning, 2018.
    Formula: taylor: I = E_x |dL/dg| of a gate g = 1 on the output of a head or unit, divided by the layer's L2 norm of
        I, with the task's own loss L. Of a sample without a label L is that of one drawn from the model's own
        probabilities: the curvature, along g, of the KL divergence from the unpruned model.
    Published: Michel et al. take 20 to 40 % of the heads of BERT and of a translation model without a visible loss.

    heads: below 1 the share of all heads that goes, else their number. units: the share of all feed-forward units.
    importance: `taylor`, or `magnitude`, the norms of the weights that make and take a head or unit, each divided by
    its mean over the layer, summed. scope: `global` ranks those of all layers together, `uniform` takes the same share
    of each. round_to: what the units that stay in a layer are a multiple of. samples: training samples of taylor.
    """

    smoke = {"samples": 8}

    def __init__(
        self,
        *,
        heads: NonNegative = 0.25,
        units: Fraction = 0.25,
        importance: Literal["taylor", "magnitude"] = "taylor",
        scope: Literal["global", "uniform"] = "global",
        round_to: PositiveInt = 8,
        samples: PositiveInt = 512,
    ) -> None:
        if heads >= 1 and heads != int(heads):
            message = f"{heads:g} heads: allowed are a share below 1 or a whole number"
            raise ConfigError(Problem(message, key="heads", hint="heads: 0.5, or heads: 12"))
        if heads == 0 and units == 0:
            message = "heads and units are both 0: nothing would be removed"
            raise ConfigError(Problem(message, key="heads", hint="heads: 0.5, or leave prune_heads out"))
        self.heads, self.units, self.importance, self.scope = heads, units, importance, scope
        self.round_to, self.samples = round_to, samples

    def check(self, model: Model) -> None:
        self._wanted(model)

    def reshape(self, model: Model, bench: Workbench) -> Reshaped:
        """The narrower model. Raises ConfigError where it has no such layers or fewer heads or units than are to go,
        KdctlError where there is nothing to find their importance with or the result does not compute what it should.
        """
        model = copy.deepcopy(model).cpu().float().eval()
        attention, forward, heads, units = self._wanted(model)
        for share, count, what in ((self.heads, heads, "heads"), (self.units, units, "feed-forward units")):
            if share and not count:
                bench.say(f"prune_heads: {share:g} of the {what} rounds to none: all of them stay")
        parts = [*(attention if heads else []), *(forward if units else [])]
        scores = dict(zip(parts, self._scores(model, parts, bench), strict=True))
        gone: dict[Part, list[int]] = {}
        for own, count, lot in ((attention, heads, 1), (forward, units, self.round_to)):
            if count:
                chosen = least_important([scores[part] for part in own], count, lot, self.scope)
                gone |= dict(zip(own, chosen, strict=True))
        result = without(model, gone)
        details = {
            "importance": self.importance,
            "scope": self.scope,
            "heads": {part.path: [part.count, part.count - len(gone.get(part, []))] for part in attention},
            "units": {part.path: [part.count, part.count - len(gone.get(part, []))] for part in forward},
            "removed_heads": {part.path: gone[part] for part in attention if gone.get(part)},
            "head_scores": {part.path: scores[part].round(6).tolist() for part in attention if part in scores},
            "macs": [measured.macs(m) for m in (model, result)],
            "parameters": [measured.parameters(m) for m in (model, result)],
        }
        return Reshaped(result, details)

    def _wanted(self, model: Model) -> tuple[list[Part], list[Part], int, int]:
        """The layers of attention, the feed-forward ones, and how many heads and units of them are to go."""
        attention, forward = attentions(model.net), feed_forwards(model.net)
        for key, found, what in (("heads", attention, "attention"), ("units", forward, "feed-forward layer")):
            if getattr(self, key) and not found:
                message = f"the model ({model.record.kind}) has no {what} that prune_heads knows"
                hint = "it is for transformers, before low_rank; `prune` makes other nets narrower"
                raise ConfigError(Problem(message, key=key, hint=hint))
        return attention, forward, *self._counts(attention, forward)

    def _counts(self, attention: list[Part], forward: list[Part]) -> tuple[int, int]:
        """How many heads and units are to go. Raises ConfigError for more than can."""
        all_heads, all_units = (sum(part.count for part in parts) for parts in (attention, forward))
        heads = int(self.heads) if self.heads >= 1 else round(self.heads * all_heads)
        most = all_heads - len(attention)
        if heads > most:
            message = f"{heads} heads are to go; of the {all_heads} in {len(attention)} layers at most {most} can"
            raise ConfigError(
                Problem(message, key="heads", hint="each layer keeps one; drop_layers takes whole layers")
            )
        units = round(self.units * all_units)
        most = all_units - sum(min(self.round_to, part.count) for part in forward)
        if units > most:
            message = f"{units} feed-forward units are to go; of {all_units} at most {most} can"
            hint = f"each layer keeps round_to units: a smaller share or round_to (now {self.round_to})"
            raise ConfigError(Problem(message, key="units", hint=hint))
        return heads, units

    def _scores(self, model: Model, parts: list[Part], bench: Workbench) -> list[Scores]:
        if self.importance == "magnitude":
            scores = [_magnitude(model.net, part) for part in parts]
        else:
            found = taylor(model, parts, bench, self.samples)
            scores = [values / max(float(np.linalg.norm(values)), 1e-30) for values in found]
        if not all(np.isfinite(values).all() for values in scores):
            raise KdctlError("the importance of heads or units is not finite: the model is broken")
        return scores


# --------------------------------------------------------------------------------------------------- what can be pruned


def attentions(net: nn.Module) -> list[Part]:
    """The attentions of a net whose queries, keys and values are plain linear layers of one width, in order."""
    found = []
    for path, module in net.named_modules():
        for makers, taker in _ATTENTION:
            parent = path.rpartition(".")[0] if taker.startswith("..") else path
            part = _part(net, path, [_join(path, name) for name in makers], _join(parent, taker.lstrip(".")), module)
            if part is not None:
                found.append(part)
                break
    return found


def feed_forwards(net: nn.Module) -> list[Part]:
    """The pairs of plain linear layers between which only units on their own stand, in order."""
    found = []
    for path, _ in net.named_modules():
        for maker, taker in _FEED_FORWARD:
            part = _part(net, path, [_join(path, maker)], _join(path, taker))
            if part is not None:
                found.append(part)
                break
    return found


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _part(net: nn.Module, path: str, makers: list[str], taker: str, attention: nn.Module | None = None) -> Part | None:
    """A part, where these paths are linear layers that fit; of an attention the module that says how many heads."""
    try:
        layers = [net.get_submodule(name) for name in (*makers, taker)]
    except AttributeError:
        return None
    if not all(type(layer) is nn.Linear for layer in layers):
        return None
    *firsts, last = layers
    widths = {layer.out_features for layer in firsts} | {last.in_features}
    count = whole = int(last.in_features)  # type: ignore[arg-type]
    if attention is not None:
        count = _num_heads(attention, whole)
    return Part(path, tuple(makers), taker, count, whole // count) if len(widths) == 1 and count else None


def _num_heads(attention: nn.Module, whole: int) -> int:
    """How many heads an attention has, by what it says of itself; 0 where it does not, or they do not fit."""
    told = vars(attention)
    size = next((told[name] for name in _HEAD_WIDTHS if isinstance(told.get(name), int)), 0)
    heads = whole // size if size else next((told[name] for name in _COUNTS if isinstance(told.get(name), int)), 0)
    return heads if heads and whole % heads == 0 else 0


# ----------------------------------------------------------------------------------------------------------- importance


def _magnitude(net: nn.Module, part: Part) -> Scores:
    total = np.zeros(part.count)
    for path in (*part.makers, part.taker):
        weight = net.get_submodule(path).weight.detach().double()  # type: ignore[operator]
        rows = weight.t() if path == part.taker else weight
        norms = rows.reshape(part.count, -1).norm(dim=1).numpy()
        total += norms / max(float(norms.mean()), 1e-30)
    return total


def taylor(model: Model, parts: Sequence[Part], bench: Workbench, samples: int) -> list[Scores]:
    """Of each part the mean |dL/dg| of a gate on each of its pieces, over the first `samples` of bench.batches.

    Raises KdctlError where there is no sample, or no gradient reaches the pieces.
    """
    copied = copy.deepcopy(model).eval().requires_grad_(True)
    for drawn in (False, True):
        sums, seen = [np.zeros(part.count) for part in parts], 0
        for slopes in _slopes(copied, parts, bench, samples, drawn):
            seen += len(slopes[0])
            for total, slope in zip(sums, slopes, strict=True):
                total += slope.abs().sum(0).double().numpy()
        if any(total.any() for total in sums):
            return [total / seen for total in sums]
    raise KdctlError("importance taylor found no gradient in the training samples", hint="importance: magnitude")


def _slopes(model: Model, parts: Sequence[Part], bench: Workbench, samples: int, drawn: bool) -> Iterator[list[Tensor]]:
    """For each micro-batch, of each part dL/dg of its gates, (N, pieces). drawn: by labels that the model drew, also of
    samples that have one.
    """
    generator = torch.Generator().manual_seed(0)
    with Taps(model.net, [f"{part.taker}:in" for part in parts]) as taps:
        with taps.recording():
            model(model.record.example(2))  # after one forward the features are no copies: gradients reach them
        for batch, labelled in _apart(micro_batches(bench.batches(), samples)):
            with torch.enable_grad(), taps.recording() as features:
                signals = bench.task.signals(bench.task.forward(model, batch), batch)
                if drawn or not labelled:
                    loss = _own_loss(signals, generator)
                else:
                    losses = bench.task.supervised(signals, batch).values()
                    loss = torch.stack([value for value, _ in losses]).sum()
            taken = [features[f"{part.taker}:in"] for part in parts]
            reaches = loss.requires_grad
            slopes = torch.autograd.grad(loss, taken, allow_unused=True) if reaches else [None] * len(taken)
            yield [
                torch.zeros(batch.size, part.count) if slope is None else _of_gates(value * slope, part)
                for part, value, slope in zip(parts, taken, slopes, strict=True)
            ]


def _apart(batches: Iterator[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Of each batch the samples that have a label, and those that have none; whether they have one."""
    for batch in batches:
        rows = batch.labelled()
        for known in (True, False):
            if (rows == known).any():
                yield batch.take(rows == known), known


def _of_gates(products: Tensor, part: Part) -> Tensor:
    """(N, ..., pieces * width) summed to (N, pieces)."""
    return products.detach().flatten(1, -2).sum(1).unflatten(1, (part.count, part.width)).sum(2)


def _own_loss(signals: Signals, generator: torch.Generator) -> Tensor:
    """The negative log probability, summed, of labels drawn from what the model says."""
    rows = signals.rows()
    said = rows.detach()
    if signals.link == "softmax":
        drawn = torch.multinomial(said.softmax(1), 1, generator=generator).squeeze(1)
        return F.cross_entropy(rows, drawn, reduction="sum")
    if signals.link == "sigmoid":
        drawn = torch.bernoulli(said.sigmoid(), generator=generator)
        return F.binary_cross_entropy_with_logits(rows, drawn, reduction="sum")
    drawn = said + torch.randn(said.shape, generator=generator)
    return 0.5 * (rows - drawn).square().sum()


def least_important(scores: Sequence[Scores], count: int, lot: int, scope: Scope) -> list[list[int]]:
    """Of each layer the pieces that go, `count` in all, or as near as lots allow.

    lot: pieces go so that their number that stays is a multiple of it, and at least one lot stays (all, where there are
    fewer). The least important of a layer go first.
    """
    lots = []  # (mean score, layer, pieces) from the least important of each layer on
    for layer, values in enumerate(scores):
        order = [int(piece) for piece in np.argsort(values, kind="stable")]
        start, end = 0, len(order) % lot or lot
        while end <= len(order) - lot:
            lots.append((float(values[order[start:end]].mean()), layer, order[start:end]))
            start, end = end, end + lot
    gone: list[list[int]] = [[] for _ in scores]
    total = sum(map(len, scores))
    for _, layer, pieces in sorted(lots, key=lambda each: each[:2]) if scope == "global" else lots:
        aim = count if scope == "global" else count * len(scores[layer]) / total
        before = sum(map(len, gone)) if scope == "global" else len(gone[layer])
        if before + len(pieces) / 2 <= aim:
            gone[layer] += pieces
    return [sorted(pieces) for pieces in gone]


# -------------------------------------------------------------------------------------------------------- the new model


def without(model: Model, gone: dict[Part, list[int]]) -> Model:
    """A new model without these pieces, in eval mode, built from its own record.

    Raises KdctlError where it does not compute what the model does with the outputs of these pieces zero.
    """
    gone = {part: pieces for part, pieces in gone.items() if pieces}
    state, edits, masked = model.net.state_dict(), [], copy.deepcopy(model)
    for part, pieces in gone.items():
        kept = part.places([piece for piece in range(part.count) if piece not in pieces])
        for path in part.makers:
            for name in (f"{path}.weight", f"{path}.bias"):
                if name in state:
                    state[name] = state[name][kept]
        state[f"{part.taker}.weight"] = state[f"{part.taker}.weight"][:, kept]
        edits += _edits(model.net, part, len(kept))
        with torch.no_grad():
            masked.net.get_submodule(part.taker).weight[:, part.places(pieces)] = 0.0  # type: ignore[operator]
    record = dataclasses.replace(model.record, structure=[*(model.record.structure or []), *edits])
    with torch.random.fork_rng([]):
        result = build_model(record, model.base)
    result.net.load_state_dict(state)
    _check_same(result.eval(), masked.eval())
    return result


def _edits(net: nn.Module, part: Part, width: int) -> list[Edit]:
    """What makes a part narrower: its layers, and what an attention says of its heads."""
    edits: list[Edit] = []
    for path in part.makers:
        edits.append({"edit": "resize", "path": path, "in": net.get_submodule(path).in_features, "out": width})
    edits.append({"edit": "resize", "path": part.taker, "in": width, "out": net.get_submodule(part.taker).out_features})
    if len(part.makers) == 1:
        return edits
    told = vars(net.get_submodule(part.path))
    for names, value in ((_COUNTS, width // part.width), (_WHOLE_WIDTHS, width)):
        named = [name for name in names if isinstance(told.get(name), int)]
        edits += [{"edit": "set", "path": part.path, "name": name, "value": value} for name in named]
    return edits


@torch.no_grad()
def _check_same(pruned: Model, masked: Model) -> None:
    """Refuses a pruned model that says something else than the masked one, of full inputs and of padded texts."""
    given, tokens = pruned.record.example(2), pruned.record.tokens
    if tokens is not None:
        given[1, (given.shape[1] + 1) // 2 :] = tokens.pad
    else:
        given = given.double()
    expected = find_logits(copy.deepcopy(masked).double()(given))
    try:
        found = find_logits(copy.deepcopy(pruned).double()(given))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise KdctlError(f"the pruned model does not run: {error}", hint="heads: 0 prunes units alone") from None
    apart = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not apart <= TOLERANCE:
        message = f"the pruned model is {apart:.1e} of the largest output from the one whose heads are zero"
        raise KdctlError(message, hint="its layers do more than prune_heads knows; drop_layers and low_rank may do")
