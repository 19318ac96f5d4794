"""The catalogue of components: what a `kind` in a file stands for, and what arguments its class takes.

Built-ins are named in the tables of their packages, as text; signatures are read from source with `ast`. Nothing here
imports torch before `load`, so listing and checking stay fast and work on a machine without it.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util  # and importlib itself
import inspect
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdctl.errors import ConfigError, MissingError, did_you_mean
from kdctl.source import ClassSource, SourceError, exported_classes, read_class

GROUPS: dict[str, tuple[str, str]] = {
    "models": ("kdctl.models", "MODELS"),
    "losses": ("kdctl.losses", "LOSSES"),
    "methods": ("kdctl.methods", "METHODS"),
    "ensembles": ("kdctl.teachers", "ENSEMBLES"),
    "data": ("kdctl.data", "SOURCES"),
    "augment": ("kdctl.data", "AUGMENTATIONS"),
    "expansions": ("kdctl.data.expansions", "EXPANSIONS"),
    "tasks": ("kdctl.tasks", "TASKS"),
    "optimizers": ("kdctl.optim", "OPTIMIZERS"),
    "schedules": ("kdctl.optim", "SCHEDULES"),
    "compressors": ("kdctl.compress", "COMPRESSORS"),
    "exporters": ("kdctl.export", "EXPORTERS"),
    "loggers": ("kdctl.loggers", "LOGGERS"),
}
"""group -> (package, name of its table)."""

GIVEN: dict[str, frozenset[str]] = {
    "models": frozenset({"num_classes", "in_channels", "image_shape", "vocab_size", "max_length", "pad", "head"}),
    "optimizers": frozenset({"params"}),
    "data": frozenset({"target"}),
}
"""Arguments that kdctl itself supplies when it builds a component of the group; a file does not set them."""

CONTRACTS: dict[str, str | tuple[str, ...]] = {
    "models": "torch.nn:Module",
    "losses": "kdctl.losses.base:Loss",
    "methods": "kdctl.methods.base:Method",
    "ensembles": "kdctl.teachers.combine:Combination",
    "data": ("load",),
    "augment": "kdctl.data.augment:Augmentation",
    "expansions": "kdctl.data.expansions.base:Expansion",
    "tasks": "kdctl.tasks.base:Task",
    "optimizers": "torch.optim:Optimizer",
    "schedules": "kdctl.optim.schedules:Schedule",
    "compressors": "kdctl.compress.base:Compression",
    "exporters": "kdctl.export.base:Exporter",
    "loggers": "kdctl.loggers.base:Logger",
}
"""What makes a user's own class one of the group: the class that it derives from, or the methods that it has."""

SINGULAR = {
    "models": "model", "losses": "loss", "methods": "method", "ensembles": "ensemble", "data": "data source",
    "augment": "augmentation", "expansions": "expansion",
    "tasks": "task", "optimizers": "optimizer", "schedules": "schedule", "compressors": "compressor",
    "exporters": "exporter", "loggers": "logger",
}  # fmt: skip

USER_MODULE = "kdctl_user_"
"""How the names of modules begin that are users' files."""

_ZOOS = {
    "torchvision": "torchvision_models:TorchvisionModel", "timm": "timm_models:TimmModel",
    "huggingface": "huggingface:HuggingFaceModel",
}  # fmt: skip
"""What stands before `:NAME` in kinds of models -> the class that makes them, in kdctl.models."""
_BY_NAME_ALONE = frozenset({"exporters"})
"""Groups without `./file.py:Class`: a process that measures imports the module that opens a target's files by name."""
_OWN_CLASS = re.compile(r"^(?P<place>.+):(?P<name>[A-Za-z_]\w*)$")


@dataclass(frozen=True)
class Component:
    """One entry of the catalogue. `target` is "package.module:Class" or "/path/file.py:Class"."""

    group: str
    name: str
    target: str
    summary: str = ""
    preset: Mapping[str, Any] = field(default_factory=dict)
    source: str = "built-in"

    @property
    def is_builtin(self) -> bool:
        return self.source.startswith("built-in")


@dataclass(frozen=True)
class Parameter:
    """One argument of a component. `annotation` is source text; `default` means something where `has_default`."""

    name: str
    annotation: str
    default: Any = None
    required: bool = False
    has_default: bool = False
    given: bool = False


@dataclass(frozen=True)
class Signature:
    """What a component takes. `parameters` leave out presets; those with `given` are supplied by kdctl.

    aliases: short names of arguments, from the class attribute ALIASES. attributes: literal class attributes, with
    those of bases.
    """

    parameters: dict[str, Parameter]
    doc: str = ""
    accepts_any: bool = False
    aliases: dict[str, str] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Parameter]:
        """The parameters that a file may set."""
        return {name: p for name, p in self.parameters.items() if not p.given}


# ------------------------------------------------------------------------------------------------------- catalogue


def catalogue(group: str) -> dict[str, Component]:
    """All components of a group by name: built-ins, then plug-ins. Raises ConfigError when a plug-in clashes."""
    entries = _builtins(group)
    for name, component in _plugins(group).items():
        if name in entries:
            raise ConfigError(
                f"plug-in '{component.source}' offers the {SINGULAR[group]} '{name}', which kdctl has already",
                hint="rename or uninstall the plug-in",
            )
        entries[name] = component
    return entries


