"""What stands beside a training: who is told of it, and the signal that stops it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from kdctl.errors import Interrupted

Bar = Callable[[str, int | None], AbstractContextManager[Callable[[int], object]]]
"""(what is done, how many there are or None) -> a context that shows how far it is; it gives what is told, after each
part, how many that part had."""


@contextmanager
def no_bar(what: str, total: int | None) -> Iterator[Callable[[int], object]]:
    """Shows nothing."""
    yield lambda number: None


@dataclass(frozen=True)
class Reading:
    """Where an epoch stands: the means of the loss and of its terms over the steps of this epoch until now, the
    learning rate, and samples a second."""

    loss: float
    terms: Mapping[str, float]
    lr: float
    samples_per_second: float


@dataclass(frozen=True)
class Epoch:
    """An epoch that is being trained. epoch: how many are done. read: gives the numbers of this moment, and waits for
    the device; pause: the least seconds between two such calls."""

    stage: str
    epoch: int
    epochs: int
    steps: int
    read: Callable[[], Reading]
    pause: float


class Reporter:
    """What a run tells while it works; this one is silent. The command line shows progress with its own."""

    def say(self, text: str) -> None:
        """A line for the reader."""

    def begin(self, epoch: Epoch) -> None:
        """The steps of an epoch are about to begin, or to go on."""

    def step(self, stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
        """One optimizer step is done."""

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        """One epoch is done; `line` is what metrics.jsonl got."""


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a flag that the loop reads; the second one stops at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._catch)
        return self

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number

    def check(self, where: str) -> None:
        """Raises Interrupted when a stop was asked for."""
        if self.number is not None:
            raise Interrupted(self.number, f"stopped {where}")

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
