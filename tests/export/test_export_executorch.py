"""A .pte program is the model: its logits, its story inside, on XNNPACK from end to end, or refused by name.

Runs where ExecuTorch is: in this environment, or in the one that KDCTL_EXECUTORCH_PYTHON names.
"""

from __future__ import annotations

import os
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kdctl.errors import ConfigError, KdctlError, MissingError
from kdctl.export import elsewhere, executorch, files
from kdctl.export.base import Learned, Quantization
from kdctl.export.executorch import ExecuTorch, left_behind
from kdctl.models.record import ModelRecord, build_model

SHAPE = (3, 16, 16)
NAMES = ["one", "zwö", "three", "four"]
absent = not elsewhere.is_here("executorch", converting=True) and elsewhere.variable("executorch") not in os.environ
needs_executorch = pytest.mark.skipif(absent, reason="neither ExecuTorch nor KDCTL_EXECUTORCH_PYTHON is here")


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
    path = tmp_path_factory.mktemp("executorch") / "model.pte"
    files.write("executorch", model, path, {"class_names": NAMES, "record": {"kind": "resnet8"}})
    return path


@pytest.fixture(scope="module")
def static(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("executorch") / "model.pte"
    kept = frozenset({"layer2.0.conv1"})
    files.write("executorch", model, path, {}, Quantization(images=images(32, 1), calibration="mse", keep=kept))
    return path


@needs_executorch
def test_program_is_the_model(exported, logits):
    predictor = files.open_file("executorch", exported)
    np.testing.assert_allclose(predictor(images(24)), logits, atol=1e-4)
    assert predictor(images(0)).shape == (0, 4)
    assert predictor.runtime.startswith("executorch 1.")
    assert (predictor.image_shape, predictor.num_classes, predictor.fixed_batch) == (SHAPE, 4, 1)
    assert predictor.class_names == NAMES
    assert predictor.metadata["record"] == {"kind": "resnet8"}
    assert predictor.metadata["preprocessing"]["shape"] == list(SHAPE)
    with pytest.raises(KdctlError, match=r"takes images \(N, 3, 16, 16\); these are \(2, 3, 8, 8\)"):
        predictor(np.zeros((2, 3, 8, 8), np.float32))


@needs_executorch
def test_all_of_it_is_delegated(exported, model):
    contents = files.inspect("executorch", exported)
    assert contents.delegated == 1.0  # shortcuts that pad would be left to portable kernels, were they not convolved
    shortcuts = 32 * 16 + 64 * 32
    assert contents.weights == sum(p.numel() for p in model.net.parameters() if p.ndim > 1) + shortcuts
    assert contents.float_operators["Conv2d"] == 9
    assert contents.int8_operators == 0
    assert 4 * contents.weights < contents.weight_bytes < contents.bytes


@needs_executorch
def test_int8_static_with_a_layer_kept(static, exported, logits):
    given = files.open_file("executorch", static)(images(24))
    noise = 10 * np.log10((logits**2).sum() / ((given - logits) ** 2).sum())
    assert noise > 20
    contents, plain = files.inspect("executorch", static), files.inspect("executorch", exported)
    assert contents.weight_bytes < 0.4 * plain.weight_bytes
    assert contents.float_operators["Conv2d"] == 1
    assert contents.int8_operators > 10
    assert contents.delegated == 1.0


@needs_executorch
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"not a program" * 99])
def test_damaged_file(exported, tmp_path, damage):
    path = tmp_path / "model.pte"
    path.write_bytes(damage(exported.read_bytes()))
    with pytest.raises(KdctlError, match="damaged or not an ExecuTorch program"):
        files.open_file("executorch", path)


@needs_executorch
def test_threads_stay_as_they_are_where_none_are_given(exported):
    before = os.sched_getaffinity(0)
    files.open_file("executorch", exported)
    assert os.sched_getaffinity(0) == before


