"""Errors that a user can act on, and the exit codes they end in (the table stands in docs: 0 ok, 1 runtime, ...).

Every failure that is the user's, the machine's or the data's to mend is a KdctlError; anything else is a bug of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: what was got, what is allowed, where it stands and how to mend it."""

    message: str
    file: str | None = None
    line: int | None = None
    key: str | None = None
    hint: str | None = None

    def where(self) -> str:
        """`file:line: key: ` with the parts that are known."""
        place = self.file or ""
        if self.file and self.line is not None:
            place += f":{self.line}"
        return "".join(f"{part}: " for part in (place, self.key) if part)

    def __str__(self) -> str:
        return self.where() + self.message + (f" ({self.hint})" if self.hint else "")


class KdctlError(Exception):
    """An error with an exit code and one or more problems; str() is what the user reads."""

    code: ClassVar[int] = 1

    def __init__(self, *problems: Problem | str, hint: str | None = None) -> None:
        self.problems = [p if isinstance(p, Problem) else Problem(p, hint=hint) for p in problems]
        super().__init__("\n".join(str(p) for p in self.problems))

    def as_dict(self) -> dict[str, object]:
        """The JSON document of an error."""
        errors = [asdict(p) for p in self.problems]
        return {"schema_version": 1, "ok": False, "code": self.code, "errors": errors}


class UsageError(KdctlError):
    """The command line itself is wrong."""

    code = 2


class ConfigError(KdctlError):
    """The experiment is wrong: keys, values, taps that do not exist, class counts that cannot match."""

    code = 3


class MissingError(KdctlError):
    """Data, weights, a dependency or a run is not there; the hint says which command or extra brings it."""

    code = 4


class OutOfMemoryError(KdctlError):
    """The machine's memory does not suffice."""

    code = 5


class GateError(KdctlError):
    """A quality gate, parity or regression check failed."""

    code = 6


class DivergedError(KdctlError):
    """A loss is not finite."""

    code = 7


class Interrupted(KdctlError):
    """Stopped by SIGINT (130) or SIGTERM (143) after saving; `code` is set on the instance."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.code = 128 + signal_number  # type: ignore[misc]
        self.run: str | None = None
        """The run that was saved."""


def did_you_mean(word: str, options: Iterable[str]) -> str | None:
    """A hint "did you mean 'x'?" with the closest of `options`, or None when nothing is close."""
    close = difflib.get_close_matches(word.lower(), {o.lower(): o for o in options}, n=1, cutoff=0.6)
    if not close:
        return None
    original = next(o for o in options if o.lower() == close[0])
    return f"did you mean '{original}'?"


def counted(number: int, noun: str) -> str:
    """A number of things as a text says it: `1 epoch`, `1,500 epochs`, `2 processes`."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, one of torch's among them, says that memory does not suffice."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