def aliases(group: str) -> dict[str, str]:
    """Other names of a group's components -> their names."""
    names = _builtins(group)
    table = getattr(importlib.import_module(GROUPS[group][0]), "ALIASES", {})
    return {alias: name for alias, name in table.items() if name in names}


def canonical(group: str, kind: str) -> str:
    """The name that a kind or its alias stands for; a kind that is no alias stays as it is."""
    return aliases(group).get(kind, kind)


def find(group: str, kind: str, base: Path | None = None) -> Component:
    """The component that `kind` names. Raises ConfigError with a hint when there is none.

    A kind is a name of the catalogue or its alias, `package.module:Class`, `./file.py:Class` (read against `base`),
    for models `torchvision:NAME`, `timm:NAME` and `huggingface:NAME_OR_FOLDER`, for optimizers the name of any class of
    torch.optim.
    """
    entries = catalogue(group)
    name = canonical(group, kind)
    if name in entries:
        return entries[name]
    own = _OWN_CLASS.match(kind)
    zoo, _, zoo_name = kind.partition(":")
    if group == "models" and zoo in _ZOOS and zoo_name:
        zoo_name = _absolute_folder(zoo_name, base) if zoo == "huggingface" else zoo_name
        target, summary = f"kdctl.models.{_ZOOS[zoo]}", f"{zoo_name} of {zoo}"
        return Component(group, f"{zoo}:{zoo_name}", target, summary, {"name": zoo_name}, f"built-in ({zoo})")
    if own is not None and not (group in _BY_NAME_ALONE and is_file_kind(kind)):
        return _own_component(group, kind, own["place"], own["name"], base)
    torch_names = _torch_optimizers() if group == "optimizers" else []
    if kind in torch_names:
        return Component(group, kind, f"torch.optim:{kind}", f"torch.optim.{kind}", {}, "torch.optim")
    hint = did_you_mean(kind, [*entries, *aliases(group), *torch_names])
    choice = f"one of {', '.join(sorted(entries))}" if len(entries) <= 12 else f"see `kdctl list {group}`"
    yours = f"a class of your own as {'package.module' if group in _BY_NAME_ALONE else './file.py'}:Class"
    raise ConfigError(f"there is no {SINGULAR[group]} '{kind}'; allowed: {choice}, or {yours}", hint=hint)


def _builtins(group: str) -> dict[str, Component]:
    package, attribute = GROUPS[group]
    table = getattr(importlib.import_module(package), attribute)
    entries = {}
    for name, (target, summary, *preset) in table.items():
        entries[name] = Component(group, name, f"{package}.{target}", summary, preset[0] if preset else {})
    return entries


@functools.cache
def _entry_points() -> dict[str, list[Any]]:
    if not _any_plugin():  # importlib.metadata costs half of the time that completing a word may take
        return {group: [] for group in GROUPS}
    from importlib.metadata import entry_points

    found = entry_points()
    return {group: list(found.select(group=f"kdctl.{group}")) for group in GROUPS}


def _any_plugin() -> bool:
    """Whether a package on the path may offer components: a group of its entry points begins with `kdctl.`."""
    for place in sys.path:
        if place.endswith(".egg") or os.path.isfile(place):
            return True  # an archive, into which only importlib.metadata looks
        try:
            with os.scandir(place or ".") as entries:
                folders = [entry.path for entry in entries if entry.name.endswith((".dist-info", ".egg-info"))]
        except OSError:
            continue
        for folder in folders:
            try:
                with open(os.path.join(folder, "entry_points.txt"), "rb") as file:
                    if b"[kdctl." in file.read():
                        return True
            except OSError:
                continue
    return False


def _plugins(group: str) -> dict[str, Component]:
    entries: dict[str, Component] = {}
    for point in _entry_points()[group]:
        source = point.dist.name if point.dist else point.value
        if point.name in entries:
            raise ConfigError(
                f"plug-ins '{entries[point.name].source}' and '{source}' both offer the {SINGULAR[group]} "
                f"'{point.name}'",
                hint="uninstall one of them",
            )
        entries[point.name] = Component(group, point.name, point.value, f"plug-in of {source}", {}, source)
    return entries


def _own_component(group: str, kind: str, place: str, name: str, base: Path | None) -> Component:
    if not is_file_kind(kind):
        component = Component(group, kind, kind, source=place)
    else:
        path = Path(os.path.abspath((base or Path.cwd()) / os.path.expanduser(place)))
        if not os.path.isfile(path):
            raise ConfigError(f"there is no file {path} for kind '{kind}'", hint="paths are read against their file")
        component = Component(group, kind, f"{path}:{name}", source=str(path))
    doc = class_source(component).doc
    return Component(group, kind, component.target, doc.split("\n")[0], {}, component.source)


def _absolute_folder(name: str, base: Path | None) -> str:
    """A model's name as it is; a folder, which begins with a dot, `~` or `/`, as an absolute path."""
    if not name.startswith((".", "~", "/")):
        return name
    return os.path.abspath((base or Path.cwd()) / os.path.expanduser(name))


