"""Layers of an experiment: the file, the files it `extends:`, and `a.b=c` overrides, merged with every value's origin.

Maps merge, lists and plain values replace. A later layer that changes a `kind` keeps the earlier arguments that the new
kind also has; the others fall away. One that gives a value by another of its names replaces it too (config/check.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdctl import registry
from kdctl.config.messages import got
from kdctl.config.yaml_io import Document, KeyPath, Origin, read_file, read_value
from kdctl.errors import ConfigError, KdctlError, MissingError, Problem, counted, did_you_mean

LIST_GROUPS = {
    "losses": "losses", "augment": "augment", "strong_augment": "augment",
    "transfer": "data", "expand": "expansions", "compress": "compressors", "export": "exporters",
    "teacher": "models", "loggers": "loggers",
}  # fmt: skip
"""Lists whose items an override may name by kind: key of the list -> group of its components."""


def load_document(path: Path, overrides: Sequence[str] = ()) -> Document:
    """The merged document of a file. Raises ConfigError (all bad overrides at once) or MissingError."""
    document = _read_chain(Path(path), ())
    problems: list[Problem] = []
    for number, text in enumerate(overrides, start=1):
        try:
            _override(document, text, f"override {number}")
        except KdctlError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return document


# --------------------------------------------------------------------------------------------------------- extending


def _read_chain(path: Path, above: tuple[Path, ...]) -> Document:
    document = read_file(path, "extends" if above else "file")
    if "extends" not in document.data:
        return document
    origin = document.origins[("extends",)]
    name = document.data.pop("extends")
    for key in [k for k in document.origins if k[:1] == ("extends",)]:
        del document.origins[key]
    if not isinstance(name, str) or not name:
        message = f"`extends` takes the path of one file, got {got(name)}"
        raise ConfigError(Problem(message, str(path), origin.line, "extends"))
    target = path.parent / os.path.expanduser(name)
    if "\0" not in name and os.path.realpath(target) in [os.path.realpath(p) for p in (*above, path)]:
        way = " -> ".join(p.name for p in (*above, path, target))
        raise ConfigError(Problem(f"files extend each other in a circle: {way}", str(path), origin.line, "extends"))
    try:
        base = _read_chain(target, (*above, path))
    except MissingError as error:
        if error.problems[0].file != str(target):
            raise
        message, hint = f"{target} does not exist", error.problems[0].hint
        raise MissingError(Problem(message, str(path), origin.line, "extends", hint)) from None
    base.main = str(path)
    _merge(base, document)
    return base


def _merge(base: Document, over: Document) -> None:
    def merge(old: dict[Any, Any], new: dict[Any, Any], path: KeyPath) -> None:
        for key, value in new.items():
            here = (*path, key)
            if isinstance(value, dict) and isinstance(old.get(key), dict):
                base.origins[here] = over.origins[here]
                merge(old[key], value, here)
            else:
                if key in old:
                    base.replaced.setdefault(here, []).append(old[key])
                old[key] = value
                _replace_origins(base.origins, here, over.origins)

    merge(base.data, over.data, ())
    base.origins[()] = over.origins[()]
    base.files += over.files


def _replace_origins(origins: dict[KeyPath, Origin], path: KeyPath, new: dict[KeyPath, Origin]) -> None:
    size = len(path)
    for key in [k for k in origins if k[:size] == path]:
        del origins[key]
    origins.update({k: v for k, v in new.items() if k[:size] == path})


# --------------------------------------------------------------------------------------------------------- overriding


def _override(document: Document, text: str, name: str) -> None:
    address, equals, written = text.partition("=")
    segments = address.strip().split(".")
    if not equals or not all(segments):
        message = f"{text!r} is not an override: it takes the form a.b=c"
        raise ConfigError(Problem(message, name, hint="for example train.epochs=10"))
    if segments[0] == "losses" and len(segments) > 1 and "losses" not in document.data and "distill" in document.data:
        message = "the file says `distill:`, the shorthand, and has no list of losses"
        raise ConfigError(Problem(message, name, key=address, hint="set distill.temperature or distill.alpha"))
    if segments[0] == "losses" and len(segments) > 1 and "losses" not in document.data and "stages" in document.data:
        message = "the file has stages, each with losses of its own"
        raise ConfigError(Problem(message, name, key=address, hint=f"name the stage: stages.NAME.{address}"))
    value, origins = read_value(written, name)
    path: KeyPath = ()
    current: Any = document.data
    for position, segment in enumerate(segments):
        key = _step(current, path, segment, Problem("", name, key=address))
        path = (*path, key)
        if position == len(segments) - 1:
            break
        if isinstance(current, dict) and current.get(key) is None:
            current[key] = {}
            document.origins[path] = Origin(name, None, "override")
        current = current[key]
    if isinstance(current, dict) and path[-1] in current:
        document.replaced.setdefault(path, []).append(current[path[-1]])
    current[path[-1]] = value
    _replace_origins(document.origins, path, {(*path, *k): v for k, v in origins.items()})


def _step(current: Any, path: KeyPath, segment: str, problem: Problem) -> str | int:
    """The key or position that one part of an address means in the value reached so far."""
    where = ".".join(map(str, path)) or "the file"

    def fail(message: str, hint: str | None = None) -> ConfigError:
        return ConfigError(Problem(message, problem.file, None, problem.key, hint))

    if isinstance(current, dict):
        is_number = segment.isascii() and segment.isdigit() and len(segment) < 10
        return int(segment) if is_number and segment not in current else segment
    if not isinstance(current, list):
        raise fail(f"`{where}` is {got(current)}: it has no key '{segment}'")
    if segment.isascii() and segment.isdigit():
        if int(segment[:9]) >= len(current):
            raise fail(f"`{where}` has {counted(len(current), 'item')}, counted from 0: there is no item {segment}")
        return int(segment)
    group = LIST_GROUPS.get(str(path[-1])) if path else None
    wanted = registry.canonical(group, segment) if group else segment
    names = [_names(item, group) for item in current]
    found = [i for i, known in enumerate(names) if segment in known or wanted in known]
    if len(found) == 1:
        return found[0]
    if found:
        which = " or ".join(f"{where}.{i}" for i in found)
        raise fail(f"`{where}` has {len(found)} items named '{segment}'", f"say which: {which}")
    every = [n for known in names for n in known]
    allowed = ", ".join(dict.fromkeys(every)) or "the list is empty"
    raise fail(f"`{where}` has no item named '{segment}'; there are: {allowed}", did_you_mean(segment, every))


@contextmanager
def locating(document: Document) -> Iterator[None]:
    """Gives the problems of a ConfigError or MissingError that is raised inside their places in the file.

    For what shows only once models and data are there: a tap that does not exist, class counts that cannot match,
    weights that do not fit.
    """
    try:
        yield
    except (ConfigError, MissingError) as error:
        raise type(error)(*(located(document, problem) for problem in error.problems)) from error


def located(document: Document, problem: Problem) -> Problem:
    """The problem with the place in the file that its key names, or the nearest thing around it that was written.

    A key that the file itself has not is looked for in its `stages:`, where one of them alone has it.
    """
    if problem.file is not None or problem.key is None:
        return problem
    segments = problem.key.split(".")
    path = _way(document.data, (), segments)
    if not path and isinstance(stages := document.data.get("stages"), list):
        inside = [_way(stage, ("stages", number), segments) for number, stage in enumerate(stages)]
        deepest = max(map(len, inside), default=0)
        found = [way for way in inside if len(way) == deepest > 2]
        path = found[0] if len(found) == 1 else ()
    origin = document.origin(path) if path else None
    if origin is None:
        return replace(problem, file=document.main or None)
    return replace(problem, file=origin.file, line=origin.key_line or origin.line)


def _way(current: Any, path: KeyPath, segments: Sequence[str]) -> KeyPath:
    """How far a key leads from a value, whose own path it extends."""
    for segment in segments:
        if isinstance(current, list):
            group = LIST_GROUPS.get(str(path[-1])) if path else None
            found = [i for i, item in enumerate(current) if segment in _names(item, group)]
            key: str | int | None = found[0] if len(found) == 1 else None
            if segment.isascii() and segment.isdigit() and int(segment[:9]) < len(current):
                key = int(segment)
        else:
            key = segment if isinstance(current, dict) and segment in current else None
        if key is None:
            break
        path, current = (*path, key), current[key]
    return path


def _names(item: Any, group: str | None) -> list[str]:
    """What a list item answers to: its name, or where it has none its kind (both as written and without alias)."""
    if not isinstance(item, dict):
        return []
    name, kind = item.get("name"), item.get("kind")
    kinds = [kind, registry.canonical(group, kind) if group else kind] if isinstance(kind, str) else []
    return list(dict.fromkeys(([name] if isinstance(name, str) else []) + kinds))
