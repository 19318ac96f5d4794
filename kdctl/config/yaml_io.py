"""YAML, read strictly: the file and line of every value are kept, and what YAML 1.1 guesses is not guessed.

Duplicate keys are refused; `1e-3` is a number; only `true` and `false` are booleans; there are no dates and no base-60
numbers; a tag (`!anything`) is an error and never run. Nesting, aliases, numbers and sizes are bounded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from kdctl.errors import ConfigError, MissingError, Problem, did_you_mean

_START = "`kdctl init` writes one to start from"
MAX_BYTES = 1_000_000
MAX_DEPTH = 60
MAX_VALUES = 10_000
MAX_DIGITS = 20

KeyPath = tuple[str | int, ...]
"""Where a value stands: keys and list positions from the top."""

_INT = re.compile(r"[-+]?[0-9]+$")
_RADIX = re.compile(r"0(?:o[0-7]+|x[0-9a-fA-F]+)$")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$")
_CONSTANTS: dict[str, bool | None] = {"": None, "~": None, "null": None, "true": True, "false": False}
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_WORDING = {
    "found character that cannot start any token": "this character cannot start a value: put the text in quotes",
    "found a tab character that violates indentation": "a tab cannot indent: use spaces",
    "mapping values are not allowed in this context": "a second ': ' in one line: is the indentation right, or should "
    "the text be in quotes?",
    "did not find expected key": "a key was expected: is the indentation right?",
    "did not find expected '-' indicator": "a list item '- ' was expected: is the indentation right?",
    "did not find expected ',' or ']'": "a ',' or the closing ']' is missing",
    "did not find expected ',' or '}'": "a ',' or the closing '}' is missing",
    "could not find expected ':'": "a ':' after a key is missing",
    "found unexpected end of stream": "a quote is not closed",
    "exceeded maximum nesting depth": "lists or maps lie too many levels deep",
    "control characters are not allowed": "a control character: this is not a text file",
}


@dataclass(frozen=True)
class Origin:
    """Where a value was written. layer: "file", "extends" (a file that was extended) or "override"."""

    file: str
    line: int | None
    layer: Literal["file", "extends", "override"] = "file"
    key_line: int | None = None

    @property
    def base(self) -> Path:
        """The folder that relative paths written here are read against."""
        return Path.cwd() if self.layer == "override" else Path(self.file).parent

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass
class Document:
    """Plain data and, by path, where each value was written.

    replaced: the values that later layers replaced, the oldest first. files: those that were merged, the one that all
    others extend first.
    """

    data: dict[Any, Any]
    origins: dict[KeyPath, Origin]
    replaced: dict[KeyPath, list[Any]] = field(default_factory=dict)
    main: str = ""
    files: list[str] = field(default_factory=list)

    def origin(self, path: KeyPath) -> Origin | None:
        """The origin of a value, or of the nearest thing around it that was written."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path)

    def layer(self, path: KeyPath) -> int:
        """The number of the layer that a value is of: that of its file in `files`, then the command line's."""
        origin = self.origin(path)
        return self.files.index(origin.file) if origin is not None and origin.file in self.files else len(self.files)


@dataclass(slots=True)
class _Node:
    """A value as written: `value` is a scalar, a list of nodes, or a list of (key, line of the key, node)."""

    kind: Literal["scalar", "list", "map"]
    value: Any
    line: int
    open: bool = False


@dataclass(slots=True)
class _Frame:
    """A list or map that is being read. `key` waits for its value; `seen` holds the line of each key."""

    node: _Node
    key: tuple[str | int, int] | None = None
    seen: dict[str | int, int] = field(default_factory=dict)


