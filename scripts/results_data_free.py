"""Measures data-free distillation on MNIST: the best preset with three seeds, each other one with less time.

    python scripts/results_data_free.py --data-root FOLDER

Works in the current directory, takes half an hour on one core, and goes on where it stopped: a row that is there is
not trained again, a run that was stopped is resumed. All rows have one teacher, which the first one trains. Writes
docs/results/data_free.json and prints it as a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

from _results import RESULTS, ROOT, kdctl, read, write

CONFIG = ROOT / "configs" / "methods" / "data_free_mnist.yaml"
OUT = RESULTS / "data_free.json"
BEST = "dfq"
SEEDS = 3
SHORT = 3
"""Epochs of the other presets."""
COMMON = "kind: data_free, steps: 200, generator_width: 16"
OTHERS = {
    "dafl": [f"method={{{COMMON}, preset: dafl, generator_lr: 5e-3, kd_steps: 2}}"],
    "dfad": [f"method={{{COMMON}, preset: dfad}}", "losses=[{kind: logit_mse}]"],
    "zskt": [f"method={{{COMMON}, preset: zskt}}"],
    "fast": [
        f"method={{{COMMON}, preset: fast, generator_lr: 5e-3, kd_steps: 10, warmup: 10, adversarial: 0.5, shift: 2, "
        "flip: false}"
    ],
    "cmi": [
        f"method={{{COMMON}, preset: cmi, generator_lr: 5e-3, g_steps: 30, kd_steps: 50, shift: 2, flip: false, "
        "negatives: 128}"
    ],
    "deep_inversion": [
        "method={kind: data_free, steps: 200, preset: deep_inversion, inversion_steps: 100, kd_steps: 50, shift: 2, "
        "flip: false}"
    ],
}
"""The overrides of each other preset: rounds that are short enough for a few minutes, digits never mirrored. A
generator that only has the student to run from learns at the published rate; dfad's student by logits, as its images
do."""


def document_of(name: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """What came of the run of this name and seed, which is resumed or trained where it is not there yet."""
    for path in sorted(Path("runs", name).glob("*/run.json")):
        state = json.loads(path.read_text())
        if state["seed"] == seed:
            done = state["status"] == "done"
            return json.loads((path.parent / "summary.json").read_text()) if done else kdctl("resume", str(path.parent))
    return kdctl("train", str(CONFIG), f"train.seed={seed}", f"name={name}", *overrides)


def row(preset: str, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Trains one student and says what came of it."""
    document = document_of(f"mnist-data-free-{preset}", seed, overrides)
    run = Path(document["run"])
    state = json.loads((run / "run.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["stage"] == "student"]
    return {
        "preset": preset,
        "seed": seed,
        "overrides": [text for text in overrides if text.startswith(("method", "losses", "train.epochs"))],
        "epochs": len(epochs),
        "top1": document["student"]["last"]["test"]["top1"],
        "teacher_top1": document["teacher"]["test"]["top1"],
        "agreement": document["agreement"],
        "val_top1": [line["val"]["top1"] for line in epochs],
        "seconds": state["seconds"]["student"],
        "teacher": str(run / "teacher.safetensors"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores (one used, others busy)",
    }


def jobs() -> list[tuple[str, int, list[str]]]:
    """Preset, seed and overrides of each row."""
    best: list[tuple[str, int, list[str]]] = [(BEST, seed, []) for seed in range(SEEDS)]
    return best + [(name, 0, [*given, f"train.epochs={SHORT}"]) for name, given in OTHERS.items()]


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| preset | seed | epochs | teacher | student without real images | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['preset']} | {r['seed']} | {r['epochs']} | {r['teacher_top1']:.2f} | {r['top1']:.2f} "
            f"| {r['seconds'] / 60:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True)
    given = parser.parse_args()
    rows = read(OUT, [])
    for preset, seed, overrides in jobs():
        if any((r["preset"], r["seed"]) == (preset, seed) for r in rows):
            continue
        teacher = next((r["teacher"] for r in rows if Path(r["teacher"]).exists()), None)
        taught = [f"teacher={{kind: lenet5, batch_norm: true, weights: {Path(teacher).resolve()}}}"] if teacher else []
        rows.append(row(preset, seed, [f"data.root={given.data_root}", "train.device=cpu", *taught, *overrides]))
        write(OUT, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
