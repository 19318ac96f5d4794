"""`kdctl train --smoke`: two steps of each stage on a slice of the data, or on synthetic inputs of the same form."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdctl import build, registry, runs
from kdctl.config.dump import dump_yaml
from kdctl.config.schema import DataSpec, Experiment, ModelSpec, OutputStage, TrainStage
from kdctl.data.base import ArraySplit, Dataset, Split
from kdctl.data.prepare import Data, split_dataset, stratified
from kdctl.data.tokenizer import Tokenizer
from kdctl.data.tokens import TokenSplit
from kdctl.device import settle_by_rule
from kdctl.errors import Interrupted, MissingError
from kdctl.pipeline import run_stages
from kdctl.signals import IGNORE
from kdctl.watch import Reporter

STEPS = 2
_MEASURED = 64
_STAND_INS = {
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
    "mnist": ((1, 28, 28), 10),
    "fashion_mnist": ((1, 28, 28), 10),
}
"""Image shape and number of classes of data that have to be fetched first."""
_OF_TEXTS = ("text", "corpus", "hub_text", "hub_corpus")
_ASKED = ("next", "hidden", "embedding")


def smoke(experiment: Experiment, reporter: Reporter) -> dict[str, Any]:
    """Runs every stage for two steps in a temporary directory and returns which stages ran.

    Weights that are not at hand are replaced by fresh ones, data by synthetic images; the document says so.
    """
    notes: list[str] = []
    data = _data(experiment, notes)
    for note in notes:
        reporter.say(f"note: {note}")
    batch = experiment.data.batch_size
    stages = [_shortened(s, batch, notes) if isinstance(s, TrainStage) else _cheap(s) for s in experiment.stages]
    short = experiment.model_copy(
        update={
            "stages": stages,
            "student": _at_hand(experiment.student, notes),
            "train": settle_by_rule(experiment.train),
            "teacher_cache": None,  # what it would keep is of a slice
            "loggers": [],
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        config = dump_yaml(short)
        names = [s.name for s in short.stages]
        run = runs.create(short.name, config, config, stages=names, seed=0, root=Path(folder))
        try:
            run_stages(run, short, reporter, data, timed=False)
        except Interrupted as stopped:
            raise Interrupted(stopped.code - 128, "the smoke test was stopped") from None
    return {"status": "smoke", "stages": names, "notes": notes}


def _shortened(stage: TrainStage, batch: int, notes: list[str]) -> TrainStage:
    """One epoch of two batches of the sliced data, with at most one label a class where labels are few. batch: the size
    of one where the stage names none."""
    labels = None if stage.data.labels_per_class in (None, "all") else 1
    update: dict[str, Any] = {"limit": STEPS * (stage.data.batch_size or batch)}
    changed = stage.data.model_copy(update=update | {"labels_per_class": labels or stage.data.labels_per_class})
    teachers = [_at_hand(t, notes).model_copy(update={"control": True}) for t in stage.teachers]
    update = {"max_drop": None, "min_speedup": None, "epochs": 1, "data": changed}
    update["student"] = stage.student and _at_hand(stage.student, notes)
    shorter = registry.load(registry.find("methods", stage.method.kind)).smoke  # type: ignore[attr-defined]
    update["method"] = stage.method.model_copy(update=shorter)
    if teachers:
        update["teacher"] = teachers if isinstance(stage.teacher, list) else teachers[0]
    return stage.model_copy(update=update)


def _cheap(stage: OutputStage) -> OutputStage:
    """The stage without its gates, which two steps cannot meet, and with what makes it quick."""
    update: dict[str, Any] = {"max_drop": None, "min_speedup": None}
    if stage.kind != "export":
        update |= getattr(registry.load(registry.find("compressors", stage.kind)), "smoke", {})
    return stage.model_copy(update=update)


def _at_hand(spec: Any, notes: list[str]) -> Any:
    """The model without weights that are not there."""
    assert isinstance(spec, ModelSpec)
    if spec.inherit is not None and spec.inherit.source != "teacher" and not Path(spec.inherit.source).exists():
        notes.append(f"{spec.kind}: fresh weights stand in for {spec.inherit.source}")
        spec = spec.model_copy(update={"inherit": None})
    if spec.weights is None or (spec.weights != "pretrained" and Path(spec.weights).exists()):
        return spec
    note = f"{spec.kind}: fresh weights stand in for {spec.weights}"
    if note not in notes:
        notes.append(note)
    return spec.model_copy(update={"weights": None})


def _data(experiment: Experiment, notes: list[str]) -> Data:
    """Two of the largest batches to train on and a few samples to measure."""
    spec = experiment.data
    sizes = [s.data.batch_size or spec.batch_size for s in experiment.train_stages]
    count = STEPS * max(sizes, default=spec.batch_size)
    try:
        data = build.build_data(experiment)
    except MissingError as error:
        of_texts, target = spec.kind in _OF_TEXTS, build.build_task(experiment).target
        notes.append(f"synthetic {'texts' if of_texts else 'images'} stand in for the data: {error}")
        alone = spec.model_copy(update={"expand": []})
        data = split_dataset(_texts(spec, count, target) if of_texts else _synthetic(spec, count), alone)
    train = _first(data.whole, count)
    labels = data.labels_per_class if data.labels_per_class == "all" else 1
    return dataclasses.replace(
        data, train=train, whole=train, val=_first(data.val, _MEASURED), test=_first(data.test, _MEASURED),
        limit=None, labels_per_class=labels,
    )  # fmt: skip


def _first(split: Split | None, count: int) -> Any:
    """The first samples of a split, each class in proportion."""
    if split is None:
        return None
    part = split.subset(stratified(split.strata, 0)[:count])
    return part.labelled(part.targets, torch.arange(len(part)))


def _synthetic(spec: DataSpec, count: int) -> Dataset:
    size = int(spec.arguments.get("size", 32))
    shape, classes = _STAND_INS.get(spec.kind, ((3, size, size), 10))
    generator = torch.Generator().manual_seed(0)

    def split(samples: int) -> ArraySplit:
        images = torch.randint(0, 256, (samples, *shape), dtype=torch.uint8, generator=generator)
        return ArraySplit(images, torch.arange(samples) % classes)

    names = [str(number) for number in range(classes)]
    return Dataset(split(max(2 * count, 20 * classes)), test=split(max(_MEASURED, classes)), class_names=names)


def _texts(spec: DataSpec, count: int, target: str) -> Dataset:
    """Texts of a few made-up words, with labels of the target's kind in two classes or in those that the file names."""
    named = spec.arguments.get("class_names")
    names = list(named) if isinstance(named, list) else ["0", "1"]
    words = torch.randint(0, 200, (max(2 * count, 20 * len(names)), 8), generator=torch.Generator().manual_seed(0))
    texts = [" ".join(f"word{number}" for number in row) for row in words.tolist()]
    pairs = spec.arguments.get("pair") is not None
    tokenizer = Tokenizer.trained(texts, 400)
    tokens = tokenizer.tokens(int(spec.arguments.get("max_length", 128)), pairs)
    numbers = tokenizer.encode(texts, texts if pairs else None, tokens.length)
    if target in ("next", "hidden"):
        names = tokenizer.vocabulary()
    elif target == "number":
        names = ["score"]

    def split(samples: int) -> TokenSplit:
        targets, some = _labels(target, samples, len(names)), numbers[:samples]
        if target != "tags":
            return TokenSplit.of(some, targets, tokens, asks=target if target in _ASKED else "targets")
        ids = torch.tensor([number for text in some for number in text])
        tags = (torch.arange(len(ids)) % len(names)).int().masked_fill(~tokens.is_word(ids), IGNORE)
        return TokenSplit.of(some, targets, tokens, tags=tags, asks="tags")

    test = split(min(max(_MEASURED, len(names)), len(texts)))
    return Dataset(split(len(texts)), test=test, class_names=names, tokenizer=tokenizer.text)


def _labels(target: str, samples: int, classes: int) -> Tensor:
    """Made-up targets of a kind (tasks.base.Task.target), which come in turn."""
    turn = torch.arange(samples)
    if target == "classes":
        return F.one_hot(turn % classes, classes) | F.one_hot(turn // 2 % classes, classes)
    if target == "number":
        return turn % 10 / 10
    return turn % classes if target in ("class", "embedding") else torch.zeros_like(turn)
