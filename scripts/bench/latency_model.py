"""How well the latency model predicts: unseen widths of ResNet-20 and other nets, predicted and then measured.

    python scripts/bench/latency_model.py --out docs/results/latency_model.json

The ResNet-20s have random widths inside their blocks (what pruning makes of them), none of which is profiled by name;
the others are whole families. Predicted and measured: ONNX Runtime in fp32, batch 1, one thread, least CPU time of a
call; every measured net has a process of its own, and they take turns. The speed of a shared machine drifts between
profiling and measuring; `reference` tells how much: one small net, before and in the turns.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from _common import conditions, print_table, say

from kdctl import runs
from kdctl.compress.latency.model import LatencyModel, machine
from kdctl.models.record import Model, ModelRecord, build_model

SHAPE = (3, 32, 32)
LIMIT = 20.0
"""Percent that a prediction may be off."""


def build(kind: str, structure: list[dict[str, Any]] | None = None, **arguments: Any) -> Model:
    normalize = {"mean": [0.5] * 3, "std": [0.25] * 3}
    names = [str(n) for n in range(10)]
    return build_model(ModelRecord(kind, arguments, 10, names, list(SHAPE), normalize, structure=structure)).eval()


def narrowed(kind: str, draw: random.Random, multiple: int) -> Model:
    """A residual net with a random width inside each block, between a quarter and all of it."""
    structure = []
    for path, module in build(kind).net.named_modules():
        if path.endswith(".conv1"):
            whole, block = module.out_channels, path.removesuffix(".conv1")
            width = max(multiple, draw.randint(whole // 4, whole) // multiple * multiple)
            structure += [
                {"edit": "resize", "path": path, "in": module.in_channels, "out": width, "groups": 1},
                {"edit": "resize", "path": f"{block}.bn1", "out": width},
                {"edit": "resize", "path": f"{block}.conv2", "in": width, "out": whole, "groups": 1},
            ]
    return build(kind, structure)


def nets() -> dict[str, Model]:
    draw = random.Random(0)
    found = {f"resnet20, widths {n}, any": narrowed("resnet20", draw, 1) for n in range(4)}
    found |= {f"resnet20, widths {n}, fours": narrowed("resnet20", draw, 4) for n in range(4, 8)}
    found |= {f"resnet20, widths {n}, eights": narrowed("resnet20", draw, 8) for n in range(8, 10)}
    found |= {f"resnet20, {w} wide": build("cifar_resnet", depth=20, stem=w, width=w) for w in (8, 24, 32)}
    return found | {kind: build(kind) for kind in ("vgg8", "mobilenet_v2", "wrn_16_2", "shufflenet_v1")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the numbers are written, as JSON")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each net is measured")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = LatencyModel(Path(folder) / "times.json")
        start, cpu = time.perf_counter(), time.process_time()
        model.profile(build("resnet20"), SHAPE, say)
        profiled = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        profiled["operators"] = len(model.times)
        contenders = nets()
        predicted = {name: model.predict(net, SHAPE) for name, net in contenders.items()}
        before = model.reference
        say("measuring")
        measured = dict(zip(contenders, model.measure(list(contenders.values()), SHAPE, chosen.seconds), strict=True))
    rows: list[dict[str, Any]] = [
        {
            "net": name, "predicted_ms": predicted[name], "measured_ms": measured[name],
            "error_percent": 100 * (predicted[name] / measured[name] - 1),
        }
        for name in contenders
    ]  # fmt: skip
    table = [
        [r["net"], *(f"{r[k]:.3f}" for k in ("predicted_ms", "measured_ms")), f"{r['error_percent']:+.1f}"]
        for r in rows
    ]
    print_table(["net", "predicted ms", "measured ms", "error %"], table)
    unseen = [abs(row["error_percent"]) for row in rows if ", widths" in row["net"]]
    summary = {
        "unseen_widths": len(unseen), "largest_error_percent": max(unseen),
        "mean_error_percent": sum(unseen) / len(unseen), "limit_percent": LIMIT, "held": max(unseen) <= LIMIT,
    }  # fmt: skip
    print(
        summary, profiled, f"reference {1e6 * before:.1f} us, in the turns {1e6 * (model.turn_reference or 0):.1f} us"
    )
    if chosen.out is not None:
        head = {"conditions": conditions(1), "machine": machine(), "image_shape": list(SHAPE), "profile": profiled}
        speed = {"reference_us": 1e6 * before, "reference_in_turns_us": 1e6 * (model.turn_reference or 0)}
        runs.write_json(chosen.out, head | speed | {"summary": summary, "rows": rows})


if __name__ == "__main__":
    main()
