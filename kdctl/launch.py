"""Processes that work for this one, and several of one command on this machine: started, watched, and ended together.

Each is told its place among the others by the environment, in torchrun's words. The first one speaks to the user; of
the others only what explains a failure is shown. No torch.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from kdctl.errors import KdctlError, Problem

_OWN = "KDCTL_LAUNCHED"
_PATIENCE = 5.0
"""Seconds that processes have to end by themselves, and again to end after SIGTERM."""
_TO_SAVE = 60.0
"""Seconds that a process without its launcher has to finish a step and to save."""
_SHOWN_LINES = 20
_KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
OWN_GROUP: dict[str, Any] = {"process_group": 0} if os.name == "posix" else {}
"""For Popen: the signals of a terminal, such as Ctrl-C, do not reach the process, whose parent says when it ends."""


def child_environment(**settings: str) -> dict[str, str]:
    """The environment of a Python process that works for this one, with further settings.

    It looks for modules where this one does: in the working directory, where `python -m` and `-c` look first and a
    user's file may be called like one of Python's own modules, only if this one looks there too.
    """
    looked = {os.path.abspath(place) for place in sys.path}
    return os.environ | ({} if os.getcwd() in looked else {"PYTHONSAFEPATH": "1"}) | settings


def world_size() -> int:
    """How many processes the environment announces; 1 where this one was started alone."""
    said = os.environ.get("WORLD_SIZE", "")
    return int(said) if said.isdecimal() else 1


def rank() -> int:
    """This process's number among them."""
    return int(os.environ.get("RANK", "0")) if world_size() > 1 else 0


def local_world_size() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world_size() > 1 else 1


def agent() -> str:
    """Names the torchrun that started this process, the same over its restarts; empty where none did.

    Its folder for the errors of its processes has a random name.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    return f"{socket.gethostname()}:{path.partition('/attempt_')[0]}" if path else ""


def end_with_launcher() -> None:
    """Where `start` started this process: has it end as if by SIGTERM when that one is no longer there."""
    if os.environ.pop(_OWN, None) is None:
        return

    def wait() -> None:
        if not os.read(0, 1):  # the launcher holds the other end
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(_TO_SAVE)
            os._exit(143)  # it waits for a process that is gone, and never comes to read the signal

    threading.Thread(target=wait, daemon=True).start()


@dataclass
class _Process:
    """One process, and how it ended. asked: whether it was told to."""

    rank: int
    process: subprocess.Popen[bytes]
    lines: list[str] = field(default_factory=list)
    code: int | None = None
    asked: bool = False

    def follow(self, ended: queue.SimpleQueue[_Process]) -> None:
        """Keeps the end of what it writes to stderr, and says when it has ended."""
        if self.process.stderr is not None:
            for line in self.process.stderr:
                self.lines = [*self.lines[1 - _SHOWN_LINES :], line.decode(errors="replace").rstrip()]
        code = self.process.wait()
        self.code = code
        ended.put(self)

    def end(self, number: int) -> None:
        if self.code is None:
            self.asked = True
            self.process.send_signal(number)


def start(count: int, command: Sequence[str]) -> int:
    """Runs a command in so many processes until all have ended, and returns their exit code.

    SIGINT, SIGTERM and SIGHUP are handed to the first process, which saves and stops all; a second one ends them.
    Raises KdctlError, with the exit code of the process that failed first, where the first process could not say what
    was wrong.
    """
    ended: queue.SimpleQueue[_Process] = queue.SimpleQueue()
    signals: list[int] = []
    processes: list[_Process] = []

    def catch(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        if processes:
            processes[0].process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    before = {number: signal.signal(number, catch) for number in _caught()}
    try:
        port = _free_port()
        for number in range(count):
            processes.append(_start(number, count, port, command))
        for one in processes:
            threading.Thread(target=one.follow, args=(ended,), daemon=True).start()
        if signals:  # one that came before there was a process
            processes[0].process.send_signal(signal.SIGTERM)
        return _outcome(processes, _watch(processes, ended, signals))
    finally:
        for one in processes:
            one.end(_KILL)
        for number, handler in before.items():
            signal.signal(number, handler)


def _caught() -> list[int]:
    return [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def _start(number: int, count: int, port: int, command: Sequence[str]) -> _Process:
    place = {
        "RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, _OWN: 1,
    }  # fmt: skip
    environment = child_environment(**{name: str(value) for name, value in place.items()})
    first = number == 0
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=None if first else subprocess.DEVNULL,
        stderr=None if first else subprocess.PIPE,
        **OWN_GROUP,
    )
    return _Process(number, process)


def _watch(processes: list[_Process], ended: queue.SimpleQueue[_Process], signals: list[int]) -> list[_Process]:
    """Waits until all have ended, and ends them where one has failed; the processes in the order of their ends."""
    order: list[_Process] = []
    deadline, hard = float("inf"), False
    while len(order) < len(processes):
        try:
            order.append(ended.get(timeout=0.2 if deadline == float("inf") else 0.05))
        except queue.Empty:
            pass
        failed = [one for one in order if one.code]
        if deadline == float("inf") and (failed or len(signals) > 1):
            deadline = time.monotonic() + _PATIENCE
        if any(one.rank == 0 for one in failed) and not hard:
            deadline = min(deadline, time.monotonic())
        if time.monotonic() >= deadline:
            for one in processes:
                one.end(_KILL if hard else signal.SIGTERM)
            deadline, hard = time.monotonic() + _PATIENCE, True
    return order


def _outcome(processes: list[_Process], order: list[_Process]) -> int:
    """The exit code of all; raises KdctlError where the first process could not say what was wrong."""
    failed = [one for one in order if one.code]
    if not failed:
        return 0
    own = [one for one in failed if not one.asked] or failed
    killed = next((one for one in own if one.code is not None and one.code < 0), None)
    first = processes[0]
    error = _error(killed or own[0], len(processes))
    if first in own and first.code is not None and first.code > 0:  # it has said what it knows
        if killed is not None:
            print(error.problems[0].message, file=sys.stderr)
        return first.code
    raise error


def _error(cause: _Process, count: int) -> KdctlError:
    code = cause.code or 1
    how = f"ended with code {code}"
    hint = "`kdctl resume` continues the run from its last checkpoint"
    if code < 0:
        name = signal.Signals(-code).name
        how = f"was killed by {name}"
        if name == "SIGKILL":
            hint = f"memory may have run out; {hint}"
        code = 128 - code if -code in (signal.SIGINT, signal.SIGTERM) else 1
    shown = "".join(f"\nrank {cause.rank}: {line}" for line in cause.lines)
    error = KdctlError(Problem(f"process {cause.rank} of {count} {how}{shown}", hint=hint))
    error.code = code  # type: ignore[misc]
    return error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
