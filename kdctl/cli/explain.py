"""`kdctl explain`: one component (its docstring and arguments, read from source) or one key of the configuration."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import kdctl
from kdctl import registry
from kdctl.cli import console
from kdctl.cli.console import yaml_text
from kdctl.cli.verb import Argument, Options, Reply
from kdctl.errors import ConfigError, UsageError, did_you_mean

_SECTION_GROUPS = {
    "student": "models", "teacher": "models", "losses": "losses", "method": "methods", "ensemble": "ensembles",
    "data": "data", "augment": "augment", "transfer": "data", "expand": "expansions", "task": "tasks",
    "optimizer": "optimizers", "schedule": "schedules", "compress": "compressors", "export": "exporters",
    "loggers": "loggers",
}  # fmt: skip
"""Key of a component's section -> the group its kinds come from."""
_LISTED = 6
_SHORTHANDS = ("distill",)
"""Keys of a file that are called like a component."""


def explain(
    options: Options,
    name: Annotated[
        str,
        Argument(metavar="NAME_OR_KEY", help="kd, losses.kd, data.views, losses.kd.temperature, ./my_net.py:Net, ..."),
    ],
) -> Reply:
    """One component or one configuration key: what it is, its arguments, types, defaults, paper and formula."""
    components = _components(name)
    if len(components) > 1:
        choices = [f"{c.group}.{c.name}" for c in components]
        raise UsageError(f"'{name}' is several things: {', '.join(choices)}", hint=f"`kdctl explain {choices[0]}`")
    if components:
        described = _component_document(components[0])
        if name in _SHORTHANDS:  # a key of that name is what most people mean
            described["key"] = _key_document(name)
        return Reply(described, _show_component)
    document = _argument_document(name) or _key_document(name)
    if document is None:
        words = _known_words(name)
        places = [word for word in dict.fromkeys(words) if word.endswith(f".{name}")]
        places = places or _arguments_called(name)
        hint = f"it is {', '.join(places[:_LISTED])}" if places else did_you_mean(name, words)
        hint = hint or "`kdctl list GROUP` shows the components, `kdctl schema` the keys"
        raise UsageError(f"there is no component and no configuration key '{name}'", hint=hint)
    return Reply(document, _show_key)


# --------------------------------------------------------------------------------------------------------- components


def _components(name: str) -> list[registry.Component]:
    """The components that `name` or `group.name` stands for."""
    group, _, rest = name.partition(".")
    if group in registry.GROUPS and (rest in _names(group) or ":" in rest):
        return [registry.find(group, rest)]
    if name.startswith(("torchvision:", "timm:", "huggingface:")):
        return [registry.find("models", name)]
    if ":" in name:
        return [registry.find(_own_group(name), name)]
    return [registry.find(g, name) for g in registry.GROUPS if name in _names(g)]


def _own_group(name: str) -> str:
    """The group that a class of the user's own belongs to, by what it derives from or the functions that it has."""
    source = registry.class_source(registry.find("losses", name))
    wanted = sorted(registry.CONTRACTS.items(), key=lambda item: item[0] == "models")  # whose base the others have too
    for group, contract in wanted:
        if isinstance(contract, str) and contract.rpartition(":")[2] in source.bases:
            return group
    if set(registry.CONTRACTS["data"]) <= source.functions:
        return "data"
    raise UsageError(
        f"'{name}' derives from nothing that tells what it is",
        hint=f"name its group: `kdctl explain models.{name}`; groups are {', '.join(registry.GROUPS)}",
    )


def _names(group: str) -> set[str]:
    return {*registry.catalogue(group), *registry.aliases(group)}


def _component_document(component: registry.Component) -> dict[str, Any]:
    signature = registry.signature(component)
    return {
        "kind": "component",
        "group": component.group,
        "name": component.name,
        "aliases": [alias for alias, name in registry.aliases(component.group).items() if name == component.name],
        "summary": component.summary,
        "doc": signature.doc,
        "taps": _taps(component) if component.group == "models" else "",
        "target": component.target,
        "source": component.source,
        "preset": dict(component.preset),
        "arguments": [_argument(parameter, signature) for parameter in signature.arguments.values()],
        "accepts_any": signature.accepts_any,
        "declares": _declared(component.group, signature.attributes),
        "costs": _costs().get("costs", {}).get(component.name) if component.group == "losses" else None,
    }


def _taps(component: registry.Component) -> str:
    """The modules that a model's features may be taken from: the part `Taps...:` of its file's docstring."""
    text = registry.class_source(component).of_file
    parts = re.findall(r"^Taps([^\n]*):\n((?:    [^\n]*\n?)+)", text, re.MULTILINE)
    own = [part for part in parts if part[0] in ("", f" of {component.name}") or part[0].startswith(",")]
    return f"Taps{own[0][0]}:\n{own[0][1].rstrip()}" if own else ""


