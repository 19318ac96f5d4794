"""Training throughput on texts: kdctl with a live and with a stored teacher, beside TextBrewer.

    python scripts/bench/textbrewer.py --peers PEERS/bin/python --texts SST2 --teacher MINILM [--rounds 5] [--json FILE]

A BERT of six layers of 384 (MINILM: a folder with model.safetensors and tokenizer.json) teaches one of two layers of
128, both with a new classifier, on sentences of SST2/train.tsv in batches of 32, each padded to its longest: the same
batches in the same order for everybody. The contenders take turns, each cell in a fresh process; what is timed are the
steps of an epoch after --warmup others, without start-up, checkpoints and evaluation. Cases:

    live       the soft loss of logits, of a teacher that runs
    features   and hidden states of two layers through projections, attention of two layers over all heads
    stored     the soft loss of logits that are there already. TextBrewer keeps them in memory, with the batches, which
               are then the same in every epoch (BasicDistiller, is_caching_logits): `to_textbrewer` of `stored`. Its
               GeneralDistiller, which it recommends for one teacher, cannot: `to_live_textbrewer`

Contenders of a case: kdctl in the precision that it chooses itself, kdctl-fp32, kdctl-sorted (as it trains when nobody
stops it: texts of like length together), textbrewer (fp32; it has no other on CPUs: its fp16 needs apex), and
textbrewer-fused, the same with AdamW in one kernel, which is up to its user. PEERS is made by

    python scripts/bench/peers.py --env PEERS --peers textbrewer==0.2.1.post1 transformers tensorboard
"""

from __future__ import annotations

