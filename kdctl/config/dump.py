"""The resolved experiment as YAML that reads back to the identical experiment, and where each value came from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel

from kdctl.config.arguments import plain as plain_value
from kdctl.config.messages import key_text
from kdctl.config.schema import Component, Experiment
from kdctl.config.yaml_io import KeyPath, resolves_to_text

if TYPE_CHECKING:
    from kdctl.config.expand import Loaded


_FIRST = ("kind", "name", "role", "start")
"""Keys that a map begins with, where it has them."""


def plain(value: Any) -> Any:
    """Maps, lists and scalars of a model, by the keys of a file. A setting that is off (None) is left out."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        order = [*(name for name in _FIRST if name in fields), *(name for name in fields if name not in _FIRST)]
        shown = {fields[name].alias or name: getattr(value, name) for name in order}
        found = {key: plain(item) for key, item in shown.items() if item is not None}
        if isinstance(value, Component):
            found |= plain_value(value.arguments)
        return found
    if isinstance(value, list):
        return [plain(item) for item in value]
    return plain_value(value)


def dump_yaml(experiment: Experiment) -> str:
    """The experiment as a file: keys in the order of the schema, floats that read back as the same numbers."""
    return dump_plain(plain(experiment))


def dump_plain(data: Any) -> str:
    """Maps, lists and scalars as YAML that reads back to the same."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=10**6)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested maps and lists as one map with dotted keys; items of a list by their name, kind or index."""
    if isinstance(value, Mapping) and value:
        pairs = list(value.items())
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        names = [str(item.get("name") or item.get("kind") or i) for i, item in enumerate(value)]
        unique = len(set(names)) == len(names)
        pairs = list(zip(names if unique else map(str, range(len(value))), value, strict=True))
    else:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, item in pairs:
        found |= flat(item, f"{prefix}.{key}" if prefix else str(key))
    return found


def origin_rows(loaded: Loaded) -> list[tuple[str, Any, str]]:
    """(key, value, where from) of every value of the resolved experiment; "default" where nobody wrote it.

    A path is shown as it was written.
    """
    return [(key_text(path), *_origin(loaded, path, value)) for path, value in _leaves(plain(loaded.experiment), ())]


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))
    else:
        yield path, value


def _origin(loaded: Loaded, path: KeyPath, value: Any) -> tuple[Any, str]:
    source = path
    for size in range(len(path), 0, -1):
        if path[:size] in loaded.links:
            source = (*loaded.links[path[:size]], *path[size:])
            break
    origin = loaded.document.origins.get(source)
    if origin is None:
        return value, "default"
    written = loaded.document.data
    for part in source:
        try:
            written = written[part]
        except (KeyError, IndexError, TypeError):
            return value, str(origin)
    return (written if isinstance(value, str) and isinstance(written, str) and "/" in value else value), str(origin)


class _Dumper(yaml.SafeDumper):
    """Writes block style, and quotes a text that would read back as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    text = repr(value)  # with a point, which other readers of YAML need to see a number
    return dumper.represent_scalar("tag:yaml.org,2002:float", text if "." in text else text.replace("e", ".0e"))


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = None if resolves_to_text(value) and not re.search(r"[\x00-\x1f\x7f-\x9f\ufeff]", value) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(float, _float)
_Dumper.add_representer(str, _text)
