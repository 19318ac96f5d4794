"""Runs the quickstart with five seeds and its control, compresses the first student to int8, and prints one table.

Calls the same commands that a user types; `scripts/demo` sets the environment up and starts it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SEEDS = 5


def kdctl(*arguments: str) -> dict[str, Any]:
    """Runs a command with --json, showing its progress, and returns its document."""
    print("$ kdctl " + " ".join(arguments), flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "kdctl", *arguments, "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def row(name: str, metrics: dict[str, float], agreement: float | None, size: dict[str, Any]) -> list[str]:
    return [
        name,
        f"{metrics['top1']:.2f}",
        "-" if agreement is None else f"{agreement:.2f}",
        f"{size['parameters']:,}",
        f"{size['bytes']:,}",
        f"{size['latency']:.3f}",
    ]


def measure(stems: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Bytes, parameters and batch-1 latency of models on disk, each in a process of its own, in turn."""
    from kdctl.bench.latency import Cell, measure
    from kdctl.models.record import load_model

    cells = [
        Cell(what=name, opener="kdctl.evaluate:open_torch", arguments={"path": str(stem)}, batch=1, threads=1)
        for name, stem in stems.items()
    ]
    sizes = {}
    for timed in measure(cells):
        stem = stems[timed.what]
        parameters = sum(p.numel() for p in load_model(stem).net.parameters())
        size = stem.with_suffix(".safetensors").stat().st_size
        sizes[timed.what] = {"parameters": parameters, "bytes": size, "latency": timed.p50_ms}
    return sizes


def main() -> None:
    group = kdctl("train", "configs/quickstart.yaml", "--seeds", str(SEEDS), "--with-baseline")
    first = group["seeds"][0]
    run, baseline = ROOT / first["run"], ROOT / first["baseline"]["run"]
    kdctl("eval", str(run.relative_to(ROOT)))
    small = kdctl("compress", str(run.relative_to(ROOT)), "--quantize", "int8", "--max-drop", "0.5")

    sizes = measure({"teacher": run / "teacher", "control": baseline / "student", "distilled": run / "student"})
    int8 = {
        "parameters": small["after"]["parameters"],
        "bytes": small["after"]["bytes"],
        "latency": small["after"]["latency_ms"]["1"],
    }
    rows = [
        ["", "top-1 %", "agreement %", "parameters", "bytes", "latency ms"],
        row("teacher (fp32, PyTorch)", group["teacher"]["test"], 100.0, sizes["teacher"]),
        row("control (fp32, PyTorch)", first["baseline"]["test"], first["baseline"]["agreement"], sizes["control"]),
        row("distilled (fp32, PyTorch)", first["student"]["test"], first["student"]["agreement"], sizes["distilled"]),
        row("distilled (int8, ONNX Runtime)", small["after"]["metrics"], small["agreement_teacher"], int8),
    ]
    print(f"\nseed {first['seed']}, test split, batch 1, one thread")
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    for cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        padded[0] = cells[0].ljust(widths[0])
        print("  ".join(padded))
    same = small["same_runtime"]
    print(f"\nint8 against fp32 in the same runtime: {int8['bytes']:,} against {same['bytes']:,} bytes, ", end="")
    print(f"{int8['latency']:.3f} against {same['latency_ms']['1']:.3f} ms")
    for note in small["notes"]:
        print(f"note: {note}")

    print(f"\n{SEEDS} seeds:")
    for who, value in group["summary"].items():
        if isinstance(value, dict):
            low, high = value["ci95"]
            print(f"{who:<9} mean {value['mean']:6.2f}  std {value['std']:.2f}  95 % interval {low:.2f} to {high:.2f}")
    print(f"verdict: {group['verdict']}")


if __name__ == "__main__":
    main()
