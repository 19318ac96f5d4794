"""Quantised ONNX of a trained network: nearly its accuracy, a fraction of its bytes, in the runtime it is meant for."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from kdctl.errors import KdctlError
from kdctl.export import graph, onnx_int8
from kdctl.export import onnx as onnx_export
from kdctl.export.base import Quantization
from kdctl.export.onnx import Onnx, OnnxPredictor, inspect, to_graph
from kdctl.export.onnx_int8 import ranges
from kdctl.quant.learned import Learned

SHAPE = (1, 8, 8)
CALIBRATIONS = ("minmax", "percentile", "entropy", "mse")


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


class Tokens(nn.Module):
    """Patches, one transformer block with attention, a mean over tokens."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(1, 32, 2, 2)
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.fc = nn.Linear(32, 10)

    def forward(self, images):
        x = self.patch(images).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + self.proj(torch.matmul(torch.softmax(torch.matmul(q, k.transpose(1, 2)) / 6, -1), v))
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.fc(x.mean(1))


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


@pytest.fixture(scope="module")
def convert(net, digits, tmp_path_factory):
    """Writes a quantised file of the net (or another model), which is traced once for all files."""
    folder = tmp_path_factory.mktemp("onnx")
    traced = {}

    def graph_of(model, image_shape, opset, fixed):
        key = (model, bool(fixed))
        if key not in traced:
            traced[key] = to_graph(model, image_shape, 21, fixed)
        copied = onnx.ModelProto()
        copied.CopyFrom(traced[key])
        return copied

    def write(name, model=net, **how):
        path = folder / f"{name}.onnx"
        if not path.exists():
            if how.get("mode", "static") == "static":
                how.setdefault("images", digits[0][:150])
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(onnx_export, "to_graph", graph_of)
                Onnx().convert(model, SHAPE, path, {}, None if name == "fp32" else Quantization(**how))
        return path

    return write


def predict(path, images):
    return OnnxPredictor(path, threads=1)(images)


def top1(path, digits):
    return 100 * float((predict(path, digits[2]).argmax(1) == digits[3]).mean())


def sqnr(path, reference, images):
    noise = predict(path, images) - reference
    return 10 * np.log10((reference**2).sum() / (noise**2).sum())


def constants(path):
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


# -------------------------------------------------------------------------------------------------------------- static


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_accuracy_is_kept(convert, digits, calibration):
    fp32 = top1(convert("fp32"), digits)
    assert fp32 > 95
    assert abs(top1(convert(calibration, calibration=calibration), digits) - fp32) <= 0.6  # three of 597 images


def test_calibrations_differ(convert):
    assert len({convert(name, calibration=name).read_bytes() for name in CALIBRATIONS}) == 4


def test_logits_are_close_at_any_batch_size(convert, digits):
    fp32, int8 = (OnnxPredictor(convert(name), threads=1) for name in ("fp32", "minmax"))
    for n in (1, 3, 32):
        expected = fp32(digits[2][:n])
        assert 0 < np.abs(int8(digits[2][:n]) - expected).max() < 0.05 * np.abs(expected).max()


def test_static_file_is_small_and_all_int8(convert, net):
    int8, fp32 = inspect(convert("minmax")), inspect(convert("fp32"))
    weights = sum(p.numel() for p in net.parameters())
    assert weights > 50_000
    assert int8.bytes < 0.3 * 4 * weights < fp32.bytes
    assert int8.bytes - int8.weight_bytes < 5_000
    assert int8.float_operators == {"Sub": 1, "Mul": 1}  # with constants: the mean of the input, the factor
    assert int8.int8_operators >= 7 and fp32.int8_operators == 0
    assert int8.weights == fp32.weights > 50_000


@pytest.mark.parametrize("per_channel", [True, False])
def test_weights_have_a_scale_a_channel_or_one(convert, per_channel):
    proto = onnx.load(convert("minmax") if per_channel else convert("per_tensor", per_channel=False))
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    nodes = [n for n in proto.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in tensors]
    scales = {tensors[n.input[0]].shape: tensors[n.input[1]].size for n in nodes if tensors[n.input[0]].ndim == 4}
    assert scales[(64, 32, 3, 3)] == (64 if per_channel else 1)


