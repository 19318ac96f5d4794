"""What a logger is, and the loggers of a run together: what fails in one of them is said once and stops nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import util
from typing import Any, ClassVar

from kdctl import registry, runs
from kdctl.config.schema import Experiment
from kdctl.errors import KdctlError, MissingError, Problem
from kdctl.runs import Run

STATE = "loggers.json"
"""The file of a run that says how far each logger has come."""


class Logger:
    """A place that is told of a run: start, each epoch, finish. Only the first of several processes has loggers.

    Its constructor takes what a file may set, and imports nothing of its library. kept: plain values that it finds
    again when its run is resumed.
    """

    package: ClassVar[str] = ""
    """The library that it needs; empty for none."""
    extra: ClassVar[str] = ""
    """The extra of kdctl that brings it."""
    replaces: ClassVar[bool] = False
    """Whether an epoch that is trained again, after a kill, takes the place of the one that was told before. Others
    are not told of it twice."""

    kept: dict[str, Any]

    def require(self) -> None:
        """Raises MissingError where its library is not installed."""
        found = util.find_spec(self.package) if self.package else None
        if self.package and (found is None or found.origin is None):  # a folder of that name is no package
            message = f"the logger {self.extra} needs {self.package}, which is not installed"
            raise MissingError(Problem(message, key="loggers", hint=f"pip install 'kdctl[{self.extra}]'"))

    def start(self, run: Run, experiment: Experiment) -> str:
        """Opens what it writes to; a line that says where that is."""
        raise NotImplementedError

    def epoch(self, line: Mapping[str, Any], number: int) -> None:
        """One epoch is done. line: what metrics.jsonl got. number: how many the run has done, over all its stages."""
        raise NotImplementedError

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """The run has ended; summary: its summary.json, None where it was stopped or failed."""
        raise NotImplementedError


def build_loggers(experiment: Experiment) -> list[tuple[str, Logger]]:
    """The loggers that an experiment names, not started yet, each with a name of its own.

    Raises MissingError where the library of one is not installed.
    """
    found: list[tuple[str, Logger]] = []
    for spec in experiment.loggers:
        logger: Logger = registry.create("loggers", spec.kind, spec.arguments)
        logger.require()
        label = spec.kind.rpartition(":")[2]
        same = sum(name.partition(" ")[0] == label for name, _ in found)
        found.append((f"{label} {same + 1}" if same else label, logger))
    return found


class Listeners:
    """The loggers that an experiment names, for one run; as a context it closes those that were not finished.

    Raises MissingError, before anything is written, where the library of one is not installed.
    """

    def __init__(self, run: Run, experiment: Experiment, say: Callable[[str], None]) -> None:
        self.run, self.experiment, self.say = run, experiment, say
        self._named = build_loggers(experiment)
        self._state: dict[str, dict[str, Any]] = {}
        self._failed: set[str] = set()
        self._number: int | None = None

    def __enter__(self) -> Listeners:
        if self._named and (self.run / STATE).exists():
            with suppress(KdctlError):
                self._state = runs.read_json(self.run / STATE)
        started = []
        for name, logger in self._named:
            logger.kept = self._state.setdefault(name, {"epochs": 0})
            if self._try(name, "starting", lambda logger=logger: self.say(logger.start(self.run, self.experiment))):  # type: ignore[misc]
                started.append((name, logger))
        self._named = started
        self._write()
        return self

    def epoch(self, line: Mapping[str, Any]) -> None:
        """Tells of an epoch whose line metrics.jsonl has got already."""
        self._number = len(self.run.metrics()) if self._number is None else self._number + 1
        for name, logger in self._named:
            if logger.replaces or logger.kept["epochs"] < self._number:
                if self._try(name, "an epoch", lambda logger=logger: logger.epoch(line, self._number)):  # type: ignore[misc]
                    logger.kept["epochs"] = self._number
        self._write()

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Tells that the run has ended; further calls do nothing."""
        for name, logger in self._named:
            self._try(name, "finishing", lambda logger=logger: logger.finish(summary))  # type: ignore[misc]
        self._write()
        self._named = []

    def __exit__(self, *exception: object) -> None:
        self.finish(None)

    def _try(self, name: str, what: str, call: Callable[[], None]) -> bool:
        """Whether the call worked; the first failure of a logger is said."""
        try:
            call()
        except Exception as error:
            if name not in self._failed:
                self._failed.add(name)
                first = next(iter(str(error).splitlines()), "") or "no message"
                text = f"logger {name}: {what} failed: {type(error).__name__}: {first}"
                self.say(f"{text}; the run goes on, and its own files are whole")
            return False
        return True

    def _write(self) -> None:
        if self._named:
            with suppress(OSError):  # a disk that is full stops the run elsewhere
                runs.write_json(self.run / STATE, self._state)


def title(run: Run) -> str:
    """What a run is called elsewhere: its name and number, and what it is a control for."""
    info = run.info
    number = info.get("number")
    text = str(info.get("name") or run.path.name) if number is None else f"{info.get('name')}/{number:03d}"
    return text if info["role"] == "main" else f"{text} {role(run)}"


def role(run: Run) -> str:
    """`main`, or which control a run is."""
    info = run.info
    return "main" if info["role"] == "main" else f"control {info.get('control') or 'baseline'}"


def numbers(value: Any, prefix: str = "") -> dict[str, float]:
    """Every finite number in nested maps by its path, `/` between keys; lists and texts are left out."""
    if isinstance(value, Mapping):
        found: dict[str, float] = {}
        for key, item in value.items():
            found |= numbers(item, f"{prefix}/{key}" if prefix else str(key))
        return found
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return {prefix: float(value)} if plain and math.isfinite(value) else {}


def of_epoch(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl, each below the name of its stage."""
    return numbers({key: item for key, item in line.items() if key != "stage"}, str(line["stage"]))
