"""Where the time of a training goes, section by section."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SECTIONS = ("data", "sampling", "teacher", "forward", "backward", "optimizer", "exchange", "evaluation")
"""What training spends its time on. `sampling` is of texts, `exchange` between processes, `other` what is in none."""


class Clock:
    """Adds up the seconds of named sections; a section inside another is taken out of the outer one.

    On CUDA a section is marked by events on the stream and read once, in `take`, so that marking waits for nothing; on
    a CPU by the clock.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._on_cuda = torch.device(device).type == "cuda"
        self._seconds: dict[str, float] = {}
        self._marks: list[tuple[str, torch.cuda.Event]] = []
        self._inside = "other"
        self._since = time.perf_counter()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """What runs inside is counted under this name."""
        outer = self._inside
        self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def _switch(self, name: str) -> None:
        """Counts what has passed under the section that was, and what comes under `name`."""
        if self._on_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((name, event))
        else:
            now = time.perf_counter()
            self._add(self._inside, now - self._since)
            self._since = now
        self._inside = name

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """The seconds of each section since the last call; waits for the device."""
        self._switch(self._inside)
        if self._on_cuda:
            torch.cuda.synchronize()
            for (name, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
                self._add(name, start.elapsed_time(end) / 1000)
            self._marks = self._marks[-1:]
        taken, self._seconds = self._seconds, {}
        return taken
