"""Memory of training: the most that kdctl holds with a live and with a stored teacher, and torchdistill.

    python scripts/bench/memory.py --root CIFAR10 --weights resnet56-4bfd9763.th --peers PEERS/bin/python [--json FILE]

ResNet-56 to ResNet-20, batch 128, all images of CIFAR-10 in memory, resident size of the training process at its peak
(MiB) after --steps steps; the store is filled anew in each of its cells.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _common import (
    Cell,
    common_parser,
    conditions,
    experiment,
    finish,
    last_json,
    print_table,
    run,
    spread,
    spread_text,
    take_turns,
    write_yaml,
)

HERE = Path(__file__).resolve().parent


def ours(options: argparse.Namespace, changes: dict[str, Any]) -> Cell:
    data = {"kind": "cifar10", "root": str(options.root.resolve()), "limit": 128 * options.steps, "views": 3}
    document = experiment("resnet56", "resnet20", data, options.weights) | changes
    document["train"] |= {"threads": options.threads, "precision": options.precision, "layout": options.layout}
    with tempfile.TemporaryDirectory() as name:
        file = write_yaml(Path(name, "memory.yaml"), document)
        command = [sys.executable, HERE / "_cell.py", "kdctl", file, "--warmup", "1"]
        done = run(command, Path(name), options.threads, KDCTL_CACHE=str(Path(name, "cache")))
    return last_json(done.output) | {"whole_command_mib": done.peak_mib}


def torchdistill(options: argparse.Namespace) -> Cell:
    done = run([
        options.peers, HERE / "torchdistill_cifar.py", "--root", options.root.resolve(), "--weights",
        options.weights.resolve(), "--threads", options.threads, "--warmup", "1", "--max-steps", options.steps - 1,
    ], threads=options.threads)  # fmt: skip
    return last_json(done.output) | {"whole_command_mib": done.peak_mib}


def main() -> None:
    parser = common_parser(__doc__)
    parser.add_argument("--root", type=Path, required=True, help="the folder of CIFAR-10")
    parser.add_argument("--weights", type=Path, required=True, help="resnet56-4bfd9763.th")
    parser.add_argument("--peers", type=Path, help="the Python of the peers' environment; without it kdctl alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--precision", default="auto", help="of kdctl; auto lets it choose")
    parser.add_argument("--layout", default="auto")
    options = parser.parse_args()
    contenders: dict[str, Callable[[], Cell]] = {
        "live": functools.partial(ours, options, {}),
        "stored": functools.partial(ours, options, {"teacher_cache": {"store": "logits"}}),
    }
    if options.peers:
        contenders["torchdistill"] = functools.partial(torchdistill, options)
    surroundings = conditions(options.threads)
    cells = take_turns(contenders, options.rounds)
    measured = ("peak_mib", "whole_command_mib")
    rows = {name: {what: spread([c[what] for c in found]) for what in measured} for name, found in cells.items()}
    print_table(
        ["contender", "peak in training, MiB", "of the whole command"],
        [[name, *(spread_text(row[what]) for what in measured)] for name, row in rows.items()],
    )
    finish({"conditions": surroundings, "steps": options.steps, "rows": rows, "cells": cells}, options.json)


if __name__ == "__main__":
    main()