def test_logits_are_not_rounded_to_256_levels(convert, digits):
    proto = onnx.load(convert("minmax"))
    assert [node.op_type for node in proto.graph.node if "logits" in node.output] == ["Gemm"]
    assert len(np.unique(predict(convert("minmax"), digits[2]))) > 256


def test_arm_gets_signed_activations(convert, digits, monkeypatch):
    def zero_points(path):
        tensors = constants(path)
        return {tensors[n.input[2]].dtype for n in onnx.load(path).graph.node if n.op_type == "QuantizeLinear"}

    monkeypatch.setattr(onnx_int8.platform, "machine", lambda: "x86_64")
    assert onnx_int8.activation_type() == "uint8" and zero_points(convert("minmax")) == {np.dtype(np.uint8)}
    monkeypatch.setattr(onnx_int8.platform, "machine", lambda: "aarch64")
    path = convert("arm")
    assert zero_points(path) == {np.dtype(np.int8)}
    np.testing.assert_allclose(predict(path, digits[2]), predict(convert("minmax"), digits[2]), atol=0.3)
    assert abs(top1(path, digits) - top1(convert("minmax"), digits)) <= 0.6


def test_kept_layers_stay_in_float(convert, digits):
    path = convert("keep", keep=frozenset({"stem.0", "fc"}))
    assert inspect(path).float_operators == {"Sub": 1, "Mul": 1, "Conv": 1, "Gemm": 1}
    kept = [t for t in constants(path).values() if t.dtype == np.float32 and t.ndim > 1]
    assert sorted(t.shape for t in kept) == [(1, 1, 1, 1), (10, 64), (32, 1, 3, 3)] or len(kept) == 2
    reference = predict(convert("fp32"), digits[2])
    assert sqnr(path, reference, digits[2]) > sqnr(convert("minmax"), reference, digits[2])


def test_images_that_do_not_fit(convert):
    for images, match in ((None, "no calibration images"), (np.full((2, *SHAPE), np.nan, np.float32), "not finite")):
        with pytest.raises(KdctlError, match=match):
            convert("refused", images=images)
    assert not list(convert("fp32").parent.glob("*refused*"))


class Session:
    """Outputs `a` = 2 x and `b` = x - 1; counts the images of each call."""

    def __init__(self):
        self.calls = []

    def get_inputs(self):
        return [type("Input", (), {"name": "x"})]

    def run(self, names, feed):
        self.calls.append(len(feed["x"]))
        return [{"a": 2 * feed["x"], "b": feed["x"] - 1}[name] for name in names]


def test_ranges_of_every_image_in_batches_that_fit_the_memory(monkeypatch):
    session, x = Session(), np.ones((20, 1, 4, 4), np.float32)
    x[17, 0, 0, 0] = 3.0
    monkeypatch.setattr(onnx_int8, "ACTIVATION_BYTES", 6 * 2 * 16 * 4)
    assert ranges(session, ["a", "b"], x, "minmax") == {"a": (0.0, 6.0), "b": (0.0, 2.0)}
    assert session.calls == [1, 6, 6, 6, 2]
    session.calls.clear()
    ranges(session, ["a", "b"], x, "mse")
    assert session.calls == [1, *[6, 6, 6, 2] * 2]


# ------------------------------------------------------------------------------------------------------------- learned


