"""Stores of made-up outputs: every value says of which sample, turn and class it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdctl.signals import Batch, Signals
from kdctl.teachers.contents import Contents
from kdctl.teachers.key import store_key
from kdctl.teachers.store import Store

CLASSES, SAMPLES = 5, 40
CONTENTS = Contents(logits=True, top_k=None, taps=(), dtype="fp16", num_classes=CLASSES)


def made_key(contents: Contents = CONTENTS, **changed: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "record": {"format": 1, "kind": "resnet56", "arguments": {"width": 16}, "class_names": ["a", "b"]},
        "code": None,
        "weights": "w" * 64,
        "data": "d" * 64,
        "augment": [{"kind": "random_crop", "padding": 4}, {"kind": "horizontal_flip"}],
        "enumerated": False,
        "augment_seed": 0,
        "stored": contents.to_dict(),
        "precision": "fp32",
    }
    return store_key(**{**given, **changed})


def batch_of(rows: Any, turn: int = 0, split: str = "train") -> Batch:
    index = torch.as_tensor(rows, dtype=torch.int64)
    return Batch(torch.zeros(len(index), 1), index * 0, index, index * 0, split=split, turn=turn)


def logits_of(batch: Batch, classes: int = CLASSES) -> Tensor:
    return batch.index[:, None] + 40.0 * batch.turn + torch.arange(classes) / 8


def put(store: Store, rows: Any, turn: int = 0, split: str = "train") -> None:
    batch = batch_of(rows, turn, split)
    store.add(batch, Signals(logits_of(batch)))


def read(store: Store, rows: Any, turn: int = 0, split: str = "train") -> Tensor:
    """The stored logits of rows that are all held."""
    batch = batch_of(rows, turn, split)
    missing = store.missing(batch)
    assert missing is None or not missing.any()
    logits, _ = store.signals(batch, (), True)
    assert logits is not None
    return logits


def right(store: Store, rows: Any, turn: int = 0, split: str = "train") -> bool:
    return torch.equal(read(store, rows, turn, split), logits_of(batch_of(rows, turn, split)))


def files(store: Store, suffix: str) -> list[Path]:
    return sorted(store.folder.glob(f"*{suffix}"))
