"""Dropping whole residual blocks: what stays is a shallower net of the same widths."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdctl.bench import cost as measured
from kdctl.compress.base import Floats, Reshape, Reshaped, Workbench
from kdctl.compress.prune import logits_of, take_samples
from kdctl.config.types import Fraction, PositiveInt
from kdctl.errors import ConfigError, KdctlError, Problem
from kdctl.models import structure
from kdctl.models.record import Model, build_model
from kdctl.taps import Taps


class DropLayers(Reshape):
    """Removes residual or transformer blocks, each time the one whose absence does the least harm.

    A block can go where its shortcut alone is the identity: with all of its weights zero it hands on its input. So can
    one of a list of blocks that normalise their sums (as those of BERT): its shortcut alone normalises once more what
    the block before it has normalised.
    Papers: Fan, Grave & Joulin, Reducing Transformer Depth on Demand with Structured Dropout, ICLR 2020 (every other);
        Men et al., ShortGPT: Layers in Large Language Models Are More Redundant Than You Expect, 2024 (by effect).

    ratio: the share of such blocks that goes, of several at least one, or blocks: their number. choose: `output` drops
    those that change the logits on training images least, one after the other; `quality` those that cost the task's
    metric least; `even` every n-th, without looking. samples: images that `output` looks at.
    """

    def __init__(
        self,
        *,
        ratio: Fraction = 0.25,
        blocks: PositiveInt | None = None,
        choose: Literal["output", "quality", "even"] = "output",
        samples: PositiveInt = 256,
    ) -> None:
        self.ratio, self.blocks, self.choose, self.samples = ratio, blocks, choose, samples

    def check(self, model: Model) -> None:
        self._found(model)

    def reshape(self, model: Model, bench: Workbench) -> Reshaped:
        """The shallower model. Raises KdctlError where the net has no block that can go, ConfigError where it has
        fewer than are to go."""
        model = copy.deepcopy(model).cpu().float().eval()
        found = self._found(model)
        count = self._count(found, bench) if self.blocks is None else self.blocks
        dropped, tried = self._choose(model, found, count, bench)
        result = without(model, dropped)
        details: dict[str, Any] = {
            "blocks": found,
            "dropped": dropped,
            "choose": self.choose,
            "effect": tried,
            "macs": [measured.macs(m) for m in (model, result)],
            "parameters": [measured.parameters(m) for m in (model, result)],
        }
        return Reshaped(result, details)

    def _found(self, model: Model) -> list[str]:
        """The blocks that can go."""
        found = residual_blocks(model)
        if not found:
            hint = "drop_layers is for nets with shortcuts; `prune` makes others narrower"
            raise KdctlError("there is no residual block in this net that can be left out", hint=hint)
        if self.blocks is not None and self.blocks > len(found):
            message = f"{self.blocks} blocks are to go, and there are {len(found)}: {', '.join(found)}"
            raise ConfigError(Problem(message, key="blocks"))
        return found

    def _count(self, found: list[str], bench: Workbench) -> int:
        """How many blocks the ratio stands for: of several at least one, unless it is 0."""
        count = round(self.ratio * len(found))
        if count == 0 < self.ratio:
            if len(found) > 1:
                return 1
            bench.say(f"drop_layers: only {found[0]} could go, and ratio {self.ratio:g} of one block is none")
        return count

    def _choose(
        self, model: Model, found: list[str], count: int, bench: Workbench
    ) -> tuple[list[str], list[dict[str, float]]]:
        """The blocks that go, and of each turn the harm of dropping each that was left."""
        if self.choose == "even":
            return [found[int((i + 0.5) * len(found) / count)] for i in range(count)], []
        harm = self._noise(model, bench) if self.choose == "output" else _loss_of_quality(bench)
        dropped: list[str] = []
        tried: list[dict[str, float]] = []
        trial = copy.deepcopy(model)
        for _ in range(count):
            turn = {}
            for path in (path for path in found if path not in dropped):
                block = trial.net.get_submodule(path)
                structure.skip(trial.net, path)
                turn[path] = round(harm(trial), 8)
                structure.put(trial.net, path, block)
            if all(map(math.isnan, turn.values())):
                message, hint = _NOTHING_TO_CHOOSE_BY[self.choose]
                raise KdctlError(message, hint=hint)
            best = min(turn, key=lambda path: (math.isnan(turn[path]), turn[path]))
            structure.skip(trial.net, best)
            dropped.append(best)
            tried.append(turn)
        return dropped, tried

    def _noise(self, model: Model, bench: Workbench) -> Callable[[Model], float]:
        """The squared error of the logits by their square."""
        images = take_samples(model, bench, self.samples)
        whole = logits_of(model, images)
        power = max(float(whole.pow(2).sum()), 1e-30)
        return lambda other: float((logits_of(other, images) - whole).pow(2).sum()) / power


_NOTHING_TO_CHOOSE_BY = {
    "output": ("the logits are not finite, whichever block is left out: the model is broken", "choose: even"),
    "quality": ("choose: quality has no label outside the test split to measure by", "choose: output needs no labels"),
}
"""What is said where the harm of every block is NaN, and a hint."""


def _loss_of_quality(bench: Workbench) -> Callable[[Model], float]:
    def harm(model: Model) -> float:
        def predict(images: Floats) -> Floats:
            logits: Floats = logits_of(model, torch.from_numpy(images)).numpy()
            return logits

        return -bench.quality(predict)

    return harm


def without(model: Model, dropped: Iterable[str]) -> Model:
    """A new model without these blocks, in eval mode, built from its own record."""
    edits = [{"edit": "skip", "path": path} for path in dropped]
    record = dataclasses.replace(model.record, structure=[*(model.record.structure or []), *edits])
    with torch.random.fork_rng([]):
        result = build_model(record, model.base)
    prefixes = tuple(f"{path}." for path in dropped)
    result.net.load_state_dict(
        {k: v for k, v in model.net.state_dict().items() if not k.startswith(prefixes or ("\0",))}
    )
    return result.eval()


@torch.no_grad()
def residual_blocks(model: Model) -> list[str]:
    """The paths of the blocks that can be left out, innermost ones, in the order of definition."""
    paths = [
        path
        for path, module in model.net.named_modules()
        if path and next(module.children(), None) is not None and next(module.parameters(), None) is not None
    ]
    given = _inputs(model, paths, model.record.example(2))
    found = [path for path in given if _hands_on(model.net, path, given[path])]
    found = [path for path in found if not any(other.startswith(f"{path}.") for other in found)]
    blocks = [path for path in given if _is_in_list(model.net, path)]
    blocks = [path for path in blocks if not any(f"{other}.".startswith(f"{path}.") for other in found)]
    normalised = [path for path in blocks if _only_normalises(model, path, given[path])]
    return [path for path in paths if path in found or path in normalised]


def _inputs(model: Model, paths: list[str], images: Tensor) -> dict[str, Tensor]:
    """What goes into each module; those that are not called, or not with a tensor, are left out."""
    try:
        with Taps(model.net, [f"{path}:in" for path in paths]) as taps, taps.recording() as features:
            model(images)
        return {path: features[f"{path}:in"] for path in paths}
    except ConfigError:
        half = len(paths) // 2
        if len(paths) <= 1:
            return {}
        return _inputs(model, paths[:half], images) | _inputs(model, paths[half:], images)


def _hands_on(net: nn.Module, path: str, given: Tensor) -> bool:
    """Whether a module without weights is the identity."""
    block = copy.deepcopy(net.get_submodule(path))
    for parameter in block.parameters():
        parameter.zero_()
    try:
        result = block(given.clone())
    except (RuntimeError, TypeError, ValueError):
        return False
    return isinstance(result, Tensor) and result.shape == given.shape and torch.equal(result, given)


def _is_in_list(net: nn.Module, path: str) -> bool:
    return isinstance(net.get_submodule(path.rpartition(".")[0]), nn.ModuleList)


def _only_normalises(model: Model, path: str, given: Tensor) -> bool:
    """Whether a module whose weights are zero but for those of its norms hands on what is normalised.

    What else it is called with, such as the mask of attention, is what the model calls it with.
    """
    block = copy.deepcopy(model.net.get_submodule(path))
    norms = [part for part in block.modules() if isinstance(part, nn.LayerNorm) and part.elementwise_affine]
    for parameter in block.parameters():
        parameter.zero_()
    for norm in norms:
        norm.weight.fill_(1)
    count = sum(p.default is p.empty and p.kind is not p.VAR_POSITIONAL for p in _parameters(block))
    others = [f"{path}:in.{number}" for number in range(1, count)]
    given = nn.functional.layer_norm(given, given.shape[-1:])
    try:
        with Taps(model.net, others) as taps, taps.recording() as features:
            model(model.record.example(2))
        result = block(given.clone(), *(features[other] for other in others))
    except (ConfigError, RuntimeError, TypeError, ValueError):
        return False
    alike = isinstance(result, Tensor) and result.shape == given.shape
    return bool(norms) and alike and torch.allclose(result, given, atol=1e-3)


def _parameters(block: nn.Module) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(block.forward).parameters.values() if p.kind is not p.VAR_KEYWORD]
