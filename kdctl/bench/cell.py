"""The process of one measured cell: opens a predictor, then times it a round at a time, as it is told on stdin.

One JSON document a line. First the cell (opener, arguments, batch, threads), answered by {"runtime": ...}; then
{"seconds": s} for each round, answered by {"wall_ms": [...], "cpu_ms": c, "peak_bytes": n}; the end of stdin ends it.
wall_ms: of each call; cpu_ms: the least process-CPU time of a call, over all threads.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from typing import Any, TextIO

WARM_UP_CALLS = 3


def main() -> int:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not end up among the replies
    try:
        _serve(replies)
    except Exception as error:
        from kdctl.errors import KdctlError

        text = str(error) if isinstance(error, KdctlError) else f"{type(error).__name__}: {error}"
        _reply(replies, {"error": text})
        return 1
    return 0


def _serve(replies: TextIO) -> None:
    import numpy as np

    cell = json.loads(sys.stdin.readline())
    module, _, name = cell["opener"].partition(":")
    predictor = getattr(importlib.import_module(module), name)(**cell["arguments"], threads=cell["threads"])
    generator = np.random.default_rng(0)
    shape, tokens = (cell["batch"], *predictor.image_shape), getattr(predictor, "tokens", None)
    images: Any = generator.random(shape, dtype=np.float32)
    if tokens is not None:  # texts of full length
        images = generator.integers(1, tokens.vocab_size, shape)
    for _ in range(WARM_UP_CALLS):
        predictor(images)
    _reply(replies, {"runtime": predictor.runtime})
    for line in sys.stdin:
        _reply(replies, _round(predictor, images, json.loads(line)["seconds"]))


def _round(predictor: Any, images: Any, seconds: float) -> dict[str, Any]:
    """Calls for about `seconds` (at least once): see the top of the file."""
    wall: list[float] = []
    cpu: list[float] = []
    predictor(images)  # caches are another cell's by now
    end = time.perf_counter_ns() + int(seconds * 1e9)
    while not wall or time.perf_counter_ns() < end:
        cpu_start, start = time.process_time_ns(), time.perf_counter_ns()
        predictor(images)
        wall.append((time.perf_counter_ns() - start) / 1e6)
        cpu.append((time.process_time_ns() - cpu_start) / 1e6)
    # Where the clock of a process moves in ticks, a short call can begin and end within one.
    least = min((value for value in cpu if value > 0), default=min(wall))
    return {"wall_ms": wall, "cpu_ms": least, "peak_bytes": peak_bytes()}


def peak_bytes() -> int:
    """The largest resident memory of this process so far, the runtime included."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:  # getrusage would hand on the parent's peak
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _reply(replies: TextIO, document: dict[str, Any]) -> None:
    replies.write(json.dumps(document) + "\n")
    replies.flush()


if __name__ == "__main__":
    sys.exit(main())