import argparse
import datetime
import functools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _common import (
    Cell,
    common_parser,
    conditions,
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
CASES = ("live", "features", "stored")
CONTENDERS = ("kdctl", "kdctl-fp32", "kdctl-sorted", "textbrewer", "textbrewer-fused")
BATCH = 32
LENGTH = 64
_HIDDEN = [
    {"student": "bert.encoder.layer.0", "teacher": "bert.encoder.layer.2"},
    {"student": "bert.encoder.layer.1", "teacher": "bert.encoder.layer.5"},
]
_ATTENTION = [{who: f"{path}.attention.self.softmax" for who, path in pair.items()} for pair in _HIDDEN]


def write_texts(options: argparse.Namespace, folder: Path) -> None:
    """A training file with as many sentences as an epoch takes, and a short one to test."""
    head, *lines = (options.texts / "train.tsv").read_text(encoding="utf-8").splitlines()
    count = BATCH * (options.warmup + options.steps)
    picked = np.random.default_rng(0).permutation(len(lines))[: count + BATCH]
    if len(picked) < count + BATCH:
        sys.exit(f"{options.texts / 'train.tsv'} has {len(lines)} sentences, {count + BATCH} are needed")
    chosen = [lines[i] for i in picked]
    (folder / "train.tsv").write_text("\n".join([head, *chosen[:count]]) + "\n", encoding="utf-8")
    (folder / "test.tsv").write_text("\n".join([head, *chosen[count:]]) + "\n", encoding="utf-8")


class Bench:
    """The contenders, in a folder of their own."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.batches = folder / "batches.npz"
        self.settled: dict[str, Any] = {"precision": "auto", "threads": options.threads, "device": "cpu"}
        write_texts(options, folder)

    def experiment(self, case: str, **train: Any) -> dict[str, Any]:
        bert = {"kind": "bert"}
        losses: list[dict[str, Any]] = [{"kind": "kd", "weight": 1, "temperature": 4}]
        if case == "features":
            losses.append({"kind": "hidden_mse", "weight": 1, "taps": _HIDDEN})
            losses.append({"kind": "attention_mse", "weight": 1, "heads": "mean", "taps": _ATTENTION})
        teacher = {"depth": 6, "width": 384, "heads": 12, "positions": 512, "control": True}
        return {
            "name": "bench",
            "task": {"kind": "text_classification"},
            "data": {
                "kind": "text", "root": str(self.folder), "test": "test.tsv", "text": "sentence", "views": 1,
                "tokenizer": str(self.options.teacher), "max_length": LENGTH, "batch_size": BATCH, "val_fraction": 0,
            },
            "teacher": bert | teacher | {"weights": str(self.options.teacher)},  # its classifier is new: no guide
            "student": bert | {"depth": 2, "width": 128, "heads": 2},
            "losses": losses,
            "optimizer": {"kind": "adamw", "lr": 1e-4},
            "train": {"epochs": 1, "seed": 0, **self.settled, **train},
        } | ({"teacher_cache": {"store": "logits"}} if case == "stored" else {})  # fmt: skip

    def prepare(self) -> None:
        """Lets kdctl settle precision and threads, fills its store, and keeps its batches for the peer."""
        say("kdctl settles")
        cell = self.kdctl("live")
        self.settled = {name: cell[name] for name in (*self.settled, "layout", "compile")}
        say(f"kdctl fills the store in {self.settled['precision']}")
        self.kdctl("stored")
        say("kdctl fills the store in fp32")
        self.kdctl("stored", precision="fp32")
        self._keep_batches()

    def _keep_batches(self) -> None:
        """The batches of the first epoch, in the order in which kdctl draws them."""
        from kdctl import build
        from kdctl.config.expand import load_experiment
        from kdctl.data.loader import TrainLoader
        from kdctl.data.tokens import TokenSplit

        TokenSplit.arranged = lambda self, rows, batch_size, key: rows  # type: ignore[method-assign]
        file = write_yaml(self.folder / "batches.yaml", self.experiment("live"))
        experiment = load_experiment(file).experiment
        loader = TrainLoader(build.build_data(experiment).train, batch_size=BATCH, order_seed=experiment.train.seed)
        found = [batch.inputs.numpy().astype(np.int32) for batch in loader.epoch(0)]
        self.lengths = [numbers.shape[1] for numbers in found]
        self.padding = 1 - sum(int((n != 0).sum()) for n in found) / sum(n.size for n in found)
        np.savez(self.batches, *found)

    def kdctl(self, case: str, arranged: bool = False, **train: Any) -> Cell:
        file = write_yaml(self.folder / "bench.yaml", self.experiment(case, **train))
        order = [] if arranged else ["--as-they-come"]
        command = [sys.executable, HERE / "_cell.py", "kdctl", file, "--warmup", self.options.warmup, *order]
        return self._cell(command)

    def textbrewer(self, case: str, *more: str) -> Cell:
        options = self.options
        return self._cell([
            options.peers, HERE / "textbrewer_peer.py", case, "--batches", self.batches, "--teacher", options.teacher,
            "--warmup", options.warmup, "--threads", options.threads, *more,
        ])  # fmt: skip

    def _cell(self, command: list[Any]) -> Cell:
        limits = {"KDCTL_CACHE": str(self.folder / "cache"), "HF_HUB_OFFLINE": "1"}
        cell: Cell = last_json(run(command, self.folder, self.options.threads, **limits).output)
        cell.setdefault("texts", cell.pop("images", 0))
        say(f"  {1000 * BATCH * cell['cpu_seconds'] / cell['texts']:.1f} CPU-ms a step")
        return cell

    def contenders(self) -> dict[str, Callable[[], Cell]]:
        made: dict[str, Callable[[], Cell]] = {}
        for case in self.options.cases:
            made |= {
                f"{case} kdctl": functools.partial(self.kdctl, case),
                f"{case} kdctl-fp32": functools.partial(self.kdctl, case, precision="fp32"),
                f"{case} kdctl-sorted": functools.partial(self.kdctl, case, arranged=True),
                f"{case} textbrewer": functools.partial(self.textbrewer, case),
                f"{case} textbrewer-fused": functools.partial(self.textbrewer, case, "--fused"),
            }
        return {name: cell for name, cell in made.items() if name.partition(" ")[2] in self.options.contenders}


def summarise(cells: dict[str, list[Cell]]) -> dict[str, Any]:
    """Each contender's CPU time a step and texts a second of it, and its ratios to TextBrewer's, round by round."""
    costs = {name: [1000 * BATCH * c["cpu_seconds"] / c["texts"] for c in found] for name, found in cells.items()}
    rows: dict[str, Any] = {}
    for name, own in costs.items():
        case, _, who = name.partition(" ")
        rows[name] = {
            "cpu_ms_per_step": spread(own),
            "texts_per_cpu_second": spread([1000 * BATCH / cost for cost in own]),
            "texts_per_second": spread([c["texts"] / c["seconds"] for c in cells[name]]),
            "peak_mib": spread([c["peak_mib"] for c in cells[name]]),
        }
        if not who.startswith("kdctl"):
            continue
        for beside in ("textbrewer", "textbrewer-fused"):
            if f"{case} {beside}" in costs:
                rows[name][f"to_{beside}"] = ratio(costs[f"{case} {beside}"], own)
            if case == "stored" and f"live {beside}" in costs:
                rows[name][f"to_live_{beside}"] = ratio(costs[f"live {beside}"], own)
        rows[name]["times"] = cells[name][-1].get("times")
    return rows


def show(rows: dict[str, Any]) -> None:
    head = ["contender", "CPU-ms a step", "texts/CPU-s", "x textbrewer", "x its live"]
    table = []
    for name, row in rows.items():
        ratios = [spread_text(row[k], 2) if k in row else "-" for k in ("to_textbrewer", "to_live_textbrewer")]
        cost, rate = spread_text(row["cpu_ms_per_step"], 1), spread_text(row["texts_per_cpu_second"])
        table.append([name, cost, rate, *ratios])
    print_table(head, table)


def main() -> None:
    parser = common_parser(__doc__)
    parser.set_defaults(threads=1)
    parser.add_argument("--peers", type=Path, required=True, help="the Python of the peer's environment")
    parser.add_argument("--texts", type=Path, required=True, help="the folder of SST-2")
    parser.add_argument("--teacher", type=Path, required=True, help="the folder of the teacher")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    options.teacher, options.peers = options.teacher.resolve(), options.peers.absolute()
    surroundings = conditions(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        bench.prepare()
        cells = take_turns(bench.contenders(), options.rounds)
    rows = summarise(cells)
    show(rows)
    versions: dict[str, str] = next((c[0]["versions"] for c in cells.values() if "versions" in c[0]), {})
    document = {
        "conditions": surroundings, "date": datetime.date.today().isoformat(), "rounds": options.rounds,
        "steps": options.steps, "batch": BATCH, "mean_padded_length": float(np.mean(bench.lengths)),
        "share_of_padding": round(bench.padding, 3), "kdctl": bench.settled, "peer": versions, "rows": rows,
    }  # fmt: skip
    finish(document, options.json)


if __name__ == "__main__":
    main()
