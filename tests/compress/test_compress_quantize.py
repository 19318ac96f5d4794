"""The quantize stage: which mode a model gets, what calibration takes, and layers that stay in fp32 to hold quality."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdctl.compress.base import Workbench
from kdctl.compress.quantize import Quantize, convolution_share, fewest, matching, take
from kdctl.compress.sensitivity import sensitivities
from kdctl.errors import ConfigError, KdctlError
from kdctl.export.onnx import OnnxPredictor, inspect
from kdctl.models.record import Model, ModelRecord
from kdctl.quant import fake

SHAPE = (1, 8, 8)


class Net(nn.Module):
    """Two convolutions and a linear. `rough`'s weights have one outlier each, which leaves the others few levels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fine = nn.Conv2d(1, 8, 3, 1, 1)
        self.rough = nn.Conv2d(8, 8, 3, 1, 1)
        self.fc = nn.Linear(8 * 16, 10)
        with torch.no_grad():
            self.rough.weight[:, 0, 0, 0] = 12.0
            self.fine.weight[0] = 0
            self.fine.bias[0] = 0.01  # what the outliers meet

    def forward(self, images):
        return self.fc(self.rough(self.fine(images).relu()).relu()[:, :, ::2, ::2].flatten(1))


class Linears(nn.Module):
    """A small convolution and large linears."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 1, 3, 1, 1)
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 10)

    def forward(self, images):
        return self.down(self.up(self.conv(images).flatten(1)).relu())


def model_of(net):
    names = [str(i) for i in range(10)]
    return Model(net, ModelRecord("net", {}, 10, names, list(SHAPE))).eval()


def bench(model, images):
    """A workbench whose quality is the SQNR of the logits against the model's own, in decibels, up to 60."""
    with torch.no_grad():
        reference = model(torch.from_numpy(images)).numpy()

    def quality(predictor):
        noise = float(((predictor(images) - reference) ** 2).sum())
        return 60.0 if noise == 0 else min(60.0, 10 * np.log10((reference**2).sum() / noise))

    def stream():
        yield from np.array_split(images, 4)

    return Workbench(
        task=None, images=stream, batches=None, quality=quality, of_student=lambda: 60.0, say=lambda _: None
    )


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).random((64, *SHAPE), dtype=np.float32)


def convert(stage, net, images, tmp_path, **more):
    model = model_of(net)
    out = tmp_path / "model.onnx"
    details = stage.convert(model, bench(model, images), SHAPE, out, {"class_names": list("0123456789")}, **more)
    return out, details


# ---------------------------------------------------------------------------------------------------------------- modes


def test_convolutions_are_static_and_linears_dynamic(images, tmp_path):
    out, details = convert(Quantize(samples=20), Net(), images, tmp_path)
    predictor = OnnxPredictor(out, 1)
    assert details == {"dtype": "int8", "mode": "static", "target": "onnx", "kept": []}
    assert predictor.metadata["quantization"]["samples"] == 20
    assert predictor.class_names[3] == "3"
    out, details = convert(Quantize(), Linears(), images, tmp_path)
    assert details["mode"] == "dynamic" and inspect(out).int8_operators >= 2


def test_convolution_share():
    class Attending(Linears):
        def forward(self, images):
            tokens = self.conv(images)  # of one head, 8 of 8 numbers each
            return F.scaled_dot_product_attention(tokens, tokens, tokens)

    assert convolution_share(model_of(Attending()), SHAPE) == pytest.approx(576 / (576 + 2 * 8 * 8 * 8))
    assert convolution_share(model_of(Linears()), SHAPE) == pytest.approx(576 / (576 + 64 * 256 + 2560))
    assert convolution_share(model_of(nn.Flatten()), SHAPE) == 0


@pytest.mark.parametrize(
    ("dtype", "mode"), [("int4", "weight_only"), ("fp16", "weight_only"), ("bf16", "weight_only"), ("int8", "static")]
)
def test_mode_of_other_dtypes(dtype, mode):
    assert Quantize(dtype=dtype)._mode(model_of(Net()), {}) == mode


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"dtype": "int4", "mode": "static"}, "onnx files cannot be int4-static"),
        ({"dtype": "fp16", "mode": "dynamic"}, "fp16 has no mode dynamic"),
        ({"mode": "static", "group_size": 32}, "no groups"),
        ({"target": "onxx"}, "onxx"),
    ],
)
def test_what_cannot_be_is_refused_at_once(arguments, match):
    with pytest.raises(ConfigError, match=match):
        Quantize(**arguments)


def test_learned_quantisation_is_taken_over(images, tmp_path):
    net = Net()
    net.rough = fake.wrap(net.rough, weight_bits=4, activation_bits=8, quantizer="plain")
    fake.calibrate(net, lambda: net(torch.from_numpy(images)) is None, "minmax")
    out, details = convert(Quantize(), net, images, tmp_path)
    assert (details["mode"], details["learned"]) == ("static", 1)
    assert OnnxPredictor(out, 1).metadata["quantization"]["learned"] == 1
    assert bench(model_of(net), images).quality(OnnxPredictor(out, 1)) > 30  # its own logits, rounded weights and all


def learnt(images, activation_bits):
    net = Net()
    for path in ("fine", "rough", "fc"):
        setattr(net, path, fake.wrap(getattr(net, path), weight_bits=4 if path == "rough" else 8,
                                     activation_bits=activation_bits, quantizer="plain"))  # fmt: skip
    fake.calibrate(net, lambda: net(torch.from_numpy(images)) is None, "minmax")
    return net


