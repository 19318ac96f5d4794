"""A .tflite file is the model: its logits at any batch size, its story inside, on XNNPACK from end to end.

Runs where LiteRT is: in this environment, or in the one that KDCTL_LITERT_PYTHON names.
"""

from __future__ import annotations

import os
import re
import zipfile

import numpy as np
import pytest
import torch

from kdctl.errors import ConfigError, KdctlError, MissingError
from kdctl.export import elsewhere, files, litert
from kdctl.export.base import Learned, Quantization
from kdctl.export.litert import LiteRt
from kdctl.models.record import ModelRecord, build_model

SHAPE = (3, 16, 16)
NAMES = ["one", "zwö", "three", "four"]
absent = not elsewhere.is_here("litert", converting=True) and elsewhere.variable("litert") not in os.environ
needs_litert = pytest.mark.skipif(absent, reason="neither LiteRT nor KDCTL_LITERT_PYTHON is here")


def images(n, seed=0):
    return np.random.default_rng(seed).random((n, *SHAPE), dtype=np.float32)


@pytest.fixture(scope="module")
def model():
    """A residual net with shortcuts that pad, normalisation, and batch statistics that are not the initial ones."""
    torch.manual_seed(0)
    normalize = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}
    model = build_model(ModelRecord("resnet8", {"shortcut": "pad"}, 4, NAMES, list(SHAPE), normalize))
    model.train()
    with torch.no_grad():
        for seed in range(20):
            model(torch.from_numpy(images(32, seed)))
    return model.eval()


@pytest.fixture(scope="module")
def logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(images(24))).numpy()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("litert") / "model.tflite"
    files.write("litert", model, path, {"class_names": NAMES, "record": {"kind": "resnet8"}})
    return path


def noise(given, expected):
    """dB of the signal over the difference."""
    return 10 * np.log10((expected**2).sum() / ((given - expected) ** 2).sum())


@needs_litert
def test_file_is_the_model(exported, logits):
    predictor = files.open_file("litert", exported, 1)
    for n in (24, 1, 5):
        np.testing.assert_allclose(predictor(images(24)[:n]), logits[:n], atol=1e-4)
    assert predictor(images(0)).shape == (0, 4)
    assert predictor.runtime.startswith("litert 2.")
    assert (predictor.image_shape, predictor.num_classes, predictor.fixed_batch) == (SHAPE, 4, None)
    assert predictor.class_names == NAMES
    assert predictor.metadata["record"] == {"kind": "resnet8"}
    assert predictor.metadata["preprocessing"]["shape"] == list(SHAPE)
    with pytest.raises(KdctlError, match=r"takes images \(N, 3, 16, 16\); these are \(2, 3, 8, 8\)"):
        predictor(np.zeros((2, 3, 8, 8), np.float32))
    with zipfile.ZipFile(exported) as archive:
        assert archive.read("labels.txt").decode().split() == NAMES


@needs_litert
def test_all_of_it_is_delegated(exported, model):
    contents = files.inspect("litert", exported)
    assert contents.delegated == 1.0  # shortcuts that pad would not be, were they not convolved
    shortcuts = 32 * 16 + 64 * 32
    assert contents.weights == sum(p.numel() for p in model.net.parameters() if p.ndim > 1) + shortcuts
    assert (contents.float_operators["CONV_2D"], contents.float_operators["FULLY_CONNECTED"]) == (9, 1)
    assert contents.int8_operators == 0
    assert 4 * contents.weights < contents.weight_bytes < contents.bytes


@needs_litert
def test_int8_static_with_a_layer_kept(exported, model, logits, tmp_path):
    quantization = Quantization(images=images(32, 1), keep=frozenset({"layer2.0.conv1"}))
    files.write("litert", model, tmp_path / "m.tflite", {}, quantization)
    assert noise(files.open_file("litert", tmp_path / "m.tflite", 1)(images(24)), logits) > 20
    contents = files.inspect("litert", tmp_path / "m.tflite")
    assert contents.weight_bytes < 0.45 * files.inspect("litert", exported).weight_bytes
    # The kept layer, and the normalisation of images, are in float: nothing else is.
    assert contents.float_operators == {"SUB": 1, "MUL": 1, "CONV_2D": 1}
    assert contents.int8_operators == 8 + 3 + 1 + 1  # convolutions, sums, the pooling, the linear
    assert contents.delegated == 1.0


