"""Taps: any place in any model becomes a named feature. The only file with forward hooks.

A tap is `module.path`, followed by what is wanted of that module:

    layer3.0.conv1        its output
    layer3.0.relu:in      its input: the first argument (`:in.1` the second, `:in.mask` the keyword argument)
    layer3.0.relu#2       its second call in a forward (a module that is used several times)
    encoder.hidden.3      an item of its output: keys of dicts, indices of tuples, attributes of records
    .hidden.3             the same of the model's own output

The longest leading part that is a module is the module; a key that is also the name of a child needs the call spelt out
(`encoder#1.hidden`).
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdctl.errors import ConfigError, Problem, counted

_GRAMMAR = re.compile(r"(?P<dotted>[^:#\s]*)(?P<side>:in)?(?:#(?P<call>[1-9]\d*))?(?P<keys>(?:\.[^.:#\s]+)*)")
_LISTED = 12
_LEFT_OUT = "the model leaves it empty; attention of a `huggingface:` model is there with `attention: eager`"


@dataclass(frozen=True)
class _Tap:
    text: str
    module: str
    of_input: bool
    call: int
    keys: tuple[str, ...]


@dataclass
class _Recording:
    features: dict[str, Tensor] = field(default_factory=dict)
    calls: Counter[_Tap] = field(default_factory=Counter)
    originals: list[tuple[tuple[str, bool], Tensor, int, Tensor]] = field(default_factory=list)
    """Of each tap and mode: the tensor, its version when it was met, and what is kept of it."""

    def restart(self) -> None:
        self.features.clear()
        self.calls.clear()


class Taps:
    """Hooks on the modules that some taps name.

    Hooks do nothing outside of `recording()`. They work on the model given, not on copies of it, stay until `remove()`
    (or the end of a `with Taps(...)`), and change neither the model's results nor its modules. Without paths no hook is
    set.

    Raises ConfigError, for all paths at once, where a path names no module.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        self._model = model
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._taps = _parse_all(self._modules, dict.fromkeys(paths))
        self._recordings: list[_Recording] = []
        self._unchanged: set[tuple[str, bool]] = set()
        self._handles: list[RemovableHandle] = []
        if self._taps:
            self._handles.append(model.register_forward_pre_hook(self._start_hook()))
        for tap in self._taps:
            module = self._modules[tap.module]
            if tap.of_input:
                self._handles.append(module.register_forward_pre_hook(self._input_hook(tap, module), with_kwargs=True))
            else:
                self._handles.append(module.register_forward_hook(self._output_hook(tap, module)))

    @property
    def paths(self) -> list[str]:
        return [tap.text for tap in self._taps]

    def remove(self) -> None:
        """Takes the hooks away; recording afterwards is an error of the program."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Taps:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    @contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """Gives a dict that the forwards inside fill: path -> tensor, of the last forward of the model.

        Gradients flow through the features. A feature is what the module gave, also where a later layer overwrites that
        tensor in place. Leave the block before backward: recomputation (activation checkpointing) calls modules again.
        Recordings may be nested; the innermost one is filled.

        Raises ConfigError where a tap holds no tensor, or was not reached.
        """
        recording = _Recording()
        self._recordings.append(recording)
        try:
            yield recording.features
        finally:
            self._recordings.pop()
        self._finish(recording)

    # Hooks are closures over the module they were set on: a deep copy of the model carries them along, and there they
    # must do nothing.

    def _start_hook(self) -> Callable[..., None]:
        def hook(called: nn.Module, _arguments: Any) -> None:
            if self._recordings and called is self._model:
                self._recordings[-1].restart()

        return hook

    def _input_hook(self, tap: _Tap, module: nn.Module) -> Callable[..., None]:
        def hook(called: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            if self._recordings and called is module:
                named = dict(enumerate(arguments)) | keywords
                self._record(tap, named if tap.keys else next(iter(named.values()), None))

        return hook

    def _output_hook(self, tap: _Tap, module: nn.Module) -> Callable[..., None]:
        def hook(called: nn.Module, _arguments: Any, output: Any) -> None:
            if self._recordings and called is module:
                self._record(tap, output)

        return hook

    def _record(self, tap: _Tap, value: Any) -> None:
        recording = self._recordings[-1]
        recording.calls[tap] += 1
        if recording.calls[tap] == tap.call:
            recording.features[tap.text] = self._kept(recording, tap, self._select(tap, value))

    def _kept(self, recording: _Recording, tap: _Tap, value: Tensor) -> Tensor:
        """The tensor itself once a forward has shown that nothing overwrites it in place; until then a copy, for which
        it stands in after a forward that has not: the order in which gradients are summed is the graph's, which must
        be the same in the first forward of a process, a resumed one, say, as in any other.

        Eval and train mode are told apart: what is in place in one (dropout) may do nothing in the other.
        """
        if value.is_inference():
            return value.clone()
        key = (tap.text, self._model.training)
        kept = value if key in self._unchanged else value.clone()
        recording.originals.append((key, value, value._version, kept))
        return kept

    def _finish(self, recording: _Recording) -> None:
        problems = [_not_reached(t, recording.calls[t]) for t in self._taps if t.text not in recording.features]
        for key, value, version, kept in recording.originals:
            if value._version == version:
                self._unchanged.add(key)
                if recording.features.get(key[0]) is kept:
                    recording.features[key[0]] = value
            elif key in self._unchanged:
                self._unchanged.discard(key)
                hint = "the model's layers differ from forward to forward: tap the input of a later module"
                problems.append(Problem(f"the feature at tap '{key[0]}' was overwritten", key="taps", hint=hint))
        if problems:
            raise ConfigError(*problems)

    def _select(self, tap: _Tap, value: Any) -> Tensor:
        for key in tap.keys:
            found = _item(value, key)
            if found is None:
                message = f"tap '{tap.text}': there is no '{key}' in {_describe(value)}"
                empty = isinstance(value, tuple | list) and _has_place(value, key)
                hint = _LEFT_OUT if empty else _closest(tap.text, self._modules)
                raise ConfigError(Problem(message, key="taps", hint=hint))
            value = found
        if not isinstance(value, Tensor):
            message = f"tap '{tap.text}' holds no tensor but {_describe(value)}"
            raise ConfigError(Problem(message, key="taps", hint="add .key or .index to the tap"))
        return value


def check(model: nn.Module, path: str, who: str = "the model") -> None:
    """Raises ConfigError where a tap names no module of the model; keys are only known once it runs."""
    parsed = _parse(dict(model.named_modules(remove_duplicate=False)), path, who)
    if isinstance(parsed, Problem):
        raise ConfigError(parsed)


def _parse_all(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> list[_Tap]:
    taps, problems = [], []
    for path in paths:
        parsed = _parse(modules, path)
        if isinstance(parsed, Problem):
            problems.append(parsed)
        else:
            taps.append(parsed)
    if problems:
        raise ConfigError(*problems)
    return taps


def _parse(modules: Mapping[str, nn.Module], path: str, who: str = "the model") -> _Tap | Problem:
    match = _GRAMMAR.fullmatch(path)
    if not path or match is None:
        hint = "a tap is module.path, then :in for its input, #2 for its second call, .key into tuples and dicts"
        return Problem(f"'{path}' is not a tap", key="taps", hint=hint)
    dotted, keys = match["dotted"], match["keys"]
    if match["side"] is None and match["call"] is None:
        dotted, keys = _longest_module(modules, dotted)
    if dotted not in modules or (not dotted and not path.startswith((":", "#", "."))):
        message = f"{who} has no module '{match['dotted']}'"
        return Problem(message, key="taps", hint=_closest(dotted or path, modules))
    of_input, call = match["side"] is not None, int(match["call"] or 1)
    return _Tap(path, dotted, of_input, call, tuple(k for k in keys.split(".") if k))


def _longest_module(modules: Mapping[str, nn.Module], dotted: str) -> tuple[str, str]:
    """Splits into the longest leading part that is a module, and the rest."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in modules:
            return name, ".".join(parts[length:])
    return "", dotted


