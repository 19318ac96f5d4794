"""The store of teacher outputs: how fast it is built, what reading it costs, and its size.

    python scripts/bench/store.py --root CIFAR10 --weights resnet56-4bfd9763.th [--limit 10000] [--json FILE]

Building is `kdctl cache build` for --views views of ResNet-56 (augmentation included, start-up not), in turns with the
teacher's bare forward pass on synthetic batches in the same precision and layout. A look-up is what the teacher costs
in a batch of 128 of `kdctl train` once everything is stored; `cost` is what kdctl itself announces before it builds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from _common import (
    Cell,
    common_parser,
    conditions,
    experiment,
    finish,
    kdctl,
    last_json,
    print_table,
    ratio,
    run,
    spread,
    spread_text,
    take_turns,
    write_yaml,
)

HERE = Path(__file__).resolve().parent
BATCH = 128


class Bench:
    """The contenders, in a folder of their own."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        data = {"kind": "cifar10", "root": str(options.root.resolve()), "limit": options.limit, "views": options.views}
        document = experiment("resnet56", "resnet20", data, options.weights)
        document["teacher_cache"] = {"store": "logits"}
        document["train"] |= {
            "precision": options.precision, "layout": options.layout, "threads": options.threads,
            "epochs": options.views,
        }  # fmt: skip
        self.file = write_yaml(folder / "store.yaml", document)
        self.built = 0

    def build(self) -> Cell:
        """A store from nothing, beside those of the rounds before."""
        self.built += 1
        done = self._kdctl("cache", "build", self.file)
        return done | {"images_per_second": done["filled"] / done["seconds"]}

    def forward(self) -> Cell:
        options = self.options
        cell: Cell = last_json(run([
            sys.executable, HERE / "_cell.py", "bare", "--forward", "--model", "resnet56", "--classes", "10",
            "--precision", options.precision, "--layout", options.layout, "--threads", options.threads,
            "--batch", "512", "--warmup", "2", "--steps", max(2, options.limit // 512),
        ], self.folder, options.threads).output)  # fmt: skip
        return cell | {"images_per_second": cell["images"] / cell["seconds"]}

    def show(self) -> dict[str, Any]:
        found: dict[str, Any] = self._kdctl("cache", "show", self.file)["stores"][0]
        return found

    def look_up_ms(self) -> list[float]:
        """Milliseconds a batch, epoch by epoch, with the store of the last round."""
        self._kdctl("train", self.file, "--run-dir", self.folder / "run")
        lines = [json.loads(line) for line in (self.folder / "run" / "metrics.jsonl").read_text().splitlines()]
        steps = -(-self.options.limit // BATCH)
        return [1000 * line["times"].get("teacher", 0.0) / steps for line in lines]

    def _kdctl(self, *arguments: object) -> Any:
        cache = self.folder / f"cache-{self.built}"
        return kdctl(*arguments, cwd=self.folder, cache=cache, threads=self.options.threads)[0]


def main() -> None:
    parser = common_parser(__doc__)
    parser.add_argument("--root", type=Path, required=True, help="the folder of CIFAR-10")
    parser.add_argument("--weights", type=Path, required=True, help="resnet56-4bfd9763.th")
    parser.add_argument("--limit", type=int, default=10000, help="training images")
    parser.add_argument("--views", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--layout", default="channels_last")
    options = parser.parse_args()
    surroundings = conditions(options.threads)
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(options, Path(name))
        announced = bench.show()
        cells = take_turns({"build": bench.build, "bare forward": bench.forward}, options.rounds)
        held = bench.show()
        look_ups = bench.look_up_ms()
    rates = {name: [c["images_per_second"] for c in found] for name, found in cells.items()}
    rows = [
        [name, spread_text(spread(r)), spread_text(ratio(r, rates["bare forward"]), 2)] for name, r in rates.items()
    ]
    print_table(["resnet56", "images/s", "x bare"], rows)
    per_row = held["bytes"] / held["rows"]
    print(
        f"{held['bytes']:,} bytes for {held['rows']:,} samples, {per_row:.1f} each; look-up of a batch of {BATCH}: ",
        end="",
    )
    print(
        f"{spread_text(spread(look_ups), 2)} ms; announced: pays off after {announced['pays_off_after_epochs']} epochs"
    )
    document = {
        "conditions": surroundings, "limit": options.limit, "views": options.views, "bytes": held["bytes"],
        "samples": held["rows"], "bytes_per_sample": per_row, "look_up_ms": spread(look_ups), "announced": announced,
        "images_per_second": {n: spread(r) for n, r in rates.items()},
        "to_bare": ratio(rates["build"], rates["bare forward"]),
    }  # fmt: skip
    finish(document, options.json)


if __name__ == "__main__":
    main()
