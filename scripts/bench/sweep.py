"""A sweep with one stored teacher: twelve runs over T and alpha against twelve plain trainings of the same student.

    python scripts/bench/sweep.py --root CIFAR10 --weights resnet56-4bfd9763.th [--epochs 6] [--limit N] [--json FILE]

Every run is a `kdctl train` of its own, one after the other, a plain one (no teacher) after each with the teacher. The
first one fills the store for --views views, the others read it. What is compared is the whole command, start-up and
the measuring on the test split included; the teacher's pass over the views is what the first run's `teacher` part says.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

from _common import (
    common_parser,
    conditions,
    experiment,
    finish,
    kdctl,
    print_table,
    say,
    spread,
    spread_text,
    write_yaml,
)

TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
ALPHAS = (0.5, 0.7, 0.9)


def documents(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The experiment with the stored teacher, and the plain one."""
    data: dict[str, Any] = {"kind": "cifar10", "root": str(options.root.resolve())}
    if options.limit:
        data["limit"] = options.limit
    taught = experiment("resnet56", "resnet20", data, options.weights) | {"teacher_cache": {"store": "logits"}}
    taught["data"]["views"] = options.views
    settings = {"precision": options.precision, "layout": options.layout, "threads": options.threads}
    taught["train"] |= {"epochs": options.epochs, "keep": "last", **settings}
    plain = {key: value for key, value in taught.items() if key not in ("teacher", "teacher_cache", "distill")}
    return taught, plain


def train(file: Path, overrides: list[str], folder: Path, name: str, threads: int) -> dict[str, Any]:
    command = ["train", file, *overrides, "--run-dir", folder / name]
    result, done = kdctl(*command, cwd=folder, cache=folder / "cache", threads=threads)
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return {
        "seconds": done.seconds,
        "cpu_seconds": done.cpu_seconds,
        "training_seconds": sum(line["seconds"] for line in lines),
        "teacher_seconds": sum(line["times"].get("teacher", 0.0) for line in lines),
        "top1": result["student"]["last"]["test"]["top1"],
    }


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = [
            write_yaml(folder / f"{n}.yaml", d) for n, d in zip(("taught", "plain"), documents(options), strict=True)
        ]
        settings = list(itertools.product(TEMPERATURES, ALPHAS))[: options.runs]
        for number, (temperature, alpha) in enumerate(settings, start=1):
            say(f"run {number} of {len(settings)}: T {temperature:g}, alpha {alpha:g}")
            overrides = [f"distill.T={temperature}", f"distill.alpha={alpha}"]
            taught = train(files[0], overrides, folder, f"taught-{number}", options.threads)
            plain = train(files[1], [], folder, f"plain-{number}", options.threads)
            rows.append({"T": temperature, "alpha": alpha, "taught": taught, "plain": plain})
            say(f"  {taught['seconds']:,.0f} s, plain {plain['seconds']:,.0f} s")
    return rows


def compare(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """All runs with the stored teacher to all plain ones: with the teacher's pass in the bill of both, and without."""

    def total(who: str, what: str) -> float:
        return sum(row[who][what] for row in rows)

    filling = rows[0]["taught"]["teacher_seconds"]
    whole, plain = total("taught", "seconds"), total("plain", "seconds")
    return {
        "teacher_seconds": filling,
        "taught_seconds": whole,
        "plain_seconds": plain,
        "ratio_to_plain_and_teacher": whole / (plain + filling),
        "ratio_to_plain": whole / plain,
        "cpu_ratio_to_plain": total("taught", "cpu_seconds") / total("plain", "cpu_seconds"),
        "later_runs": spread([r["taught"]["seconds"] / r["plain"]["seconds"] for r in rows[1:] or rows]),
    }


def show(rows: list[dict[str, Any]], found: dict[str, Any]) -> None:
    head = ["T", "alpha", "taught s", "plain s", "of it teacher s", "taught CPU s", "plain CPU s", "top1"]
    table = []
    for row in rows:
        taught, plain = row["taught"], row["plain"]
        times = [taught["seconds"], plain["seconds"], taught["teacher_seconds"], taught["cpu_seconds"]]
        numbers = [f"{value:,.1f}" for value in (*times, plain["cpu_seconds"])]
        table.append([f"{row['T']:g}", f"{row['alpha']:g}", *numbers, f"{taught['top1']:.2f}"])
    print_table(head, table)
    print(
        f"{len(rows)} runs {found['taught_seconds']:,.0f} s; as many plain ones {found['plain_seconds']:,.0f} s ",
        end="",
    )
    print(f"and the teacher's pass {found['teacher_seconds']:,.0f} s: ratio {found['ratio_to_plain_and_teacher']:.3f}")
    print(f"without the teacher's pass in the bill: {found['ratio_to_plain']:.3f}; ", end="")
    print(f"runs after the first, each to its plain one: {spread_text(found['later_runs'], 3)}")


def main() -> None:
    parser = common_parser(__doc__)
    parser.add_argument("--root", type=Path, required=True, help="the folder of CIFAR-10")
    parser.add_argument("--weights", type=Path, required=True, help="resnet56-4bfd9763.th")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--limit", type=int, help="only so many training images")
    parser.add_argument("--views", type=int, default=3)
    parser.add_argument("--runs", type=int, default=len(TEMPERATURES) * len(ALPHAS), help="fewer, for trying out")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--layout", default="auto")
    options = parser.parse_args()
    surroundings = conditions(options.threads)
    rows = measure(options)
    found = compare(rows)
    show(rows, found)
    settings = {"epochs": options.epochs, "limit": options.limit, "views": options.views}
    finish({"conditions": surroundings, **settings, **found, "runs": rows}, options.json)


if __name__ == "__main__":
    main()