@needs_litert
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "mode", "least", "share"), [
    ("int8", "dynamic", 20, 0.3), ("int8", "weight_only", 20, 0.3), ("int4", "weight_only", 5, 0.2),
    ("fp16", "weight_only", 50, 0.55),
])  # fmt: skip
def test_weights_in_fewer_bits(exported, model, logits, tmp_path, dtype, mode, least, share):
    files.write("litert", model, tmp_path / "m.tflite", {}, Quantization(dtype, mode))
    assert least < noise(files.open_file("litert", tmp_path / "m.tflite", 1)(images(24)), logits) < 100
    contents, plain = files.inspect("litert", tmp_path / "m.tflite"), files.inspect("litert", exported)
    assert contents.weight_bytes < share * plain.weight_bytes
    assert contents.weights == plain.weights
    assert contents.int8_operators == (10 if mode == "dynamic" else 0)


@needs_litert
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"not a model" * 99])
def test_damaged_file(exported, tmp_path, damage):
    path = tmp_path / "model.tflite"
    path.write_bytes(damage(exported.read_bytes()))
    with pytest.raises(KdctlError, match="damaged or not a LiteRT model"):
        files.open_file("litert", path)


def test_what_is_refused(model, tmp_path):
    convert, out = LiteRt().convert, tmp_path / "model.tflite"
    with pytest.raises(ConfigError, match="cannot be bf16; allowed: fp32, int8-static"):
        convert(model, SHAPE, out, {}, Quantization("bf16", "weight_only"))
    with pytest.raises(ConfigError, match="no calibration 'mse'; allowed: minmax"):
        convert(model, SHAPE, out, {}, Quantization(images=images(2), calibration="mse"))
    with pytest.raises(ConfigError, match=r"calibration images are \(2, 16, 16, 3\); the model takes \(N, 3, 16, 16\)"):
        convert(model, SHAPE, out, {}, Quantization(images=np.zeros((2, 16, 16, 3), np.float32)))
    with pytest.raises(ConfigError, match="one a group"):
        convert(model, SHAPE, out, {}, Quantization("int4", "weight_only", group_size=32))
    with pytest.raises(ConfigError, match="quantisation-aware training found"):
        convert(model, SHAPE, out, {}, Quantization(images=images(2), learned={"fc": Learned(np.float32(1))}))
    with pytest.raises(MissingError, match="there is no file"):
        litert.open_predictor(out)
    assert list(tmp_path.iterdir()) == []


def test_metadata_come_back_and_equal_ones_are_equal_bytes(tmp_path):
    document = {"class_names": NAMES, "record": {"kind": "x"}}
    data = litert.with_metadata(b"the model", document)
    assert data == litert.with_metadata(b"the model", document)
    (tmp_path / "m").write_bytes(data)
    assert data.startswith(b"the model")
    assert litert.read_metadata(tmp_path / "m") == document
    (tmp_path / "m").write_bytes(b"the model")
    assert litert.read_metadata(tmp_path / "m") == {}


def test_scope_of_a_module():
    name = "kdctl.models.record.Model/a.CifarResNet_net/torch.nn.Sequential_layer1/a.BasicBlock_0/torch.Conv2d_conv1;"
    assert re.search(litert.scope("layer1.0.conv1"), name)
    assert re.search(litert.scope("layer1.0"), name)
    for other in ("layer1.0.conv", "0.conv1", "layer1.1.conv1", "conv1"):
        assert not re.search(litert.scope(other), name)
    assert not re.search(litert.NORMALISATION, name)
    assert re.search(litert.NORMALISATION, "kdctl.models.record.Model;4")