class Chain(nn.Module):
    """Convolution, ReLU, pooling and linear on scaled images: what learned steps are checked on."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, 1, 1)
        self.fc = nn.Linear(16 * 16, 10)

    def forward(self, images):
        return self.fc(F.max_pool2d(self.conv((images - 0.3) / 0.4).relu(), 2).flatten(1))


def learned_chain(weight_bits, input_bits):
    """A chain whose weights are on a grid, what it learned, and its forward pass with rounded inputs."""
    torch.manual_seed(0)
    chain, learned = Chain().eval(), {}
    for path, limits in (("conv", (-0.7, 1.8)), ("fc", (0.0, 0.9))):
        layer, top = chain.get_submodule(path), 2 ** (weight_bits - 1) - 1
        rows = layer.weight.data.flatten(1)
        scale = rows.abs().amax(1) / top * 0.9
        levels = (rows / scale[:, None]).round().clamp(-top, top)
        layer.weight.data = (levels * scale[:, None]).reshape(layer.weight.shape)
        learned[path] = Learned(scale.numpy(), weight_bits, limits, input_bits)

    def rounded(x, limits):
        step = (limits[1] - limits[0]) / (2**input_bits - 1)
        zero = round(-limits[0] / step)
        return ((x / step).round() + zero).clamp(0, 2**input_bits - 1).sub(zero) * step

    def forward(images):
        with torch.no_grad():
            x = rounded((torch.from_numpy(images) - 0.3) / 0.4, learned["conv"].input_range)
            x = F.max_pool2d(chain.conv(x).relu(), 2).flatten(1)
            return chain.fc(rounded(x, learned["fc"].input_range)).numpy()

    return chain, learned, forward


@pytest.mark.parametrize(("weight_bits", "input_bits"), [(8, 8), (4, 8), (4, 4)])
def test_learned_steps_are_taken_as_they_are(convert, digits, weight_bits, input_bits):
    chain, learned, forward = learned_chain(weight_bits, input_bits)
    path = convert(f"learned{weight_bits}{input_bits}", chain, learned=learned)
    images = np.random.default_rng(0).random((50, *SHAPE), dtype=np.float32)
    difference = np.abs(predict(path, images) - forward(images)).max(1)
    step = learned["fc"].weight_scale.max() * (0.9 / (2**input_bits - 1)) * (2 ** (weight_bits - 1) - 1)
    if weight_bits == 8:
        assert np.median(difference) < 1e-5
    assert (
        difference.max() < 8 * step
    )  # inputs of fc on a rounding edge may fall on its other side, as biases round too
    contents = inspect(path)
    assert not {"Conv", "Gemm", "MatMul", "Clip"} & set(contents.float_operators)
    assert (contents.weight_bytes < 0.75 * contents.weights + 800) == (weight_bits == 4)  # two weights a byte


def test_learned_input_of_one_reader_does_not_clip_another(convert, net, digits):
    """The shortcut beside conv1.0 keeps its own levels where conv1.0 learned a narrow range."""
    (weight,) = (value for name, value in constants(convert("fp32")).items() if name == "conv1.0.weight")
    narrow = Learned(np.abs(weight).max((1, 2, 3)) / 127, 8, (0.0, 0.5), 8)
    path = convert("narrow", learned={"conv1.0": narrow})
    clipped = net.conv1[0].register_forward_pre_hook(lambda _, inputs: (inputs[0].clamp(0, 0.5),))
    with torch.no_grad():
        reference = net(torch.from_numpy(digits[2])).numpy()
    clipped.remove()
    assert sqnr(path, reference, digits[2]) > 25
    assert sqnr(convert("fp32"), reference, digits[2]) < 20


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_learned_steps_of_weights_that_are_only_stored(convert, net, mode):
    """A convolution of a dynamic file, and one of a static file that makes what a kept layer reads."""
    steps = np.full(64, 0.01, np.float32)
    keep = frozenset({"conv2.0"}) if mode == "static" else frozenset()
    path = convert(f"stored-{mode}", mode=mode, learned={"conv1.0": Learned(steps, 8, None)}, keep=keep)
    found = constants(path)
    (weight,) = (v for v in found.values() if v.shape == (64, 1, 288) and v.dtype == np.int8)
    expected = constants(convert("fp32"))["conv1.0.weight"].reshape(64, 1, 288)
    np.testing.assert_array_equal(weight, np.clip(np.rint(expected / 0.01), -127, 127))


class Grouped(nn.Module):
    """A transposed convolution in two groups, whose weight has no axis of its output channels."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 6, 3, 2, groups=2)
        self.stem, self.fc = nn.Conv2d(1, 4, 3, 2, 1), nn.Linear(6, 10)

    def forward(self, images):
        return self.fc(self.up(self.stem(images).relu()).mean((2, 3)))


