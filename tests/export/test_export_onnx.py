"""The exported file is the model: same logits at any batch size, its story inside, and damage is told."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from kdctl import __version__, runs
from kdctl.errors import ConfigError, KdctlError, MissingError
from kdctl.export import manifest
from kdctl.export import onnx as exporter
from kdctl.export.base import Learned, Quantization
from kdctl.export.onnx import Onnx, OnnxPredictor, inspect, record_metadata
from kdctl.models.record import ModelRecord, build_model

SHAPE = (3, 10, 12)
RECORD = {"kind": "net", "class_names": ["one", "twö", "three", "four"], "normalize": {"mean": [0.4], "std": [0.2]}}


class Net(nn.Module):
    """Normalisation, a strided convolution with batch norm, dropout, a mean over pixels, a linear."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 4)

    def forward(self, images):
        x = (images - 0.4) / torch.tensor([0.2, 0.3, 0.25]).view(1, 3, 1, 1)
        return self.fc(self.drop(self.bn(self.conv(x)).relu().mean((2, 3))))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = Net()
    net(torch.rand(64, *SHAPE))  # batch statistics that are not the initial ones
    return net


@pytest.fixture(scope="module")
def exported(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    Onnx().convert(net, SHAPE, path, record_metadata(RECORD))
    return path


def test_a_model_is_traced_once_until_it_changes(monkeypatch):
    """What was quantised is held against its own fp32 file: the same model, loaded again."""
    record = ModelRecord("mlp", {"hidden": []}, 4, list("abcd"), [3, 4, 4], {"mean": [0.5], "std": [0.25]})
    torch.manual_seed(0)
    first, calls, trace = build_model(record), [], exporter._trace
    monkeypatch.setattr(exporter, "_trace", lambda *given: calls.append(given) or trace(*given))
    exporter._TRACED.clear()
    protos = [exporter.to_graph(model, (3, 4, 4)) for model in (first, copy.deepcopy(first))]
    assert len(calls) == 1 and protos[0] == protos[1]
    with torch.no_grad():
        next(first.parameters()).mul_(2)
    changed = exporter.to_graph(first, (3, 4, 4))
    assert len(calls) == 2 and changed != protos[0]


def images(n):
    return np.random.default_rng(n).random((n, *SHAPE), dtype=np.float32)


def test_logits_at_any_batch_size(net, exported):
    assert net.training  # the export leaves the model as it is
    predictor = OnnxPredictor(exported, threads=1)
    net.eval()
    try:
        for n in (1, 3, 32):
            with torch.no_grad():
                expected = net(torch.from_numpy(images(n))).numpy()
            np.testing.assert_allclose(predictor(images(n)), expected, atol=1e-5)
    finally:
        net.train()


def test_predictor_states_what_it_is(exported):
    predictor = OnnxPredictor(exported, threads=1)
    assert predictor.runtime.startswith("onnxruntime 1.")
    assert (predictor.image_shape, predictor.num_classes, predictor.fixed_batch) == (SHAPE, 4, None)
    assert predictor.class_names == RECORD["class_names"]
    assert predictor.metadata["kdctl_version"] == __version__
    assert predictor.metadata["record"]["normalize"] == RECORD["normalize"]
    assert predictor.metadata["preprocessing"]["shape"] == list(SHAPE)


def test_file_holds_no_traces(exported):
    proto = onnx.load(exported)
    assert not any(n.name or n.doc_string or n.metadata_props for n in proto.graph.node)
    assert not proto.graph.value_info
    contents = inspect(exported)
    assert contents.weights == 8 * 3 * 9 + 4 * 8
    assert contents.weight_bytes == 4 * (contents.weights + 8 + 4 + 1)  # biases, and the mean of the input


def test_quiet(net, tmp_path, capfd, recwarn):
    Onnx().convert(net, SHAPE, tmp_path / "m.onnx", {})
    assert capfd.readouterr() == ("", "")
    assert recwarn.list == []


def test_wrong_images_are_refused(exported):
    with pytest.raises(KdctlError, match=r"takes images \(N, 3, 10, 12\); these are \(2, 3, 12, 10\)"):
        OnnxPredictor(exported, threads=1)(np.zeros((2, 3, 12, 10), np.float32))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"not a model"])
def test_damaged_file(exported, tmp_path, damage):
    path = tmp_path / "model.onnx"
    path.write_bytes(damage(exported.read_bytes()))
    with pytest.raises(KdctlError, match="damaged or not an ONNX model"):
        OnnxPredictor(path)
    with pytest.raises(MissingError, match="there is no file"):
        OnnxPredictor(tmp_path / "other.onnx")


def test_model_that_cannot_be_traced(tmp_path):
    class Branches(nn.Module):
        def forward(self, x):
            return x.flatten(1) if x.sum() > 0 else -x.flatten(1)

    with pytest.raises(KdctlError, match="cannot be exported to ONNX"):
        Onnx().convert(Branches(), SHAPE, tmp_path / "m.onnx", {})
    assert list(tmp_path.iterdir()) == []


def test_opset_range():
    with pytest.raises(ConfigError, match="opset is 9"):
        Onnx(opset=9)


def test_manifest_tells_a_damaged_artefact(exported, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(exported.read_bytes())
    predictor = OnnxPredictor(path, threads=1)
    document = manifest.describe(
        predictor, target="onnx", variant="onnx-fp32", model="model.onnx", source="train", folder=tmp_path
    )
    runs.write_json(tmp_path / manifest.NAME, document)
    assert manifest.verify(tmp_path)["inputs"][0]["shape"] == ["batch", *SHAPE]
    assert [manifest.preprocessing((n, 8, 8)).get("channels") for n in (1, 3, 4)] == ["grey", "RGB", None]
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    with pytest.raises(KdctlError, match="checksum"):
        manifest.verify(tmp_path)
    path.unlink()
    with pytest.raises(MissingError, match="is not there"):
        manifest.verify(tmp_path)
    runs.write_json(tmp_path / manifest.NAME, {"files": 3})
    with pytest.raises(KdctlError, match="damaged"):
        manifest.verify(tmp_path)
    (tmp_path / manifest.NAME).unlink()
    with pytest.raises(MissingError, match="not an artefact"):
        manifest.verify(tmp_path)


@pytest.mark.parametrize("channels", [4, 1])
def test_a_bias_that_learnt_steps_are_too_small_for_holds(tmp_path, channels):
    """In steps of input and weight it would have more than 32 bits."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 80, 4)).eval()
    scale = np.full(4, 1e-9, np.float32) if channels == 4 else np.float32(1e-9)
    with torch.no_grad():
        net[0].weight.mul_(1e-7)
        net[0].bias.copy_(torch.tensor([1.0, 2.0, 0.0, 0.5]))
    images = np.random.default_rng(0).random((20, *SHAPE), dtype=np.float32)
    learned = {"0": Learned(scale, 8, (0.0, 1.0), 8)}
    Onnx().convert(net, SHAPE, tmp_path / "model.onnx", {}, Quantization(images=images, learned=learned))
    with torch.no_grad():
        expected = net(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(OnnxPredictor(tmp_path / "model.onnx", 1)(images), expected, atol=0.05)
