"""A .pt2 file is the model; nothing that is pickled in one is ever opened."""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kdctl.errors import ConfigError, KdctlError, MissingError
from kdctl.export.base import Quantization
from kdctl.export.onnx import quiet
from kdctl.export.pt2 import Pt2, inspect, open_predictor
from kdctl.models.record import Model, ModelRecord, build_model

SHAPE = (3, 8, 8)
CLASSES = ["one", "twö", "three", "four"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    record = ModelRecord("digits_cnn", {"width": 4}, 4, CLASSES, list(SHAPE), {"mean": [0.4], "std": [0.2]})
    model = build_model(record)
    model(torch.rand(64, *SHAPE))  # batch statistics that are not the initial ones
    return model


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("pt2") / "model.pt2"
    Pt2().convert(model, SHAPE, path, {"class_names": CLASSES})
    assert model.training  # the export leaves the model as it is
    return path


def images(n):
    return np.random.default_rng(n).random((n, *SHAPE), dtype=np.float32)


def test_logits_at_any_batch_size(model, exported):
    predictor = open_predictor(exported)
    model.eval()
    for n in (1, 3, 32):
        with torch.no_grad():
            expected = model(torch.from_numpy(images(n))).numpy()
        np.testing.assert_allclose(predictor(images(n)), expected, atol=1e-5)
    model.train()
    assert (predictor.image_shape, predictor.num_classes, predictor.class_names) == (SHAPE, 4, CLASSES)
    assert predictor.runtime == f"torch.export {torch.__version__}"
    with pytest.raises(KdctlError, match=r"takes images \(N, 3, 8, 8\)"):
        predictor(np.zeros((2, 3, 8, 9), np.float32))


def test_contents(model, exported):
    contents = inspect(exported)
    assert contents.weights == sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    assert contents.float_operators["conv2d"] == 4 and contents.int8_operators == 0
    assert contents.bytes > contents.weight_bytes > 4 * contents.weights


def test_int8_is_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="larger and slower than fp32"):
        Pt2().convert(model, SHAPE, tmp_path / "m.pt2", {}, Quantization(mode="dynamic"))
    assert list(tmp_path.iterdir()) == []


def test_model_that_cannot_be_exported(tmp_path):
    class Branches(nn.Module):
        def forward(self, x):
            return x.flatten(1) if x.sum() > 0 else -x.flatten(1)

    record = ModelRecord("mlp", {"hidden": []}, 4, CLASSES, list(SHAPE))
    with pytest.raises(KdctlError, match=r"cannot be exported by torch\.export"):
        Pt2().convert(Model(Branches(), record), SHAPE, tmp_path / "m.pt2", {})


def test_files_that_are_no_such_files(exported, tmp_path):
    whole = exported.read_bytes()
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("a/b", "c")
    contents = {"half": whole[: len(whole) // 2], "empty": b"", "text": b"not a model"}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    for name in (*contents, "zip"):
        with pytest.raises(KdctlError, match=r"damaged or not a \.pt2 file"):
            open_predictor(tmp_path / name)
    with pytest.raises(MissingError, match="there is no file"):
        open_predictor(tmp_path / "none")


class Touch:
    """What a foreign pickle might hold: code that runs as it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def changed(source, target, change):
    """Copies an archive; change(name, data) gives each part's new data."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return target


def test_pickled_parts_are_not_opened(exported, tmp_path):
    sign, buffer = tmp_path / "sign", io.BytesIO()
    torch.save(Touch(sign), buffer)

    def inputs(name, data):
        return buffer.getvalue() if "sample_inputs" in name else data

    def weights(name, data):
        if name.endswith("weight_0"):
            return buffer.getvalue()
        if not name.endswith("weights_config.json"):
            return data
        document = json.loads(data)
        next(iter(document["config"].values()))["use_pickle"] = True
        return json.dumps(document)

    def constants(name, data):
        if not name.endswith("constants_config.json"):
            return data
        return json.dumps({"config": {"mean": {"path_name": "opaque_0", "is_param": False, "use_pickle": False}}})

    for change in (inputs, weights, constants):
        with pytest.raises(KdctlError, match="holds pickled"):
            open_predictor(changed(exported, tmp_path / "m.pt2", change))
        assert not sign.exists()
    with contextlib.suppress(Exception), quiet():
        torch.export.load(str(changed(exported, tmp_path / "m.pt2", inputs)))
    assert sign.exists()  # torch alone does open them