def test_a_transposed_convolution_in_groups(convert, digits):
    torch.manual_seed(0)
    grouped = Grouped().eval()
    with torch.no_grad():
        reference = grouped(torch.from_numpy(digits[2])).numpy()
    assert sqnr(convert("grouped", grouped), reference, digits[2]) > 25


# ----------------------------------------------------------------------------------------------- weights alone, dynamic


@pytest.mark.parametrize(
    ("how", "least_sqnr", "bytes_a_weight"),
    [
        ({"dtype": "int8", "mode": "weight_only"}, 35, 1.0),
        ({"dtype": "int4", "mode": "weight_only"}, 10, 0.5),
        ({"dtype": "int4", "mode": "weight_only", "group_size": 32}, 13, 0.5 + 4 / 32),
        ({"dtype": "fp16", "mode": "weight_only"}, 60, 2.0),
        ({"dtype": "bf16", "mode": "weight_only"}, 40, 2.0),
    ],
)
def test_weights_alone(convert, digits, how, least_sqnr, bytes_a_weight):
    path = convert("-".join(map(str, how.values())), **how)
    contents, fp32 = inspect(path), inspect(convert("fp32"))
    assert sqnr(path, predict(convert("fp32"), digits[2]), digits[2]) > least_sqnr
    assert contents.weights == fp32.weights
    assert contents.weight_bytes < 1.05 * bytes_a_weight * contents.weights + 2_500
    assert contents.float_operators == fp32.float_operators  # all widening is done as the file is loaded


def test_groups_of_int4_lose_less_than_channels(convert, digits):
    reference = predict(convert("fp32"), digits[2])
    whole, groups = (
        sqnr(convert(f"int4-weight_only{end}", dtype="int4", mode="weight_only", group_size=size), reference, digits[2])
        for end, size in (("", None), ("-32", 32))
    )
    assert groups > whole + 0.5


def test_groups_that_do_not_fit_are_told(convert):
    path = convert("groups", dtype="int8", mode="weight_only", group_size=32)
    assert OnnxPredictor(path, threads=1).metadata["quantization"]["groups"] == {"stem.0": 9}


def test_weight_only_keeps_layers(convert):
    path = convert("int4-keep", dtype="int4", mode="weight_only", keep=frozenset({"conv2.0"}))
    assert [t.shape for t in constants(path).values() if t.dtype == np.float32 and t.shape == (64, 64, 3, 3)]


def test_dynamic_linears_of_a_transformer(convert, digits):
    torch.manual_seed(0)
    tokens = Tokens().eval()
    with torch.no_grad():
        reference = tokens(torch.from_numpy(digits[2])).numpy()
    path = convert("tokens", tokens, mode="dynamic")
    contents = inspect(path)
    assert sqnr(path, reference, digits[2]) > 30
    assert contents.int8_operators >= 5  # qkv, proj, up, down, fc
    floats = contents.float_operators
    assert floats["MatMul"] + floats.get("FusedMatMul", 0) == 2  # the attention's own
    assert contents.bytes < 0.5 * 4 * sum(p.numel() for p in tokens.parameters())
    kept = inspect(convert("tokens_keep", tokens, mode="dynamic", keep=frozenset({"up"})))
    # By its path, though it is stored transposed.
    assert kept.weight_bytes - contents.weight_bytes >= 3 * 32 * 64 - 64 * 4


def test_names_of_transposed_weights():
    torch.manual_seed(0)
    found = graph.layers(to_graph(Tokens(), SHAPE))
    assert set(found) == {"patch", "qkv", "proj", "up", "down", "fc"}


def test_metadata(convert):
    said = OnnxPredictor(convert("entropy", calibration="entropy"), threads=1).metadata["quantization"]
    assert (said["dtype"], said["mode"], said["calibration"], said["samples"]) == ("int8", "static", "entropy", 150)