def _closest(path: str, modules: Iterable[str]) -> str:
    """A hint: near paths if there are any, else the first ones."""
    names = [name for name in modules if name]
    close = difflib.get_close_matches(path, names, n=3, cutoff=0.6)
    if close:
        said = "did you mean " + " or ".join(f"'{name}'" for name in close) + "?"
    else:
        outer = [name for name in names if "." not in name] or names
        said = "it has " + ", ".join(outer[:_LISTED]) + (", ..." if len(outer) > _LISTED else "")
    return said


def _item(value: Any, key: str) -> Any:
    """The item of a dict, tuple, list or record, or None where there is none."""
    if isinstance(value, Tensor):
        return None
    number = int(key) if re.fullmatch(r"-?\d+", key) else None
    if isinstance(value, Mapping):
        return value.get(key, value.get(number))
    if number is not None and isinstance(value, Sequence):
        return value[number] if _has_place(value, key) else None
    return getattr(value, key, None)


def _has_place(value: Sequence[Any], key: str) -> bool:
    """Whether a sequence is long enough for a key, whatever stands there."""
    return re.fullmatch(r"-?\d+", key) is not None and -len(value) <= int(key) < len(value)


def _describe(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a dict with " + ", ".join(str(key) for key in value)
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return "nothing" if value is None else f"a {type(value).__name__}"


def _not_reached(tap: _Tap, calls: int) -> Problem:
    if calls == 0:
        message = f"the module of tap '{tap.text}' was not called in the forward"
        return Problem(message, key="taps", hint="a container that is looped over has no output: tap a layer in it")
    there = counted(calls, "time")
    message = f"tap '{tap.text}' wants call {tap.call} of its module, which was called {there} in the forward"
    return Problem(message, key="taps")
