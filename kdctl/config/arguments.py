"""Arguments of a component, checked against the annotations in its class's source, without importing it.

An annotation is read, not run: a name that is not known here (`Tensor`, `nn.Module`) stands for values that a file
cannot hold, so it drops out of a union, and alone it takes anything.
"""

from __future__ import annotations

import ast
import functools
import types as builtin_types
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Union

from pydantic import ConfigDict, Strict, TypeAdapter, ValidationError

from kdctl import registry
from kdctl.config import types
from kdctl.config.messages import by_place, got, unknown_key, wrong_value
from kdctl.config.yaml_io import KeyPath
from kdctl.registry import Component, Parameter, Signature

_NAMES: dict[str, Any] = {
    name: value for name, value in vars(types).items() if not name.startswith("_") and name[0].isupper()
}
_NAMES |= {"int": int, "float": float, "str": str, "bool": bool, "None": None, "Any": Any}
_NAMES |= {"list": list, "tuple": list, "Sequence": list, "Iterable": list, "dict": dict, "Mapping": dict}
_UNKNOWN = object()
_STRICT = ConfigDict(strict=True, allow_inf_nan=False)


@dataclass
class Checked:
    """Arguments by their proper names and as numbers of their type, and what is wrong, by its place as written."""

    values: dict[str, Any] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    problems: list[tuple[KeyPath, str, str | None]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def check_arguments(component: Component, written: Mapping[str, Any], reserved: Container[str] = ()) -> Checked:
    """Checks what a file gives a component. Values that are wrong are kept as they are, beside the problem.

    reserved: keys beside the arguments that have a meaning of their own, which no argument can be given by.
    """
    signature = registry.signature(component)
    known = signature.arguments
    checked = Checked()
    for key, value in written.items():
        name = signature.aliases.get(key, key)
        twice = key != name and (name in written or name in checked.renamed.values())
        checked.renamed[key] = name
        if twice:
            checked.problems.append(((key,), f"'{key}' is another name of '{name}', which is given too", "remove one"))
        elif name in known:
            checked.values[name], problems = _check_value(known[name], value)
            checked.problems += [((key, *place), message, hint) for place, message, hint in problems]
        elif name in component.preset:
            message = f"'{key}' is fixed by kind '{component.name}' ({name}: {component.preset[name]})"
            checked.problems.append(((key,), message, "choose another kind"))
        elif name in signature.parameters:
            checked.problems.append(((key,), f"'{key}' is set by kdctl, from the data and the models", "remove it"))
        elif signature.accepts_any:
            checked.values[name] = value
        else:
            checked.unknown.append(key)
    for name, parameter in known.items():
        if parameter.required and name in reserved and not component.is_builtin:
            message = f"the argument '{name}' of '{component.name}' has the name of a key of kdctl, which goes first"
            checked.problems.append(((name,), message, "give it another name or a default in the class"))
        elif parameter.required and name not in checked.values:
            message = f"argument '{name}' of '{component.name}' is missing; allowed: {parameter.annotation}"
            checked.problems.append(((name,), message, f"add {name}: ..."))
    return checked


def unknown_argument(component: Component, key: str, reserved: list[str]) -> tuple[str, str | None]:
    """Message and hint for an argument that the component's class does not have."""
    signature = registry.signature(component)
    return unknown_key(key, [*signature.arguments, *signature.aliases, *reserved], f"argument of '{component.name}':")


def defaults(signature: Signature) -> dict[str, Any]:
    """The defaults that are written as literals, as plain data."""
    found = {}
    for name, parameter in signature.arguments.items():
        if parameter.has_default:
            found[name] = _check_value(parameter, plain(parameter.default))[0]
    return found


def is_path(parameter: Parameter) -> bool:
    """Whether the argument is annotated as a path."""
    return "PathStr" in parameter.annotation


def plain(value: Any) -> Any:
    """The value with lists for tuples and sets."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    return value


def _check_value(parameter: Parameter, value: Any) -> tuple[Any, list[tuple[KeyPath, str, str | None]]]:
    try:
        return plain(adapter(parameter.annotation).validate_python(value)), []
    except ValidationError as error:
        found = error.errors(include_url=False)
    if any(e["type"] in ("missing", "too_long") for e in found):  # a tuple of another length
        return value, [((), f"got {got(value)}; allowed: {parameter.annotation}", None)]
    problems: list[tuple[KeyPath, str, str | None]] = []
    for path, errors in by_place(found, value).items():
        inner = value
        for part in path:
            inner = inner[part]
        problems.append((path, *wrong_value(inner, errors)))
    return value, problems


# ------------------------------------------------------------------------------------------------------- annotations


@functools.cache
def adapter(annotation: str) -> TypeAdapter[Any]:
    """A strict validator for an annotation's text; one that cannot be read takes anything."""
    return TypeAdapter(annotation_type(annotation), config=_STRICT)


def annotation_type(annotation: str) -> Any:
    """The type that an annotation's text stands for, made of builtins, Literal and kdctl.config.types."""
    try:
        found = _read(ast.parse(annotation, mode="eval").body)
    except (SyntaxError, ValueError, TypeError):
        return Any
    return Any if found is _UNKNOWN else found


def _read(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            return annotation_type(node.value)
        return None if node.value is None else _UNKNOWN
    if isinstance(node, ast.Name | ast.Attribute):
        return _NAMES.get(_last(node), _UNKNOWN)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _union([_read(node.left), _read(node.right)])
    if isinstance(node, ast.Subscript):
        inner = list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]
        return _read_subscript(_last(node.value), inner)
    return _UNKNOWN


def _read_subscript(name: str, inner: list[ast.expr]) -> Any:
    if name == "Literal":
        return Literal[tuple(ast.literal_eval(item) for item in inner)]
    if name == "Annotated":
        return _read(inner[0])
    if name == "tuple":
        variadic = isinstance(inner[-1], ast.Constant) and inner[-1].value is Ellipsis
        items = tuple(_known(_read(item)) for item in (inner[:-1] if variadic else inner))
        if variadic:
            return list[items[0]]  # type: ignore[valid-type]
        return Annotated[builtin_types.GenericAlias(tuple, items), Strict(False)]
    items = tuple(_known(_read(item)) for item in inner)
    if name in {"Optional", "Union"}:
        return _union([*map(_read, inner), *([None] if name == "Optional" else [])])
    if name in {"list", "Sequence", "Iterable"} and len(items) == 1:
        return list[items[0]]  # type: ignore[valid-type]
    if name in {"dict", "Mapping"} and len(items) == 2:
        return dict[items[0], items[1]]  # type: ignore[valid-type]
    return _UNKNOWN


def _union(members: list[Any]) -> Any:
    known = [m for m in members if m is not _UNKNOWN]
    if not known or known == [None]:
        return _UNKNOWN
    return Union[tuple(known)]  # noqa: UP007 - built from a list


def _known(found: Any) -> Any:
    return Any if found is _UNKNOWN else found


def _last(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
