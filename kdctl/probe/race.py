"""Which of several choices is fastest, by measuring them in turn: precision, layout, threads, compilation. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

from kdctl.errors import counted

BUDGET_S = 5.0
_LEAST_S = 0.5
_SHARE = 0.05
"""Measuring takes this share of the time that training is expected to take, within those bounds."""
GAIN = 0.05
"""A less plain choice must save at least this share of the time, so that noise decides nothing."""
ROUNDING = 1.1
"""Time of a step in less than fp32 counts this many times: it changes the numbers, so it must save more."""
_SLACK = (2.0, 1.5, 1.25, 1.15, 1.15, 1.15, 1.15)
"""After each round of measurements: how many times as slow as the fastest a candidate may be to stay in."""
_NEAR = 1.3
"""Numbers of threads up to this many times as slow as the best one are tried with every precision and layout."""

FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, MemoryError)
"""What a choice that does not work raises; RuntimeError includes torch's own, and that memory is short."""
Clock = Callable[[], float]


@dataclass(frozen=True)
class Choice:
    """What is chosen for a run."""

    precision: str
    layout: str
    threads: int
    compile: bool = False

    @property
    def plainness(self) -> tuple[bool, bool, bool, int]:
        """Sorts the plain ones to the front: fp32, contiguous, not compiled, few threads."""
        return self.precision != "fp32", self.layout != "contiguous", self.compile, self.threads

    def __str__(self) -> str:
        compiled = ["compiled"] if self.compile else []
        return ", ".join([self.precision, self.layout, counted(self.threads, "thread"), *compiled])


Measure = Callable[[Choice], float]
"""Seconds a sample takes with a choice; the first call for each may be slower, since it warms up."""
Times = dict[Choice, list[float]]


@dataclass(frozen=True)
class Options:
    """What is allowed of each setting."""

    precisions: Sequence[str]
    layouts: Sequence[str]
    threads: Sequence[int]
    compile: Sequence[bool]

    @property
    def count(self) -> int:
        return len(self.precisions) * len(self.layouts) * len(self.threads) * len(self.compile)

    @property
    def first(self) -> Choice:
        return Choice(self.precisions[0], self.layouts[0], self.threads[0], self.compile[0])

    def allow(self, choice: Choice) -> bool:
        pairs = zip(asdict(choice).values(), (self.precisions, self.layouts, self.threads, self.compile), strict=True)
        return all(value in allowed for value, allowed in pairs)


def fastest(options: Options, measure: Measure, clock: Clock, samples: int) -> tuple[Choice, str]:
    """The fastest of what is allowed, and a line about it.

    Takes about a twentieth of the time that `samples` take, within half a second and BUDGET_S by the clock. Compiling
    takes its own time where it is an option; where it is what the user set, the rest is chosen without it.
    Raises what `measure` raises where it does so for every choice.
    """
    deadline = clock() + _budget(options, measure, samples)
    times = _uncompiled(options, measure, clock, deadline)
    choice = plainest_of_fast(times)
    if len(options.compile) > 1:
        both = [choice, replace(choice, compile=True)]
        with suppress(Exception):  # no compiler, or a model that it does not take
            for _ in range(3):  # compiles, and records what it replays
                measure(both[1])
            compared = race(both, measure, clock, clock() + BUDGET_S)
            choice = plainest_of_fast(compared)
            times |= compared
    line = f"{choice}: {1 / min(times[choice]):,.0f} samples/s"
    plain = [
        min(own) for c, own in times.items() if (c.precision, c.layout, c.compile) == ("fp32", "contiguous", False)
    ]
    if plain and any(choice.plainness[:3]):
        line += f" (fp32 contiguous {1 / min(plain):,.0f})"
    return replace(choice, compile=choice.compile or options.compile[0]), line


def _budget(options: Options, measure: Measure, samples: int) -> float:
    """Seconds that measuring may take; the first measurement of all, which says so, warms up what the others use."""
    try:
        seconds = measure(replace(options.first, threads=max(options.threads), compile=False))
    except FAILURES:  # others may still work
        return BUDGET_S
    return min(max(_LEAST_S, _SHARE * seconds * samples), BUDGET_S)


def _uncompiled(options: Options, measure: Measure, clock: Clock, deadline: float) -> Times:
    """The times of precisions and layouts against each other, with every number of threads that is worth it.

    Those that were dropped on the way have fewer.
    """
    threads = _worthwhile_threads(options, measure, clock, deadline)
    parts = itertools.product(options.precisions, options.layouts, threads)
    return race([Choice(*part) for part in parts], measure, clock, deadline)


def _worthwhile_threads(options: Options, measure: Measure, clock: Clock, deadline: float) -> list[int]:
    """The numbers of threads with which the plain choice is about as fast as it gets, largest first.

    Tried from the largest down until one is clearly slower, since on many cores a step with one thread takes long.
    """
    most, *fewer = sorted(options.threads, reverse=True)
    if not fewer:
        return [most]
    times: dict[int, float] = {}
    for number in (most, *fewer):
        if times and clock() >= deadline:
            break
        try:
            times[number] = min(measure(Choice(options.precisions[0], options.layouts[0], number)) for _ in range(2))
        except FAILURES:  # another precision or layout may work
            return [most]
        if times[number] > _NEAR * min(times.values()):
            break
    best = min(times.values())
    return [number for number, seconds in times.items() if seconds <= _NEAR * best]


def race(candidates: Sequence[Choice], measure: Measure, clock: Clock, deadline: float) -> Times:
    """Measures the candidates in turn, round by round, drops those that fall behind, and stops at the deadline.

    The first round may take BUDGET_S longer: it is what tells the candidates apart at all. At least one is measured. A
    candidate that fails is out; where all fail, the last error is raised.
    """
    times: Times = {}
    alive = list(candidates)
    for number, slack in enumerate(_SLACK):
        for choice in list(alive):
            if times and clock() >= deadline + (BUDGET_S if number == 0 else 0):
                return times
            try:
                seconds = min(measure(choice) for _ in range(2 if number == 0 else 1))  # the first one warms up
            except FAILURES:
                alive.remove(choice)
                times.pop(choice, None)
                if not alive:
                    raise
            else:
                times.setdefault(choice, []).append(seconds)
        best = min(min(times[choice]) for choice in alive)
        alive = [choice for choice in alive if min(times[choice]) <= slack * best]
        if len(alive) == 1:
            break
    return times


def plainest_of_fast(times: Times) -> Choice:
    """The plainest of the choices that are within GAIN of the fastest, in times that count ROUNDING."""
    counted = {choice: min(own) * (1 if choice.precision == "fp32" else ROUNDING) for choice, own in times.items()}
    best = min(counted.values())
    fast = [choice for choice, seconds in counted.items() if seconds * (1 - GAIN) <= best]
    return min(fast, key=lambda choice: choice.plainness)
