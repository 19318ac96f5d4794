"""Edits of a net: a saved model with each of them comes back, and what does not fit is a ConfigError."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdctl.errors import ConfigError
from kdctl.models import structure
from kdctl.models.record import Model, ModelRecord, build_model, load_model, save_model

SHAPE = (3, 16, 16)


def record(kind: str, edits: list[dict[str, Any]] | None = None, **arguments: Any) -> ModelRecord:
    return ModelRecord(kind, arguments, 3, ["a", "b", "c"], list(SHAPE), structure=edits)


def build(kind: str, edits: list[dict[str, Any]] | None = None, **arguments: Any) -> Model:
    torch.manual_seed(0)
    model = build_model(record(kind, edits, **arguments))
    model(torch.rand(4, *SHAPE))  # moves the batch norms' statistics away from their start
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model.eval()


def chain(**last: Any) -> list[dict[str, Any]]:
    first = {"kind": "Conv2d", "in_channels": 16, "out_channels": 4, "kernel_size": [3, 1], "padding": [1, 0]}
    return [
        first,
        {"kind": "Conv2d", "in_channels": 4, "out_channels": 16, "kernel_size": [1, 3], "padding": [0, 1]} | last,
    ]


NARROW = [
    {"edit": "resize", "path": "layer1.0.conv1", "in": 16, "out": 8, "groups": 1},
    {"edit": "resize", "path": "layer1.0.bn1", "out": 8},
    {"edit": "resize", "path": "layer1.0.conv2", "in": 8, "out": 16, "groups": 1},
]
HIDDEN = [
    {"edit": "resize", "path": "blocks.0.mlp.fc1", "in": 96, "out": 40},
    {"edit": "resize", "path": "blocks.0.mlp.fc2", "in": 40, "out": 96},
]
EDITS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "resize": ("resnet8", NARROW),
    "resize of linear layers": ("tiny_transformer", HIDDEN),
    "replace": ("resnet8", [{"edit": "replace", "path": "layer1.0.conv2", "layers": chain(bias=False)}]),
    "set": ("tiny_transformer", [{"edit": "set", "path": "blocks.1.attention", "name": "head_dim", "value": 48}]),
    "skip": ("tiny_transformer", [{"edit": "skip", "path": "blocks.2"}]),
    "bias": ("resnet8", [{"edit": "bias", "path": "conv1"}]),
    "fake_quant": ("resnet8", [{"edit": "fake_quant", "path": "layer1.0.conv1", "weight_bits": 4}]),
    "several": ("resnet8", [*NARROW, {"edit": "replace", "path": "layer2.0.downsample.0", "layers": [
        {"kind": "Conv2d", "in_channels": 16, "out_channels": 4, "kernel_size": 1, "stride": 2, "bias": False},
        {"kind": "Conv2d", "in_channels": 4, "out_channels": 32, "kernel_size": 1, "bias": False},
    ]}]),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_model_comes_back_exactly(name: str, tmp_path: Path) -> None:
    kind, edits = EDITS[name]
    model, plain = build(kind, edits), build(kind)
    images = torch.rand(2, *SHAPE)
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert loaded.record == model.record and loaded.record.structure == edits
    assert torch.equal(loaded(images), model(images))
    assert not torch.equal(plain(images), model(images)), "the edit changed nothing"


def test_a_model_without_edits_has_none_in_its_record(tmp_path: Path) -> None:
    save_model(build("resnet8"), tmp_path / "m")
    assert "structure" not in json.loads((tmp_path / "m.json").read_text())


HIDDEN_NAME = "_reversed_padding_repeated_twice"
DAMAGED: dict[str, tuple[str, dict[str, Any]]] = {
    "no edit": ("resnet8", {"path": "conv1"}),
    "an unknown edit": ("resnet8", {"edit": "melt", "path": "conv1"}),
    "an edit that is a list": ("resnet8", {"edit": ["skip"], "path": "conv1"}),
    "no such module": ("resnet8", {"edit": "skip", "path": "layer1.7"}),
    "a path that is a number": ("resnet8", {"edit": "skip", "path": 7}),
    "the net itself": ("resnet8", {"edit": "skip", "path": ""}),
    "a parameter": ("resnet8", {"edit": "skip", "path": "conv1.weight"}),
    "no width": ("resnet8", {"edit": "resize", "path": "conv1", "in": 3, "groups": 1}),
    "a width that is text": ("resnet8", {"edit": "resize", "path": "conv1", "in": 3, "out": "16", "groups": 1}),
    "a width below one": ("resnet8", {"edit": "resize", "path": "fc", "in": -4, "out": 3}),
    "no groups": ("resnet8", {"edit": "resize", "path": "conv1", "in": 3, "out": 8, "groups": 0}),
    "groups that do not divide": ("resnet8", {"edit": "resize", "path": "conv1", "in": 3, "out": 8, "groups": 2}),
    "a module without a width": ("resnet8", {"edit": "resize", "path": "relu", "out": 8}),
    "an empty chain": ("resnet8", {"edit": "replace", "path": "fc", "layers": []}),
    "a chain of what is no layer": ("resnet8", {"edit": "replace", "path": "fc", "layers": [{"kind": "Module"}]}),
    "arguments that no layer has": ("resnet8", {"edit": "replace", "path": "fc", "layers": [{"kind": "Linear"}]}),
    "a method": ("tiny_transformer", {"edit": "set", "path": "blocks.0.attention", "name": "forward", "value": 1}),
    "a hidden attribute": ("resnet8", {"edit": "set", "path": "conv1", "name": HIDDEN_NAME, "value": []}),
    "no such attribute": ("resnet8", {"edit": "set", "path": "conv1", "name": "head_dim", "value": 1}),
    "a fraction": ("tiny_transformer", {"edit": "set", "path": "blocks.0.attention", "name": "head_dim", "value": 8.0}),
    "bits that do not exist": ("resnet8", {"edit": "fake_quant", "path": "conv1", "weight_bits": 99}),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_an_edit_that_does_not_fit_is_an_error(name: str) -> None:
    kind, edit = DAMAGED[name]
    with pytest.raises(ConfigError, match="does not fit the model"):
        build_model(record(kind, [edit]))


def test_weights_of_another_structure_are_refused(tmp_path: Path) -> None:
    model = build("resnet8", NARROW)
    model.record = dataclasses.replace(model.record, structure=None)
    save_model(model, tmp_path / "m")
    with pytest.raises(ConfigError, match=r"layer1\.0\.conv1\.weight"):
        load_model(tmp_path / "m")


def test_a_resized_net_computes_as_one_built_so() -> None:
    class Net(nn.Sequential):
        def __init__(self, width: int) -> None:
            super().__init__(
                nn.Conv2d(3, width, 3, 2, 1, dilation=2, padding_mode="reflect"),
                nn.BatchNorm2d(width, eps=1e-3),
                nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
                nn.GroupNorm(width // 4, width),
                nn.ConvTranspose2d(width, 2 * width, 2, 2, output_padding=1),
                nn.Flatten(2),
                nn.Conv1d(2 * width, width, 1),
                nn.Linear(49, width),
                nn.LayerNorm(width, bias=False),
            )

    narrow, wide = Net(8).eval(), Net(12).eval()
    found = {path: structure.widths(module) for path, module in narrow.named_modules()}
    edits = [{"edit": "resize", "path": path, **widths} for path, widths in found.items() if widths is not None]
    assert [edit["path"] for edit in edits] == ["0", "1", "2", "3", "4", "6", "7", "8"]
    structure.apply(wide, json.loads(json.dumps(edits)))
    wide.load_state_dict(narrow.state_dict())
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(wide(images), narrow(images))
    assert not any(module.training for module in wide.modules())


def test_a_module_under_two_names_is_replaced_under_both() -> None:
    layer = nn.Linear(4, 4)
    net = nn.Sequential(layer, nn.Sequential(layer, nn.ReLU()), layer)
    structure.apply(net, [{"edit": "resize", "path": "1.0", "in": 4, "out": 4}])
    assert net[0] is net[1][0] is net[2] is not layer
