"""What the benchmarks share: contenders that take turns, medians and their spread, CPU time, tables, JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Cell = dict[str, Any]
"""What one contender measured in one round."""
AKAMASTER = {"shortcut": "pad", "mapping": {"linear.": "fc."}, "normalize": "imagenet"}
"""How the weights of resnet56-4bfd9763.th are read."""


# ------------------------------------------------------------------------------------------------------------ measuring


def cpu_seconds() -> float:
    """User and system time of this process, of its children that ended and (Linux) of those that still run."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system + _living_children()


def _living_children() -> float:
    ticks = 0
    for task in Path("/proc/self/task").glob("*/children"):
        for pid in task.read_text().split():
            stat = Path("/proc", pid, "stat")
            if stat.exists():
                fields = stat.read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def peak_mib() -> float:
    """Most memory that this process has held, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Meter:
    """Wall and CPU seconds since the last start."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.wall, self.cpu = time.perf_counter(), cpu_seconds()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self.wall, cpu_seconds() - self.cpu


@dataclass(frozen=True)
class Finished:
    """A command that ended well: its output, and what it cost, the processes it started included."""

    output: str
    seconds: float
    cpu_seconds: float
    peak_mib: float


def run(command: Sequence[object], cwd: Path | None = None, threads: int | None = None, **env: str) -> Finished:
    """Runs a command to its end; one that fails ends the benchmark with its own message.

    threads: limits what libraries take; None leaves that to the command.
    """
    limits = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        began = time.perf_counter()
        process = subprocess.Popen(
            [str(part) for part in command], cwd=cwd, env={**os.environ, **limits, **env}, stdout=output, stderr=errors
        )
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0), errors.seek(0)
        if process.returncode:
            said = errors.read()[-3000:] + output.read()[-1000:]
            sys.exit(f"{said}\n{' '.join(map(str, command))}: exit code {process.returncode}")
        return Finished(output.read(), seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def last_json(output: str) -> Any:
    """The JSON document in the last line of an output."""
    return json.loads(output.strip().splitlines()[-1])


def take_turns(contenders: Mapping[str, Callable[[], Cell]], rounds: int) -> dict[str, list[Cell]]:
    """The cells of each contender; in every round each has its turn, in an order that moves on from round to round."""
    cells: dict[str, list[Cell]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        at = number % len(names)
        for name in names[at:] + names[:at]:
            say(f"round {number + 1} of {rounds}: {name}")
            cells[name].append(contenders[name]())
    return cells


# ------------------------------------------------------------------------------------------------------------ reporting


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def ratio(own: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """The spread of own / other, taken round by round: what slows a whole round down falls out."""
    return spread([a / b for a, b in zip(own, other, strict=True)])


def spread_text(value: dict[str, float], digits: int = 0) -> str:
    """A spread as `median (least-most)`."""
    median, least, most = (f"{value[k]:,.{digits}f}" for k in ("median", "least", "most"))
    return f"{median} ({least}-{most})"


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need to be, numbers to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        print(row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)))


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def conditions(threads: int) -> dict[str, Any]:
    """Under what the numbers came about. load: the number of busy processes, a minute's mean, when this is called."""
    import torch

    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": usable_cores(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def finish(document: dict[str, Any], file: Path | None) -> None:
    """Writes a benchmark's JSON where it was asked for."""
    if file is not None:
        file.write_text(json.dumps({"schema_version": 1, **document}, indent=1) + "\n")
        say(f"wrote {file}")


def common_parser(documentation: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes."""
    made = argparse.ArgumentParser(description=documentation.splitlines()[0])
    made.add_argument("--threads", type=int, default=usable_cores(), help="of each contender; all cores by default")
    made.add_argument("--json", type=Path, help="write the result here too")
    return made


# ------------------------------------------------------------------------------------------------------- running kdctl


def kdctl(*arguments: object, cwd: Path, cache: Path, threads: int | None = None) -> tuple[Any, Finished]:
    """The JSON document of a kdctl command, run in a folder with its stored teachers in `cache`, and what it cost."""
    command = [sys.executable, "-m", "kdctl", *arguments, "--quiet", "--json"]
    done = run(command, cwd, threads, KDCTL_CACHE=str(cache))
    return json.loads(done.output), done


def write_yaml(path: Path, document: dict[str, Any]) -> Path:
    import yaml

    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def experiment(teacher: str, student: str, data: dict[str, Any], weights: Path | None = None) -> dict[str, Any]:
    """An experiment file as the benchmarks train it: crop and flip, T 4, the teacher's share 0.9, SGD."""
    taught = {"weights": str(weights.resolve()), **AKAMASTER} if weights else {"control": True}
    return {
        "name": "bench",
        "data": {
            **data,
            "val_fraction": 0.0,
            "augment": [{"kind": "random_crop", "padding": 4}, {"kind": "horizontal_flip"}],
        },
        "teacher": {"kind": teacher, **taught},
        "student": {"kind": student},
        "distill": {"T": 4, "alpha": 0.9},
        "optimizer": {"kind": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True},
        "train": {"epochs": 1, "seed": 0},
    }