def read_file(path: Path, layer: Literal["file", "extends"] = "file") -> Document:
    """Reads one file. Raises MissingError when it is not there, ConfigError with file and line when it is not valid."""
    name = str(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise MissingError(Problem("this file does not exist", name, hint=_neighbour(path) or _START)) from None
    except IsADirectoryError:
        inside = Path(path, "config.yaml")
        hint = f"a run is repeated by {inside}, and continued by `kdctl resume {path}`" if inside.is_file() else _START
        raise ConfigError(Problem("this is a folder, and a file is wanted", name, hint=hint)) from None
    except OSError as error:
        raise ConfigError(Problem(f"cannot be read: {error.strerror}", name)) from None
    except ValueError:
        raise MissingError(Problem("this is not a path", name)) from None
    root = _Reader(name).read(_decode(raw, name))
    if root is None:
        raise ConfigError(Problem("the file is empty", name, hint=_START))
    if root.kind != "map":
        got = "a list" if root.kind == "list" else f"the value {_short(root.value)}"
        raise ConfigError(Problem(f"an experiment is a map of keys and values, got {got}", name, root.line))
    data, origins = _plain(root, name, layer)
    return Document(data, origins, main=name, files=[name])


def read_value(text: str, name: str) -> tuple[Any, dict[KeyPath, Origin]]:
    """Reads the value of an override by the rules of a file; `name` ("override 1") stands for the file in errors."""
    try:
        root = _Reader(name).read(_decode(text.encode("utf-8", "surrogateescape"), name))
        value, origins = _plain(root, name, "override") if root else (None, {(): Origin(name, None, "override")})
    except ConfigError as error:
        hint = "put the value in quotes"
        raise ConfigError(*(replace(p, line=None, hint=p.hint or hint) for p in error.problems)) from None
    return value, {path: Origin(name, None, "override") for path in origins}


def resolves_to_text(text: str) -> bool:
    """Whether an unquoted scalar would read back as this text, and not as a number, a boolean or null."""
    return text not in _CONSTANTS and not any(p.match(text) for p in (_INT, _RADIX, _FLOAT, _NOT_FINITE))


def _neighbour(path: Path) -> str | None:
    try:
        return did_you_mean(path.name, os.listdir(path.parent))
    except OSError:
        return None


def _decode(raw: bytes, name: str) -> str:
    if len(raw) > MAX_BYTES:
        raise ConfigError(Problem(f"larger than {MAX_BYTES} bytes: this is not an experiment file", name))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(Problem("not UTF-8 text", name, line, hint="save the file as UTF-8")) from None
    if "\0" in text:
        raise ConfigError(Problem("a binary file, not YAML text", name, text.count("\n", 0, text.index("\0")) + 1))
    return text


class _Reader:
    """Turns the parser's events into nodes, without recursion."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.anchors: dict[str, _Node] = {}

    def fail(self, message: str, line: int | None, hint: str | None = None) -> ConfigError:
        return ConfigError(Problem(message, self.name, line, hint=hint))

    def read(self, text: str) -> _Node | None:
        """The root of the only document; None when there is nothing in it."""
        try:
            return self._compose(yaml.parse(text, Loader=_LOADER))
        except yaml.MarkedYAMLError as error:
            ended = error.problem == "found unexpected end of stream"
            mark = error.context_mark if ended and error.context_mark else error.problem_mark or error.context_mark
            what = error.problem or error.context or "cannot be read"
            message = _WORDING.get(what, what)
            line = min(mark.line, text.count("\n")) if mark else 0
            if mark and text.split("\n")[line][mark.column : mark.column + 1] == "\t":
                message = "a tab cannot indent or start a value: use spaces"
            begun = error.context_mark.line if error.context_mark else line
            hint = f"it belongs to what begins in line {begun + 1}" if begun < line else None
            raise self.fail(f"not valid YAML: {message}", line + 1, hint) from None
        except yaml.reader.ReaderError as error:
            at = text.count("\n", 0, error.position) + 1 if isinstance(error.position, int) else None
            raise self.fail(f"not valid YAML: {_WORDING.get(error.reason, error.reason)}", at) from None
        except yaml.YAMLError as error:
            raise self.fail(f"not valid YAML: {error}", None) from None

    def _compose(self, events: Iterator[Any]) -> _Node | None:
        root: _Node | None = None
        stack: list[_Frame] = []
        documents = values = 0
        for event in events:
            line = event.start_mark.line + 1
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self.fail("a second document (`---`): an experiment is one document", line)
            elif isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent):
                stack.pop().node.open = False
            elif isinstance(event, yaml.NodeEvent):
                node = self._node(event, line)
                root = root or node
                if stack:
                    self._attach(stack[-1], node, line)
                if node.open:
                    stack.append(_Frame(node))
                values += 1
                if len(stack) > MAX_DEPTH or values > MAX_VALUES:
                    limit = f"{MAX_DEPTH} levels deep" if len(stack) > MAX_DEPTH else f"{MAX_VALUES} values"
                    raise self.fail(f"more than {limit}: this is not an experiment file", line)
        return None if root is None or (root.kind == "scalar" and root.value is None) else root

    def _node(self, event: Any, line: int) -> _Node:
        if isinstance(event, yaml.AliasEvent):
            name = str(event.anchor)
            if name not in self.anchors:
                hint = did_you_mean(name, self.anchors)
                raise self.fail(f"alias *{_clip(name)} has no anchor before it", line, hint)
            if self.anchors[name].open:
                raise self.fail(f"alias *{_clip(name)} contains itself", line)
            return self.anchors[name]
        if event.tag is not None:
            raise self.fail(f"tag {_short(event.tag)} is not allowed: tags are never run", line, "remove the tag")
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event.value, line) if event.implicit[0] else event.value
            node = _Node("scalar", value, line)
        else:
            node = _Node("list" if isinstance(event, yaml.SequenceStartEvent) else "map", [], line, open=True)
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def _attach(self, frame: _Frame, node: _Node, line: int) -> None:
        """Adds a node to the list or map around it: there, by turns, as a key and as a value."""
        if frame.node.kind == "list":
            frame.node.value.append(node)
        elif frame.key is not None:
            frame.node.value.append((*frame.key, node))
            frame.key = None
        else:
            key = self._key(node, line)
            if key in frame.seen:
                first = frame.seen[key]
                raise self.fail(f"key '{_clip(str(key))}' stands twice: here and in line {first}", line, "remove one")
            frame.key = (key, line)
            frame.seen[key] = line

    def _key(self, node: _Node, line: int) -> str | int:
        if node.kind != "scalar" or isinstance(node.value, bool) or not isinstance(node.value, str | int):
            got = f"a {node.kind}" if node.kind != "scalar" else _short(node.value)
            raise self.fail(f"a key is text or a whole number, got {got}", line, "put the key in quotes")
        if node.value == "<<":
            raise self.fail("merge keys (`<<`) are not supported", line, "`extends:` takes up another file")
        return node.value

    def _scalar(self, text: str, line: int) -> Any:
        """The value of a plain (unquoted) scalar, by the rules of YAML 1.2."""
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        if _INT.match(text) or _RADIX.match(text):
            if len(text) > MAX_DIGITS + 1:
                raise self.fail(f"a whole number of {len(text)} digits is too large", line)
            number = int(text, 0) if _RADIX.match(text) else int(text)
            if abs(number) >= 2**63:
                raise self.fail(f"{text} is too large: whole numbers have 63 bits", line)
            return number
        if _FLOAT.match(text):
            value = float(text)
            if value in (float("inf"), float("-inf")):
                raise self.fail(f"number {_short(text)} is too large", line)
            return value
        if _NOT_FINITE.match(text):
            raise self.fail(f"{text} is not a finite number", line)
        return text


def _plain(root: _Node, name: str, layer: Literal["file", "extends", "override"]) -> tuple[Any, dict[KeyPath, Origin]]:
    """Data and origins of a tree of nodes. Aliases are copied out; how much that may come to is bounded."""
    origins: dict[KeyPath, Origin] = {}

    def build(node: _Node, path: KeyPath, key_line: int) -> Any:
        if len(origins) >= MAX_VALUES or len(path) > MAX_DEPTH:
            raise ConfigError(Problem(f"aliases unfold to more than {MAX_VALUES} values or too deep", name, key_line))
        line = node.line if node.kind == "scalar" else key_line
        origins[path] = Origin(name, line, layer, key_line)
        if node.kind == "map":
            return {key: build(value, (*path, key), at) for key, at, value in node.value}
        if node.kind == "list":
            return [build(value, (*path, i), value.line) for i, value in enumerate(node.value)]
        return node.value

    return build(root, (), root.line), origins


def _short(value: Any) -> str:
    return _clip(repr(value))


def _clip(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
