"""What pruning decides by: which samples give an importance, and how many units a share of a group is."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from kdctl.compress.base import Workbench
from kdctl.compress.channels.budget import Ranking
from kdctl.compress.channels.importance import importance
from kdctl.compress.channels.rules import follow
from kdctl.compress.prune import Prune
from kdctl.models.record import Model, ModelRecord, build_model
from kdctl.signals import CLEAN, IGNORE, Batch
from kdctl.tasks.classification import Classification

SHAPE = (1, 8, 8)
IMAGES = torch.rand(64, *SHAPE, generator=torch.Generator().manual_seed(0))


def make(*hidden: int) -> Model:
    torch.manual_seed(0)
    return build_model(ModelRecord("mlp", {"hidden": list(hidden)}, 10, list("0123456789"), list(SHAPE))).eval()


def bench(targets: torch.Tensor, rows: torch.Tensor) -> Workbench:
    batch = Batch(IMAGES, targets, torch.arange(64), torch.full((64,), CLEAN)).take(rows)

    def batches() -> Iterator[Batch]:
        yield batch

    return Workbench(Classification(), lambda: iter([IMAGES.numpy()]), batches, lambda _: 0.0, lambda: 0.0)


def test_taylor_counts_labelled_samples() -> None:
    model, labelled = make(12), torch.arange(64) % 3 == 2
    channels = follow(model)
    groups = channels.groups()
    targets = torch.where(labelled, torch.arange(64) % 10, IGNORE)
    among, alone = (
        importance("taylor", model, channels, groups, bench(targets, rows), 16)
        for rows in (torch.ones(64, dtype=torch.bool), labelled)
    )
    np.testing.assert_array_equal(among, alone)


@pytest.mark.parametrize("scope", ["global", "uniform", "sensitivity"])
def test_no_ratio_takes_nothing(scope: str) -> None:
    """Also of a group whose whole width is no multiple."""
    model = make(20, 18)
    groups = follow(model).groups()
    ranking = Ranking(groups, np.arange(200, dtype=float), 8)
    assert [ranking.levels(index) for index in range(2)] == [[0, 4, 12], [0, 2, 10]]
    own = bench(torch.arange(64) % 10, torch.arange(64))
    result = Prune(ratio=0.0, scope=scope, importance="l2").reshape(model, own)  # type: ignore[arg-type]
    assert result.details["channels"] == {"layer1.linear": [20, 20], "layer2.linear": [18, 18], "fc": [10, 10]}