def test_inputs_that_training_left_in_float_stay_so(images, tmp_path):
    net = learnt(images, None)
    out, details = convert(Quantize(), net, images, tmp_path)
    assert (details["mode"], details["learned"]) == ("weight_only", 3)
    assert bench(model_of(net), images).quality(OnnxPredictor(out, 1)) == 60
    assert Quantize(target="executorch")._plan(model_of(net), bench(model_of(net), images))[1].mode == "static"


@pytest.mark.parametrize(("dtype", "learned"), [("int4", {"rough"}), ("fp16", set()), ("bf16", set())])
def test_a_dtype_that_was_asked_for_is_kept(dtype, learned, images):
    """Only what fits it is taken as it was learnt: 8-bit steps are none of int4."""
    model = model_of(learnt(images, 8))
    _, how = Quantize(dtype=dtype)._plan(model, bench(model, images))
    assert (how.dtype, how.mode, set(how.learned)) == (dtype, "weight_only", learned)


def test_groups_are_refused_where_auto_finds_a_mode_without_them(images, tmp_path):
    with pytest.raises(ConfigError, match="weights of int8 static have no groups"):
        convert(Quantize(group_size=4), Net(), images, tmp_path)
    assert not (tmp_path / "model.onnx").exists()


# --------------------------------------------------------------------------------------------------------- calibration


def test_takes_no_more_images_than_asked():
    seen = []

    def stream():
        for i in range(10):
            seen.append(i)
            yield np.full((4, *SHAPE), i, np.float32)

    images = take(stream(), 10, SHAPE)
    assert images[:, 0, 0, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 2
    assert seen == [0, 1, 2]


def test_images_that_do_not_fit():
    with pytest.raises(KdctlError, match=r"calibration images are \(5, 3, 8, 8\); the model takes \(N, 1, 8, 8\)"):
        take([np.zeros((5, 3, 8, 8), np.float32)], 4, SHAPE)
    with pytest.raises(KdctlError, match="no calibration images"):
        take([], 4, SHAPE)


# ----------------------------------------------------------------------------------------------------- mixed precision


def test_the_rough_layer_is_the_most_sensitive(images):
    model = model_of(Net())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ranked = sensitivities(model, images)
    assert ranked[0].path == "rough"
    assert {layer.path: layer.weights for layer in ranked} == {"fine": 72, "rough": 576, "fc": 1280}
    assert ranked[0].sqnr_db < ranked[1].sqnr_db - 6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    alone = sensitivities(model, images, bits=4, activation_bits=None, skip=["rough"])
    assert {layer.path for layer in alone} == {"fine", "fc"}
    by_path = {layer.path: layer.sqnr_db for layer in ranked}
    assert all(layer.sqnr_db < by_path[layer.path] - 6 for layer in alone)  # 4 bits


def test_max_drop_keeps_the_worst_layer_in_fp32(images, tmp_path):
    out, plain = convert(Quantize(), Net(), images, tmp_path)
    assert plain["kept"] == [] and "quality_after" not in plain
    _, details = convert(Quantize(), Net(), images, tmp_path, max_drop=26.0)
    assert details["kept"] == ["rough"] and details["layers"] == 3
    assert details["quality_before"] - details["quality_quantized"] > 26 >= 60 - details["quality_after"]
    assert details["sensitivity"][0]["path"] == "rough"
    model = model_of(Net())
    assert bench(model, images).quality(OnnxPredictor(out, 1)) == pytest.approx(details["quality_after"])
    assert inspect(out).float_operators == {"Conv": 2}  # with the one before, whose int8 kernel would round its input


def test_max_drop_that_holds_keeps_nothing(images, tmp_path):
    _, details = convert(Quantize(), Net(), images, tmp_path, max_drop=50.0)
    assert details["kept"] == [] and "sensitivity" not in details
    assert details["quality_after"] == details["quality_quantized"] < 60


def test_max_drop_without_labels_keeps_nothing(images, tmp_path):
    model, told = model_of(Net()), []
    own = replace(
        bench(model, images), quality=lambda _: float("nan"), of_student=lambda: float("nan"), say=told.append
    )
    details = Quantize().convert(model, own, SHAPE, tmp_path / "model.onnx", {}, max_drop=0.5)
    assert details["kept"] == [] and "quality_before" not in details and "no label" in told[0]


def test_max_drop_with_nothing_left_to_rank(images, tmp_path):
    _, details = convert(Quantize(keep=["*"]), Net(), images, tmp_path, max_drop=-1.0)
    assert (details["kept"], details["layers"]) == (["fc", "fine", "rough"], 0)
    assert details["quality_after"] == details["quality_quantized"]


@pytest.mark.parametrize(("least", "most"), [(1, 20), (3, 20), (8, 20), (13, 20), (20, 20), (99, 20), (1, 1), (2, 3)])
def test_fewest(least, most):
    asked = []

    def holds(count):
        asked.append(count)
        return count >= least

    assert fewest(holds, most) == min(least, most)
    assert len(asked) <= 10 and len(set(asked)) == len(asked)


def test_globs_of_keep():
    net = nn.ModuleDict({"a": nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Linear(2, 2)), "b": nn.Linear(2, 2)})
    assert matching(net, ["a"]) == {"a.0", "a.2"}
    assert matching(net, ["*.0", "b"]) == {"a.0", "b"}
    with pytest.raises(KdctlError, match="'c' matches no layer"):
        matching(net, ["c"])
    assert matching(net, []) == frozenset()


def test_keep_is_of_convolutions_linears_and_embeddings():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Embedding(3, 2), nn.ConvTranspose2d(2, 2, 1))
    assert matching(net, ["*"]) == {"0", "2", "3"}
    with pytest.raises(KdctlError, match="'1' matches no layer"):
        matching(net, ["1"])
