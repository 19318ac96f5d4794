"""The JSON Schema of experiment files, for editors: every kind by name, with the arguments of its class."""

from __future__ import annotations

import copy
from typing import Any

from kdctl import registry
from kdctl.config.arguments import adapter, defaults
from kdctl.config.schema import DataSpec, ExperimentFile, LossSpec, ModelSpec, TaskSpec, TeacherSpec
from kdctl.errors import ConfigError

_SPECS = (TaskSpec, DataSpec, ModelSpec, TeacherSpec, LossSpec)


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of what a file may say. Raises ConfigError when a plug-in clashes."""
    schema = ExperimentFile.model_json_schema(by_alias=True)
    schema["title"] = "kdctl experiment"
    schema["properties"]["extends"] = {"type": "string", "description": "another file that this one changes"}
    definitions = schema["$defs"]
    plain = definitions.pop("Component")
    for group in sorted(_point_to_groups(schema)):
        definitions[group] = copy.deepcopy(plain)
        _add_kinds(definitions[group], group)
    for spec in _SPECS:
        if spec.__name__ in definitions:
            _add_kinds(definitions[spec.__name__], spec.group)
    _add_output_kinds(definitions["OutputStage"])
    return schema


def _point_to_groups(schema: Any) -> set[str]:
    """Makes each reference to a plain component one to its group's own definition; returns the groups."""
    found: set[str] = set()
    if isinstance(schema, list):
        for item in schema:
            found |= _point_to_groups(item)
    elif isinstance(schema, dict):
        if isinstance(schema.get("group"), str) and "$ref" in schema:
            group = schema.pop("group")
            schema["$ref"] = f"#/$defs/{group}"
            found.add(group)
        for item in schema.values():
            found |= _point_to_groups(item)
    return found


def _add_kinds(definition: dict[str, Any], group: str) -> None:
    """Names the kinds of a group in a component's definition, and for each what arguments it takes."""
    entries, short = registry.catalogue(group), registry.aliases(group)
    names = {name: [name, *(alias for alias, other in short.items() if other == name)] for name in entries}
    own = {"type": "string", "pattern": "[:.]|^[A-Z]", "description": "a class of your own, or of torch"}
    named = {"enum": [*entries, *short], "description": "; ".join(f"{c.name}: {c.summary}" for c in entries.values())}
    definition["properties"]["kind"] = {"anyOf": [named, own]}
    own_keys = list(definition["properties"])
    definition["allOf"] = [_rule("kind", names[name], component, own_keys) for name, component in entries.items()]


def _add_output_kinds(definition: dict[str, Any]) -> None:
    compressors, exporters = registry.catalogue("compressors"), registry.catalogue("exporters")
    definition["properties"]["kind"] = {"enum": [*compressors, "export"]}
    definition["properties"]["target"] = {"enum": list(exporters), "description": "of an export: the runtime"}
    own_keys = list(definition["properties"])
    definition["allOf"] = [_rule("kind", [name], component, own_keys) for name, component in compressors.items()]
    definition["allOf"] += [_rule("target", [name], component, own_keys) for name, component in exporters.items()]


def _rule(key: str, names: list[str], component: registry.Component, own_keys: list[str]) -> dict[str, Any]:
    condition = {"properties": {key: {"enum": names}}, "required": [key]}
    return {"if": condition, "then": _arguments(component, own_keys)}


def _arguments(component: registry.Component, own_keys: list[str]) -> dict[str, Any]:
    try:
        signature = registry.signature(component)
    except ConfigError:  # a plug-in whose source is not at hand
        return {}
    filled = defaults(signature)
    properties: dict[str, Any] = {}
    for name, parameter in signature.arguments.items():
        properties[name] = adapter(parameter.annotation).json_schema()
        if name in filled:
            properties[name]["default"] = filled[name]
    aliased = set(signature.aliases.values())
    required = [name for name, p in signature.arguments.items() if p.required and name not in aliased]
    for alias, name in signature.aliases.items():
        properties[alias] = {**properties[name], "description": f"another name of {name}"}
    found: dict[str, Any] = {"properties": properties}
    if not signature.accepts_any:
        found["propertyNames"] = {"enum": [*own_keys, *properties]}
    if required:
        found["required"] = required
    return found
