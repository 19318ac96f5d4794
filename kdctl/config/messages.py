"""Problems in plain words: what was got, what is allowed, what was probably meant.

Pydantic reports one error a branch of a union; here they become one problem a place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kdctl.config.schema import NAME
from kdctl.config.types import DEVICE, STEPS
from kdctl.config.yaml_io import KeyPath
from kdctl.errors import did_you_mean

MAX_ERRORS = 200
"""How many errors of one value are looked at."""

_KINDS_OF_VALUE = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "dict_type": "a map",
    "model_type": "a map of keys",
    "none_required": "null",
}
_BOUNDS = {"greater_than": ("gt", ">"), "greater_than_equal": ("ge", ">="), "less_than": ("lt", "<"),
           "less_than_equal": ("le", "<=")}  # fmt: skip
_LENGTHS = {"string_too_short": "text that is not empty", "too_short": "a list of at least {min_length} items",
            "too_long": "a list of at most {max_length} items", "finite_number": "a finite number"}  # fmt: skip


def got(value: Any) -> str:
    """A value as a user would write it, cut short."""
    if isinstance(value, dict):
        return "a map"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return clip(repr(value) if isinstance(value, str) else format(value), 60)


def clip(text: str, size: int) -> str:
    """The text, cut to `size` characters."""
    return text if len(text) <= size else text[: size - 3] + "..."


def key_text(path: KeyPath) -> str:
    return ".".join(map(str, path))


def unknown_key(key: Any, allowed: Sequence[str], what: str = "key") -> tuple[str, str | None]:
    """Message and hint for a key or argument that is not known."""
    names = ", ".join(allowed) if allowed else "none"
    return f"unknown {what} '{clip(str(key), 60)}'; allowed: {names}", did_you_mean(str(key), allowed)


def wrong_value(value: Any, errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """Message and hint for one value and all that the branches of its type say against it."""
    allowed = " or ".join(dict.fromkeys(_allowed(error) for error in errors))
    if "[key]" in errors[0]["loc"]:
        return f"got the key {got(errors[0]['input'])}; allowed as a key: {allowed}", None
    return f"got {got(value)}; allowed: {allowed}", _hint(value, errors)


def by_place(errors: Sequence[Mapping[str, Any]], data: Any) -> dict[KeyPath, list[Mapping[str, Any]]]:
    """Errors by the place in the data; where something deeper is wrong, a branch of another type does not matter."""
    places: dict[KeyPath, list[Mapping[str, Any]]] = {}
    for error in errors[:MAX_ERRORS]:
        places.setdefault(_place(error, data), []).append(error)
    for path in list(places):
        deeper = any(len(other) > len(path) and other[: len(path)] == path for other in places)
        if deeper and all(error["type"] in {*_KINDS_OF_VALUE, "literal_error"} for error in places[path]):
            del places[path]
    return places


def _place(error: Mapping[str, Any], data: Any) -> KeyPath:
    """The location without the names of union branches."""
    path: list[str | int] = []
    current = data
    for position, part in enumerate(error["loc"]):
        inside_map = isinstance(current, dict) and part in current
        inside_list = isinstance(current, list | tuple) and isinstance(part, int) and part < len(current)
        if inside_map or inside_list:
            current = current[part]
        elif not (error["type"] == "missing" and position == len(error["loc"]) - 1):
            continue
        path.append(part)
    return tuple(path)


def _allowed(error: Mapping[str, Any]) -> str:
    kind, context = error["type"], error.get("ctx") or {}
    if kind in _KINDS_OF_VALUE:
        return _KINDS_OF_VALUE[kind]
    if kind == "literal_error":
        return str(context["expected"])
    if kind in _BOUNDS:
        name, sign = _BOUNDS[kind]
        limit = context[name]
        return f"a number {sign} {int(limit) if limit == int(limit) else limit}"
    if kind in _LENGTHS:
        return _LENGTHS[kind].format(**context)
    if kind == "string_pattern_mismatch":
        if context["pattern"] == STEPS:
            return "a number of steps as `500 steps`"
        if context["pattern"] == DEVICE:
            return "auto, cpu, cuda, cuda:N or mps"
        is_name = NAME in context["pattern"]
        return "a name of letters, digits, `_`, `.` and `-`" if is_name else f"text that matches {context['pattern']}"
    if kind == "value_error":
        return str(context["error"])
    return str(error["msg"])


def _hint(value: Any, errors: Sequence[Mapping[str, Any]]) -> str | None:
    kinds = {error["type"] for error in errors}
    if "bool_type" in kinds and str(value).lower() in {"yes", "no", "on", "off", "true", "false", "0", "1"}:
        return "write true or false"
    if isinstance(value, float) and value.is_integer() and kinds & {"int_from_float", "int_type"}:
        return f"write {int(value)}"
    if isinstance(value, str):
        expected = " ".join(e["ctx"]["expected"] for e in errors if e["type"] == "literal_error")
        if words := re.findall(r"'([^']*)'", expected):
            return did_you_mean(value, words)
        if kinds & {"int_type", "float_type"} and re.fullmatch(r"[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?", value):
            return "remove the quotes"
    if "string_type" in kinds and isinstance(value, int | float):
        return "put it in quotes"
    if "model_type" in kinds and isinstance(value, str):
        return f"for a component: {{kind: {value}}}" if re.fullmatch(r"\w+", value) else None
    return None
