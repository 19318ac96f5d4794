"""Makes the CIFAR-10 table of the README: distilled against control, then int8 of the first student of each.

    python scripts/results_cifar10.py --data-root FOLDER --teacher-weights resnet56-4bfd9763.th

Works in the current directory, takes a few hours on two CPU cores, and goes on where it stopped: a group whose result
is there is not trained again. Writes docs/results/cifar10.json and prints the table in Markdown.
"""

from __future__ import annotations

import argparse
from typing import Any

from _results import RESULTS, ROOT, group_of, kdctl, write

OUT = RESULTS / "cifar10.json"
SEEDS = {"resnet56_to_resnet8": 5, "resnet56_to_resnet20": 2}


def row(group: dict[str, Any], int8: dict[str, Any]) -> dict[str, Any]:
    same, after = int8["same_runtime"], int8["after"]
    return {
        "student": group["student"]["kind"],
        "parameters": group["student"]["parameters"],
        "teacher_top1": group["teacher"]["test"]["top1"],
        "epochs": group["epochs"],
        "precision": group["precision"],
        "summary": group["summary"],
        "verdict": group["verdict"],
        "seeds": [
            {"seed": s["seed"], "student": s["student"]["test"]["top1"], "control": s["baseline"]["test"]["top1"],
             "student_last": s["student"]["last"]["top1"], "control_last": s["baseline"]["last"]["top1"],
             "agreement": s["student"]["agreement"], "control_agreement": s["baseline"]["agreement"]}
            for s in group["seeds"]
        ],
        "int8": {
            "fp32_top1": int8["before"]["metrics"]["top1"],
            "top1": after["metrics"]["top1"],
            "bytes": after["bytes"],
            "bytes_ratio": after["bytes"] / int8["before"]["bytes"],
            "cpu_ms": after["cpu_ms"],
            "fp32_same_runtime_cpu_ms": same["cpu_ms"],
            "fp32_eager_cpu_ms": int8["before"]["cpu_ms"],
            "agreement": int8["agreement"],
            "notes": int8["notes"],
        },
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| student | seeds | control | distilled | gain, 95 % interval | int8 | bytes, int8/fp32 | speed, fp32/int8 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        s, q = r["summary"], r["int8"]
        low, high = s["gain"]["ci95"]
        speed = q["fp32_same_runtime_cpu_ms"]["1"] / q["cpu_ms"]["1"]
        lines.append(
            f"| {r['student']} ({r['parameters']:,}) | {s['gain']['n']} | {s['baseline']['mean']:.2f} "
            f"| {s['student']['mean']:.2f} | {s['gain']['mean']:+.2f}, {low:+.2f} to {high:+.2f} "
            f"| {q['top1']:.2f} (fp32 {q['fp32_top1']:.2f}) | {q['bytes_ratio']:.3f} | {speed:.2f} x |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--teacher-weights", required=True)
    given = parser.parse_args()
    overrides = [f"data.root={given.data_root}", f"teacher.weights={given.teacher_weights}", "train.threads=1"]
    rows = []
    for name, seeds in SEEDS.items():
        config = ROOT / "configs" / "cifar10" / f"{name}.yaml"
        group = group_of(
            f"cifar10-{name.replace('_to_', '-')}", config, *overrides, "--seeds", str(seeds), "--with-baseline"
        )
        first = group["seeds"][0]["run"]
        int8 = kdctl("compress", first, "--quantize", "int8", "--max-drop", "0.5")
        rows.append(row(group, int8))
        write(OUT, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