def _declared(group: str, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What the class of a loss or a method says of itself, read from its source."""
    if group == "losses":
        taps = attributes.get("needs_taps", False)
        return {
            "teacher": bool(attributes.get("needs_teacher", True)),
            "labels": bool(attributes.get("needs_targets", False)),
            "taps": "optional" if taps is None else "required" if taps else "none",
            "whole_batch": bool(attributes.get("batchwise", False)),
            "logits_of": list(attributes.get("links", ())),
        }
    if group == "methods":
        return {
            "teacher": not attributes.get("provides_teacher", False),
            "several_processes": bool(attributes.get("parallel", False)),
        }
    return {}


@functools.cache
def _costs() -> dict[str, Any]:
    """What scripts/bench/losses.py has measured of each loss; empty where the file is not there."""
    path = Path(kdctl.__file__).parent / "losses" / "costs.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _declared_lines(group: str, declared: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The same for people: (label, text)."""
    if group == "losses":
        taps = {"required": "taps", "optional": "taps (may be left out)", "none": ""}[declared["taps"]]
        needs = ["a teacher" if declared["teacher"] else "", "labels" if declared["labels"] else "", taps]
        needs.append("the whole batch (no micro-batches)" if declared["whole_batch"] else "")
        kinds = "" if len(declared["logits_of"]) > 1 else f"of {', '.join(declared['logits_of'])} models"
        return [("needs", ", ".join(n for n in needs if n) or "nothing but logits"), ("logits", kinds)]
    if group == "methods":
        teacher = "a teacher where a term needs one" if declared["teacher"] else "no teacher: it teaches itself"
        return [("needs", teacher), ("nproc", "any number" if declared["several_processes"] else "one process")]
    return []


def _costs_line(costs: Mapping[str, Any]) -> str:
    """The costs of a loss in one line, in the units that people compare."""
    meta = _costs().get("meta", {})
    kept = costs["saved_bytes"]
    amount = f"{kept / 2**20:,.1f} MiB" if kept >= 2**20 else f"{kept / 2**10:,.0f} KiB"
    return (
        f"{costs['time_vs_kd']:,g} x the time of kd, {costs['step_overhead_percent']:g} % of a training step of "
        f"ResNet-20; {amount} kept for backward (batch {meta.get('batch', '?')}, one CPU thread)"
    )


def _argument(parameter: registry.Parameter, signature: registry.Signature) -> dict[str, Any]:
    return {
        "name": parameter.name,
        "type": _annotation_text(parameter.annotation),
        "required": parameter.required,
        "default": _plain(parameter.default) if parameter.has_default else None,
        "aliases": [alias for alias, name in signature.aliases.items() if name == parameter.name],
    }


def _annotation_text(source: str) -> str:
    """An annotation as it stands in source, with the names of config/types.py spelt out."""
    from kdctl.config import types as named

    def spell(match: re.Match[str]) -> str:
        value = getattr(named, match[0], None)
        known = get_origin(value) in (Annotated, Union, types.UnionType)
        return _type_text(value) if known else match[0]

    return re.sub(r"[A-Z]\w+", spell, source)


def _show_component(document: dict[str, Any]) -> None:
    other = f" (also {', '.join(document['aliases'])})" if document["aliases"] else ""
    console.out(f"{document['group']}: {document['name']}{other}")
    if not document["doc"].startswith(document["summary"]) or not document["summary"]:
        console.out(document["summary"])
    if document["doc"]:
        console.out("\n" + document["doc"])
    if document["taps"]:
        console.out("\n" + document["taps"])
    lines = _declared_lines(document["group"], document["declares"])
    if document["costs"]:
        lines.append(("costs", _costs_line(document["costs"])))
    if any(text for _, text in lines):
        console.out()
    for label, text in lines:
        if text:
            console.out(f"{label:<9}{text}")
    if document["preset"]:
        preset = ", ".join(f"{name} = {yaml_text(value)}" for name, value in document["preset"].items())
        console.out(f"\nfixed by this name: {preset}")
    if document["arguments"]:
        console.out()
        rows = [
            [
                " / ".join([a["name"], *a["aliases"]]),
                a["type"],
                "required" if a["required"] else yaml_text(a["default"]),
            ]
            for a in document["arguments"]
        ]
        console.print_table(["argument", "type", "default"], rows)
    elif not document["accepts_any"]:
        console.out("\nno arguments")
    if document["accepts_any"]:
        console.out("\nfurther arguments are handed on")
    if document.get("key"):
        console.out()
        _show_key(document["key"] | {"name": f"the key {document['key']['name']}"})
    console.detail(f"\nclass {document['target']}")


# --------------------------------------------------------------------------------------------------------------- keys


def _argument_document(key: str) -> dict[str, Any] | None:
    """An argument of a component, as in `losses.kd.temperature`, `kd.temperature` or `optimizer.sgd.lr`."""
    argument = key.rpartition(".")[2]
    for component in _owners(key):
        signature = registry.signature(component)
        parameter = signature.arguments.get(signature.aliases.get(argument, argument))
        if parameter is not None:
            described = _argument(parameter, signature)
            full = f"{component.group}.{component.name}"
            described["description"] = f"an argument of {component.name}: `kdctl explain {full}`"
            return {"kind": "key", **described, "name": key}
    return None


def _owners(key: str) -> list[registry.Component]:
    """The components whose argument the last part of a key may be."""
    section, _, kind = key.rpartition(".")[0].rpartition(".")
    group = _SECTION_GROUPS.get(section.rpartition(".")[2], section)
    groups = list(registry.GROUPS) if not section else [group] if group in registry.GROUPS else []
    return [registry.find(g, kind) for g in groups if kind in _names(g)]


def _key_document(key: str) -> dict[str, Any] | None:
    """A key of the schema, as in `data.views` or `teacher.train.epochs`; indices of lists may be left out."""
    from kdctl.config.schema import ExperimentFile

    models: list[Any] = [ExperimentFile]
    field = None
    for word in key.split("."):
        if word.isdigit() and field is not None:
            continue
        found = [(m, f) for m in models if (f := _field(m, word)) is not None]
        if not found:
            return None
        field = found[0][1]
        models = list(dict.fromkeys(model for _, f in found for model in _models(f.annotation)))
    if field is None:
        return None
    return {
        "kind": "key",
        "name": key,
        "description": field.description or " ".join(" ".join((m.__doc__ or "").split()) for m in models),
        "type": _type_text(field.annotation, field.metadata),
        "required": field.is_required(),
        "default": None if field.is_required() else _plain(field.get_default(call_default_factory=True)),
        "aliases": [field.alias] if field.alias and field.alias != key.rpartition(".")[2] else [],
        "keys": sorted({name for model in models for name in _key_names(model)}),
        "kinds_from": _SECTION_GROUPS.get(word) if any(_field(model, "kind") for model in models) else None,
    }


def _field(model: Any, word: str) -> Any:
    for name, field in model.model_fields.items():
        if word in (name, field.alias):
            return field
    return None


def _key_names(model: Any) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _models(annotation: Any) -> Iterator[Any]:
    """The schema classes inside an annotation: of unions, lists and maps."""
    if isinstance(annotation, type) and hasattr(annotation, "model_fields"):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _type_text(annotation: Any, metadata: Any = ()) -> str:
    """A type as a user would say it: number > 0, one of a, b, a list of ..."""
    from kdctl.config.types import When

    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation == When:
        return "epoch (or `500 steps`)"
    if origin is Annotated:
        return _type_text(arguments[0], [d for m in arguments[1:] for d in getattr(m, "metadata", [m])])
    if origin in (Union, types.UnionType):
        return " or ".join(_type_text(a) for a in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments)) if len(arguments) > 1 else f"`{arguments[0]}`"
    if origin is list:
        return f"a list of {_type_text(arguments[0])}"
    if origin is dict:
        return f"a map of {_type_text(arguments[0])} to {_type_text(arguments[1])}"
    names = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
    text = names.get(annotation) or ("map with a kind" if _field(annotation, "kind") else "map")
    limits = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [f"{sign} {getattr(m, name)}" for name, sign in limits.items() for m in metadata if hasattr(m, name)]
    return " ".join([text, " and ".join(bounds)]).strip()


