"""ResNet-56 at half its MACs by Torch-Pruning's own recipe, then fine-tuned as long as kdctl's: one JSON document.

    python scripts/bench/torch_pruning_peer.py DATA_ROOT WEIGHTS SEED [EPOCHS]

As its CIFAR-10 example does: group L1 importance, global ranking with a largest ratio a layer, pruned in steps until
the MACs are half, then SGD from 0.01 with momentum 0.9 and weight decay 5e-4, the rate divided by ten twice; without a
teacher. Scaled: the example trains for 100 epochs, here it is EPOCHS. The net, images and measuring are kdctl's; its
shortcuts without parameters are turned into equal 1x1 convolutions, which Torch-Pruning can follow.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch.nn import functional as F

from kdctl import build
from kdctl.bench import cost
from kdctl.config.expand import load_experiment
from kdctl.config.schema import Experiment
from kdctl.data.augment import Augment
from kdctl.data.loader import TrainLoader
from kdctl.data.prepare import Data
from kdctl.evaluate import TorchPredictor, metrics, predict
from kdctl.models.record import Model
from kdctl.registry import create
from kdctl.tasks.base import Task

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "compression" / "prune_recover.yaml"
SHAPE = (3, 32, 32)


def main() -> None:
    root, weights, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
    epochs = int(sys.argv[4]) if len(sys.argv) > 4 else 1
    experiment = load_experiment(
        CONFIG, [f"data.root={root}", f"student.weights={weights}", "data.limit=20000"]
    ).experiment
    data, task = build.build_data(experiment), build.build_task(experiment)
    model = build.build_model(experiment.student, data, "student")
    torch.manual_seed(seed)
    whole = cost.macs(model, SHAPE)
    before = _measure(model, data, task)
    pruned = _prune(model, whole // 2)
    after = _measure(pruned, data, task)
    seconds = _train(pruned, data, experiment, seed, epochs)
    row = {
        "pruned": {"before": before | {"macs": whole}, "after": after},
        "recovered": {"before": before | {"macs": whole}, "after": _measure(pruned, data, task)},
        "seconds": seconds,
        "torch_pruning": tp.__version__,
    }
    print(json.dumps(row))


def _prune(model: Model, goal: int) -> Model:
    pruned = copy.deepcopy(model)
    for path, module in list(pruned.net.named_modules()):
        if type(module).__name__ == "PadShortcut":
            parent, _, name = path.rpartition(".")
            block: Any = pruned.net.get_submodule(parent)
            channels = block.conv1.in_channels
            setattr(block, name, _as_convolution(module, channels))
    example = torch.zeros(1, *SHAPE)
    pruner = tp.pruner.BasePruner(
        pruned, example, importance=tp.importance.GroupMagnitudeImportance(p=1), global_pruning=True,
        pruning_ratio=1.0, max_pruning_ratio=0.8, iterative_steps=400, ignored_layers=[pruned.net.fc],
    )  # fmt: skip
    while cost.macs(pruned, SHAPE) > goal:
        pruner.step()
    return pruned


def _as_convolution(shortcut: Any, channels: int) -> torch.nn.Conv2d:
    before, after = shortcut.padding[4:6]
    conv = torch.nn.Conv2d(channels, before + channels + after, 1, shortcut.stride, bias=False)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[before + torch.arange(channels), torch.arange(channels), 0, 0] = 1
    return conv


def _train(model: Model, data: Data, experiment: Experiment, seed: int, epochs: int) -> float:
    steps = [create("augment", s.kind, s.arguments) for s in experiment.data.augment]
    loader = TrainLoader(
        data.train, batch_size=128, augment=Augment(steps, seed=0), views="fresh", order_seed=seed,
        device=torch.device("cpu"), workers=0,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    total, done, start = epochs * len(loader), 0, time.monotonic()
    model.train()
    for epoch in range(epochs):
        for batch in loader.epoch(epoch):
            rate = 0.01 * 0.1 ** ((done >= 0.6 * total) + (done >= 0.8 * total))
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(batch.inputs), batch.targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
    model.eval()
    return time.monotonic() - start


def _measure(model: Model, data: Data, task: Task) -> dict[str, Any]:
    said = predict(TorchPredictor(model), data.split("test"), task, 512)
    return {
        "metrics": metrics(said, task), "macs": cost.macs(model, SHAPE), "parameters": cost.parameters(model.net),
    }  # fmt: skip


if __name__ == "__main__":
    main()
