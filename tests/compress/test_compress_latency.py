"""The latency model: what it sees of a net, how it goes between measured widths, and what it keeps."""

from __future__ import annotations

import json
import tempfile

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdctl.compress.latency import model as latency
from kdctl.compress.latency import profile
from kdctl.compress.latency.model import LatencyModel
from kdctl.compress.latency.operators import Operator, conv_layout, operators
from kdctl.errors import KdctlError
from kdctl.models.record import ModelRecord, build_model


def resnet8(structure=None):
    record = ModelRecord("resnet8", {}, 10, list("0123456789"), [3, 32, 32], structure=structure)
    return build_model(record)


def conv(inputs, outputs, side, kernel=3, stride=1, groups=1):
    pad = kernel // 2
    return Operator("conv", (inputs, outputs, groups, kernel, kernel, stride, stride, pad, pad, 1, 1, side, side))


@pytest.fixture
def told(monkeypatch):
    """Times by a rule in place of measured ones: of an operator its numbers, by 1e6. What was asked for is recorded."""
    asked = []

    def times(wanted, say=None):
        asked.extend(wanted)
        return profile.Times([cost(kind, size) for kind, size in wanted], 0.5)

    monkeypatch.setattr(profile, "times", times)
    monkeypatch.setattr(profile, "block_size", lambda folder: 16)
    monkeypatch.setattr(profile, "call_time", lambda: profile.Times([3.0], 0.5))
    held = profile.stack()[1]
    whole = 3.0 + sum(cost(*one) for one in held) + 0.25 * len(held)
    monkeypatch.setattr(profile, "stack_time", lambda: profile.Times([whole], 0.5))
    return asked


def cost(kind, size):
    if kind == "gemm":
        return size[0] / 1e6
    if kind != "conv":
        return max(size[0], latency.NUMBERS[0]) / 1e6
    return size[0] * size[1] / size[2] / 1e6


# ---------------------------------------------------------------------------------------------------------- operators


def test_a_residual_net_is_its_convolutions():
    model = resnet8().train()
    assert operators(model, (3, 32, 32)) == [
        conv(3, 16, 32),
        conv(16, 16, 32), conv(16, 16, 32),
        conv(16, 32, 32, stride=2), conv(32, 32, 16), conv(16, 32, 32, 1, 2),
        conv(32, 64, 16, stride=2), conv(64, 64, 8), conv(32, 64, 16, 1, 2),
        Operator("global_pool", (4096,)), Operator("gemm", (1, 64, 10)),
    ]  # fmt: skip
    assert model.training and model.net.layer1.training


def test_a_pruned_net_is_seen_with_its_widths():
    structure = [
        {"edit": "resize", "path": "layer1.0.conv1", "in": 16, "out": 11, "groups": 1},
        {"edit": "resize", "path": "layer1.0.bn1", "out": 11},
        {"edit": "resize", "path": "layer1.0.conv2", "in": 11, "out": 16, "groups": 1},
    ]
    assert operators(resnet8(structure), (3, 32, 32))[1:3] == [conv(16, 11, 32), conv(11, 16, 32)]


