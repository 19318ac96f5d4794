"""From a merged document to an ExperimentFile: every problem at once, each with its place and what is allowed there.

Three passes: each component's arguments against its class, the schema, and what has to hold between sections
(config/consistency.py). Aliases become names and relative paths absolute on the way.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError

from kdctl import registry
from kdctl.config.arguments import check_arguments, is_path, unknown_argument
from kdctl.config.consistency import check_consistency
from kdctl.config.messages import by_place, clip, got, key_text, unknown_key, wrong_value
from kdctl.config.schema import (
    Component,
    DataSpec,
    Distill,
    ExperimentFile,
    Group,
    Inherit,
    ModelSpec,
    OutputStage,
    TeacherCache,
    TrainSettings,
    stage_type,
)
from kdctl.config.yaml_io import Document, KeyPath
from kdctl.errors import ConfigError, KdctlError, MissingError, Problem, did_you_mean

MAX_PROBLEMS = 50


@dataclass(frozen=True)
class Site:
    """A map of the document, the section of the schema that it should be, and for components their group."""

    path: KeyPath
    model: type[BaseModel]
    group: str
    value: dict[Any, Any]

    @property
    def keys(self) -> list[str]:
        """The keys of the section itself, as a file writes them."""
        own = [info.alias or name for name, info in self.model.model_fields.items()]
        return [*own, "extends"] if self.model is ExperimentFile else own


def check(document: Document, require_files: bool = True) -> ExperimentFile:
    """The experiment that a document states, called like its file where it has no name. Adds the origins of renamed
    keys to the document.

    Raises ConfigError with all problems; MissingError when nothing else is wrong and weights or data named by a path
    are not there (unless `require_files` is false).
    """
    return _Check(document, require_files).run()


class _Check:
    def __init__(self, document: Document, require_files: bool) -> None:
        self.document = document
        self.require_files = require_files
        self.data = copy.deepcopy(document.data)
        self.base = Path(os.path.abspath(document.main)).parent
        self.problems: list[Problem] = []
        self.missing: list[Problem] = []

    def run(self) -> ExperimentFile:
        self._models_of_stages()
        sites = {site.path: site for site in walk(ExperimentFile, self.data)}
        for site in sites.values():
            short = {name: info.alias for name, info in site.model.model_fields.items() if info.alias}
            self._keep_latest(site, short)
            self._rename_origins(site.path, short)
            if issubclass(site.model, Component):
                self._component(site)
            if issubclass(site.model, ModelSpec):
                self._weights(site, "weights", "pretrained")
            if issubclass(site.model, Inherit):
                self._weights(site, "source", "teacher")
            if issubclass(site.model, TeacherCache) and isinstance(site.value.get("dir"), str) and site.value["dir"]:
                site.value["dir"] = self._absolute((*site.path, "dir"), site.value["dir"])
        file = self._schema(sites)
        if file is not None:
            file = file if file.name else file.model_copy(update={"name": _name(self.document.main)})
            for path, message, hint in check_consistency(file):
                self._report(path, message, hint)
        if self.problems:
            raise ConfigError(*self._sorted())
        if self.missing:
            raise MissingError(*self.missing)
        assert file is not None  # a file that the schema refuses has problems
        return file

    def _report(self, path: KeyPath, message: str, hint: str | None = None, key_line: bool = False) -> None:
        self.problems.append(self._problem(path, message, hint, key_line))

    def _problem(self, path: KeyPath, message: str, hint: str | None, key_line: bool = False) -> Problem:
        origin, key = self.document.origin(path), clip(key_text(path), 200)
        if origin is None:
            return Problem(clip(message, 1000), self.document.main or None, 1, key, hint)
        line = origin.key_line if key_line and origin.line is not None else origin.line
        return Problem(clip(message, 1000), origin.file, line, key, hint)

    def _sorted(self) -> list[Problem]:
        main = self.document.main
        ordered = sorted(dict.fromkeys(self.problems), key=lambda p: (p.file != main, p.file or "", p.line or 0))
        if len(ordered) > MAX_PROBLEMS:
            return [*ordered[:MAX_PROBLEMS], Problem("... and more", main)]
        return ordered

    def _models_of_stages(self) -> None:
        """Lets a model that is taken `from` a stage leave out what it is: that stage says so."""
        stages = self.data.get("stages")
        made: dict[str, dict[Any, Any]] = {}
        if not isinstance(stages, list):
            made["student"], stages = _without_weights(self.data.get("student")), self.data.get("compress")
        for stage in stages if isinstance(stages, list) else []:
            if not isinstance(stage, dict):
                continue
            teacher, student = stage.get("teacher"), stage.get("student")
            for model in [student, *(teacher if isinstance(teacher, list) else [teacher])]:
                if isinstance(model, dict) and "kind" not in model:
                    model.update({**made.get(str(model.get("from")), {}), **model})
            if stage_type(stage) == "<train>" and stage.get("kind") != "finetune":
                model = student if isinstance(student, dict) else self.data.get("student")
                made[str(stage.get("name", "student"))] = _without_weights(model)

    # ------------------------------------------------------------------------------------------------------- schema

    def _schema(self, sites: Mapping[KeyPath, Site]) -> ExperimentFile | None:
        try:
            return ExperimentFile.model_validate(self.data)
        except ValidationError as error:
            errors = error.errors(include_url=False)
        for path, found in by_place(errors, self.data).items():
            kind = found[0]["type"]
            site = sites.get(path[:-1])
            if kind == "missing" and site is not None and (misspelt := _misspelt(site, str(path[-1]))):
                self._report((*site.path, misspelt), *unknown_key(misspelt, site.keys), key_line=True)
            elif kind == "missing":
                self._report(path, f"'{path[-1]}' is missing", _missing_hint(path))
            elif kind == "invalid_key":
                self._report(path, f"a key must be text, got {got(path[-1])}", "put it in quotes", key_line=True)
            elif kind == "extra_forbidden" and site is not None:
                twice = _given_twice(site, str(path[-1]))
                message, hint = twice or unknown_key(path[-1], site.keys)
                self._report(path, message, hint or _belongs(path), key_line=True)
            else:
                self._report(path, *wrong_value(_at(self.data, path), found))
        return None

    # --------------------------------------------------------------------------------------------------- components

    def _component(self, site: Site) -> None:
        kind_key, group = ("kind", site.group)
        if site.model is OutputStage and not site.group:
            kind_key, group = ("target", "exporters") if site.value.get("kind") == "export" else ("kind", "compressors")
        kind = site.value.get(kind_key)
        place = (*site.path, kind_key)
        if not isinstance(kind, str) or not kind:
            if kind_key == "target":
                self._report(place, "an export stage needs a target; " + _kinds("exporters"))
            return
        origin = self.document.origin(place)
        try:
            component = registry.find(group, kind, origin.base if origin else self.base)
            reserved = [*site.keys, *site.model.model_fields, kind_key]
            self._keep_latest(site, registry.signature(component).aliases)
            written = {str(k): v for k, v in site.value.items() if k not in reserved}
            checked = check_arguments(component, written, reserved)
        except KdctlError as error:
            for problem in error.problems:
                self._report(place, problem.message, problem.hint)
            return
        site.value[kind_key] = component.target if registry.is_file_kind(kind) else component.name
        for key in checked.unknown[: MAX_PROBLEMS + 1]:
            if not self._fell_away(site, kind_key, group, key):
                message, hint = unknown_argument(component, key, site.keys)
                self._report((*site.path, key), message, hint or _belongs((*site.path, key)), key_line=True)
        for place, message, hint in checked.problems:
            self._report((*site.path, *place), message, hint)
        for key in [k for k in site.value if str(k) in written]:
            del site.value[key]
        site.value.update(checked.values)
        self._rename_origins(site.path, checked.renamed)
        self._paths(site, component)

    def _keep_latest(self, site: Site, aliases: Mapping[str, str]) -> None:
        """Of several names of one key or argument, takes away those of earlier layers than the last that gives one."""
        for name in dict.fromkeys(aliases.values()):
            given = [key for key in (name, *aliases) if key in site.value and aliases.get(key, key) == name]
            layers = {key: self.document.layer((*site.path, key)) for key in given}
            for key in [key for key in given if layers[key] < max(layers.values())]:
                del site.value[key]
                size, origins = len(site.path) + 1, self.document.origins
                for path in [path for path in origins if path[:size] == (*site.path, key)]:
                    del origins[path]

    def _rename_origins(self, path: KeyPath, renamed: Mapping[str, str]) -> None:
        origins, size = self.document.origins, len(path) + 1
        for old, new in renamed.items():
            if old != new and (*path, old) in origins:
                moved = {p: o for p, o in origins.items() if p[:size] == (*path, old)}
                origins.update({(*path, new, *p[size:]): o for p, o in moved.items()})

    def _fell_away(self, site: Site, kind_key: str, group: str, key: str) -> bool:
        """Whether an argument of an earlier layer belongs to a kind that a later layer has changed."""
        document, of_kind, of_key = self.document, (*site.path, kind_key), (*site.path, key)
        if of_kind not in document.origins or of_key not in document.origins:
            return False
        if document.layer(of_key) >= document.layer(of_kind):
            return False
        for old in document.replaced.get(of_kind, []):
            try:
                signature = registry.signature(registry.find(group, str(old), document.origins[of_key].base))
            except ConfigError:
                continue
            if key in signature.arguments or key in signature.aliases:
                return True
        return False

    # -------------------------------------------------------------------------------------------------------- paths

    def _paths(self, site: Site, component: registry.Component) -> None:
        """Makes the arguments that are paths absolute, defaults among them. Those of data have to be there."""
        for name, parameter in registry.signature(component).arguments.items():
            value = site.value.get(name, parameter.default)
            if not is_path(parameter) or not isinstance(value, str) or not value:
                continue
            site.value[name] = self._absolute((*site.path, name), value)
            fetched = site.value.get("download") is True
            if component.group in ("data", "expansions") and not fetched and not os.path.exists(site.value[name]):
                hint = f"{key_text((*site.path, name))}=... names another place"
                if "download" in registry.signature(component).arguments:
                    hint = f"{key_text((*site.path, 'download'))}=true fetches it, {hint}"
                self._missing((*site.path, name), f"there is nothing at {site.value[name]}", hint)

    def _weights(self, site: Site, key: str, word: str) -> None:
        """Makes the path of weights absolute; `word` stands for weights without a path."""
        value = site.value.get(key)
        if not isinstance(value, str) or value in ("", word):
            return
        path = site.value[key] = self._absolute((*site.path, key), value)
        if not os.path.exists(path) and not os.path.exists(path + ".safetensors"):
            hint = f"{key}: a run directory, a weights file or `{word}`"
            self._missing((*site.path, key), f"there are no weights at {path}", hint)

    def _missing(self, path: KeyPath, message: str, hint: str) -> None:
        if self.require_files:
            self.missing.append(self._problem(path, message, hint))

    def _absolute(self, path: KeyPath, value: str) -> str:
        origin = self.document.origins.get(path)
        return os.path.abspath((origin.base if origin else self.base) / os.path.expanduser(value))


# ----------------------------------------------------------------------------------------------------------- walking


def walk(model: type[BaseModel], value: dict[Any, Any], path: KeyPath = (), group: str = "") -> Iterator[Site]:
    """All maps of a document that the schema knows, from the top down."""
    yield Site(path, model, group, value)
    for name, info in model.model_fields.items():
        for key in {info.alias or name, name}:
            if key in value:
                yield from _walk(info.annotation, info.metadata, value[key], (*path, key))


def _walk(annotation: Any, metadata: Any, value: Any, path: KeyPath) -> Iterator[Site]:
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        tag = next((m.tag for m in more if isinstance(m, Tag)), None)
        if tag is None or tag == stage_type(value):
            yield from _walk(inner, more, value, path)
    elif get_origin(annotation) is list:
        for index, item in enumerate(value if isinstance(value, list) else []):
            yield from _walk(get_args(annotation)[0], (), item, (*path, index))
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if isinstance(value, dict):
            marked = next((m.name for m in metadata if isinstance(m, Group)), "")
            yield from walk(annotation, value, path, marked or getattr(annotation, "group", ""))
    else:
        for member in get_args(annotation):
            yield from _walk(member, metadata, value, path)


def _name(file: str) -> str:
    """What an experiment is called that does not say it: like its file."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(file).stem).strip("-.")[:100] or "experiment"


