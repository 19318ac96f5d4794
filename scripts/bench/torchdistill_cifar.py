"""torchdistill on CIFAR with its own box, loop, loss and loader; run it with the Python that `peers.py` made.

    PEERS/bin/python scripts/bench/torchdistill_cifar.py --root FOLDER --weights resnet56-4bfd9763.th --out FILE.jsonl

The settings are those of its published CIFAR-10 recipe for distillation (SGD 0.1, momentum 0.9, weight decay 1e-4,
batch 128, T 4, random crop and flip one image at a time, the rate cut by ten after 1/2 and 3/4 of the epochs) with
three changes: the milestones are scaled to the number of epochs (8 and 11 of 15); the teacher has 0.9 of the loss, the
better of two readings of alpha; and the teacher is put into eval mode, which torchdistill leaves to its user. Images
are normalised as the teacher needs. All training images train, the test split is measured after every epoch.

One JSON line an epoch goes to --out, and a checkpoint beside it from which the same command continues. With --max-steps
nothing is measured but the speed of that many steps after --warmup others, and one JSON line is printed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[2]))  # kdctl's nets; it is not installed among the peers

import numpy as np
import torch
from _common import Meter, peak_mib, usable_cores
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, RandomSampler, SequentialSampler

from kdctl import registry
from kdctl.data.cifar import Cifar
from kdctl.data.npz import read_npz
from kdctl.models.weights import load_weights
from kdctl.torchvision_guard import ensure_torchvision

ensure_torchvision()
from torchdistill.core.distillation import DistillationBox, get_distillation_box  # noqa: E402
from torchdistill.misc.log import MetricLogger, SmoothedValue  # noqa: E402
from torchvision import transforms  # noqa: E402

IMAGENET = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
MILESTONES = (91 / 182, 136 / 182)


class PillowImages(Dataset[tuple[Any, int]]):
    """Images as torchvision's CIFAR classes give them: from an array to Pillow and through the transforms, singly."""

    def __init__(self, images: np.ndarray, targets: list[int], transform: Any) -> None:
        self.images, self.targets, self.transform = images, targets, transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[index])), self.targets[index]


def datasets(options: argparse.Namespace) -> tuple[dict[str, Dataset[Any]], int]:
    loaded = read_npz(options.npz) if options.npz else Cifar(root=str(options.root)).load()
    plain = [transforms.ToTensor(), IMAGENET]
    augmented = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *plain]
    found: dict[str, Dataset[Any]] = {}
    for name, split, steps in (("train", loaded.train, augmented), ("test", loaded.test, plain)):
        if split is None:
            sys.exit(f"{options.npz} has no {name} split")
        images = split.fetch(torch.arange(len(split))).permute(0, 2, 3, 1).contiguous().numpy()
        found[name] = PillowImages(images, split.targets.tolist(), transforms.Compose(steps))
    return found, len(loaded.class_names)


def net(kind: str, num_classes: int, **arguments: Any) -> nn.Module:
    return registry.create("models", kind, arguments, num_classes=num_classes)


def train_config(options: argparse.Namespace) -> dict[str, Any]:
    """What torchdistill's YAML comes to."""
    logits = dict.fromkeys(("student_module_io", "teacher_module_io"), "output")
    kd = {
        "key": "KDLoss",
        "kwargs": {
            "student_module_path": ".", "teacher_module_path": ".", **logits,
            "temperature": options.T, "alpha": 1 - options.teacher_share, "reduction": "batchmean",
        },
    }  # fmt: skip

    def loader(dataset: str, sampler: type) -> dict[str, Any]:
        return {
            "dataset_id": dataset,
            "sampler": {"class_or_func": sampler, "kwargs": {}},
            "kwargs": {"batch_size": options.batch, "num_workers": options.workers},
        }

    return {
        "num_epochs": options.epochs,
        "train_data_loader": loader("train", RandomSampler),
        "val_data_loader": loader("test", SequentialSampler),
        "teacher": {"forward_proc": "forward_batch_only", "sequential": [], "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only", "sequential": [], "requires_grad": True},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}},
        "scheduler": {
            "key": "MultiStepLR",
            "kwargs": {"milestones": [round(m * options.epochs) for m in MILESTONES], "gamma": 0.1},
        },
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"criterion": kd, "weight": 1.0}}}},
    }


