"""OpenVINO's files are the model, in every form that they are written in; what is damaged or foreign is refused."""

from __future__ import annotations

import copy
import os

import numpy as np
import pytest
import torch
from torch import nn

from kdctl.bench.latency import Cell, measure
from kdctl.errors import ConfigError, KdctlError, MissingError
from kdctl.export import onnx
from kdctl.export.base import Learned, Quantization
from kdctl.export.openvino import OpenVino, inspect, open_predictor
from kdctl.export.openvino_weights import _in_integers
from kdctl.models.record import Model, ModelRecord, build_model

pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install 'kdctl[openvino]'")

SHAPE = (3, 8, 8)
CLASSES = ["one", 'tw"ö', "three", "four"]
WEIGHT_ONLY = {"mode": "weight_only"}


@pytest.fixture(autouse=True, scope="module")
def once():
    """Exports each model to ONNX but once: it is most of the time that these tests take."""
    graphs, export = {}, onnx.to_graph

    def to_graph(model, *rest, **named):
        key = (id(model), repr(rest), repr(named))
        if key not in graphs:
            graphs[key] = (export(model, *rest, **named), model)
        return copy.deepcopy(graphs[key][0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, "to_graph", to_graph)
        yield


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
    return build("digits_cnn", width=16)


@pytest.fixture(scope="module")
def perceptron():
    return build("mlp", hidden=[256, 64])


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("openvino") / "model.xml"
    OpenVino().convert(model.train(), SHAPE, path, {"class_names": CLASSES})
    assert model.training  # the export leaves the model as it is
    return path


def test_logits_at_any_batch_size(model, exported):
    predictor = open_predictor(exported, threads=1)
    for n in (1, 3, 32):
        np.testing.assert_allclose(predictor(images(n)), answers(model, images(n)), atol=1e-4)
    assert (predictor.image_shape, predictor.num_classes, predictor.fixed_batch) == (SHAPE, 4, None)
    assert predictor.class_names == CLASSES and predictor.runtime.startswith("openvino 20")
    assert predictor.metadata["preprocessing"]["shape"] == list(SHAPE)
    assert sorted(p.name for p in exported.parent.iterdir()) == ["model.bin", "model.xml"]
    with pytest.raises(KdctlError, match=r"takes images \(N, 3, 8, 8\)"):
        predictor(np.zeros((2, 3, 8, 9), np.float32))


def test_static_int8_has_the_scales_of_our_onnx(model, exported, tmp_path):
    how = Quantization(images=images(96))
    OpenVino().convert(model, SHAPE, tmp_path / "model.xml", {}, how)
    onnx.Onnx().convert(model, SHAPE, tmp_path / "model.onnx", {}, how)
    logits = open_predictor(tmp_path / "model.xml", threads=1)(images(64))
    same = onnx.open_predictor(tmp_path / "model.onnx", threads=1)(images(64))
    assert 25 < fidelity(logits, answers(model, images(64))) < 80
    assert fidelity(logits, same) > 25
    contents, fp32 = inspect(tmp_path / "model.xml"), inspect(exported)
    assert contents.int8_operators >= 5 and contents.float_operators == {}
    assert fp32.int8_operators == 0 and fp32.float_operators["Convolution"] == 4
    assert contents.weights == fp32.weights and contents.weight_bytes < 0.4 * fp32.weight_bytes


@pytest.mark.parametrize(
    ("how", "at_least", "bytes_a_weight"),
    [
        ({"mode": "dynamic"}, 35, 1),
        ({**WEIGHT_ONLY}, 35, 1),
        ({**WEIGHT_ONLY, "per_channel": False}, 30, 1),
        ({**WEIGHT_ONLY, "dtype": "int4", "group_size": 32}, 14, 0.5),
        ({**WEIGHT_ONLY, "dtype": "int4"}, 12, 0.5),
        ({**WEIGHT_ONLY, "dtype": "fp16"}, 55, 2),
        ({**WEIGHT_ONLY, "dtype": "bf16"}, 35, 2),
    ],
)
def test_few_bits_a_weight(perceptron, tmp_path, how, at_least, bytes_a_weight):
    how = Quantization(**how)
    OpenVino().convert(perceptron, SHAPE, tmp_path / "model.xml", {}, how)
    logits = open_predictor(tmp_path / "model.xml", threads=1)(images(32))
    assert at_least < fidelity(logits, answers(perceptron, images(32))) < 90
    contents = inspect(tmp_path / "model.xml")
    assert contents.weights == sum(p.numel() for p in perceptron.parameters() if p.ndim >= 2)
    rest = 4 * 324 + 4 * 324 * (8 if how.group_size else 1) + 600  # biases, scales, shapes
    assert contents.weight_bytes <= bytes_a_weight * contents.weights + rest
    assert contents.int8_operators == (3 if how.mode == "dynamic" else 0)


def test_dynamic_quantises_inputs_and_weight_only_does_not(perceptron, tmp_path):
    logits = {}
    for mode in ("dynamic", "weight_only"):
        OpenVino().convert(perceptron, SHAPE, tmp_path / f"{mode}.xml", {}, Quantization(mode=mode))
        logits[mode] = open_predictor(tmp_path / f"{mode}.xml", threads=1)(images(32))
    assert (tmp_path / "dynamic.bin").read_bytes() == (tmp_path / "weight_only.bin").read_bytes()
    assert 30 < fidelity(logits["dynamic"], logits["weight_only"]) < 60


def test_what_training_found_is_kept(perceptron, tmp_path):
    plain = copy.deepcopy(perceptron)
    step = 2 * plain.net.fc.weight.detach().abs().max() / 127  # a step that no rule of ours would choose
    plain.net.fc.weight.data = (plain.net.fc.weight / step).round() * step
    how = Quantization(mode="weight_only", learned={"fc": Learned(np.float32(step))}, keep=frozenset(OTHERS))
    OpenVino().convert(plain, SHAPE, tmp_path / "model.xml", {}, how)
    logits = open_predictor(tmp_path / "model.xml", threads=1)(images(8))
    np.testing.assert_allclose(logits, answers(plain, images(8)), atol=1e-4)


OTHERS = ("layer1.linear", "layer2.linear")


def test_layers_that_are_kept(perceptron, tmp_path):
    how = Quantization(mode="dynamic", keep=frozenset(["layer1.linear"]))
    OpenVino().convert(perceptron, SHAPE, tmp_path / "model.xml", {}, how)
    contents = inspect(tmp_path / "model.xml")
    assert contents.int8_operators == 2 and contents.float_operators["FullyConnected"] == 1
    assert contents.weight_bytes > 4 * perceptron.net.layer1.linear.weight.numel()
    with pytest.raises(KdctlError, match="not in the OpenVINO graph: layer9"):
        OpenVino().convert(perceptron, SHAPE, tmp_path / "m.xml", {}, Quantization(mode="dynamic", keep={"layer9"}))


@pytest.mark.parametrize("axes", [(0,), (1,)])
@pytest.mark.parametrize("group", [None, 8])
def test_integers_are_near_their_weights(axes, group):
    weight = np.random.default_rng(0).normal(size=(24, 16) if axes == (0,) else (16, 24)).astype(np.float32)
    weight *= np.linspace(0.1, 10, 24, dtype=np.float32).reshape((-1, 1) if axes == (0,) else (1, -1))
    for dtype, top in (("int8", 127), ("int4", 7)):
        how = Quantization(dtype=dtype, mode="weight_only", group_size=group)
        node = _in_integers(weight, axes, how, None)
        found = value(node)
        steps = np.abs(weight).max(axis=1 - axes[0], keepdims=True) / top
        assert found.shape == weight.shape
        assert (np.abs(found - weight) <= (0.51 if dtype == "int8" else 4) * steps).all()
        assert fidelity(found, weight) > (40 if dtype == "int8" else 15)


def constants(node):
    """Sizes of the constants that a node is made of."""
    import openvino

    nodes = openvino.Model([node], []).get_ordered_ops()
    return sorted(int(np.prod(n.shape)) for n in nodes if n.get_type_name() == "Constant")


def value(node):
    import openvino

    return openvino.Core().compile_model(openvino.Model([node], []), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([])[0]


@pytest.mark.parametrize(("dtype", "bits"), [("int4", 8), ("int8", 4), ("int4", 3)])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("steps", [[0.03], [0.01, 0.02, 0.03, 0.04]])
def test_learned_bits_and_steps_hold_before_the_files(dtype, bits, per_channel, steps):
    top = 2 ** (bits - 1) - 1
    steps = np.array(steps, np.float32)
    weight = np.random.default_rng(0).integers(-top, top + 1, (4, 6)) * steps[:, None]
    how = Quantization(dtype=dtype, mode="weight_only", per_channel=per_channel, group_size=2)
    node = _in_integers(weight.astype(np.float32), (0,), how, Learned(steps if len(steps) > 1 else steps[0], bits))
    np.testing.assert_allclose(value(node), weight, rtol=1e-6)


@pytest.mark.parametrize(("inputs", "scales"), [(64, 2 * 8), (48, 2 * 8), (37, 8), (34, 2 * 8)])
def test_groups_where_the_size_does_not_divide_the_inputs(inputs, scales):
    weight = np.random.default_rng(0).normal(size=(8, inputs)).astype(np.float32)
    node = _in_integers(weight, (0,), Quantization("int8", "weight_only", group_size=32), None)
    assert scales in constants(node) and fidelity(value(node), weight) > 40


def test_what_is_kept_is_not_halved(perceptron, tmp_path):
    how = Quantization(dtype="fp16", mode="weight_only", keep=frozenset(["layer2.linear"]))
    OpenVino().convert(perceptron, SHAPE, tmp_path / "model.xml", {}, how)
    data = (tmp_path / "model.bin").read_bytes()
    assert perceptron.net.layer2.linear.weight.detach().numpy().tobytes() in data
    assert perceptron.net.fc.weight.detach().numpy().tobytes() not in data


def test_a_failure_between_the_files_leaves_the_old_pair(perceptron, exported, tmp_path, monkeypatch):
    out = tmp_path / "model.xml"
    for suffix in (".xml", ".bin"):
        out.with_suffix(suffix).write_bytes(exported.with_suffix(suffix).read_bytes())
    move = os.replace

    def fail(source, target):
        if str(target) == str(out):
            raise OSError(28, "No space left on device")
        move(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KdctlError, match="cannot be written: No space"):
        OpenVino().convert(perceptron, SHAPE, out, {})
    for suffix in (".xml", ".bin"):
        assert out.with_suffix(suffix).read_bytes() == exported.with_suffix(suffix).read_bytes()
    out.with_suffix(".bin").unlink()
    with pytest.raises(KdctlError, match="cannot be written"):
        OpenVino().convert(perceptron, SHAPE, out, {})
    assert [path.name for path in tmp_path.iterdir()] == ["model.xml"]


def test_in_a_fresh_process(exported):
    (row,) = measure([Cell("fp32", "kdctl.export.openvino:open_predictor", {"path": str(exported)})], seconds=0.1)
    assert row.runtime.startswith("openvino") and row.cpu_ms > 0


def test_what_it_cannot_be(model, tmp_path):
    with pytest.raises(ConfigError, match="openvino files cannot be int4-static"):
        OpenVino().convert(model, SHAPE, tmp_path / "m.xml", {}, Quantization(dtype="int4"))


def test_an_operator_that_openvino_lacks(tmp_path):
    class Determinant(nn.Module):
        def forward(self, x):
            return torch.linalg.det(x).unsqueeze(1).repeat(1, 2, 1).flatten(1)

    record = ModelRecord("mlp", {"hidden": []}, 6, list("abcdef"), list(SHAPE))
    with pytest.raises(KdctlError, match=r"OpenVINO cannot read the model.*Det"):
        OpenVino().convert(Model(Determinant(), record), SHAPE, tmp_path / "m.xml", {})
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_such_files(exported, tmp_path):
    graph, constants = exported.read_bytes(), exported.with_suffix(".bin").read_bytes()
    damaged = {
        "half": (graph[: len(graph) // 2], constants),
        "empty": (b"", constants),
        "foreign": (b"not a model", constants),
        "short": (graph, constants[: len(constants) // 2]),
    }
    for name, (text, data) in damaged.items():
        (tmp_path / f"{name}.xml").write_bytes(text)
        (tmp_path / f"{name}.bin").write_bytes(data)
        with pytest.raises(KdctlError, match="damaged or not of OpenVINO"):
            open_predictor(tmp_path / f"{name}.xml")
    (tmp_path / "half.bin").unlink()
    with pytest.raises(MissingError, match=r"no file .*half\.bin"):
        open_predictor(tmp_path / "half.xml")
    with pytest.raises(MissingError, match="there is no file"):
        open_predictor(tmp_path / "none.xml")


def test_a_place_that_cannot_be_written(model, tmp_path):
    with pytest.raises(KdctlError, match="cannot be written"):
        OpenVino().convert(model, SHAPE, tmp_path / "none" / "model.xml", {})
