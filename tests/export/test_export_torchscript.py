"""A TorchScript file is the model, in fp32 and in int8; what it cannot hold and what is no such file is refused."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.backends import xnnpack

from kdctl.bench.latency import Cell, measure
from kdctl.errors import ConfigError, KdctlError, MissingError
from kdctl.export.base import Learned, Quantization
from kdctl.export.pt2 import Pt2
from kdctl.export.torchscript import TorchScript, inspect, open_predictor
from kdctl.export.torchscript_int8 import Observer
from kdctl.models.record import Model, ModelRecord, build_model

SHAPE = (3, 8, 8)
CLASSES = ["one", "twö", "three", "four"]


def build(kind, **arguments):
    torch.manual_seed(0)
    record = ModelRecord(kind, arguments, 4, CLASSES, list(SHAPE), {"mean": [0.4], "std": [0.2]})
    model = build_model(record).train()
    model(torch.rand(64, *SHAPE))  # batch statistics that are not the initial ones
    return model


def images(n):
    return np.random.default_rng(n).random((n, *SHAPE), dtype=np.float32)


def answers(model, batch):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(batch)).numpy()


def fidelity(logits, expected):
    """Signal to noise in decibels."""
    return 10 * np.log10((expected**2).sum() / ((logits - expected) ** 2).sum())


@pytest.fixture(scope="module")
def model():
    return build("digits_cnn", width=8)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """fp32.ts and int8.ts of the model."""
    path = tmp_path_factory.mktemp("torchscript")
    TorchScript().convert(model.train(), SHAPE, path / "fp32.ts", {"class_names": CLASSES})
    assert model.training  # the export leaves the model as it is
    TorchScript().convert(model, SHAPE, path / "int8.ts", {}, Quantization(images=images(96)))
    return path


def test_logits_at_any_batch_size(model, folder):
    predictor = open_predictor(folder / "fp32.ts")
    for n in (1, 3, 32):
        np.testing.assert_allclose(predictor(images(n)), answers(model, images(n)), atol=1e-5)
    assert (predictor.image_shape, predictor.num_classes, predictor.class_names) == (SHAPE, 4, CLASSES)
    assert predictor.runtime == f"torchscript {torch.__version__}" and predictor.metadata["quantization"] == "fp32"
    with pytest.raises(KdctlError, match=r"takes images \(N, 3, 8, 8\)"):
        predictor(np.zeros((2, 3, 8, 9), np.float32))


def test_static_int8(model, folder):
    expected = answers(model, images(64))
    logits = open_predictor(folder / "int8.ts")(images(64))
    assert 25 < fidelity(logits, expected) < 80
    contents, fp32 = inspect(folder / "int8.ts"), inspect(folder / "fp32.ts")
    assert contents.weights == fp32.weights == sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    assert contents.weight_bytes < 0.4 * fp32.weight_bytes
    assert fp32.int8_operators == 0 and fp32.float_operators["aten::_convolution"] == 4
    assert set(contents.float_operators) == {"aten::sub", "aten::div"}  # the normalisation of the input alone
    assert contents.int8_operators == 6  # 4 convolutions with their ReLU, the pooling, the linear


def test_layers_that_are_kept(model, tmp_path):
    how = Quantization(images=images(32), keep=frozenset(["layer2.conv"]))
    TorchScript().convert(model, SHAPE, tmp_path / "m.ts", {}, how)
    assert inspect(tmp_path / "m.ts").float_operators["aten::_convolution"] == 1
    with pytest.raises(ConfigError, match="no layers layer9"):
        TorchScript().convert(model, SHAPE, tmp_path / "m.ts", {}, Quantization(keep=frozenset(["layer9"])))


def test_dynamic_int8(tmp_path):
    model = build("mlp", hidden=[256])
    TorchScript().convert(model, SHAPE, tmp_path / "fp32.ts", {})
    TorchScript().convert(model, SHAPE, tmp_path / "int8.ts", {}, Quantization(mode="dynamic"))
    assert 25 < fidelity(open_predictor(tmp_path / "int8.ts")(images(16)), answers(model, images(16))) < 80
    contents, fp32 = inspect(tmp_path / "int8.ts"), inspect(tmp_path / "fp32.ts")
    assert contents.int8_operators == 2 and contents.weights == fp32.weights
    assert contents.bytes < 0.35 * fp32.bytes
    with pytest.raises(KdctlError, match="no linear layers"):
        flat = Model(nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()), model.record)
        TorchScript().convert(flat, SHAPE, tmp_path / "m.ts", {}, Quantization(mode="dynamic"))


def test_calibration_decides_the_range():
    values = torch.cat([torch.randn(400_000), torch.tensor([20.0, -20.0])])
    steps = {}
    for method in ("minmax", "percentile", "mse"):
        observer = Observer(method=method)
        observer(values)
        observer.counting = True
        observer(values)
        steps[method] = float(observer.calculate_qparams()[0])
    assert steps["minmax"] == pytest.approx(40 / 255, rel=1e-3)
    assert steps["percentile"] < 0.3 * steps["minmax"] < steps["mse"] < 0.7 * steps["minmax"]


def test_in_a_fresh_process(folder):
    cells = [Cell("int8", "kdctl.export.torchscript:open_predictor", {"path": str(folder / "int8.ts")})]
    (row,) = measure(cells, seconds=0.1)
    assert row.runtime.startswith("torchscript") and row.cpu_ms > 0


def test_global_state_stays(model, folder, tmp_path):
    before = torch.backends.quantized.engine
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        TorchScript().convert(model, SHAPE, tmp_path / "m.ts", {}, Quantization(images=images(8)))
        open_predictor(folder / "int8.ts")
    assert torch.backends.quantized.engine == before and caught == []


def test_what_it_cannot_hold(model, tmp_path):
    with pytest.raises(ConfigError, match="allowed: fp32, int8-static, int8-dynamic"):
        TorchScript().check(Quantization(dtype="fp16", mode="weight_only"))
    learned = Quantization(learned={"fc": Learned(np.ones(4, np.float32))})
    with pytest.raises(ConfigError, match="not from training"):
        TorchScript().convert(model, SHAPE, tmp_path / "m.ts", {}, learned)


@pytest.mark.skipif(xnnpack.enabled, reason="this PyTorch can optimise for mobile")
def test_mobile_names_its_successor(model, tmp_path):
    with pytest.raises(MissingError, match=r"without XNNPACK.*executorch"):
        TorchScript(mobile=True).convert(model, SHAPE, tmp_path / "m.ts", {})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((4, 3, 9, 8), np.float32), r"calibration images are \(4, 3, 9, 8\); the model takes \(N, 3, 8, 8\)"),
        (None, "there are no calibration images"),
        (np.full((4, *SHAPE), np.nan, np.float32), "not finite"),
    ],
)
def test_calibration_images_that_do_not_fit(model, tmp_path, given, message):
    with pytest.raises(KdctlError, match=message):
        TorchScript().convert(model, SHAPE, tmp_path / "m.ts", {}, Quantization(images=given))
    assert list(tmp_path.iterdir()) == []


class Branches(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, :4] if x.mean() > 0.5 else -x.flatten(1)[:, :4]


class OneSize(nn.Module):
    def forward(self, x):
        return x.reshape(int(x.shape[0]), -1)[:, :4]


class Pairs(nn.Module):
    def forward(self, x):
        return x.reshape(-1, 2)


def test_models_that_are_not_the_same_for_any_images(tmp_path):
    record = ModelRecord("mlp", {"hidden": []}, 4, CLASSES, list(SHAPE))

    def convert(net, quantization=None):
        TorchScript().convert(Model(net, record), SHAPE, tmp_path / "m.ts", {}, quantization)

    for net in (Branches(), OneSize()):
        with pytest.raises(KdctlError, match="something else for other images"):
            convert(net)
    with pytest.raises(KdctlError, match=r"does not give logits"):
        convert(Pairs())
    with pytest.raises(KdctlError, match=r"torch.fx can follow"):
        convert(Branches(), Quantization(images=images(4)))
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_such_files(model, folder, tmp_path):
    whole = (folder / "fp32.ts").read_bytes()
    Pt2().convert(model, SHAPE, tmp_path / "other", {})
    contents = {"half": whole[: len(whole) // 2], "empty": b"", "text": b"not a model"}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    for name in (*contents, "other"):
        with pytest.raises(KdctlError, match="damaged or not a TorchScript file"):
            open_predictor(tmp_path / name)
    with pytest.raises(MissingError, match="there is no file"):
        open_predictor(tmp_path / "none")


def test_a_place_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(KdctlError, match="cannot be written"):
        TorchScript().convert(model, SHAPE, tmp_path / "file" / "m.ts", {})