def train_one_epoch(
    box: DistillationBox, epoch: int, warmup: int = 0, most_steps: int | None = None
) -> tuple[float, float]:
    """(wall, CPU) seconds after the warm-up, by the loop of torchdistill's example for image classification."""
    box.pre_epoch_process(epoch=epoch)
    box.teacher_model.eval()
    log = MetricLogger(delimiter="  ")
    log.add_meter("lr", SmoothedValue(window_size=1, fmt="{value}"))
    log.add_meter("img/s", SmoothedValue(window_size=10, fmt="{value}"))
    meter = Meter()
    batches = itertools.islice(log.log_every(box.train_data_loader, 100, f"Epoch: [{epoch}]"), most_steps)
    for step, (images, targets, extra) in enumerate(batches):
        if step == warmup:
            meter.start()
        began = time.time()
        images, targets = images.to(box.device), targets.to(box.device)
        loss = box.forward_process(images, targets, extra)
        box.post_forward_process(loss=loss)
        log.update(loss=loss.item(), lr=box.optimizer.param_groups[0]["lr"])
        log.meters["img/s"].update(len(images) / (time.time() - began))
    return meter.read()


@torch.inference_mode()
def accuracy(model: nn.Module, loader: Any) -> float:
    """Percent of a loader's images that the model classifies right."""
    model.eval()
    device = next(model.parameters()).device
    right = sum(int((model(batch[0].to(device)).argmax(1).cpu() == batch[1]).sum()) for batch in loader)
    return 100 * right / len(loader.dataset)


def run(box: DistillationBox, student: nn.Module, options: argparse.Namespace) -> None:
    """All epochs that are not done yet."""
    saved = options.out.with_suffix(".pt")
    first = 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        student.load_state_dict(state["student"])
        box.optimizer.load_state_dict(state["optimizer"])
        box.lr_scheduler.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])
        first = state["epoch"]
    for epoch in range(first, options.epochs):
        seconds, cpu = train_one_epoch(box, epoch)
        meter = Meter()
        reached = accuracy(student, box.val_data_loader)
        eval_seconds, eval_cpu = meter.read()
        box.post_epoch_process()
        state = {
            "student": student.state_dict(), "optimizer": box.optimizer.state_dict(), "epoch": epoch + 1,
            "schedule": box.lr_scheduler.state_dict(), "random": torch.get_rng_state(),
        }  # fmt: skip
        line = {
            "epoch": epoch + 1, "of": options.epochs, "seed": options.seed, "test_accuracy": reached,
            "seconds": seconds, "cpu_seconds": cpu, "eval_seconds": eval_seconds, "eval_cpu_seconds": eval_cpu,
            "threads": options.threads, "workers": options.workers, "teacher_mode": "eval",
        }  # fmt: skip
        torch.save(state, saved.with_suffix(".aside"))
        os.replace(saved.with_suffix(".aside"), saved)
        with options.out.open("a") as file:
            file.write(json.dumps(line) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--root", type=Path, help="the folder of CIFAR-10, as kdctl's data.root")
    source.add_argument("--npz", type=Path, help="images of 32x32 in kdctl's form instead")
    parser.add_argument("--teacher", default="resnet56")
    parser.add_argument("--student", default="resnet20")
    parser.add_argument("--weights", type=Path, help="resnet56-4bfd9763.th; without it the teacher is random")
    parser.add_argument("--out", type=Path, help="one JSON line an epoch")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--T", type=float, default=4.0)
    parser.add_argument("--teacher-share", type=float, default=0.9)
    parser.add_argument("--max-steps", type=int, help="measure the speed of so many steps and nothing else")
    parser.add_argument("--warmup", type=int, default=10)
    options = parser.parse_args()
    if not options.max_steps and options.out is None:
        parser.error("--out or --max-steps is needed")
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    random.seed(options.seed)
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    data, num_classes = datasets(options)
    teacher = net(options.teacher, num_classes, **({"shortcut": "pad"} if options.weights else {}))
    if options.weights:
        load_weights(teacher, options.weights, {"linear.": "fc."})
    student = net(options.student, num_classes)
    box = get_distillation_box(
        teacher.to(device),
        student.to(device),
        data,
        train_config(options),
        device,
        None,
        distributed=False,
        lr_factor=1,
    )
    if options.max_steps:
        seconds, cpu = train_one_epoch(box, 0, options.warmup, options.warmup + options.max_steps)
        images = options.batch * options.max_steps
        print(json.dumps({"images": images, "seconds": seconds, "cpu_seconds": cpu, "peak_mib": peak_mib()}))
        return
    if options.weights and not options.out.exists():
        print(f"teacher: {accuracy(teacher, box.val_data_loader):.2f} % of the test split", file=sys.stderr, flush=True)
    run(box, student, options)


if __name__ == "__main__":
    main()