@needs_executorch
@pytest.mark.slow
def test_learned_scales_are_kept(model, tmp_path):
    """The step of the last layer's weights is in the file, and its input is clipped where training clipped it."""
    shown = (torch.from_numpy(images(24)) - model.mean) / model.std
    with torch.no_grad():
        features = torch.nn.Sequential(*list(model.net)[:-1])(shown)
    bound = float(features.median())
    before = model.net.fc.weight.clone()
    with torch.no_grad():
        model.net.fc.weight.copy_((before / 0.05).round() * 0.05)
        expected = model.net.fc(features.clamp(max=bound)).numpy()
    try:
        found = {"fc": Learned(np.full(4, 0.05, np.float32), 4, (0.0, bound))}
        rest = frozenset({"conv1", "layer1", "layer2", "layer3", "pool"})
        wanted = Quantization(images=images(24), keep=rest, learned=found)
        files.write("executorch", model, tmp_path / "m.pte", {}, wanted)
    finally:
        with torch.no_grad():
            model.net.fc.weight.copy_(before)
    given = files.open_file("executorch", tmp_path / "m.pte")(images(24))
    assert np.abs(given - expected).max() < 0.05 * np.abs(expected).max()
    assert 4 * np.float32(0.05).tobytes() in (tmp_path / "m.pte").read_bytes()


def test_what_is_refused(model, tmp_path):
    convert, out = ExecuTorch().convert, tmp_path / "model.pte"
    with pytest.raises(ConfigError, match="cannot be fp16; allowed: fp32, int8-static, int8-dynamic"):
        convert(model, SHAPE, out, {}, Quantization("fp16", "weight_only"))
    with pytest.raises(ConfigError, match="no calibration 'entropy'; allowed: minmax, mse"):
        convert(model, SHAPE, out, {}, Quantization(images=images(2), calibration="entropy"))
    with pytest.raises(ConfigError, match="there are no calibration images"):
        convert(model, SHAPE, out, {}, Quantization())
    with pytest.raises(ConfigError, match=r"calibration images are \(2, 3, 8, 8\); the model takes \(N, 3, 16, 16\)"):
        convert(model, SHAPE, out, {}, Quantization(images=np.zeros((2, 3, 8, 8), np.float32)))
    with pytest.raises(ConfigError, match="one a group"):
        convert(model, SHAPE, out, {}, Quantization(mode="dynamic", group_size=32))
    with pytest.raises(MissingError, match="there is no file"):
        executorch.open_predictor(out)
    assert list(tmp_path.iterdir()) == []


def test_slow_kernels_are_named():
    def node(name):
        return SimpleNamespace(op="call_function", target=SimpleNamespace(_op=SimpleNamespace(_opname=name)))

    nodes = [node("view_copy"), node("add"), node("convolution"), node("add"), node("native_layer_norm")]
    nodes += [SimpleNamespace(op="call_function", target=len), SimpleNamespace(op="placeholder", target="images")]
    assert left_behind(SimpleNamespace(nodes=nodes)) == Counter({"add": 2, "convolution": 1})


@needs_executorch
def test_operator_that_no_delegate_takes(tmp_path):
    """A cumulative sum is not XNNPACK's."""
    (tmp_path / "net.py").write_text(
        "import torch\n\n\nclass Net(torch.nn.Module):\n"
        "    def __init__(self, *, num_classes: int):\n        super().__init__()\n"
        "        self.fc = torch.nn.Linear(768, num_classes)\n\n"
        "    def forward(self, x):\n        return self.fc(torch.cumsum(x, 1).flatten(1))\n",
        encoding="utf-8",
    )
    model = build_model(ModelRecord("./net.py:Net", {}, 4, NAMES, list(SHAPE)), tmp_path)
    with pytest.raises(KdctlError, match=r"cumsum \(1\) would run on slow portable kernels"):
        files.write("executorch", model.eval(), tmp_path / "model.pte", {})
    assert not (tmp_path / "model.pte").exists()
