"""Measuring a model on a test split: kdctl's two ways against a plain fp32 loop, images per second.

    python scripts/bench/evaluation.py [--model resnet56] [--images 4096] [--rounds 5] [--json FILE]

    kdctl, final      what `kdctl eval` and the end of a run do: fp32, predictions and every metric
    kdctl, training   what happens after each epoch, in bf16 and channels_last (--precision, --layout)
    plain             batches of uint8 images to float, normalised, the net in inference mode, right answers counted

The contenders take turns in one process, on the same random net and the same noise.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from _common import Cell, Meter, common_parser, conditions, finish, print_table, ratio, spread, spread_text, take_turns

from kdctl import evaluate, registry
from kdctl.data.base import ArraySplit
from kdctl.models.record import Model, ModelRecord, build_model
from kdctl.tasks.base import Task

CLASSES = 10


def make_model(kind: str, layout: str = "contiguous") -> Model:
    torch.manual_seed(0)
    normalize = {"mean": [0.5] * 3, "std": [0.25] * 3}
    names = [str(number) for number in range(CLASSES)]
    model = build_model(ModelRecord(kind, {}, CLASSES, names, [3, 32, 32], normalize)).eval()
    return model.to(memory_format=torch.channels_last) if layout == "channels_last" else model  # type: ignore[call-overload]


def final(model: Model, split: ArraySplit, task: Task, batch: int) -> None:
    evaluate.metrics(evaluate.predict(evaluate.TorchPredictor(model), split, task, batch), task)


def in_training(model: Model, split: ArraySplit, task: Task, batch: int, precision: str) -> None:
    evaluate.validate(model, split, task, torch.device("cpu"), batch, precision)


@torch.inference_mode()
def plain(model: Model, images: torch.Tensor, targets: torch.Tensor, batch: int) -> float:
    right = 0
    for rows in torch.arange(len(images)).split(batch):
        right += int((model(images[rows].float() / 255).argmax(1) == targets[rows]).sum())
    return right / len(images)


def timed(work: Any, images: int) -> Cell:
    meter = Meter()
    work()
    seconds, cpu = meter.read()
    return {"images_per_second": images / seconds, "cpu_seconds_per_1000": 1000 * cpu / images}


def main() -> None:
    parser = common_parser(__doc__)
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=512, help="as data.eval_batch_size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="bf16", help="of the measuring after each epoch")
    parser.add_argument("--layout", default="channels_last")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (options.images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    targets = torch.randint(0, CLASSES, (options.images,), generator=generator)
    split = ArraySplit(images, targets)
    task: Task = registry.create("tasks", "classification", {})
    model, own = make_model(options.model), make_model(options.model, options.layout)
    works = {
        "kdctl, final": functools.partial(final, model, split, task, options.batch),
        "kdctl, training": functools.partial(in_training, own, split, task, options.batch, options.precision),
        "plain": functools.partial(plain, model, images, targets, options.batch),
    }
    surroundings = conditions(options.threads)
    cells = take_turns({name: functools.partial(timed, w, options.images) for name, w in works.items()}, options.rounds)
    rates = {name: [c["images_per_second"] for c in found] for name, found in cells.items()}
    costs = {name: [c["cpu_seconds_per_1000"] for c in found] for name, found in cells.items()}
    rows = {
        name: {
            "images_per_second": spread(rates[name]),
            "cpu_seconds_per_1000": spread(costs[name]),
            "to_plain": ratio(rates[name], rates["plain"]),
        }
        for name in cells
    }
    digits = {"images_per_second": 0, "cpu_seconds_per_1000": 2, "to_plain": 2}
    table = [[name, *(spread_text(row[what], d) for what, d in digits.items())] for name, row in rows.items()]
    print_table([options.model, "images/s", "CPU-s per 1,000", "x plain"], table)
    settings = {"model": options.model, "batch": options.batch, "precision": options.precision}
    finish({"conditions": surroundings, **settings, "rows": rows}, options.json)


if __name__ == "__main__":
    main()
