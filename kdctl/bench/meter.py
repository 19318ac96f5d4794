"""What a stretch of work takes of the machine: the peak of its memory, and the energy of the processors."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from kdctl.bench.cell import peak_bytes

POWERCAP = Path("/sys/class/powercap")
_INTERVAL = 30.0
"""Seconds between readings: a counter of 262 kJ comes round once in more than four minutes at 1 kW."""
_MISSED = 0.05
"""The share of a work's time that may lie outside of the meter, for example before a run was resumed."""


class Meter:
    """Measures what runs inside `with Meter(device):`; `describe` then says it.

    Memory: on CUDA the most that tensors took; else the peak of the process's resident memory, since the start of the
    work where the system lets it be reset, else of the process so far. Energy: Intel's RAPL counters of processors and
    their memory, of the whole machine, other programs included; a GPU's is not in it. Of several processes each
    measures its own memory.
    """

    def __init__(self, device: torch.device | str = "cpu", powercap: Path = POWERCAP) -> None:
        self._device = torch.device(device)
        self._counters, self._source = find_counters(powercap)
        self._seconds = 0.0
        self._peak: int | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Meter:
        self._since = time.perf_counter()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            _reset_peak()
        self._read()
        if self._counters:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._seconds = time.perf_counter() - self._since
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._read()
        on_cuda = self._device.type == "cuda"
        self._peak = torch.cuda.max_memory_allocated(self._device) if on_cuda else peak_bytes()

    def describe(self, seconds: float | None = None) -> dict[str, Any]:
        """`peak_bytes`, `energy_joules` (None where it cannot be read) and `energy_source`, or why there is none.

        seconds: what the whole work took; where the meter saw only a part of it, the energy is not that of the whole.
        """
        joules = sum(counter.joules for counter in self._counters) if self._counters else None
        source = self._source
        if joules is not None and seconds is not None and self._seconds < (1 - _MISSED) * seconds:
            joules, source = None, "not measured: the work was interrupted and resumed"
        return {"peak_bytes": self._peak, "energy_joules": joules, "energy_source": source}

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self._read()

    def _read(self) -> None:
        """Takes a reading of all counters; where one fails, there is no energy to tell."""
        try:
            for counter in self._counters:
                counter.read()
        except (OSError, ValueError) as error:
            self._counters, self._source = [], f"not measured: a RAPL counter stopped answering: {error}"


@dataclass
class Counter:
    """One energy counter: a file of microjoules that begins at 0 again after `wrap` of them."""

    path: Path
    wrap: int
    last: int | None = None
    microjoules: int = 0

    @property
    def joules(self) -> float:
        return self.microjoules / 1e6

    def read(self) -> None:
        """Adds what has passed since the last reading, less than one turn of the counter."""
        now = int(self.path.read_text())
        if self.last is not None:
            self.microjoules += now - self.last if now >= self.last else now - self.last + self.wrap + 1
        self.last = now


def find_counters(powercap: Path = POWERCAP) -> tuple[list[Counter], str]:
    """The counters that add up to all processors and their memory, and what they are; none, and why.

    A package counts whole, its `dram` zone beside it; its cores are in it, and `psys` would count it again.
    """
    zones = sorted(powercap.glob("intel-rapl:*"))
    if not zones:
        return [], "not measured: this machine shows no RAPL counters"
    counters, names = [], []
    try:
        for zone in zones:
            name = (zone / "name").read_text().strip()
            if name.startswith("package") or name == "dram":
                counters.append(Counter(zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())))
                counters[-1].path.read_text()
                names.append(name)
    except PermissionError:
        return [], f"not measured: reading {powercap.name} needs the rights of root"
    except (OSError, ValueError) as error:
        return [], f"not measured: the RAPL counters cannot be read: {error}"
    if not counters:
        return [], "not measured: this machine shows no RAPL counter of a processor"
    return counters, f"Intel RAPL ({', '.join(names)}), the whole machine"


def _reset_peak() -> None:
    """Begins the peak of this process's resident memory anew, where the system can."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        pass  # the peak is then that of the process so far