def _at(data: Any, path: KeyPath) -> Any:
    for part in path:
        data = data[part]
    return data


def _without_weights(model: Any) -> dict[Any, Any]:
    taken = model if isinstance(model, dict) else {}
    return {k: v for k, v in taken.items() if k not in ("weights", "from", "mapping", "inherit")}


def _belongs(path: KeyPath) -> str | None:
    """Where a key that is unknown in its place is known."""
    sections: dict[str, type[BaseModel]] = {"train": TrainSettings, "data": DataSpec, "distill": Distill}
    places = [f"{name}.{path[-1]}" for name, model in sections.items() if path[-1] in model.model_fields]
    return f"did you mean {places[0]}?" if places and path[:-1] != tuple(places[0].split(".")[:-1]) else None


def _misspelt(site: Site, wanted: str) -> str | None:
    """A key of a component that was probably meant to be the one that is missing."""
    others = [str(key) for key in site.value if key not in site.keys] if issubclass(site.model, Component) else []
    return next((key for key in others[:MAX_PROBLEMS] if did_you_mean(key, [wanted])), None)


def _given_twice(site: Site, key: str) -> tuple[str, str] | None:
    """Where a key is the long name of one that is given by its short name as well."""
    info = site.model.model_fields.get(key)
    if info is None or info.alias is None:
        return None
    return f"'{key}' is another name of '{info.alias}', which is given too", "remove one"


def _missing_hint(path: KeyPath) -> str | None:
    if path[-1] != "kind" or len(path) < 2:
        return f"add {path[-1]}: ..."
    example = {"optimizer": "sgd", "schedule": "cosine", "method": "distill", "task": "classification"}
    return f"for example kind: {example[str(path[-2])]}" if path[-2] in example else "add kind: ..., see `kdctl list`"


def _kinds(group: str) -> str:
    return f"allowed: {', '.join(sorted(registry.catalogue(group)))}"
