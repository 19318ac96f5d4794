"""From a source to what a stage trains on: validation carved out, transfer data added, samples and labels limited.

All draws are stratified by class and keyed by `split_seed`. A training sample's number (`index`) is its position in the
train split once validation is out and transfer data are appended, before any limit or withheld label: so augmentation
and stored teacher outputs agree between stages that see more or fewer of the samples and labels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from kdctl import registry
from kdctl.config.schema import Component, DataSpec, StageData
from kdctl.data import counter
from kdctl.data.base import Dataset, Shape, Split, joined, without_labels
from kdctl.data.expansions.base import further_texts
from kdctl.errors import ConfigError, MissingError, Problem
from kdctl.signals import IGNORE, TokenInput

Labels = int | Literal["all"]
_TARGETS = {
    "classes": "several classes a sample",
    "number": "a number a sample",
    "tags": "a class of each word",
    "next": "the next token of texts",
    "hidden": "hidden tokens of texts",
    "embedding": "embeddings of texts",
}
"""What a task learns, in words."""


@dataclass
class Data:
    """The splits of an experiment or of one stage of it.

    train: limited and with labels withheld as asked. whole: the train split before that, whose positions number the
    samples. val and test are None where there is none.
    """

    train: Split
    val: Split | None
    test: Split | None
    class_names: list[str]
    input_shape: Shape
    mean: list[float]
    std: list[float]
    whole: Split
    limit: int | None = None
    labels_per_class: Labels = "all"
    split_seed: int = 0
    tokenizer: str | None = None
    """Of texts: the content of the tokenizer's file."""
    own_tokens: TokenInput | None = None
    """Of texts as a model reads them that has another tokenizer: what its numbers mean."""
    _fingerprint: list[str] = field(default_factory=list, repr=False)

    @property
    def tokens(self) -> TokenInput | None:
        """What texts are made of; None of images."""
        return self.own_tokens or getattr(self.whole, "tokens", None)

    @property
    def head(self) -> str:
        """What a model answers for: each sample, each token of a text, or its vocabulary at each token."""
        return self.whole.head

    @property
    def index_size(self) -> int:
        """How many sample numbers there are: every `index` of train is below it."""
        return len(self.whole)

    @property
    def measured(self) -> str:
        """The split that a run is measured on: test, else validation, else training; the first with a label, if any."""
        there = {n: s for n, s in (("test", self.test), ("val", self.val), ("train", self.train)) if s is not None}
        labelled = [name for name, split in there.items() if split.has_labels]
        return (labelled or list(there))[0]

    def split(self, name: str) -> Split:
        """train, val or test. Raises MissingError where there is no such split."""
        there = {n: s for n, s in (("train", self.train), ("val", self.val), ("test", self.test)) if s is not None}
        if name not in there:
            raise MissingError(f"the data have no split '{name}'; there are: {', '.join(there)}")
        return there[name]

    def class_counts(self) -> list[int]:
        """How many training samples of each class have their label."""
        targets = self.train.targets
        if targets.ndim == 2:
            return targets.clamp_min(0).sum(0).tolist()
        return torch.bincount(targets[targets != IGNORE], minlength=len(self.class_names)).tolist()

    def for_stage(self, stage: StageData | None = None) -> Data:
        """The same data with the limit and labels that a stage sets, and the experiment's where it sets none."""
        changed = stage or StageData()
        limit = changed.limit if changed.limit is not None else self.limit
        labels = changed.labels_per_class if changed.labels_per_class is not None else self.labels_per_class
        train = _withheld(_limited(self.whole, limit, self.split_seed), self.whole, labels, self.split_seed)
        return Data(
            train, self.val, self.test, self.class_names, self.input_shape, self.mean, self.std, self.whole,
            limit, labels, self.split_seed, self.tokenizer, self.own_tokens, self._fingerprint,
        )  # fmt: skip

    def fingerprint(self) -> str:
        """SHA-256 over images and targets of all splits, before any limit: equal for all stages. Computed once."""
        if not self._fingerprint:
            splits = (self.whole, self.val, self.test)
            text = " ".join("-" if split is None else split.fingerprint() for split in splits)
            self._fingerprint.append(hashlib.sha256(text.encode()).hexdigest())
        return self._fingerprint[0]


def prepare(spec: DataSpec, base: Path | None = None, target: str = "class") -> Data:
    """Loads the source that `spec` names and makes the splits of it. target: of what kind (tasks.base.Task.target).

    A source's own validation split is used as it is; otherwise `val_fraction` of the labelled training samples is
    held out, each class in proportion. base: where a user's own file is looked for.
    """
    return split_dataset(_load(spec, base, "data", target), spec, base, target)


