"""What has to hold of loss terms: names, taps, the kind of probabilities they compare, the teachers that they need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from kdctl import registry
from kdctl.config.embeddings import check_embedding
from kdctl.config.schema import Component, ExperimentFile, LossSpec, TapPair, TeacherSpec, TrainStage
from kdctl.config.yaml_io import KeyPath
from kdctl.errors import KdctlError, counted

Finding = tuple[KeyPath, str, str | None]
"""Path, message, hint."""

ADD_TEACHER = "add teacher: {kind: ..., weights: ...}"
_WHERE_TAPS = "a tap is any module path of the net: `kdctl explain MODEL` names the usual ones"


def teachers_of(path: KeyPath, given: TeacherSpec | list[TeacherSpec] | None) -> list[tuple[KeyPath, TeacherSpec]]:
    if isinstance(given, list):
        return [((*path, i), spec) for i, spec in enumerate(given)]
    return [] if given is None else [(path, given)]


def check_losses(path: KeyPath, losses: Sequence[LossSpec]) -> Iterator[Finding]:
    if losses and all(_weighs_nothing(loss) for loss in losses):
        yield path, "every term weighs 0: nothing would be learnt", "give one of them a weight"
    labels = Counter(loss.label for loss in losses)
    for index, loss in enumerate(losses):
        if labels[loss.label] > 1:
            yield (*path, index), f"{labels[loss.label]} terms are called '{loss.label}'", "give each a name: ..."
        needs_taps = _attribute(loss, "needs_taps", None)
        if needs_taps is True and not loss.taps:
            message = f"'{loss.kind}' compares features and needs taps"
            yield (*path, index), message, f"for example taps: [layer1, layer2]; {_WHERE_TAPS}"
        if needs_taps is False and loss.taps:
            yield (*path, index, "taps"), f"'{loss.kind}' takes no taps", "remove them"


def _weighs_nothing(loss: LossSpec) -> bool:
    return not any(loss.weight.values() if isinstance(loss.weight, dict) else [loss.weight])


def check_links(file: ExperimentFile) -> Iterator[Finding]:
    """Terms on probabilities of another kind than the task has: softmax where a sample has several labels, say."""
    link = _literal("tasks", file.task, "link", "softmax")
    if link is None:  # there is no such task, which is told elsewhere
        return
    if link == "embedding":
        yield from check_embedding(file, teachers_of(("teacher",), file.teacher))
        return
    stages = [(i, stage) for i, stage in enumerate(file.stages or []) if isinstance(stage, TrainStage)]
    places: list[tuple[KeyPath, Sequence[LossSpec]]] = [(("losses",), file.losses or [])]
    places += [(("stages", index, "losses"), stage.losses) for index, stage in stages]
    for path, spec in teachers_of(("teacher",), file.teacher):
        places.append(((*path, "train", "losses"), (spec.train.losses if spec.train else None) or []))
    fitting = "binary_kd" if link == "sigmoid" else "logit_mse"
    for path, losses in places:
        for index, loss in enumerate(losses):
            links = _attribute(loss, "links", None)
            if links and link not in links and not loss.force:
                message = f"'{loss.kind}' is meant for {' or '.join(links)}, and {file.task.kind} has {link} logits"
                yield (*path, index), message, f"{fitting} is meant for it; force: true uses this one all the same"
    if file.distill is not None and link != "softmax":
        message = f"`distill` softens a softmax over classes, and {file.task.kind} has {link} logits"
        yield ("distill",), message, f"losses: [{{kind: supervised}}, {{kind: {fitting}}}]"


def check_need(path: KeyPath, losses: Sequence[LossSpec], where: str) -> Iterator[Finding]:
    """Terms that need a teacher, where there is none."""
    for index, loss in enumerate(losses):
        if _attribute(loss, "needs_teacher", True):
            yield (*path, index), f"'{loss.kind}' needs a teacher, and {where} has none", ADD_TEACHER


def check_several(
    path: KeyPath, losses: Sequence[LossSpec], place: KeyPath, ensemble: Component | None, number: int
) -> Iterator[Finding]:
    """What names something of each teacher, where there are `number` of them."""
    for index, loss in enumerate(losses):
        for tap_index, tap in enumerate(loss.taps):
            if isinstance(tap, TapPair) and isinstance(tap.teacher, list) and number and len(tap.teacher) != number:
                message = f"{counted(len(tap.teacher), 'place')} for {counted(number, 'teacher')}"
                where = (*path, index, "taps", tap_index, "teacher")
                yield where, message, "one place a teacher, in their order"
    for key in ("weights", "groups") if ensemble is not None and number > 1 else ():
        values = ensemble.arguments.get(key) if ensemble is not None else None
        if isinstance(values, list) and len(values) != number:
            message = f"{counted(len(values), key.removesuffix('s'))} for {number} teachers"
            yield (*place, key), message, "one a teacher, in their order"


def teaches(method: Component | None) -> bool:
    """Whether the method is itself what teaches."""
    if method is None:
        return False
    try:
        found = registry.signature(registry.find("methods", method.kind)).attributes
    except KdctlError:
        return False
    return found.get("provides_teacher", False) is True


def _attribute(loss: LossSpec, name: str, default: Any) -> Any:
    """A literal attribute of the term's class, read from its source; None where there is no such class."""
    return _literal("losses", loss, name, default)


def _literal(group: str, component: Component, name: str, default: Any) -> Any:
    try:
        return registry.signature(registry.find(group, component.kind)).attributes.get(name, default)
    except KdctlError:
        return None