class Odd(nn.Module):
    """What runtimes do not fuse: a norm, an activation and a sum without a layer before them, and a join."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 20, 1)

    def forward(self, x):
        x = F.relu(self.norm(x))
        x = F.relu(self.conv(x))
        x = torch.cat([x + x, F.relu(x)], 1)
        return F.max_pool2d(x, 2).flatten(1) @ torch.ones(640, 2)


def test_what_is_not_fused_is_counted():
    found = operators(Odd(), (3, 8, 8))
    assert [op.kind for op in found] == ["mul", "relu", "conv", "add", "relu", "copy", "max_pool2", "gemm"]
    assert [op.size for op in found[3:]] == [(1280,), (1280,), (2560,), (640,), (1, 640, 2)]


def test_changes_of_layout_are_counted():
    """18 channels come in no fours: that convolution wants a plain image, and the next its blocked form."""
    net = nn.Sequential(nn.Conv2d(3, 18, 1), nn.Conv2d(18, 32, 1), nn.Conv2d(32, 32, 1), nn.Flatten())
    found = [op for op in operators(net, (3, 4, 4), block=16) if op.kind != "conv"]
    assert found == [Operator("reorder", (18 * 16,)), Operator("reorder", (32 * 16,))]
    assert "reorder" not in {op.kind for op in operators(net, (3, 4, 4))}


@pytest.mark.parametrize(
    ("inputs", "outputs", "groups", "block", "layout"),
    [
        (16, 20, 1, 16, "blocked"), (3, 16, 1, 16, "thin"), (18, 16, 1, 16, "plain"), (32, 32, 32, 16, "blocked"),
        (18, 18, 18, 16, "plain"), (32, 64, 4, 16, "plain"), (64, 64, 4, 16, "blocked"), (64, 64, 1, 0, "plain"),
    ],
)  # fmt: skip
def test_layouts(inputs, outputs, groups, block, layout):
    assert conv_layout(inputs, outputs, groups, block) == layout


def test_an_operator_without_known_cost_is_refused():
    class Sorts(nn.Module):
        def forward(self, x):
            return x.sort(-1).values

    with pytest.raises(KdctlError, match="does not know the operator sort"):
        operators(Sorts(), (3, 4, 4))


# --------------------------------------------------------------------------------------------------------- prediction


def test_a_net_is_the_sum_of_its_operators(told, tmp_path):
    model = LatencyModel(tmp_path / "times.json")
    found = [conv(16, 16, 32), conv(32, 64, 8), Operator("add", (1024,))]
    expected = 3.0 + 3 * 0.25 + (256 + 2048 + 1024) / 1e6
    assert model.predict_operators(found) == pytest.approx(1000 * 0.5 * expected, rel=1e-9)


@pytest.mark.parametrize(
    ("op", "relative"),
    [
        (conv(16, 17, 8), 16 * 32),  # a stair: what 32 cost
        (conv(20, 16, 8), 32 * 16),
        (conv(5, 16, 8), 5 * 16),  # fewer channels than a block are read as they are
        (conv(48, 16, 8), 48 * 16),  # between 32 and 64
        (conv(40, 40, 8, groups=40), 48),  # depthwise
        (conv(64, 144, 8), 64 * 144),  # between 128 and 192
        (conv(18, 23, 8), 18 * 23),  # no fours: no stairs
        (Operator("add", (3000,)), 3000),
        (Operator("add", (5,)), 1024),
        (Operator("add", (2**23,)), 2**23),
        (Operator("gemm", (1, 100, 10)), 1),
    ],
)
def test_between_measured_widths(op, relative, told, tmp_path):
    model = LatencyModel(tmp_path / "times.json")
    model.predict_operators([op])
    assert model._relative(op) == pytest.approx(relative / 1e6, rel=1e-9)


def test_what_was_profiled_is_not_measured_again(told, tmp_path):
    file = tmp_path / "times.json"
    LatencyModel(file).profile(resnet8(), (3, 32, 32))
    count = len(told)
    assert count == len(set(told)) > 10
    structure = [
        {"edit": "resize", "path": "layer3.0.conv1", "in": 32, "out": 36, "groups": 1},
        {"edit": "resize", "path": "layer3.0.bn1", "out": 36},
        {"edit": "resize", "path": "layer3.0.conv2", "in": 36, "out": 64, "groups": 1},
    ]
    again = LatencyModel(file)
    narrow = again.predict(resnet8(structure), (3, 32, 32))
    assert len(told) == count and narrow < again.predict(resnet8(), (3, 32, 32))


def test_a_damaged_file_of_times_is_made_again(told, tmp_path):
    file = tmp_path / "times.json"
    for text in ("{", "[]", '{"format": 0}', '{"format": 1, "times": 3}'):
        file.write_text(text)
        LatencyModel(file).predict_operators([conv(16, 16, 8)])
        assert conv(16, 16, 8).key in json.loads(file.read_text())["times"]


def test_times_of_two_processes_are_joined(told, tmp_path):
    first, second = LatencyModel(tmp_path / "times.json"), LatencyModel(tmp_path / "times.json")
    first.predict_operators([conv(16, 16, 8)])
    second.predict_operators([conv(32, 32, 8)])
    assert {conv(16, 16, 8).key, conv(32, 32, 8).key} <= set(json.loads(first.file.read_text())["times"])


def test_a_narrower_convolution_takes_no_longer(told, tmp_path, monkeypatch):
    noisy = {(16, 16): 9.0, (16, 32): 5.0, (32, 32): 7.0}
    monkeypatch.setattr(
        profile, "times", lambda wanted, say=None: profile.Times([noisy.get(s[:2], 0.1) for _, s in wanted], 0.5)
    )
    model = LatencyModel(tmp_path / "times.json")
    model.predict_operators([conv(*widths, 8) for widths in noisy])
    assert [model.times[conv(*widths, 8).key] for widths in noisy] == [5.0, 5.0, 7.0]


def test_files_are_by_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "processor", lambda: "another")
    other = latency.machine_key()
    monkeypatch.undo()
    assert latency.machine_key() != other and latency.machine_key() == latency.machine_key()


# --------------------------------------------------------------------------------------------------------- measurement


def test_chains_hold_what_they_measure():
    """Nets with more of an operator execute more of it: nothing is merged, fused away or cancelled out."""
    kinds = [
        conv(32, 32, 8), conv(3, 16, 8), conv(18, 18, 8), conv(32, 32, 8, groups=32), Operator("gemm", (1, 32, 32)),
        Operator("matmul", (2, 8, 8, 8)), *(Operator(kind, (1024,)) for kind in (
            "add", "mul", "relu", "sigmoid", "gelu", "layer_norm", "softmax", "copy", "global_pool", "reorder",
            "max_pool2", "max_pool3", "avg_pool2",
        )),
    ]  # fmt: skip
    for op in kinds:
        few, many = (executed(profile.chain(op.kind, op.size, n)) for n in (2, 5))
        each = {"matmul": 2, "copy": 2, "reorder": 2, "global_pool": 2}.get(op.kind, 1)
        assert many - few == 3 * each, op


def executed(graph):
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/optimized.onnx"
        profile.open_graph(graph, path)
        return len(onnx.load(path).graph.node)


def test_more_work_takes_longer(tmp_path):
    """Real times, by a factor that no busy machine hides: sixteen times the channels, 256 times the work."""
    model = LatencyModel(tmp_path / "times.json")
    small, large = model.predict_operators([conv(16, 16, 16)]), model.predict_operators([conv(256, 256, 16)])
    assert 0 < small < large / 10
    assert model.file.is_file() and model.block in (0, 8, 16)


def test_models_are_measured_in_turns_with_the_reference(tmp_path, monkeypatch):
    """Every model in a process of its own that runs its file; here the files are nets of 2 and 40 convolutions."""

    def convert(self, model, image_shape, out, metadata):
        assert image_shape == (3, 16, 16)
        net = profile.chain("conv", conv(32, 32, 16).size, model)
        out.write_bytes(net.SerializeToString())

    monkeypatch.setattr(latency.Onnx, "convert", convert)
    model = LatencyModel(tmp_path / "times.json")
    small, large = model.measure([2, 40], (3, 16, 16), seconds=0.3)
    assert 0 < 4 * small < large
    assert model.turn_reference == model.reference and small / 1000 < model.reference < large / 1000
    assert LatencyModel(model.file).reference == model.reference
