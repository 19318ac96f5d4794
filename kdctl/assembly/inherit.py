"""A student that begins with weights of its teacher: the tensors of the same names, layer by layer, cut to size.

Where an axis is shorter in the student, `truncate` takes the first units. `svd` looks for a projection P (D, d) of the
hidden states: the top right singular vectors of the token embeddings, each row times the root of how often its token
stands in the training texts. By Eckart and Young no other projection loses less of the embeddings that the tokens of
these texts have, summed over all of them. Each count is one higher than it is, so that a token that no training text
has is not lost on purpose. Nothing is centred: P is applied without an offset, and the mean of the embeddings is part
of what a model sees.

An axis along the hidden state is multiplied by P. Of a perceptron's and the pooler's units those stay whose weights, in
and out, are largest; of the heads the first ones, for their units belong together. A normalisation's gains become their
means, weighted by how much of each direction they scale (the squares of P); its offsets are projected.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kdctl.config.inheritance import evenly, layer_problems
from kdctl.config.schema import Inherit
from kdctl.data.base import Split
from kdctl.data.tokens import TokenSplit
from kdctl.errors import ConfigError, MissingError, Problem
from kdctl.models import record as records
from kdctl.models.record import Model
from kdctl.models.weights import read_tensors
from kdctl.runs import holds_model

KEY = "student.inherit"
_STREAM = "stream"
_AXES: dict[str, tuple[str, ...]] = {
    r"word_embeddings\.weight": ("tokens", _STREAM),
    r"(position|token_type)_embeddings\.weight": ("rows", _STREAM),
    r"LayerNorm\.weight": ("gain",),
    r"LayerNorm\.bias": (_STREAM,),
    r"self\.(query|key|value)\.weight": ("heads", _STREAM),
    r"self\.(query|key|value)\.bias": ("heads",),
    r"attention\.output\.dense\.weight": (_STREAM, "heads"),
    r"attention\.output\.dense\.bias": (_STREAM,),
    r"intermediate\.dense\.weight": ("hidden", _STREAM),
    r"intermediate\.dense\.bias": ("hidden",),
    r"\d\.output\.dense\.weight": (_STREAM, "hidden"),
    r"\d\.output\.dense\.bias": (_STREAM,),
    r"pooler\.dense\.weight": ("pooled", _STREAM),
    r"pooler\.dense\.bias": ("pooled",),
    r"cls\.(predictions\.transform\.)?dense\.weight": (_STREAM, _STREAM),
    r"cls\.(predictions\.transform\.)?dense\.bias": (_STREAM,),
    r"cls\.(predictions\.)?bias": ("rows",),
    r"(?<!\.)classifier\.weight": ("classes", "pooled"),
    r"(?<!\.)classifier\.bias": ("classes",),
}
"""What lies along each axis of BERT's weights, by the end of their published names; the first that fits counts."""
_BY_WEIGHT = ("hidden", "pooled")
"""Axes whose units may stand in any order: the largest are kept."""
_LISTED = 4


@dataclass
class _Source:
    """What is inherited from. model: None where the file says no more than tensors."""

    state: dict[str, Tensor]
    called: str
    model: Model | None


