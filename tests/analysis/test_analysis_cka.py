"""Linear CKA against Song's estimator written out, and which places of a net are compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdctl.analysis import cka as module
from kdctl.analysis.cka import alignment, choose_taps, feature_bytes, gram, grouped, layer_similarity, u_centred
from kdctl.data.base import ArraySplit
from kdctl.errors import ConfigError
from kdctl.models.record import Model, ModelRecord, build_model


def song(k: Any, el: Any) -> float:
    """The unbiased HSIC of Song et al. (2012), eq. 5."""
    n = len(k)
    k, el = k - np.diag(np.diag(k)), el - np.diag(np.diag(el))
    one = np.ones(n)
    parts = (
        np.trace(k @ el) + (one @ k @ one) * (one @ el @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * one @ k @ el @ one
    )
    return float(parts / (n * (n - 3)))


def cka(x: Tensor, y: Tensor) -> float:
    return alignment(u_centred(gram(x)), u_centred(gram(y)))


def test_the_unbiased_estimator() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 5) + 3
    y = x @ torch.randn(5, 7) + 0.5 * torch.randn(20, 7)
    k, el = (z.double().numpy() @ z.double().numpy().T for z in (x, y))
    expected = song(k, el) / (song(k, k) * song(el, el)) ** 0.5
    centred = [u_centred(torch.from_numpy(z)).double() for z in (k, el)]
    assert (centred[0] * centred[1]).sum().item() / (20 * 17) == pytest.approx(song(k, el), rel=1e-5)
    assert 0.1 < expected < 0.99 and cka(x, y) == pytest.approx(expected, rel=1e-4)


def test_what_does_not_change_it_and_what_has_none() -> None:
    torch.manual_seed(0)
    x, noise = torch.randn(200, 30), torch.randn(200, 4000)
    turned = x @ torch.linalg.qr(torch.randn(30, 30)).Q
    assert cka(x, 3 * turned + 7) == pytest.approx(1, abs=1e-4)
    assert cka(x, noise) < 0.05  # the biased one is above 0.3, with more features than samples
    assert cka(x, torch.ones(200, 3)) == 0


def model(kind: str, shape: list[int], **arguments: Any) -> Model:
    torch.manual_seed(0)
    return build_model(ModelRecord(kind, arguments, 10, list("0123456789"), shape)).eval()


def samples(shape: list[int], count: int = 12) -> ArraySplit:
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ArraySplit(images, torch.arange(count) % 10)


@pytest.mark.parametrize(
    ("kind", "shape", "expected"),
    [
        ("digits_cnn", [1, 8, 8], ["layer1", "layer2", "layer3", "fc"]),
        ("resnet8", [3, 32, 32], ["layer1.0", "layer2.0", "layer3.0", "fc"]),
        ("resnet20", [3, 32, 32], [
            "layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer2.2", "layer3.0", "layer3.2", "fc",
        ]),
    ],
)  # fmt: skip
def test_blocks_are_taken_and_the_logits(kind: str, shape: list[int], expected: list[str]) -> None:
    assert choose_taps(model(kind, shape), samples(shape)) == expected


@pytest.mark.parametrize(
    ("kind", "arguments", "expected"),
    [
        ("vgg11", {}, ["layer1", "layer2", "layer3", "layer4", "layer5", "fc"]),
        ("mlp", {"hidden": [8]}, ["layer1", "fc"]),
        ("tiny_transformer", {}, [f"blocks.{i}" for i in range(6)] + ["fc"]),
    ],
)
def test_other_families(kind: str, arguments: dict[str, Any], expected: list[str]) -> None:
    shape = [3, 32, 32]
    assert choose_taps(model(kind, shape, **arguments), samples(shape)) == expected


class Layer(nn.Module):
    """Gives a tuple, as layers of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.linear(x), None


class Wrapped(nn.Module):
    """Nearly all of it in one module; one layer is not called, one gives no row a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"layers": nn.ModuleList([Layer() for _ in range(3)])})
        self.idle = nn.Sequential(nn.Linear(2, 2))
        self.head = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        for layer in self.body["layers"]:  # type: ignore[attr-defined]
            x = layer(x)[0]
        return self.head(x)


def test_a_foreign_net() -> None:
    record = ModelRecord("none", {}, 3, list("abc"), [1, 2, 3])
    shape = [1, 2, 3]
    found = choose_taps(Model(Wrapped(), record).eval(), samples(shape))
    assert found == ["body.layers.0#1.0", "body.layers.1#1.0", "body.layers.2#1.0", "head"]


def test_as_few_passes_as_the_budget_allows() -> None:
    assert grouped(list("abcd"), [3, 4, 5, 1], 8) == [["a", "b"], ["c", "d"]]
    assert grouped(list("abc"), [8, 1, 8], 8) == [["a"], ["b"], ["c"]]


def test_similarity_of_two_nets_however_little_memory() -> None:
    shape = [1, 8, 8]
    one, other, some = model("digits_cnn", shape, width=4), model("digits_cnn", shape, width=8), samples(shape, 40)
    mine, others, matrix, count = layer_similarity(one, other, some)
    assert mine == others == ["layer1", "layer2", "layer3", "fc"] and count == 40
    assert np.shape(matrix) == (4, 4) and 0 <= np.min(matrix) <= np.max(matrix) <= 1
    largest = max(feature_bytes(other, others, some))
    assert largest == 4 * 8 * 64
    again = layer_similarity(one, other, some, budget=largest * 40)  # a layer at a time
    assert np.allclose(again[2], matrix, atol=1e-6) and again[3] == 40
    assert layer_similarity(one, other, some, budget=largest * 10)[3] == 10
    same = layer_similarity(one, one, some)[2]
    assert np.diag(same) == pytest.approx(1, abs=1e-5) and np.allclose(same, np.transpose(same), atol=1e-6)
    with pytest.raises(ConfigError, match="cannot be compared with 3 samples"):
        layer_similarity(one, other, some, budget=largest * 3)


def test_fewer_samples_are_of_all_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of images lie class after class."""
    shape = [1, 8, 8]
    one, images = model("digits_cnn", shape, width=4), samples(shape, 200)
    ordered = ArraySplit(images.images, torch.arange(200) // 20)
    taps = ["layer1", "layer2", "layer3", "fc"]
    seen: list[int] = []
    real = module._centred_grams

    def look(net: Model, group: list[str], rows: ArraySplit) -> Any:
        seen.extend(rows.targets.tolist())
        return real(net, group, rows)

    monkeypatch.setattr(module, "_centred_grams", look)
    assert layer_similarity(one, one, ordered, budget=max(feature_bytes(one, taps, images)) * 20)[3] == 20
    assert set(seen) == set(range(10))