def split_dataset(dataset: Dataset, spec: DataSpec, base: Path | None = None, target: str = "class") -> Data:
    """The splits of a loaded data set, as `spec` asks for them."""
    train, val = dataset.train, dataset.val
    if val is None and spec.val_fraction > 0:
        train, val = _carved(train, spec.val_fraction, spec.split_seed)
    whole = _with_transfer(train, spec.transfer, base, target)
    if spec.expand:
        further = further_texts(train, whole, spec.expand, spec.split_seed, dataset.tokenizer, base)
        whole = _numbered(joined([whole, *further]))
    data = Data(
        whole, _renumbered(val), _renumbered(dataset.test), list(dataset.class_names), dataset.input_shape,
        dataset.mean, dataset.std, whole, spec.limit, spec.labels_per_class, spec.split_seed, dataset.tokenizer,
    )  # fmt: skip
    return data.for_stage()


def _load(spec: Component, base: Path | None, key: str, target: str) -> Dataset:
    takes = "target" in registry.signature(registry.find("data", spec.kind, base)).parameters
    given = {"target": target} if takes else {}
    if not takes and target != "class":
        message = f"the task learns {_TARGETS[target]}, and {spec.kind} has one class a sample"
        raise ConfigError(Problem(message, key=f"{key}.kind", hint="task: {kind: classification}, or other data"))
    dataset = registry.create("data", spec.kind, spec.arguments, base=base, **given).load()
    if not isinstance(dataset, Dataset):
        message = f"load() of {spec.kind} gave {type(dataset).__name__}, expected kdctl.data.base.Dataset"
        raise ConfigError(Problem(message, key=key))
    return dataset


def _with_transfer(train: Split, transfer: list[Component], base: Path | None, target: str) -> Split:
    splits = [train]
    for number, component in enumerate(transfer):
        key = f"data.transfer.{number}"
        added = _load(component, base, key, target).train
        if tuple(added.input_shape) != tuple(train.input_shape):
            message = f"images of {component.kind} have shape {added.input_shape}, the data's {train.input_shape}"
            raise ConfigError(Problem(message, key=key, hint="transfer data must have the shape of the data"))
        splits.append(added.labelled(without_labels(added.targets)))
    return _numbered(joined(splits))


def _numbered(split: Split) -> Split:
    return split.labelled(split.targets, torch.arange(len(split)))


def _renumbered(split: Split | None) -> Split | None:
    return None if split is None else _numbered(split)


# ---------------------------------------------------------------------------------------------------------- selection


def _carved(train: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Train without, and with only, `fraction` of its labelled samples, each class in proportion."""
    strata = train.strata
    order = stratified(strata, seed)
    order = order[strata[order] != IGNORE]
    held = torch.zeros(len(train), dtype=torch.bool)
    held[order[: round(fraction * len(order))]] = True
    if not bool(held.any()) or bool(held.all()):
        message = f"{fraction} of {len(order)} labelled training samples leaves nothing to validate on or to train on"
        raise ConfigError(Problem(message, key="data.val_fraction", hint="0 trains without a validation split"))
    return train.subset(torch.nonzero(~held).flatten()), train.subset(torch.nonzero(held).flatten())


def _limited(whole: Split, limit: int | None, seed: int) -> Split:
    """`limit` samples, each class (and the unlabelled ones) in proportion; a larger limit contains a smaller one."""
    if limit is None or limit >= len(whole):
        return whole
    return whole.subset(stratified(whole.strata, seed)[:limit].sort().values)


def _withheld(train: Split, whole: Split, labels: Labels, seed: int) -> Split:
    """All labels hidden but those of `labels` samples of each class; a larger number contains a smaller one.

    A class with fewer samples keeps all of its labels. Raises ConfigError where no class of the whole train split has
    as many.
    """
    if labels == "all":
        return train
    if whole.targets.ndim > 1 or whole.targets.is_floating_point() or whole.head != "sample":
        message = "labels are kept by class, and samples of this task have none"
        raise ConfigError(
            Problem(message, key="data.labels_per_class", hint="leave it out; data.limit takes fewer samples")
        )
    counts = torch.bincount(whole.targets[whole.targets != IGNORE])
    if not len(counts) or labels > int(counts.max()):
        largest = int(counts.max()) if len(counts) else 0
        message = f"got {labels}, but the largest class has {largest} training samples"
        raise ConfigError(Problem(message, key="data.labels_per_class", hint="`all` keeps every label"))
    order = stratified(whole.targets, seed)  # of which a limit takes the beginning: it holds the first of each class
    kept = torch.zeros(len(whole), dtype=torch.bool)
    for target in range(len(counts)):
        kept[order[whole.targets[order] == target][:labels]] = True
    return train.labelled(torch.where(kept[train.index], train.targets, IGNORE))


def stratified(targets: Tensor, seed: int) -> Tensor:
    """All rows (N,) in a random order in which every beginning has the classes in their proportions.

    The j-th of n samples of a class, in an order drawn by the seed, stands at (j + 1/2) / n of the whole.
    """
    drawn = counter.permutation(len(targets), counter.SPLIT, seed)
    by_class = drawn[torch.argsort(targets[drawn], stable=True)]
    sizes = torch.unique(targets, return_counts=True)[1]
    starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    place = (torch.arange(len(targets)) - starts + 0.5) / torch.repeat_interleave(sizes, sizes).double()
    return by_class[torch.argsort(place, stable=True)]
