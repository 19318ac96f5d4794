"""What training found is in the quantised graph, and spoils no other reader of the same tensor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from kdctl.errors import ConfigError
from kdctl.export import pt2e
from kdctl.export.base import Learned, Quantization

pytest.importorskip("executorch", reason="ExecuTorch is not installed: pip install 'kdctl[executorch]'")
pytest.importorskip("torchao", reason="torchao is not installed: pip install 'kdctl[executorch]'")


class Block(nn.Module):
    """A stem, then two convolutions and a shortcut that read the same tensor, then a pooling and a convolution."""

    def __init__(self, shortcut: bool):
        super().__init__()
        self.stem, self.one, self.two = (nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8))
        self.pool, self.last = nn.MaxPool2d(2), nn.Conv2d(8, 8, 3)
        self.shortcut = shortcut

    def forward(self, images):
        x = self.stem(images).relu()
        x = self.one(x) + self.two(x) + (x if self.shortcut else 0)
        return self.last(self.pool(x.relu())).mean((2, 3))


class Wrapped(nn.Module):
    def __init__(self, shortcut: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.net = Block(shortcut)

    def forward(self, images):
        return self.net(images)


IMAGES = np.random.default_rng(0).random((2, 3, 8, 8), dtype=np.float32)


def found(model, path, limits, bits=8):
    weight = model.net.get_submodule(path).weight.detach().flatten(1)
    return Learned((weight.abs().amax(1) / 127).numpy(), bits, limits)


def quantized(model, learned, **how):
    graph = torch.export.export(model.eval(), (torch.zeros(1, 3, 8, 8),)).module()
    return pt2e.quantized(graph, Quantization(images=IMAGES, learned=learned, **how))


def spans(graph):
    """By convolution, in the order of the graph: the range of its input's levels."""
    layers = [n for n in graph.graph.nodes if n.op == "call_function" and "conv2d" in str(n.target)]
    return [layer.args[0].args[1] * 255 for layer in layers]


@pytest.fixture(scope="module")
def plain():
    """The ranges without anything learned."""
    return spans(quantized(Wrapped(), {}))


def test_a_range_that_all_readers_learned(plain):
    model = Wrapped(shortcut=False)
    learned = {path: found(model, path, limits) for path, limits in (("two", (0.0, 0.05)), ("one", (0.0, 0.1)))}
    ranges = spans(quantized(model, learned))
    assert ranges[1:3] == pytest.approx([0.1, 0.1]) and plain[1] > 0.5
    assert ranges[0] == plain[0]


def test_a_range_that_one_reader_learned_clips_no_other(plain):
    model = Wrapped()
    narrow = {path: found(model, path, (0.0, 0.05)) for path in ("one", "two")}
    assert spans(quantized(model, narrow)) == pytest.approx(plain, rel=1e-3)
    wide = narrow | {"one": found(model, "one", (-1.0, 4.0))}
    assert spans(quantized(model, wide))[1:3] == pytest.approx([5.0, 5.0])


@pytest.mark.parametrize("calibration", ["minmax", "mse"])
def test_a_learned_range_behind_a_pooling(calibration):
    model = Wrapped()
    ranges = spans(quantized(model, {"last": found(model, "last", (0.0, 0.3))}, calibration=calibration))
    assert ranges[3] == pytest.approx(0.3)


def test_learned_weights_with_dynamic_inputs():
    model = nn.Module()
    model.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    model.forward = lambda images: model.net(images)
    steps = np.full(4, 0.03, np.float32)
    graph = quantized(model, {"1": Learned(steps)}, mode="dynamic")
    scales = [value for _, value in graph.named_buffers() if value.shape == (4,) and value.dtype == torch.float32]
    assert any(torch.allclose(value, torch.from_numpy(steps)) for value in scales)


def test_weights_alone_that_were_learned_are_not_left_in_float():
    model = Wrapped()
    with pytest.raises(ConfigError, match="one was trained with 4-bit weights alone, its input in float"):
        quantized(model, {"one": found(model, "one", None, 4)})
    with pytest.raises(ConfigError, match="XNNPACK leaves stem in float with mode: dynamic"):
        quantized(model, {"stem": found(model, "stem", None)}, mode="dynamic")
