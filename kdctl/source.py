"""Classes read from Python source without importing it: arguments, docstring, literal class attributes.

Names that a module imports from elsewhere are followed, as are base classes, so that an inherited `__init__` is found.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from kdctl.errors import did_you_mean

_ROOTS = {"object", "Module", "ABC", "Protocol", "Generic", "Optimizer"}
"""Bases whose own arguments are of no interest to a file."""
_MAX_HOPS = 20


class SourceError(Exception):
    """The class or its module cannot be found or read."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Argument:
    """One argument of `__init__`; `default` is a value where `has_default` (written as a literal)."""

    name: str
    annotation: str
    default: Any
    required: bool
    has_default: bool


@dataclass(frozen=True)
class ClassSource:
    """What the source of a class says.

    accepts_any: further arguments are taken, or cannot be known. bases: the names of all classes that it derives from.
    functions: those that it defines or inherits. of_file: the docstring of the file that it stands in.
    """

    parameters: tuple[Argument, ...] = ()
    doc: str = ""
    accepts_any: bool = False
    attributes: dict[str, Any] = field(default_factory=dict)
    bases: frozenset[str] = frozenset()
    functions: frozenset[str] = frozenset()
    of_file: str = ""


@dataclass(frozen=True)
class _Module:
    """A parsed file: its classes, where imported names come from: name -> (module, name there), and its docstring."""

    name: str
    classes: dict[str, ast.ClassDef]
    imports: dict[str, tuple[str, str]]
    doc: str


def read_class(place: str, name: str) -> ClassSource:
    """The class `name` of a module (dotted) or a file (ends in .py). Raises SourceError when it is not there."""
    path = Path(place) if place.endswith(".py") else _module_file(place)
    if path is None:
        raise SourceError(f"there is no module '{place}'", "is it installed? a file is named as ./file.py:Class")
    return _read(str(path), _modified(path), place, name)


def exported_classes(module: str) -> list[str]:
    """Names of the classes that a package's `__init__` defines or imports; empty when it is not installed."""
    path = _module_file(module)
    if path is None:
        return []
    parsed = _parse(str(path), _modified(path), module)
    return sorted(n for n in {*parsed.classes, *parsed.imports} if n[:1].isupper())


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from None


def _module_file(module: str) -> Path | None:
    """The source file of a module, found without importing it or its packages."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top) if module else None
    except (ImportError, ValueError):
        return None
    dotted = top
    for part in rest:
        if spec is None or spec.submodule_search_locations is None:
            return None
        dotted += f".{part}"
        spec = PathFinder.find_spec(dotted, list(spec.submodule_search_locations))
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin)


@functools.lru_cache(maxsize=256)
def _parse(path: str, modified: int, name: str) -> _Module:
    try:
        tree = ast.parse(Path(path).read_bytes(), path)
    except (SyntaxError, ValueError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise SourceError(f"{path}{line} is not valid Python: {error}") from None
    package = name if path.endswith("__init__.py") else name.rpartition(".")[0]
    imports = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                origin = ".".join([*parent, *([node.module] if node.module else [])])
            for alias in node.names:
                imports[alias.asname or alias.name] = (origin, alias.name)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    return _Module(name, classes, imports, ast.get_docstring(tree) or "")


@functools.lru_cache(maxsize=1024)
def _read(path: str, modified: int, place: str, name: str, hops: int = 0) -> ClassSource:
    module = _parse(path, modified, place)
    if name in module.classes:
        return _describe(module, path, modified, module.classes[name], hops)
    if name in module.imports and hops < _MAX_HOPS:
        origin, original = module.imports[name]
        found = _module_file(origin)
        if found is not None:
            return _read(str(found), _modified(found), origin, original, hops + 1)
    raise SourceError(f"{place} has no class '{name}'", did_you_mean(name, module.classes))


def _describe(module: _Module, path: str, modified: int, node: ast.ClassDef, hops: int) -> ClassSource:
    bases = _bases(module, path, modified, node, hops)
    attributes = {}
    for base in reversed(bases):
        attributes.update(base.attributes)
    attributes.update(_literal_attributes(node))
    doc = ast.get_docstring(node) or next((b.doc for b in bases if b.doc), "")
    names = frozenset(map(_last_name, node.bases)).union(*(base.bases for base in bases))
    functions = frozenset(n.name for n in node.body if isinstance(n, ast.FunctionDef))
    functions = functions.union(*(base.functions for base in bases))
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init is None:
        if node.decorator_list:  # a dataclass or the like: its __init__ is made when it is imported
            return ClassSource((), doc, True, attributes, names, functions, module.doc)
        parameters = next((b.parameters for b in bases if b.parameters), ())
        accepts_any = any(b.accepts_any for b in bases)
        return ClassSource(parameters, doc, accepts_any, attributes, names, functions, module.doc)
    own = _arguments(init)
    accepts_any = init.args.kwarg is not None
    if accepts_any and bases and _hands_on(init):
        known = {p.name for p in own}
        own += tuple(p for p in bases[0].parameters if p.name not in known)
        accepts_any = bases[0].accepts_any
    return ClassSource(own, doc, accepts_any, attributes, names, functions, module.doc)


def _bases(module: _Module, path: str, modified: int, node: ast.ClassDef, hops: int) -> list[ClassSource]:
    found = []
    for base in node.bases:
        last = _last_name(base)
        if last in _ROOTS:
            continue
        try:
            if hops >= _MAX_HOPS or not isinstance(_bare(base), ast.Name):
                raise SourceError("not followed")
            found.append(_read(path, modified, module.name, last, hops + 1))
        except SourceError:
            found.append(ClassSource(accepts_any=True))
    return found


def _bare(base: ast.expr) -> ast.expr:
    return base.value if isinstance(base, ast.Subscript) else base


def _last_name(base: ast.expr) -> str:
    """The name of a base class, without its module."""
    base = _bare(base)
    return base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "")


def _arguments(init: ast.FunctionDef) -> tuple[Argument, ...]:
    positional = [*init.args.posonlyargs, *init.args.args]
    missing: list[ast.expr | None] = [None] * (len(positional) - len(init.args.defaults))
    pairs = [*zip(positional, [*missing, *init.args.defaults], strict=True)][1:]
    pairs += zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)
    arguments = []
    for argument, default in pairs:
        text = ast.unparse(argument.annotation) if argument.annotation else "Any"
        try:
            value, literal = (ast.literal_eval(default), True) if default is not None else (None, False)
        except ValueError:
            value, literal = None, False
        arguments.append(Argument(argument.arg, text, value, default is None, literal))
    return tuple(arguments)


def _hands_on(init: ast.FunctionDef) -> bool:
    """Whether `super().__init__(**kwargs)` is called with what `__init__` itself does not know."""
    name = init.args.kwarg.arg if init.args.kwarg else ""
    for call in ast.walk(init):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "super().__init__":
            return any(k.arg is None and isinstance(k.value, ast.Name) and k.value.id == name for k in call.keywords)
    return False


def _literal_attributes(node: ast.ClassDef) -> dict[str, Any]:
    attributes = {}
    for item in node.body:
        if not isinstance(item, ast.Assign | ast.AnnAssign) or item.value is None:
            continue
        target = item.targets[0] if isinstance(item, ast.Assign) else item.target
        if not isinstance(target, ast.Name):
            continue
        try:
            attributes[target.id] = ast.literal_eval(item.value)
        except ValueError:
            continue
    return attributes
