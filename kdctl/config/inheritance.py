"""What a student takes over of its teacher, as far as it can be checked without building either."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kdctl import registry
from kdctl.config.arguments import defaults
from kdctl.config.schema import Inherit, ModelSpec, TeacherSpec
from kdctl.config.yaml_io import KeyPath
from kdctl.errors import KdctlError, counted
from kdctl.runs import holds_model

_LAYERED = ("bert", "mobilebert", "tiny_transformer")
"""Kinds whose `depth` is the number of the layers that are taken over one by one."""
_WIDTHS = ("width", "hidden", "embedding", "positions")


def check_inherit(
    path: KeyPath, spec: ModelSpec, teachers: Sequence[TeacherSpec], where: str, start: str | None = None
) -> Iterator[tuple[KeyPath, str, str | None]]:
    """Path, message and hint of all that is wrong with what a student inherits.

    where: what has these teachers. start: the stage that the student goes on from, where its own stage names one.
    """
    wish = spec.inherit
    if wish is None:
        return
    here: KeyPath = (*path, "inherit")
    other = next((key for key, value in (("weights", spec.weights), ("from", spec.stage)) if value is not None), None)
    if other is not None:
        message = f"a student's weights come from one place: both {other} and inherit are given"
        yield here, message, "remove one; `inherit: {source: ...}` cuts other weights than the teacher's to size"
    if start not in (None, "fresh"):
        message = f"this stage goes on with the weights of '{start}', and would inherit others"
        yield here, message, "from: fresh, or leave inherit out"
    if wish.parts == "embeddings" and wish.layers is not None:
        yield (*here, "layers"), "this has no effect: embeddings alone are inherited", "parts: all"
    if wish.source != "teacher":
        return
    if not teachers:
        hint = "add teacher: {kind: ..., weights: ...}, or name a run directory as source"
        yield (*here, "source"), f"{where} has no teacher to inherit from", hint
    elif registry.canonical("models", spec.kind) == registry.canonical("models", teachers[0].kind):
        yield from _check_sizes(path, spec, teachers[0], wish)


def _check_sizes(
    path: KeyPath, spec: ModelSpec, teacher: TeacherSpec, wish: Inherit
) -> Iterator[tuple[KeyPath, str, str | None]]:
    """Depths and widths of two models of one kind."""
    for name in _WIDTHS:
        own, other = _argument(spec, name), _argument(teacher, name)
        if isinstance(own, int) and isinstance(other, int) and own > other:
            message = f"a student of {name} {own} cannot inherit from a teacher of {name} {other}"
            yield (*path, name), message, f"{name}: up to {other}, or leave inherit out"
    own, other = _argument(spec, "depth"), _argument(teacher, "depth")
    if wish.parts != "all" or spec.kind not in _LAYERED or not isinstance(own, int) or not isinstance(other, int):
        return
    yield from ((((*path, "inherit", "layers")), *found) for found in layer_problems(own, other, wish.layers))


def layer_problems(own: int, other: int, layers: Sequence[int] | None) -> list[tuple[str, str | None]]:
    """What is wrong with the layers that a student of `own` layers takes of `other`: messages and hints."""
    if layers is None:
        message = f"a student of {counted(own, 'layer')} inherits from {other}"
        hint = "name a layer for each, some of them twice, or take a depth up to the source's"
        return [(message, hint)] if own > other else []
    found: list[tuple[str, str | None]] = []
    if len(layers) != own:
        message = f"got {counted(len(layers), 'layer')} for a student of {own}"
        found.append((message, f"one each; left out: {evenly(own, other)}"))
    beyond = next((number for number in layers if number >= other), None)
    if beyond is not None:
        found.append((f"got layer {beyond}; allowed: 0 to {other - 1}, the source has {other}", "layers count from 0"))
    return found


def evenly(own: int, other: int) -> list[int]:
    """The layers of `other` for `own` of them: evenly spaced, the first and the last among them; the first for one.

    12 to 6 is 0, 2, 4, 7, 9, 11, as DistilBERT's released code has it (Sanh et al., 2019).
    """
    steps = max(own - 1, 1)
    return [(2 * number * (other - 1) + steps) // (2 * steps) for number in range(own)]


def _argument(spec: ModelSpec, name: str) -> Any:
    """What a model is called with, its class's default where a file says nothing; None where weights say it."""
    if name in spec.arguments:
        return spec.arguments[name]
    if spec.weights is not None and holds_model(spec.weights):
        return None
    try:
        return defaults(registry.signature(registry.find("models", spec.kind))).get(name)
    except KdctlError:
        return None