def is_file_kind(kind: str) -> bool:
    """Whether a kind names a class in a file of the user's (`./file.py:Class`)."""
    own = _OWN_CLASS.match(kind)
    return own is not None and (own["place"].endswith(".py") or "/" in own["place"] or os.sep in own["place"])


def shown_kind(kind: str) -> str:
    """A kind for people: without the folder of a user's own file."""
    return kind.replace("\\", "/").rpartition("/")[2] if is_file_kind(kind) else kind


@functools.cache
def _torch_optimizers() -> list[str]:
    names = exported_classes("torch.optim")
    return [name for name in names if name != "Optimizer"]


# ------------------------------------------------------------------------------------------------------- signatures


def class_source(component: Component) -> ClassSource:
    """What the source of the component's class says. Raises ConfigError when the class is not there."""
    place, _, name = component.target.rpartition(":")
    try:
        return read_class(place, name)
    except SourceError as error:
        raise ConfigError(f"kind '{component.name}': {error}", hint=error.hint) from None


def signature(component: Component) -> Signature:
    """What the component's class takes, read from its source. Raises ConfigError when the class is not there."""
    source = class_source(component)
    given = GIVEN.get(component.group, frozenset())
    parameters = {
        p.name: Parameter(p.name, p.annotation, p.default, p.required, p.has_default, p.name in given)
        for p in source.parameters
        if p.name not in component.preset
    }
    short = source.attributes.get("ALIASES")
    short = {k: v for k, v in short.items() if v in parameters} if isinstance(short, dict) else {}
    return Signature(parameters, source.doc, source.accepts_any, short, source.attributes)


# ---------------------------------------------------------------------------------------------------------- objects


def load(component: Component) -> type:
    """The component's class. Imports its module; a user's class must be of the group's own kind."""
    place, _, name = component.target.rpartition(":")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(component, place)
    loaded = getattr(module, name, None)
    if not isinstance(loaded, type):
        raise ConfigError(f"kind '{component.name}': {place} has no class '{name}'")
    if not component.is_builtin:
        _check_contract(component, loaded)
    return loaded


def _check_contract(component: Component, loaded: type) -> None:
    contract = CONTRACTS[component.group]
    if isinstance(contract, tuple):
        absent = [name for name in contract if not callable(getattr(loaded, name, None))]
        lack = f"has no method {absent[0]}()" if absent else ""
    else:
        module, _, name = contract.partition(":")
        fits = issubclass(loaded, getattr(importlib.import_module(module), name))
        lack = "" if fits else f"does not derive from {module}.{name}"
    if lack:
        raise ConfigError(f"kind '{component.name}' is not a {SINGULAR[component.group]}: {loaded.__name__} {lack}")


def create(group: str, kind: str, arguments: Mapping[str, Any], base: Path | None = None, **given: Any) -> Any:
    """An instance of the component, called with its preset, `arguments` and what kdctl supplies (`given`).

    Raises ConfigError when the class does not take these arguments or refuses their values.
    """
    component = find(group, kind, base)
    loaded = load(component)
    declared = signature(component)
    known = declared.parameters
    values = {
        name: tuple(v) if isinstance(v, list) and name in known and known[name].annotation.startswith("tuple") else v
        for name, v in arguments.items()
    }
    label = f"{SINGULAR[group]} '{kind}'"
    repeated = sorted(set(values) & (set(component.preset) | set(given)))
    if repeated:
        raise ConfigError(f"{label}: '{repeated[0]}' is set by kdctl and cannot be given")
    unknown = sorted(set(values) - set(known)) if not declared.accepts_any else []
    if unknown:
        raise ConfigError(f"{label} has no argument '{unknown[0]}'", hint=did_you_mean(unknown[0], known))
    values |= {**component.preset, **given}
    try:
        inspect.signature(loaded).bind(**values)
    except TypeError as error:
        raise ConfigError(f"{label}: {error}", hint=f"see `kdctl explain {kind}`") from None
    try:
        return loaded(**values)
    except (ValueError, TypeError) as error:
        if component.is_builtin and isinstance(error, TypeError):
            raise
        raise ConfigError(f"{label}: {error}") from error


def _import_module(component: Component, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingError(f"kind '{component.name}': {name} cannot be imported: {error}") from error
    except Exception as error:
        if component.is_builtin:
            raise
        raise ConfigError(f"kind '{component.name}': importing {name} failed: {error!r}") from error


def _is_beside(path: Path, error: Exception) -> bool:
    """Whether a module that was not found lies in the folder of the user's file."""
    top = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    return top != "" and any((path.parent / top).with_suffix(end).exists() for end in ("", ".py"))


def _import_file(path: Path) -> Any:
    """The module of a user's file, under a name made from its path, once a process."""
    name = f"{USER_MODULE}{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        kind = MissingError if isinstance(error, ImportError) else ConfigError
        alone = "a run copies the file alone: what it needs stands in it or in an installed package"
        raise kind(f"importing {path} failed: {error!r}", hint=alone if _is_beside(path, error) else None) from error
    return module