@torch.no_grad()
def inherit(student: Model, wish: Inherit, teachers: Sequence[Model], train: Split) -> str:
    """Gives a student, in place, what it inherits, and says what that is. train: whose tokens weigh in the projection.

    Raises ConfigError where there is nobody to inherit from, where the student is wider or deeper, where tokenizers
    differ, or where no weight has a counterpart; MissingError where the source is not there.
    """
    source = _source(student, wish, teachers)
    own = {name: v for name, v in student.net.state_dict().items() if isinstance(v, Tensor)}
    lists = {} if wish.parts == "embeddings" else _layers(student.net, source, wish.layers)
    pairs = {name: _counterpart(name, lists) for name in own}
    given = {name: source.state[other] for name, other in pairs.items() if other in source.state}
    for name in _head(student, source):
        given.pop(name, None)
    if wish.parts == "embeddings":
        given = {name: value for name, value in given.items() if "embed" in name}
    if not given:
        what = "embeddings" if wish.parts == "embeddings" else "weights"
        message = f"{source.called} has no {what} of the names that the student's have: {_names(list(own))}"
        raise ConfigError(Problem(message, key=KEY, hint="a source of the student's own kind, or leave inherit out"))
    _check_sizes(given, own, source)
    narrower = [name for name, value in given.items() if value.shape != own[name].shape]
    how = ""
    if narrower and wish.widths == "svd":
        given, kept = _projected(given, own, train)
        how = f", projected with {kept:.1%} of the embeddings' squares kept"
    elif narrower:
        given = {name: value[tuple(map(slice, own[name].shape))] for name, value in given.items()}
        how = ", truncated"
    student.net.load_state_dict(given, strict=False)
    chosen = "".join(f", {path} {', '.join(map(str, numbers))}" for path, numbers in lists.items())
    return f"the student begins with {len(given)} of its {len(own)} tensors from {source.called}{chosen}{how}"


# --------------------------------------------------------------------------------------------------------- the source


def _source(student: Model, wish: Inherit, teachers: Sequence[Model]) -> _Source:
    key = f"{KEY}.source"
    if wish.source == "teacher":
        if not teachers:
            hint = "add a teacher, or name a run directory as source"
            raise ConfigError(Problem("this stage has no teacher to inherit from", key=key, hint=hint))
        model, called = teachers[0], "the teacher"
    elif holds_model(wish.source):
        model, called = records.load_model(Path(wish.source)), wish.source
    else:
        return _Source(_foreign(student, Path(wish.source)), wish.source, None)
    own, other = student.record.tokens, model.record.reads or model.record.tokens
    if own is not None and other is not None and own.tokenizer != other.tokenizer:
        message = f"the texts of {called} were made into numbers by another tokenizer"
        hint = "name the tokenizer that it was trained with as data.tokenizer"
        raise ConfigError(Problem(message, key=key, hint=hint))
    state = {name: v for name, v in model.net.state_dict().items() if isinstance(v, Tensor)}
    return _Source(state, called, model)


def _foreign(student: Model, path: Path) -> dict[str, Tensor]:
    """The tensors of a published encoder's file or folder, under the student's names where it knows them."""
    try:
        state = read_tensors(path / "model.safetensors" if path.is_dir() else path)
    except (ConfigError, MissingError) as error:
        raise type(error)(*(replace(problem, key=f"{KEY}.source") for problem in error.problems)) from None
    names = student.net.state_dict()
    roots = {f"{name.partition('.')[0]}." for name in names}
    if not any(name.startswith(tuple(roots)) for name in state):
        prefix = next((r for r in roots if any(r + name in names for name in state)), "")
        state = {prefix + name: value for name, value in state.items()}
    return state