def _show_key(document: dict[str, Any]) -> None:
    console.out(document["name"] + (f" (also {', '.join(document['aliases'])})" if document["aliases"] else ""))
    lines = [
        ("", document["description"]),
        ("type", document["type"]),
        ("default", "required" if document["required"] else yaml_text(document["default"])),
        ("keys", ", ".join(document.get("keys", []))),
        ("kinds", f"`kdctl list {document['kinds_from']}`" if document.get("kinds_from") else ""),
    ]
    for label, text in lines:
        if text:
            console.out(f"{label:<9}{text}" if label else text)


# ---------------------------------------------------------------------------------------------------------------- all


def _known_words(name: str) -> list[str]:
    """What may have been meant by a name: with a component in it, only its arguments."""
    from kdctl.config.schema import ExperimentFile

    before = name.rpartition(".")[0]
    arguments = [f"{before}.{word}" for owner in _owners(name) for word in registry.signature(owner).arguments]
    if arguments:
        return arguments
    words = [name for group in registry.GROUPS for name in _names(group)]
    for name, field in ExperimentFile.model_fields.items():
        words.append(name)
        words += [f"{name}.{key}" for model in _models(field.annotation) for key in _key_names(model)]
    return words


def _arguments_called(name: str) -> list[str]:
    """The places where an argument has this name: `losses.kd.temperature`, ..."""
    found = []
    for group in registry.GROUPS:
        for component in registry.catalogue(group).values():
            with contextlib.suppress(ConfigError):  # a library that is not installed
                if name in registry.signature(component).arguments:
                    found.append(f"{group}.{component.name}.{name}")
    return found


def _plain(value: Any) -> Any:
    """A default as plain values for JSON."""
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", by_alias=True, exclude_none=True)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return value
