"""Int8 of a trained network: nearly its accuracy, a third of its bytes, int8 operators throughout."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from kdctl.compress import quantize
from kdctl.compress.quantize import Quantize, take
from kdctl.errors import KdctlError
from kdctl.export.onnx import Onnx, OnnxPredictor, inspect

SHAPE = (1, 8, 8)


class Net(nn.Module):
    """A residual network with a shortcut without parameters; 57,000 weights."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.conv1 = nn.Sequential(nn.Conv2d(32, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.conv2 = nn.Sequential(nn.Conv2d(64, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64))
        self.fc = nn.Linear(64, 10)

    def forward(self, images):
        x = self.stem((images - 0.3) / 0.38)
        x = F.relu(self.conv2(self.conv1(x)) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 16, 16)))
        return self.fc(x.mean((2, 3)) * 2.0)


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = (data.images[order, None] / 16).astype(np.float32)
    return images[:1200], data.target[order][:1200], images[1200:], data.target[order][1200:]


@pytest.fixture(scope="module")
def net(digits):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net, (x, y, *_) = Net(), map(torch.from_numpy, digits)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(4):
        for rows in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return net.eval()


def batches(images):
    return [images[i : i + 100] for i in range(0, len(images), 100)]


@pytest.fixture(scope="module")
def folder(net, digits, tmp_path_factory):
    """fp32.onnx and an int8 file for each way of calibration."""
    folder = tmp_path_factory.mktemp("int8")
    metadata = {"class_names": [str(i) for i in range(10)]}
    Onnx().convert(net, SHAPE, folder / "fp32.onnx", metadata)
    for method in ("minmax", "percentile", "entropy"):
        stage = Quantize(calibration=method, samples=150)
        stage.convert(net, batches(digits[0]), SHAPE, folder / f"{method}.onnx", metadata)
    return folder


def top1(path, digits):
    predictor = OnnxPredictor(path, threads=1)
    return 100 * float((predictor(digits[2]).argmax(1) == digits[3]).mean())


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_accuracy_is_kept(folder, digits, method):
    fp32 = top1(folder / "fp32.onnx", digits)
    assert fp32 > 95
    assert abs(top1(folder / f"{method}.onnx", digits) - fp32) <= 0.6  # three of 597 images


def test_logits_are_close_at_any_batch_size(folder, digits):
    fp32, int8 = (OnnxPredictor(folder / f"{name}.onnx", threads=1) for name in ("fp32", "minmax"))
    for n in (1, 3, 32):
        expected = fp32(digits[2][:n])
        assert 0 < np.abs(int8(digits[2][:n]) - expected).max() < 0.05 * np.abs(expected).max()


def test_calibrations_differ(folder):
    files = {name: (folder / f"{name}.onnx").read_bytes() for name in ("minmax", "percentile", "entropy")}
    assert len(set(files.values())) == 3


def test_file_is_small_and_all_int8(folder, net):
    int8, fp32 = inspect(folder / "minmax.onnx"), inspect(folder / "fp32.onnx")
    weights = sum(p.numel() for p in net.parameters())
    assert weights > 50_000
    assert int8.bytes < 0.3 * 4 * weights < fp32.bytes
    assert int8.description_bytes < 5_000
    assert int8.float_operators == {"Sub": 1, "Mul": 1}  # with constants: the mean of the input, the factor
    assert int8.int8_operators >= 7 and fp32.int8_operators == 0


def test_weights_have_a_scale_a_channel(folder, net, digits, tmp_path):
    def scales(path):
        proto = onnx.load(path)
        tensors = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
        nodes = [n for n in proto.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in tensors]
        return {tensors[n.input[0]].shape: tensors[n.input[1]].size for n in nodes if tensors[n.input[0]].ndim == 4}

    assert scales(folder / "minmax.onnx")[(64, 32, 3, 3)] == 64
    Quantize(per_channel=False).convert(net, batches(digits[0]), SHAPE, tmp_path / "m.onnx", {})
    assert scales(tmp_path / "m.onnx")[(64, 32, 3, 3)] == 1


def test_logits_are_not_rounded_to_256_levels(folder, digits):
    proto = onnx.load(folder / "minmax.onnx")
    assert [node.op_type for node in proto.graph.node if "logits" in node.output] == ["Gemm"]
    assert len(np.unique(OnnxPredictor(folder / "minmax.onnx", threads=1)(digits[2]))) > 256


def test_sums_with_constants_stay_in_float():
    nodes = [onnx.helper.make_node(op, ins, ["o"], name=op + ins[1]) for op in ("Add", "Mul") for ins in ("ab", "ac")]
    made = onnx.helper.make_graph(nodes, "g", [], [], [onnx.numpy_helper.from_array(np.ones(1, np.float32), "c")])
    assert quantize._in_float(onnx.helper.make_model(made)) == ["Addc", "Mulc"]


def test_metadata(folder):
    metadata = OnnxPredictor(folder / "entropy.onnx", threads=1).metadata
    said = json.loads(metadata["quantization"])
    assert said["calibration"] == "entropy" and said["samples"] == 150
    assert json.loads(metadata["preprocessing"])["shape"] == list(SHAPE)
    assert json.loads(metadata["class_names"])[3] == "3"


def test_arm_gets_signed_activations(net, digits, tmp_path, monkeypatch):
    def first_zero_point(path):
        proto = onnx.load(path)
        tensors = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
        return tensors[next(n for n in proto.graph.node if n.op_type == "QuantizeLinear").input[2]].dtype

    monkeypatch.setattr(quantize.platform, "machine", lambda: "x86_64")
    assert quantize.activation_type() == "uint8"
    monkeypatch.setattr(quantize.platform, "machine", lambda: "aarch64")
    Quantize(samples=8).convert(net, batches(digits[0]), SHAPE, tmp_path / "m.onnx", {})
    assert first_zero_point(tmp_path / "m.onnx") == np.int8


def test_takes_no_more_images_than_asked():
    seen = []

    def stream():
        for i in range(10):
            seen.append(i)
            yield np.full((4, *SHAPE), i, np.float32)

    images = take(stream(), 10, SHAPE)
    assert images[:, 0, 0, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 2
    assert seen == [0, 1, 2]


def test_calibration_images_that_do_not_fit(net, tmp_path):
    out = tmp_path / "m.onnx"
    with pytest.raises(KdctlError, match=r"calibration images are \(5, 3, 8, 8\); the model takes \(N, 1, 8, 8\)"):
        Quantize().convert(net, [np.zeros((5, 3, 8, 8), np.float32)], SHAPE, out, {})
    with pytest.raises(KdctlError, match="no calibration images"):
        Quantize().convert(net, [], SHAPE, out, {})
    assert list(tmp_path.iterdir()) == []


def test_broken_model_leaves_the_old_file(net, digits, tmp_path, capfd):
    out = tmp_path / "m.onnx"
    out.write_bytes(b"old")
    broken = Net().eval()
    broken.load_state_dict(net.state_dict())
    with torch.no_grad():
        broken.fc.weight[0, 0] = float("nan")
    with pytest.raises(KdctlError, match="not finite"):
        Quantize().convert(broken, batches(digits[0]), SHAPE, out, {})
    assert out.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    assert capfd.readouterr() == ("", "")


def test_variant():
    assert Quantize().variant() == "int8-static"
