"""Time to accuracy: how long kdctl trains to reach the test accuracy that torchdistill has after 15 epochs.

    PEERS/bin/python scripts/bench/torchdistill_cifar.py --root CIFAR10 --weights resnet56-4bfd9763.th --out peer.jsonl
    python scripts/bench/time_to_accuracy.py --peer peer.jsonl --root CIFAR10 --weights resnet56-4bfd9763.th

Both start from nothing, train on all 50,000 images with the same teacher, follow a schedule that was fixed before, and
are measured on the test split at its end. kdctl runs configs/cifar10/resnet56_to_resnet20_fast.yaml with an empty
store: filling it is part of its time. What is compared is training, the teacher and the data included, without
measuring; the whole command with start-up and the measuring of student and teacher stands beside it. --peer-seconds
replaces the seconds of an epoch in the file where that one did not run alone: `training.py` measures both in turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from _common import Finished, common_parser, conditions, finish, kdctl, print_table, say, spread, spread_text

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "cifar10" / "resnet56_to_resnet20_fast.yaml"


def read_peer(file: Path, seconds_per_epoch: float | None) -> dict[str, Any]:
    """What torchdistill reached in the file's last epoch, and its training seconds until then."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    if not lines or lines[-1]["epoch"] != lines[-1]["of"]:
        sys.exit(f"{file}: the run has not come to its end")
    seconds = seconds_per_epoch * len(lines) if seconds_per_epoch else sum(line["seconds"] for line in lines)
    return {
        "epochs": len(lines),
        "accuracy": lines[-1]["test_accuracy"],
        "seconds": seconds,
        "cpu_seconds": sum(line["cpu_seconds"] for line in lines),
        "threads": lines[-1]["threads"],
        "workers": lines[-1]["workers"],
        "measured": "--peer-seconds" if seconds_per_epoch else str(file.name),
    }


def train(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One `kdctl train` from an empty store."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = [f"data.root={options.root.resolve()}", f"teacher.weights={options.weights.resolve()}"]
        overrides += [
            f"train.seed={seed}",
            f"train.threads={options.threads}",
            "teacher_cache.fill=lazy",
            *options.overrides,
        ]
        command = ["train", options.config.resolve(), *overrides, "--run-dir", folder / "run"]
        result, done = kdctl(*command, cwd=folder, cache=folder / "cache", threads=options.threads)
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return describe(result, done, lines, seed)


def describe(result: dict[str, Any], done: Finished, lines: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    parts: dict[str, float] = {}
    for line in lines:
        for part, seconds in line["times"].items():
            parts[part] = parts.get(part, 0.0) + seconds
    return {
        "seed": seed,
        "epochs": result["epochs"],
        "accuracy": result["student"]["last"]["test"]["top1"],
        "seconds": sum(line["seconds"] for line in lines),
        "parts": parts,
        "command_seconds": done.seconds,
        "command_cpu_seconds": done.cpu_seconds,
        "peak_mib": done.peak_mib,
        "precision": result["precision"],
    }


def compare(peer: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "peer": peer,
        "runs": runs,
        "accuracy": spread([run["accuracy"] for run in runs]),
        "ratio": spread([peer["seconds"] / run["seconds"] for run in runs]),
        "ratio_to_whole_command": spread([peer["seconds"] / run["command_seconds"] for run in runs]),
        "reached": statistics.mean(run["accuracy"] for run in runs) >= peer["accuracy"],
    }


def show(found: dict[str, Any]) -> None:
    peer, head = found["peer"], ["run", "epochs", "test top1", "training s", "of it teacher s", "command s", "CPU s"]
    rows = [[
        f"torchdistill, {peer['workers']} workers", str(peer["epochs"]), f"{peer['accuracy']:.2f}",
        f"{peer['seconds']:,.0f}", "-", "-", f"{peer['cpu_seconds']:,.0f}",
    ]]  # fmt: skip
    for run in found["runs"]:
        seconds = [run["seconds"], run["parts"].get("teacher", 0.0), run["command_seconds"], run["command_cpu_seconds"]]
        numbers = [f"{value:,.0f}" for value in seconds]
        rows.append([f"kdctl, seed {run['seed']}", str(run["epochs"]), f"{run['accuracy']:.2f}", *numbers])
    print_table(head, rows)
    print(f"{spread_text(found['ratio'], 2)} times shorter; to the end of the whole command ", end="")
    print(spread_text(found["ratio_to_whole_command"], 2))
    if not found["reached"]:
        print("NOT REACHED: the mean accuracy of kdctl's runs lies below the peer's")


def main() -> None:
    parser = common_parser(__doc__)
    parser.add_argument("--peer", type=Path, required=True, help="the .jsonl of torchdistill_cifar.py")
    parser.add_argument("--peer-seconds", type=float, help="seconds of one of its epochs, measured elsewhere")
    parser.add_argument("--root", type=Path, required=True, help="the folder of CIFAR-10")
    parser.add_argument("--weights", type=Path, required=True, help="resnet56-4bfd9763.th")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="KEY=VALUE", help="for trying out")
    options = parser.parse_args()
    peer = read_peer(options.peer, options.peer_seconds)
    surroundings = conditions(options.threads)
    runs = []
    for seed in options.seeds:
        say(f"kdctl train, seed {seed}")
        runs.append(train(options, seed))
        say(f"  {runs[-1]['accuracy']:.2f} % after {runs[-1]['seconds']:,.0f} s")
    found = compare(peer, runs)
    show(found)
    finish({"conditions": surroundings, **found}, options.json)


if __name__ == "__main__":
    main()
