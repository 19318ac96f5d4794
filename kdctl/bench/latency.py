"""Latency of predictors, each in a fresh process with its own thread count, in turns.

On a shared machine the time of a call swings by factors. So the cells of a comparison take short turns, every cell
under the same weather, and beside wall percentiles a row holds the least process-CPU time of a call, which other
processes disturb least: compare by that.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from kdctl.errors import KdctlError
from kdctl.launch import OWN_GROUP, child_environment

ROUND_SECONDS = 0.1
OPEN_LIMIT, ROUND_LIMIT = 600.0, 300.0
"""Seconds after which a process that does not answer is ended."""


@dataclass(frozen=True)
class Cell:
    """One thing to time.

    what: its name in the table. opener: "package.module:function", called with `arguments` (JSON values) and `threads`;
    it returns a predictor. batch: images a call. threads: how many it computes with. python: the interpreter that runs
    it, which has kdctl and the runtime; None for this one.
    """

    what: str
    opener: str
    arguments: dict[str, Any] = field(default_factory=dict)
    batch: int = 1
    threads: int = 1
    python: str | None = None


@dataclass(frozen=True)
class Row:
    """What was measured of a cell.

    p50_ms, p95_ms: wall time of a call. cpu_ms: the least process-CPU time of a call, summed over threads.
    samples_per_second: by the median. peak_bytes: resident memory of the process, its runtime included.
    calls: how many were timed.
    """

    what: str
    runtime: str
    batch: int
    threads: int
    p50_ms: float
    p95_ms: float
    cpu_ms: float
    samples_per_second: float
    peak_bytes: int
    calls: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(cells: Sequence[Cell], *, seconds: float = 1.5, progress: Callable[[str], None] | None = None) -> list[Row]:
    """Times every cell for about `seconds`, in short turns with the others of its batch size and thread count.

    progress: told the name of each comparison as it starts. Raises KdctlError when a cell cannot be opened or dies.
    """
    rows: dict[int, Row] = {}
    numbered = sorted(enumerate(cells), key=lambda item: (item[1].threads, item[1].batch))
    for (threads, batch), group in groupby(numbered, key=lambda item: (item[1].threads, item[1].batch)):
        if progress is not None:
            progress(f"batch {batch}, {threads} thread{'s' if threads > 1 else ''}")
        members = list(group)
        measured = _interleave([cell for _, cell in members], seconds)
        rows.update(zip((number for number, _ in members), measured, strict=True))
    return [rows[number] for number in range(len(cells))]


def processor() -> str:
    """The name of the processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _interleave(cells: list[Cell], seconds: float) -> list[Row]:
    workers: list[_Worker] = []
    try:
        workers.extend(_Worker(cell) for cell in cells)
        for worker in workers:
            worker.open()
        for turn in range(max(1, round(seconds / ROUND_SECONDS))):
            for worker in workers if turn % 2 == 0 else reversed(workers):
                worker.turn(ROUND_SECONDS)
        return [worker.row() for worker in workers]
    finally:
        for worker in workers:
            worker.close()


class _Worker:
    """The process of one cell."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.runtime = ""
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.peak = 0
        threads = str(cell.threads)
        environment = child_environment(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, PYTHONWARNINGS="ignore")
        self.errors = tempfile.TemporaryFile()
        command = [cell.python or sys.executable, "-m", "kdctl.bench.cell"]
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, env=environment, text=True,
                **OWN_GROUP,
            )  # fmt: skip
        except OSError as error:
            self.errors.close()
            raise KdctlError(f"{cell.what} cannot be timed: {command[0]}: {error.strerror}") from None
        self._send({"opener": cell.opener, "arguments": cell.arguments, "batch": cell.batch, "threads": cell.threads})

    def open(self) -> None:
        self.runtime = self._receive(OPEN_LIMIT)["runtime"]

    def turn(self, seconds: float) -> None:
        self._send({"seconds": seconds})
        reply = self._receive(ROUND_LIMIT)
        self.wall += reply["wall_ms"]
        self.cpu.append(reply["cpu_ms"])
        self.peak = reply["peak_bytes"]

    def row(self) -> Row:
        p50, p95 = (float(v) for v in np.percentile(self.wall, (50, 95)))
        cell, speed = self.cell, 1000 * self.cell.batch / p50
        return Row(
            cell.what, self.runtime, cell.batch, cell.threads, p50, p95, min(self.cpu), speed, self.peak, len(self.wall)
        )

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            try:
                if stream is not None:
                    stream.close()
            except BrokenPipeError:
                pass

    def _send(self, document: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(document) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has died: the next receive says why

    def _receive(self, limit: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        watchdog = threading.Timer(limit, self.process.kill)
        watchdog.start()
        try:
            line = self.process.stdout.readline()
        finally:
            watchdog.cancel()
        reply: dict[str, Any] = json.loads(line) if line else {"error": self._last_words()}
        if "error" in reply:
            raise KdctlError(f"{self.cell.what} cannot be timed: {reply['error']}")
        return reply

    def _last_words(self) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return f"its process ended with code {code}" + (f": {lines[-1]}" if lines else "")
