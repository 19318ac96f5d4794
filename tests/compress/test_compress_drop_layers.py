"""Dropping blocks: which can go, which go first, and that the record rebuilds what is left."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kdctl.compress.base import Workbench
from kdctl.compress.drop_layers import DropLayers, residual_blocks
from kdctl.errors import ConfigError, KdctlError
from kdctl.models.record import Model, ModelRecord, build_model, load_model, save_model
from kdctl.tasks.classification import Classification

IMAGES = np.random.default_rng(0).random((16, 3, 16, 16)).astype(np.float32)


def make(kind: str, **arguments) -> Model:
    torch.manual_seed(0)
    return build_model(ModelRecord(kind, arguments, 10, [str(i) for i in range(10)], [3, 16, 16])).eval()


def bench(quality=lambda predict: 0.0) -> Workbench:
    return Workbench(
        Classification(), lambda: iter([IMAGES]), lambda: iter([]), quality, lambda: 0.0, lambda text: None
    )


@pytest.mark.parametrize(
    ("kind", "arguments", "expected"),
    [
        ("resnet14", {}, ["layer1.0", "layer1.1", "layer2.1", "layer3.1"]),
        ("tiny_transformer", {"depth": 3}, ["blocks.0", "blocks.1", "blocks.2"]),
        ("wrn_16_1", {}, ["layer1.0", "layer1.1", "layer2.1", "layer3.1"]),
        (
            "mobilenet_v2",
            {},
            [f"layer{s}.{i}" for s, n in ((2, 2), (3, 3), (4, 4), (5, 3), (6, 3)) for i in range(1, n)],
        ),
        ("vgg8", {}, []),
        ("shufflenet_v2", {}, []),
    ],
)
def test_blocks_whose_shortcut_is_the_identity_can_go(kind, arguments, expected):
    assert residual_blocks(make(kind, **arguments)) == expected


def test_the_block_that_changes_least_goes_and_the_model_comes_back(tmp_path):
    model = make("resnet14")
    with torch.no_grad():
        model.net.layer2[1].bn2.weight.mul_(1e-3)
        model.net.layer1[0].bn2.weight.mul_(1e-2)
    result = DropLayers(blocks=2).reshape(model, bench())
    assert result.details["dropped"] == ["layer2.1", "layer1.0"]
    images = torch.from_numpy(IMAGES)
    with torch.no_grad():
        near, whole = result.model(images), model(images)
        assert torch.allclose(near, whole, atol=0.1 * float(whole.abs().max()))
        for path in result.details["dropped"]:
            parent, _, name = path.partition(".")
            model.net.get_submodule(parent)[int(name)] = nn.Identity()
        assert torch.equal(result.model(images), model(images))
        save_model(result.model, tmp_path / "small")
        assert torch.equal(load_model(tmp_path / "small")(images), near)
    assert result.details["macs"][1] < result.details["macs"][0]
    assert result.details["parameters"][1] == sum(p.numel() for p in result.model.parameters())


def test_blocks_are_chosen_by_quality():
    """A metric that is only content without layer3.1."""
    model = make("resnet14")
    without = DropLayers(blocks=1, choose="even").reshape(model, bench())
    assert without.details["dropped"] == ["layer2.1"]
    wanted = make("resnet14")
    wanted.net.layer3[1] = nn.Identity()
    with torch.no_grad():
        target = wanted(torch.from_numpy(IMAGES)).numpy()
    result = DropLayers(blocks=1, choose="quality").reshape(
        model, bench(lambda predict: -abs(predict(IMAGES) - target).max())
    )
    assert result.details["dropped"] == ["layer3.1"]


def test_no_label_to_choose_by_is_told():
    with pytest.raises(KdctlError, match="no label outside the test split"):
        DropLayers(blocks=1, choose="quality").reshape(make("resnet14"), bench(lambda predict: float("nan")))


def test_a_share_of_the_blocks_and_too_many():
    assert len(DropLayers(ratio=0.5, choose="even").reshape(make("resnet14"), bench()).details["dropped"]) == 2
    small = DropLayers(ratio=0.25, choose="even").reshape(make("tiny_transformer", depth=2), bench())
    assert len(small.details["dropped"]) == 1, "a quarter of two blocks is one"
    with pytest.raises(ConfigError, match="5 blocks are to go, and there are 4"):
        DropLayers(blocks=5).reshape(make("resnet14"), bench())
    with pytest.raises(KdctlError, match="no residual block"):
        DropLayers().reshape(make("vgg8"), bench())
