"""Random hidden states and attention maps of texts with padding, for the tests of losses on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kdctl.signals import Batch, Signals

Given = tuple[Signals, Signals, Batch]
LENGTHS = [4, 1, 3]
MAPS = ("attention_mse", "attention_kl")


def cut(given: Given, rows: slice) -> Given:
    """The samples at these rows."""
    student, teacher = (
        Signals(s.logits[rows], features={tap: f[rows] for tap, f in s.features.items()}) for s in given[:2]
    )
    return student, teacher, given[2].take(rows)


def padded(kind: str, lengths: list[int], padded_to: int, padding: float, key: str = "attention_mask") -> Given:
    """Sequences of the same random states, whatever the padding; the mask as `extra` or as `keep`."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(padded_to) < torch.tensor(lengths)[:, None]
    sides = []
    for learns in (True, False):
        features = {}
        for tap in ("f", "g")[: 1 if kind in MAPS else 2]:
            width = (2, padded_to, padded_to) if kind in MAPS else (padded_to, 5)
            feature = torch.full((len(lengths), *width), padding, dtype=torch.float64)
            for row, n in enumerate(lengths):
                if kind in MAPS:
                    feature[row, :, :n, :n] = torch.randn(2, n, n, generator=generator, dtype=torch.float64)
                else:
                    feature[row, :n] = torch.randn(n, 5, generator=generator, dtype=torch.float64)
            features[tap] = feature.requires_grad_(learns)
        sides.append(Signals(torch.zeros(len(lengths), 2, dtype=torch.float64), features=features))
    index = torch.arange(len(lengths))
    keep, extra = (None, {key: mask.long()}) if key == "attention_mask" else (mask, {})
    return sides[0], sides[1], Batch(torch.zeros(len(lengths), 1), index, index, index, keep, extra)


def arrays(given: Given, tap: str = "f") -> tuple[Any, Any]:
    return given[0].features[tap].detach().numpy(), given[1].features[tap].numpy()


def unit(rows: Any) -> Any:
    return rows / np.sqrt((rows**2).sum(-1, keepdims=True))
