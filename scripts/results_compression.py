"""Makes the compression tables of the README: pruning, the pipeline, quantisation-aware training, runtimes.

    python scripts/results_compression.py prune --data-root FOLDER --weights resnet56-4bfd9763.th
    python scripts/results_compression.py pipeline --data-root FOLDER --weights resnet56-4bfd9763.th
    python scripts/results_compression.py qat --data-root FOLDER --weights resnet20-12fca82f.th
    python scripts/results_compression.py runtimes --data-root FOLDER --weights resnet20-12fca82f.th
    python scripts/results_compression.py transformer --data-root FOLDER
    python scripts/results_compression.py table

Each works in the current directory, appends to docs/results/compression.json as it goes, and leaves out what is there.
`prune` takes about an hour on two CPU cores, the others a few minutes each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from _results import RESULTS, ROOT, kdctl, read, write

from kdctl import stats

OUT = RESULTS / "compression.json"
CONFIGS = ROOT / "configs" / "compression"
TARGETS = "onnx,openvino,executorch,litert,torchscript"
WITHOUT = ["compress.finetune.losses=[{kind: ce}]", "compress.finetune.teacher=null"]
PRUNE_ARMS: dict[str, list[str]] = {
    "distilled": [],
    "without a teacher": WITHOUT,
    "l1, uniform, without a teacher": [*WITHOUT, "compress.prune.importance=l1", "compress.prune.scope=uniform"],
}
QAT = (
    "{kind: finetune, name: qat, epochs: 1, data: {limit: 10000, batch_size: 64}, "
    "losses: [{kind: kd, temperature: 4.0}], method: {kind: qat, weight_bits: 4, first_last_bits: null"
)
QAT_ARMS: dict[str, tuple[str, str]] = {
    "int4 weights, a step a tensor": (
        "{kind: quantize, name: ptq, dtype: int4, per_channel: false}", QAT + ", per_channel: false}}",
    ),
    "int4 weights, a step a channel": ("{kind: quantize, name: ptq, dtype: int4}", QAT + "}}"),
    "int8, a step a tensor": (
        "{kind: quantize, name: ptq, mode: static, per_channel: false}",
        QAT.replace("weight_bits: 4", "weight_bits: 8") + ", per_channel: false}}",
    ),
}  # fmt: skip
"""What is quantised: the stage without training, and the one with it."""


def add(section: str, name: str, row: dict[str, Any]) -> None:
    """Adds one row to the file."""
    document = read(OUT, {})
    document.setdefault(section, {})[name] = row
    write(OUT, document)


def brief(document: dict[str, Any]) -> dict[str, Any]:
    """What a row of the table needs of an artefact's document; no path of this machine."""
    kept = ("variant", "target", "runtime", "samples", "agreement", "max_abs_diff", "delegated", "notes", "gates")
    columns = {name: document[name] for name in ("before", "same_runtime", "after")}
    return {name: document[name] for name in kept} | columns


def prune(options: argparse.Namespace) -> None:
    for seed in options.seeds:
        for arm, overrides in PRUNE_ARMS.items():
            name = f"{arm}, seed {seed}"
            if name in read(OUT, {}).get("prune", {}):
                continue
            config = str(CONFIGS / "prune_recover.yaml")
            document = kdctl("train", config, *own(options), f"train.seed={seed}", *overrides)
            pruned, tuned = document["artefacts"]
            seconds = json.loads((Path(document["run"]) / "run.json").read_text())["seconds"]
            add("prune", name, {
                "arm": arm, "seed": seed, "pruned": brief(pruned), "recovered": brief(tuned),
                "seconds": seconds["finetune"],
            })  # fmt: skip
        name = f"Torch-Pruning, seed {seed}"
        if name not in read(OUT, {}).get("prune", {}):
            peer = ROOT / "scripts" / "bench" / "torch_pruning_peer.py"
            command = [sys.executable, str(peer), str(options.data_root), str(options.weights), str(seed)]
            row = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
            add("prune", name, {"arm": "Torch-Pruning", "seed": seed, **row})


def pipeline(options: argparse.Namespace) -> None:
    for seed in options.seeds:
        name = f"seed {seed}"
        if name in read(OUT, {}).get("pipeline", {}):
            continue
        config = str(CONFIGS / "pipeline.yaml")
        document = kdctl("train", config, *own(options), f"train.seed={seed}")
        add("pipeline", name, {"seed": seed, "stages": [brief(d) for d in document["artefacts"]]})