def _head(student: Model, source: _Source) -> list[str]:
    """The names of the last linear layer where its outputs mean something else in the source."""
    linear = [path for path, module in student.net.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        return []
    names = [f"{linear[-1]}.weight", f"{linear[-1]}.bias"]
    if source.model is not None and source.model.record.class_names == student.record.class_names:
        return []
    last = student.net.get_submodule(linear[-1])
    answers = isinstance(last, nn.Linear) and last.out_features == student.record.num_classes
    return names if answers else []


# ------------------------------------------------------------------------------------------------------------- layers


def _layers(net: nn.Module, source: _Source, wanted: Sequence[int] | None) -> dict[str, list[int]]:
    """Path of each list of like layers -> the source's layer of each of them, where these are not the same ones.

    Lists inside of lists stay as they are. Raises ConfigError for layers that the source has not, and where layers are
    named and it is not clear of which list.
    """
    counts = _lists(net, source.state)
    if wanted is not None and len(counts) != 1:
        message = f"this student has {len(counts)} lists of layers{_listed(counts)}, so one choice does not fit"
        hint = "leave it out: each list is spaced evenly" if counts else "leave it out"
        raise ConfigError(Problem(message, key=f"{KEY}.layers", hint=hint))
    chosen = {}
    for path, (own, other) in counts.items():
        found = layer_problems(own, other, wanted)
        if found:
            raise ConfigError(*(Problem(f"{path}: {text}", key=f"{KEY}.layers", hint=hint) for text, hint in found))
        numbers = list(wanted) if wanted is not None else evenly(own, other)
        if numbers != list(range(other)):
            chosen[path] = numbers
    return chosen


def _lists(net: nn.Module, state: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Path of each outermost list of like modules -> how many the net has, and how many the source."""
    found: dict[str, tuple[int, int]] = {}
    for path, module in net.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len({type(part) for part in module}) != 1:
            continue
        if any(path.startswith(f"{outer}.") for outer in found):
            continue
        inside = (re.match(rf"{re.escape(path)}\.(\d+)\.", name) for name in state)
        numbers = [int(match[1]) for match in inside if match]
        if numbers:
            found[path] = len(module), max(numbers) + 1
    return found


def _counterpart(name: str, lists: Mapping[str, Sequence[int]]) -> str:
    """The name in the source of a tensor of the student."""
    for path, numbers in lists.items():
        if name.startswith(f"{path}."):
            number, _, rest = name[len(path) + 1 :].partition(".")
            return f"{path}.{numbers[int(number)]}.{rest}"
    return name


# -------------------------------------------------------------------------------------------------------------- sizes


def _check_sizes(given: Mapping[str, Tensor], own: Mapping[str, Tensor], source: _Source) -> None:
    """Refuses other tokens, other kernels, and a student that is anywhere wider than what it inherits."""
    pairs = {name: (tuple(own[name].shape), tuple(value.shape)) for name, value in given.items()}
    for name, (mine, theirs) in pairs.items():
        if name.endswith("word_embeddings.weight") and mine[0] != theirs[0]:
            message = f"{source.called} has {theirs[0]:,} tokens, the data's tokenizer {mine[0]:,}"
            raise ConfigError(Problem(message, key=f"{KEY}.source", hint="name its tokenizer as data.tokenizer"))
    wider = [n for n, (mine, theirs) in pairs.items() if any(a > b for a, b in zip(mine, theirs, strict=False))]
    other = [n for n, (mine, theirs) in pairs.items() if len(mine) != len(theirs) or mine[2:] != theirs[2:]]
    for names, what in ((other, "has weights of another form"), (wider, "is wider")):
        if names:
            listed = _names([f"{name} {pairs[name][0]} of {pairs[name][1]}" for name in names])
            hint = "a student that is nowhere wider than its source, or leave inherit out"
            raise ConfigError(Problem(f"the student {what} than {source.called}: {listed}", key=KEY, hint=hint))


# --------------------------------------------------------------------------------------------------------- projection


def _projected(given: Mapping[str, Tensor], own: Mapping[str, Tensor], train: Split) -> tuple[dict[str, Tensor], float]:
    """The source's tensors at the student's sizes, and how much of the embeddings' weighted squares remains.

    A tensor along whose axes it is not known what lies stays as it is in the student. Raises ConfigError where there
    are no embeddings of tokens to look at.
    """
    words = next((name for name in given if name.endswith("word_embeddings.weight")), None)
    if words is None or not isinstance(train, TokenSplit):
        message = "svd projects by embeddings of tokens, under BERT's names, and these models have none"
        raise ConfigError(Problem(message, key=f"{KEY}.widths", hint="widths: truncate takes the first units"))
    for state, whose in ((own, "the student's"), (given, "the source's")):
        width = next((state[name].shape[1] for name in state if name.endswith("position_embeddings.weight")), None)
        if width not in (None, state[words].shape[1]):
            message = f"{whose} token embeddings are factorised: {state[words].shape[1]} wide, its states {width}"
            hint = "a model without factorised embeddings, or widths: truncate"
            raise ConfigError(Problem(message, key=f"{KEY}.widths", hint=hint))
    counts = torch.bincount(train.ids.flatten().long(), minlength=len(given[words]))
    basis, kept = projection(given[words], counts, own[words].shape[1])
    axes = {name: found for name in given if (found := _axes(name)) is not None}
    if not any(name.endswith("pooler.dense.weight") for name in own):  # the classifier reads hidden states
        axes = {name: tuple(_STREAM if a == "pooled" else a for a in found) for name, found in axes.items()}
    sizes = (given[words].shape[1], own[words].shape[1])
    axes = {n: labels for n, labels in axes.items() if _runs_along(labels, given[n].shape, own[n].shape, sizes)}
    weights = _weights(given, axes)
    cut = {name: _cut(given[name].double(), own[name].shape, name, axes[name], basis, weights) for name in axes}
    return cut, kept


def projection(embeddings: Tensor, counts: Tensor, width: int) -> tuple[Tensor, float]:
    """P (D, width), float64, orthonormal columns by falling share, and the share of the weighted squares that it keeps.

    embeddings: (V, D). counts: (V,), how often each token stands in the texts. The sign of a direction is that of its
    largest element, so that P is the same wherever it is computed. With the full width it is the identity.
    """
    if width == embeddings.shape[1]:
        return torch.eye(width, dtype=torch.float64, device=embeddings.device), 1.0
    weighted = embeddings.double() * (counts.to(embeddings.device).double() + 1).sqrt()[:, None]
    squares, vectors = torch.linalg.eigh(weighted.T @ weighted)
    basis = vectors.flip(1)[:, :width]
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return basis * largest.sign(), float(squares.flip(0)[:width].sum() / squares.sum())


def _axes(name: str) -> tuple[str, ...] | None:
    return next((axes for pattern, axes in _AXES.items() if re.search(f"{pattern}$", name)), None)


def _runs_along(labels: Sequence[str], theirs: Sequence[int], mine: Sequence[int], sizes: tuple[int, int]) -> bool:
    """Whether the axes along the hidden state have its sizes; those of a bottleneck, under the same names, have not."""
    pairs = zip(labels, theirs, mine, strict=True)
    return all((a, b) == sizes for label, a, b in pairs if label in (_STREAM, "gain"))


def _group(name: str, label: str) -> str:
    """The units that an axis runs over: those of a kind in one layer."""
    layer = re.match(r".*\.\d+\.", name)
    return f"{layer[0] if layer else ''}{label}"


def _weights(given: Mapping[str, Tensor], axes: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """How large each unit of a group is: the norm of its weights in, times that of its weights out."""
    found: dict[str, Tensor] = {}
    for name, labels in axes.items():
        for axis, label in enumerate(labels):
            if label in _BY_WEIGHT and given[name].ndim == 2:
                group, norms = _group(name, label), given[name].double().norm(dim=1 - axis)
                found[group] = found[group] * norms if group in found else norms
    return found


def _cut(
    value: Tensor, shape: Sequence[int], name: str, labels: Sequence[str], basis: Tensor, weights: Mapping[str, Tensor]
) -> Tensor:
    """A tensor of the source at a shape, by what lies along each of its axes."""
    for axis, label in enumerate(labels):
        if label == _STREAM:
            value = torch.tensordot(value, basis, ([axis], [0])).movedim(-1, axis)
        elif label == "gain":
            value = basis.square().T @ value
        elif _group(name, label) in weights:
            value = value.index_select(axis, weights[_group(name, label)].topk(shape[axis]).indices.sort().values)
        else:
            value = value.narrow(axis, 0, shape[axis])
    return value


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _listed(names: Mapping[str, object]) -> str:
    return f" ({', '.join(names)})" if names else ""
