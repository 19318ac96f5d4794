"""Training throughput: kdctl with a live and with a stored teacher, torchdistill, and the limit of a bare loop.

    python scripts/bench/training.py --peers PEERS/bin/python [--images CIFAR10] [--rounds 5] [--json FILE]

The contenders take turns, each cell in a fresh process; what is timed are --steps steps after --warmup others, without
start-up and evaluation. PEERS is the folder of `peers.py`. Teachers are random (their work is the same), images are
those of CIFAR-10 where its folder is named, else noise. Contenders:

    torchdistill-0, -2   its own box, loop, loss and loader with so many workers (torchdistill_cifar.py)
    live, stored         kdctl's own loop with logits of a running teacher, and of a store that is already filled
    bare                 the student alone on synthetic batches in kdctl's precision and layout: forward, backward, SGD
    bare-fp32            the same in fp32, contiguous
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import (
    Cell,
    common_parser,
    conditions,
    experiment,
    finish,
    last_json,
    print_table,
    ratio,
    run,
    say,
    spread,
    spread_text,
    take_turns,
    write_yaml,
)

HERE = Path(__file__).resolve().parent
PAIRS = {"resnet56-resnet20": 10, "resnet32x4-resnet8x4": 100, "wrn_40_2-wrn_16_2": 100}
"""Teacher and student, and how many classes they tell apart."""
CONTENDERS = ("torchdistill-0", "torchdistill-2", "live", "stored", "bare", "bare-fp32")
COMPARED = ("to_torchdistill", "cpu_to_torchdistill", "to_bare")
"""Ratios of a row; where torchdistill has two contenders, to the better one of each round."""
VIEWS = 3
BATCH = 128
TEST_IMAGES = 256


def make_images(options: argparse.Namespace, classes: int, file: Path) -> None:
    """An .npz with as many training images as a cell takes."""
    count = BATCH * (options.warmup + options.steps)
    if options.images:
        from kdctl.data.cifar import Cifar

        split = Cifar(root=str(options.images)).load().train
        rows = torch.arange(count + TEST_IMAGES) % len(split)
        images = split.fetch(rows).permute(0, 2, 3, 1).contiguous().numpy()
    else:
        images = np.random.default_rng(0).integers(0, 256, (count + TEST_IMAGES, 32, 32, 3), dtype=np.uint8)
    targets = np.arange(len(images)) % classes
    np.savez(file, x_train=images[:count], y_train=targets[:count], x_test=images[count:], y_test=targets[count:])


class Bench:
    """The contenders of one pair of teacher and student."""

    def __init__(self, pair: str, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder, self.classes = options, folder, PAIRS[pair]
        self.teacher, self.student = pair.split("-")
        self.images = folder / "images.npz"
        make_images(options, self.classes, self.images)
        self.settled: dict[str, Any] = {}

    def contenders(self) -> dict[str, Callable[[], Cell]]:
        made: dict[str, Callable[[], Cell]] = {
            "torchdistill-0": functools.partial(self.torchdistill, 0),
            "torchdistill-2": functools.partial(self.torchdistill, 2),
            "live": functools.partial(self.kdctl, "live", {}),
            "stored": functools.partial(self.kdctl, "stored", self.stored),
            "bare": self.bare,
            "bare-fp32": functools.partial(self.bare, "fp32", "contiguous"),
        }
        return {name: made[name] for name in self.options.contenders}

    stored = {"teacher_cache": {"store": "logits"}}

    def prepare(self) -> Cell | None:
        """Lets kdctl settle precision and layout, and fills the store; the cell of that, None without a store."""
        asked = {"precision": self.options.precision, "layout": self.options.layout}
        self.settled = {**asked, "threads": self.options.threads, "device": self.options.device}
        if not {"live", "stored", "bare"} & set(self.options.contenders):
            return None
        say("kdctl settles")
        cell = self.kdctl("settle", {})
        self.settled = {name: cell[name] for name in (*self.settled, "compile")}
        if "stored" not in self.options.contenders:
            return None
        say("kdctl fills the store")
        return self.kdctl("fill", self.stored, epochs=VIEWS)

    def kdctl(self, name: str, changes: dict[str, Any], epochs: int = 1) -> Cell:
        document = experiment(self.teacher, self.student, {"kind": "npz", "path": str(self.images)}) | changes
        document["data"]["views"] = VIEWS
        document["optimizer"]["lr"] = 0.01  # a random teacher is no guide
        document["train"] = {"epochs": epochs, "seed": 0, **self.settled}
        file = write_yaml(self.folder / f"{name}.yaml", document)
        return self._cell([sys.executable, HERE / "_cell.py", "kdctl", file, "--warmup", self.options.warmup])

    def torchdistill(self, workers: int) -> Cell:
        options = self.options
        return self._cell([
            options.peers, HERE / "torchdistill_cifar.py", "--npz", self.images, "--teacher", self.teacher,
            "--student", self.student, "--workers", workers, "--threads", options.threads, "--device", options.device,
            "--warmup", options.warmup, "--max-steps", options.steps,
        ])  # fmt: skip

    def bare(self, precision: str = "", layout: str = "") -> Cell:
        options = self.options
        return self._cell([
            sys.executable, HERE / "_cell.py", "bare", "--model", self.student, "--classes", self.classes,
            "--precision", precision or self.settled["precision"], "--layout", layout or self.settled["layout"],
            *(["--compile"] if self.settled.get("compile") and not precision else []),
            "--threads", options.threads, "--device", self.settled["device"],
            "--warmup", options.warmup, "--steps", options.steps, "--batch", BATCH,
        ])  # fmt: skip

    def _cell(self, command: list[Any]) -> Cell:
        done = run(command, self.folder, self.options.threads, KDCTL_CACHE=str(self.folder / "cache"))
        cell: Cell = last_json(done.output)
        cell["images_per_second"] = cell["images"] / cell["seconds"]
        cell["cpu_seconds_per_1000"] = 1000 * cell["cpu_seconds"] / cell["images"]
        say(f"  {cell['images_per_second']:,.0f} images/s, {cell['cpu_seconds_per_1000']:.2f} CPU-s per 1,000")
        return cell


def measure(pair: str, options: argparse.Namespace) -> dict[str, Any]:
    say(f"{pair}:")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(pair, options, Path(folder))
        filled = bench.prepare()
        cells = take_turns(bench.contenders(), options.rounds)
    rates = {name: [c["images_per_second"] for c in found] for name, found in cells.items()}
    costs = {name: [c["cpu_seconds_per_1000"] for c in found] for name, found in cells.items()}
    base = [max(pairs) for pairs in zip(*(rates[n] for n in rates if n.startswith("torchdistill")), strict=True)]
    base_costs = [min(pairs) for pairs in zip(*(costs[n] for n in costs if n.startswith("torchdistill")), strict=True)]
    rows = {
        name: {
            "images_per_second": spread(rates[name]),
            "cpu_seconds_per_1000": spread(costs[name]),
            "to_torchdistill": ratio(rates[name], base) if base else None,
            "cpu_to_torchdistill": ratio(base_costs, costs[name]) if base else None,
            "to_bare": ratio(rates[name], rates["bare"]) if "bare" in rates else None,
            "times": cells[name][-1].get("times"),
        }
        for name in cells
    }
    return {"pair": pair, "kdctl": bench.settled, "rows": rows, "store_filling": filled, "cells": cells}


def show(found: dict[str, Any]) -> None:
    print(f"\n{found['pair']}, batch {BATCH}; kdctl in {found['kdctl']['precision']}, {found['kdctl']['layout']}")
    head = ["contender", "images/s", "CPU-s per 1,000", "x torchdistill", "by CPU-s", "x bare"]
    rows = []
    for name, row in found["rows"].items():
        ratios = [spread_text(row[k], 2) if row[k] else "-" for k in COMPARED]
        rows.append([name, spread_text(row["images_per_second"]), spread_text(row["cpu_seconds_per_1000"], 2), *ratios])
    print_table(head, rows)
    if found["store_filling"]:
        print(f"training while the store fills: {found['store_filling']['images_per_second']:,.0f} images/s")


def main() -> None:
    parser = common_parser(__doc__)
    parser.add_argument("--peers", type=Path, help="the Python of the peers' environment")
    parser.add_argument("--images", type=Path, help="the folder of CIFAR-10")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--precision", default="auto", help="of kdctl; auto lets it choose")
    parser.add_argument("--layout", default="auto")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.peers is None and any(n.startswith("torchdistill") for n in options.contenders):
        parser.error("torchdistill needs --peers; --contenders leaves it out")
    document: dict[str, Any] = {"conditions": conditions(options.threads), "batch": BATCH, "steps": options.steps}
    document["pairs"] = [measure(pair, options) for pair in options.pairs]
    for found in document["pairs"]:
        show(found)
    finish(document, options.json)


if __name__ == "__main__":
    main()