def qat(options: argparse.Namespace) -> None:
    augment = "data.augment=[{kind: random_crop, padding: 4}, {kind: horizontal_flip}]"
    for arm, (after, aware) in QAT_ARMS.items():
        for seed in options.seeds:
            name = f"{arm}, seed {seed}"
            if name in read(OUT, {}).get("qat", {}):
                continue
            stages = f"compress=[{after}, {aware}, {{kind: export, target: onnx, name: shipped, from: qat}}]"
            config = str(CONFIGS / "int8.yaml")
            document = kdctl("train", config, *own(options), f"train.seed={seed}", augment, "export=[]", stages)
            made = {a["variant"]: brief(a) for a in document["artefacts"]}
            fp32, lost, kept = (
                made["ptq"]["before"]["metrics"]["top1"], made["ptq"]["after"]["metrics"]["top1"],
                made["shipped"]["after"]["metrics"]["top1"],
            )  # fmt: skip
            recovered = (kept - lost) / (fp32 - lost) if fp32 > lost else None
            add("qat", name, {"arm": arm, "seed": seed, "fp32": fp32, "ptq": lost, "qat": kept, "recovered": recovered})


def runtimes(options: argparse.Namespace) -> None:
    run = kdctl("train", str(CONFIGS / "int8.yaml"), *own(options), "compress=[]", "export=[]")["run"]
    export("runtimes", run)


def transformer(options: argparse.Namespace) -> None:
    run = kdctl("train", str(CONFIGS / "transformer.yaml"), f"data.root={options.data_root}")["run"]
    export("transformer", run)


def export(section: str, run: str) -> None:
    """Every runtime that is installed, in fp32 and int8, in one command."""
    add_exports(section, kdctl("export", run, "--to", TARGETS, "--dtype", "fp32,int8"))


def add_exports(section: str, document: dict[str, Any]) -> None:
    for made in document["stages"]:
        add(section, made["variant"], brief(made))
    for failure in document["failures"]:
        add(section, failure["variant"], failure)


def own(options: argparse.Namespace) -> list[str]:
    return [f"data.root={options.data_root}", f"student.weights={options.weights}"]


def table() -> str:
    """The tables in Markdown."""
    document, lines = read(OUT, {}), []
    arms: dict[str, list[dict[str, Any]]] = {}
    for row in document.get("prune", {}).values():
        arms.setdefault(row["arm"], []).append(row)
    lines += [
        "| ResNet-56, half of its MACs | top-1, mean (std) | MACs | parameters | minutes |",
        "|---|---|---|---|---|",
    ]
    for arm, rows in arms.items():
        value = stats.interval([r["recovered"]["after"]["metrics"]["top1"] for r in rows])
        after, minutes = rows[0]["recovered"]["after"], sum(r["seconds"] for r in rows) / len(rows) / 60
        size = f"{after['macs']:,} | {after['parameters']:,}"
        spread = "one seed" if value.std is None else f"std {value.std:.2f}, {len(rows)} seeds"
        lines.append(f"| {arm} | {value.mean:.2f} ({spread}) | {size} | {minutes:.1f} |")
    lines += ["", "| quantised to | seed | fp32 | after training | trained | recovered |", "|---|---|---|---|---|---|"]
    for row in document.get("qat", {}).values():
        share = "-" if row["recovered"] is None else f"{100 * row['recovered']:.0f} %"
        lines.append(
            f"| {row['arm']} | {row['seed']} | {row['fp32']:.2f} | {row['ptq']:.2f} | {row['qat']:.2f} | {share} |"
        )
    for seed, row in document.get("pipeline", {}).items():
        lines += ["", f"| pipeline, {seed} | top-1 | bytes | MACs | cpu ms, batch 1 |", "|---|---|---|---|---|"]
        for column, made in [("the teacher", row["stages"][0]["before"])] + [
            (d["variant"], d["after"]) for d in row["stages"]
        ]:
            size = f"{made['bytes']:,} | {made['macs']:,} | {made['cpu_ms']['1']:.2f}"
            lines.append(f"| {column} | {made['metrics']['top1']:.2f} | {size} |")
    for section in ("runtimes", "transformer"):
        rows = document.get(section, {})
        if rows:
            lines += [
                "",
                f"| {section} | top-1 | agreement | bytes | cpu ms, 1 | x fp32 there | x eager |",
                "|---" * 7 + "|",
            ]
        for name, row in rows.items():
            lines.append(f"| {name} | {row['error']} |" if "error" in row else runtime_row(name, row))
    return "\n".join(lines)


def runtime_row(name: str, row: dict[str, Any]) -> str:
    after = row["after"]
    times = [row[c]["cpu_ms"]["1"] / after["cpu_ms"]["1"] for c in ("same_runtime", "before")]
    said = f"{after['metrics']['top1']:.2f} | {row['agreement']:.2f} | {after['bytes']:,} | {after['cpu_ms']['1']:.3f}"
    return f"| {name} ({row['runtime']}) | {said} | {times[0]:.2f} | {times[1]:.2f} |"


MAKERS = {"prune": prune, "pipeline": pipeline, "qat": qat, "runtimes": runtimes, "transformer": transformer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*MAKERS, "table"])
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0, 1, 2])
    options = parser.parse_args()
    if options.what == "table":
        print(table())
        return
    options.data_root = options.data_root.resolve()
    options.weights = options.weights and options.weights.resolve()
    MAKERS[options.what](options)


if __name__ == "__main__":
    main()
