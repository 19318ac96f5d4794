"""How `train` and `resume` run in several processes: --nproc starts them here, torchrun wherever it likes."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from kdctl import launch
from kdctl.cli import console
from kdctl.cli.verb import Option, Options, Reply
from kdctl.errors import KdctlError, UsageError

Nproc = Annotated[
    int | None,
    Option(
        "--nproc",
        min=1,
        help="train in this many processes on this machine; for several machines start kdctl by torchrun, with the "
        "run directory on a file system that all of them see",
    ),
]


@dataclass(frozen=True)
class Elsewhere(Reply):
    """The reply of a process whose result another process shows."""

    code: int = 0

    def deliver(self, as_json: bool) -> int:
        return self.code


def _nothing(document: object) -> None:
    """Shows nothing."""


def check(nproc: int | None) -> None:
    """Refuses --nproc where torchrun has started another number of processes; before torch is imported."""
    if launch.world_size() > 1:  # else torch warns that a search for unused parameters may be superfluous
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if nproc is not None and launch.world_size() not in (1, nproc):
        message = f"--nproc is {nproc}, and this is one of {launch.world_size()} processes already"
        raise UsageError(message, hint="leave --nproc out: torchrun's own options say how many there are")


def starts_others(nproc: int | None) -> bool:
    """Whether this process is to start the ones that train."""
    return (nproc or 1) > 1 and launch.world_size() == 1


def start(nproc: int | None) -> Reply:
    """Runs this very command in several processes."""
    return Elsewhere({}, _nothing, code=launch.start(nproc or 1, [sys.executable, "-m", "kdctl", *sys.argv[1:]]))


def lead(work: Callable[[], Reply]) -> Reply:
    """The work of the first process, among those that are there."""
    launch.end_with_launcher()
    from kdctl import ranks

    with ranks.joined() as everyone:
        reply = work()
        everyone.told(None)
    return reply


def follow(options: Options) -> Reply:
    """The work of every other process. What goes wrong in it is told to the first one, which shows it."""
    launch.end_with_launcher()
    from kdctl import pipeline, ranks

    code, joined = 0, False
    try:
        with ranks.joined():
            joined = True
            pipeline.follow()
    except Exception as error:
        if not joined:
            raise
        if options.debug:
            traceback.print_exc()
        console.detail(f"rank {launch.rank()}: {error}")
        code = error.code if isinstance(error, KdctlError) else 1
    return Elsewhere({}, _nothing, code=code)
