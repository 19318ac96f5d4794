"""One cell of a benchmark in a fresh process: prints what it measured as one line of JSON.

python scripts/bench/_cell.py kdctl FILE.yaml --warmup 10
python scripts/bench/_cell.py bare --model resnet20 --classes 10 --precision bf16 --layout channels_last --threads 2
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from _common import Cell, Meter, peak_mib, usable_cores
from torch.nn import functional as F

from kdctl import registry
from kdctl.device import autocast
from kdctl.watch import Reporter

_BATCHES = 8
"""Different synthetic batches, so that caches see what they see in training."""


class Watch(Reporter):
    """Measures kdctl's own loop from its reports: all steps after those of the warm-up."""

    def __init__(self, warmup: int, epochs: int, batch: int, device: str) -> None:
        self.warmup, self.epochs, self.batch, self.device = warmup, epochs, batch, device
        self.meter = Meter()
        self.cell: Cell = {}

    def step(self, stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
        done = epoch * steps + step
        if done == self.warmup:
            _wait(self.device)
            self.meter.start()
        if done == self.epochs * steps:
            _wait(self.device)
            seconds, cpu = self.meter.read()
            images = (done - self.warmup) * self.batch
            self.cell = {"images": images, "seconds": seconds, "cpu_seconds": cpu, "peak_mib": peak_mib()}

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        self.cell |= {"times": line["times"], "loss": line["loss"]}


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def train(options: argparse.Namespace) -> Cell:
    """`kdctl train` on a file, in this process."""
    from kdctl import experiment
    from kdctl.config.expand import load_experiment
    from kdctl.runs import Run

    if options.as_they_come:
        from kdctl.data.tokens import TokenSplit

        TokenSplit.arranged = lambda self, rows, batch_size, key: rows  # type: ignore[method-assign]
    loaded = load_experiment(options.file).experiment
    stage = loaded.student_stage
    watch = Watch(options.warmup, stage.epochs, loaded.data.batch_size, loaded.train.device)
    document = experiment.train(experiment.Plan(loaded, options.file.read_text()), watch)
    resolved = experiment.load_run(Run(Path(document["run"]))).train
    chosen = {name: getattr(resolved, name) for name in ("precision", "layout", "threads", "device", "compile")}
    return watch.cell | chosen


def bare(options: argparse.Namespace) -> Cell:
    """A net alone on synthetic data that are already there: forward, cross-entropy, backward, fused SGD.

    With --forward in eval mode and without gradients: what a teacher does.
    """
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    layout = torch.channels_last if options.layout == "channels_last" else torch.contiguous_format
    net = registry.create("models", options.model, {}, num_classes=options.classes)
    net.to(device=device, memory_format=layout).train(not options.forward).requires_grad_(not options.forward)
    if options.compile:
        net.compile()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True, fused=True)
    batches = [
        (
            torch.randn(options.batch, 3, options.side, options.side, device=device).to(memory_format=layout),
            torch.randint(options.classes, (options.batch,), device=device),
        )
        for _ in range(_BATCHES)
    ]
    meter = Meter()
    for step in range(options.warmup + options.steps):
        if step == options.warmup:
            _wait(options.device)
            meter.start()
        images, targets = batches[step % _BATCHES]
        with autocast(device, options.precision):
            loss = F.cross_entropy(net(images), targets)
        if options.forward:
            continue
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    _wait(options.device)
    seconds, cpu = meter.read()
    return {"images": options.batch * options.steps, "seconds": seconds, "cpu_seconds": cpu, "peak_mib": peak_mib()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(required=True)
    ours = kinds.add_parser("kdctl")
    ours.add_argument("file", type=Path)
    ours.add_argument("--warmup", type=int, default=10)
    ours.add_argument("--as-they-come", action="store_true", help="texts in their drawn order, not by length")
    ours.set_defaults(work=train)
    alone = kinds.add_parser("bare")
    alone.add_argument("--model", required=True)
    alone.add_argument("--classes", type=int, required=True)
    alone.add_argument("--precision", default="fp32")
    alone.add_argument("--layout", default="contiguous")
    alone.add_argument("--compile", action="store_true")
    alone.add_argument("--device", default="cpu")
    alone.add_argument("--threads", type=int, default=usable_cores())
    alone.add_argument("--batch", type=int, default=128)
    alone.add_argument("--forward", action="store_true", help="no backward pass and no update")
    alone.add_argument("--side", type=int, default=32)
    alone.add_argument("--warmup", type=int, default=10)
    alone.add_argument("--steps", type=int, default=30)
    alone.set_defaults(work=bare)
    options = parser.parse_args()
    print(json.dumps(options.work(options)))


if __name__ == "__main__":
    main()
