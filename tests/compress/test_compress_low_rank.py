"""Low rank: the best factors, exact geometry, ranks under one budget, and a record that rebuilds the net."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdctl.bench.cost import macs, parameters
from kdctl.compress.base import Workbench
from kdctl.compress.factors.factorise import (
    balanced,
    cp,
    energies,
    product,
    spatial,
    spatial_matrix,
    svd,
    tucker,
    tucker_energies,
)
from kdctl.compress.factors.rank_choice import Option, by_energy, within_budget
from kdctl.compress.low_rank import LowRank
from kdctl.errors import ConfigError, KdctlError
from kdctl.models.record import Model, ModelRecord, build_model, load_model, save_model
from kdctl.taps import Taps
from kdctl.tasks.classification import Classification

GENERATOR = torch.Generator().manual_seed(0)
BENCH = Workbench(Classification(), lambda: iter(()), lambda: iter(()), lambda predict: 0.0, lambda: 0.0)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def missed(chain: list[Tensor], weight: Tensor) -> float:
    """The share of the weight's squared norm that a chain misses."""
    return float((product(chain) - weight).square().sum() / weight.square().sum())


# ------------------------------------------------------------------------------------------------------------- algebra

WEIGHT = random(12, 8, 3, 5)
WAYS: dict[str, Callable[[Tensor, int], list[Tensor]]] = {
    "spatial": lambda w, less: spatial(w, 24 - less),
    "tucker": lambda w, less: tucker(w, 12 - less, 8 - less),
    "svd": lambda w, less: svd(w.flatten(1), 12 - less),
}


@pytest.mark.parametrize("way", WAYS)
def test_full_rank_is_the_weight_and_less_is_not(way: str) -> None:
    weight = WEIGHT.flatten(1) if way == "svd" else WEIGHT
    assert missed(WAYS[way](WEIGHT, 0), weight) < 1e-20
    assert missed(WAYS[way](WEIGHT, 3), weight) > 1e-2


def test_energies_are_what_the_factors_keep() -> None:
    for rank in (1, 5, 11):
        assert 1 - missed(svd(WEIGHT.flatten(1), rank), WEIGHT.flatten(1)) == pytest.approx(
            energies(WEIGHT.flatten(1))[rank - 1]
        )
        assert 1 - missed(spatial(WEIGHT, rank), WEIGHT) == pytest.approx(energies(spatial_matrix(WEIGHT))[rank - 1])
    bounds = tucker_energies(WEIGHT)
    for out, channels in ((12, 3), (4, 8)):
        assert 1 - missed(tucker(WEIGHT, out, channels), WEIGHT) == pytest.approx(bounds[out - 1, channels - 1])
    assert 1 - missed(tucker(WEIGHT, 6, 4), WEIGHT) > bounds[5, 3] + 0.01, "the sweeps found nothing better"


def test_a_full_mode_of_tucker_has_no_factor_of_its_own() -> None:
    assert [tuple(f.shape) for f in tucker(WEIGHT, 6, 4)] == [(4, 8, 1, 1), (6, 4, 3, 5), (12, 6, 1, 1)]
    assert [tuple(f.shape) for f in tucker(WEIGHT, 12, 4)] == [(4, 8, 1, 1), (12, 4, 3, 5)]
    assert [tuple(f.shape) for f in tucker(WEIGHT, 6, 8)] == [(6, 8, 3, 5), (12, 6, 1, 1)]


def test_cp_finds_a_sum_of_outer_products() -> None:
    weight = torch.einsum("or,ir,hr,wr->oihw", *(random(n, 4) for n in (12, 8, 3, 5)))
    chain = cp(weight, 4, sweeps=300)
    assert [tuple(f.shape) for f in chain] == [(4, 8, 1, 1), (4, 1, 3, 1), (4, 1, 1, 5), (12, 4, 1, 1)]
    assert missed(chain, weight) < 1e-2
    assert all(torch.equal(a, b) for a, b in zip(chain, cp(weight, 4, sweeps=300), strict=True)), "it is not seeded"
    assert missed(cp(weight, 2), weight) > 0.05
    few, many = (missed(cp(WEIGHT, 20, starts=1, sweeps=n), WEIGHT) for n in (2, 60))
    assert many < few


@pytest.mark.parametrize(
    "chain", [svd(WEIGHT.flatten(1), 5), spatial(WEIGHT, 7), tucker(WEIGHT, 6, 4), cp(WEIGHT, 9), cp(WEIGHT, 1)]
)
def test_balanced_factors_have_the_same_product_and_equal_norms(chain: list[Tensor]) -> None:
    chain = [chain[0] * 1e3, *chain[1:-1], chain[-1] / 1e3]
    result = balanced(chain)
    torch.testing.assert_close(product(result), product(chain))
    norms = [float(factor.norm()) for factor in result]
    assert max(norms) < 3 * min(norms)
    into, out_of = result[-2].flatten(1).norm(dim=1), result[-1].transpose(0, 1).flatten(1).norm(dim=1)
    torch.testing.assert_close(into, out_of, rtol=1e-3, atol=0)


# --------------------------------------------------------------------------------------------------------------- ranks


def options(seed: int) -> list[Option]:
    kept = torch.rand(6, generator=torch.Generator().manual_seed(seed)).sort().values
    return [Option(None, 100.0 + seed, 1.0), *(Option((i,), 15.0 * i + seed, float(k)) for i, k in enumerate(kept, 1))]


def test_ranks_within_a_budget_are_nearly_the_best_there_are() -> None:
    layers = [options(seed) for seed in range(4)]
    for budget in (80, 130, 200, 300, 390):
        chosen = within_budget(layers, budget)
        assert chosen is not None and sum(o.cost for o in chosen) <= budget
        allowed = [c for c in itertools.product(*layers) if sum(o.cost for o in c) <= budget]
        best = min(sum(o.loss for o in c) for c in allowed)
        assert sum(o.loss for o in chosen) <= 1.1 * best + 0.1, budget
    assert within_budget(layers, 65) is None
    assert within_budget(layers, 1000) == [ways[0] for ways in layers]


def test_the_cheapest_option_that_keeps_the_energy() -> None:
    ways = [Option(None, 10, 1.0), Option((1,), 2, 0.5), Option((2,), 4, 0.9), Option((3,), 6, 0.95)]
    assert [by_energy(ways, e).ranks for e in (0.4, 0.9, 0.91, 0.99)] == [(1,), (2,), (3,), None]


# -------------------------------------------------------------------------------------------------------------- models


def build(kind: str, shape: tuple[int, int, int] = (3, 16, 16), base: Path | None = None, **arguments: Any) -> Model:
    torch.manual_seed(0)
    names = [f"class {i}" for i in range(10)]
    model = build_model(ModelRecord(kind, arguments, 10, names, list(shape)), base)
    model(torch.rand(8, *shape))
    return model.eval()


def changed(result: Model) -> list[str]:
    return [edit["path"] for edit in result.record.structure or []]


ODD = """
import torch
from torch import nn
def weight(*shape):
    return torch.einsum("or,ir,hr,wr->oihw", *(torch.randn(n, 1) for n in shape))
class Odd(nn.Sequential):
    def __init__(self, *, num_classes: int):
        super().__init__(
            nn.Conv2d(3, 32, (3, 5), (2, 1), (1, 2), bias=False), nn.ReLU(),
            nn.Conv2d(32, 24, 3, padding="same", dilation=(1, 2), padding_mode="reflect"), nn.ReLU(),
            nn.Conv2d(24, 20, 5, (1, 3), (0, 2), padding_mode="circular"), nn.ReLU(),
            nn.Conv2d(20, 16, 1, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1, groups=4), nn.ReLU(),
            nn.Conv2d(16, 16, (1, 3)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))
        for layer in self:
            if isinstance(layer, nn.Conv2d) and layer.groups == 1:
                layer.weight.data = weight(*layer.weight.shape) / layer.weight[0].numel() ** 0.5
"""


@pytest.mark.parametrize("convolution", ["tucker", "cp", "spatial"])
def test_layers_of_any_geometry_that_are_of_low_rank_say_the_same(convolution: Any, tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(ODD)
    model = build("./odd.py:Odd", base=tmp_path)
    images = torch.rand(3, 3, 16, 16)
    result = LowRank(energy=0.999, convolution=convolution, round_to=1, skip=["13"]).reshape(model, BENCH)
    assert changed(result.model) == ["0", "2", "4", "6", "10"]
    assert all(layer["energy"] > 1 - 1e-9 and max(layer["ranks"]) == 1 for layer in result.details["layers"])
    with torch.no_grad():
        torch.testing.assert_close(result.model(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("of", ["parameters", "macs"])
@pytest.mark.parametrize("convolution", ["tucker", "cp", "spatial"])
def test_the_budget_holds_and_a_saved_model_comes_back(convolution: Any, of: Any, tmp_path: Path) -> None:
    model = build("resnet8")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.rand(3, 3, 16, 16)
    result = LowRank(keep_ratio=0.6, of=of, convolution=convolution, layers=["layer*.conv?"]).reshape(model, BENCH)
    small, details = result.model, result.details
    assert details["parameters"] == {"before": parameters(model), "after": parameters(small)}
    assert details["macs"] == {"before": macs(model, (3, 16, 16)), "after": macs(small, (3, 16, 16))}
    treated = [m for p, m in model.net.named_modules() if p.startswith("layer") and ".conv" in p]
    weights = sum(p.numel() for m in treated for p in m.parameters())
    if of == "parameters":
        assert 0.5 * weights < weights - (parameters(model) - parameters(small)) <= 0.6 * weights
        saved = sum(layer["parameters_before"] - layer["parameters_after"] for layer in details["layers"])
        assert saved == parameters(model) - parameters(small)
    else:
        spent = sum(m.weight.numel() * side for m, side in zip(treated, [256, 256, 64, 64, 16, 16], strict=True))
        assert 0.5 * spent < spent - (macs(model, (3, 16, 16)) - macs(small, (3, 16, 16))) <= 0.6 * spent
    assert all(
        layer["path"].split(".")[-1].startswith("conv") and 0 < layer["energy"] < 1 for layer in details["layers"]
    )
    assert all(rank % 4 == 0 for layer in details["layers"] for rank in layer["ranks"])
    assert not small.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    save_model(small, tmp_path / "m")
    assert torch.equal(load_model(tmp_path / "m")(images), small(images))


def test_energy_is_kept_in_each_layer_and_taps_hold() -> None:
    model = build("tiny_transformer", depth=2)
    result = LowRank(energy=0.8, skip=["patch", "fc", "*.v"]).reshape(model, BENCH)
    assert {path.rpartition(".")[2] for path in changed(result.model)} == {"q", "k", "proj", "fc1", "fc2"}
    assert all(0.8 <= layer["energy"] < 0.9 for layer in result.details["layers"])
    path = "blocks.1.attention.q"
    images = torch.rand(2, 3, 16, 16)
    with Taps(result.model.net, [path]) as taps, taps.recording() as features:
        result.model(images)
    assert features[path].shape == (2, 16, 96)


def test_what_is_grouped_or_would_not_shrink_stays() -> None:
    result = LowRank(keep_ratio=0.7, of="macs").reshape(build("mobilenet_v2"), BENCH)
    kept = dict(result.model.net.named_modules())
    depthwise = [p for p, m in build("mobilenet_v2").net.named_modules() if getattr(m, "groups", 1) > 1]
    assert depthwise and all(isinstance(kept[path], nn.Conv2d) for path in depthwise)
    with pytest.raises(KdctlError, match="no layer of this model becomes smaller"):
        LowRank(energy=1.0).reshape(build("digits_cnn", width=4), BENCH)


CALLS = """
import torch
from torch import nn
class Calls(nn.Module):
    def __init__(self, *, num_classes: int):
        super().__init__()
        self.stem, self.twice, self.once = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.unused, self.fc = nn.Linear(64, 64), nn.Linear(16, num_classes)
        self.first = self.second = nn.Linear(16, 16)
        with torch.no_grad():
            self.once.weight[:] = self.once.weight[:1, :1].clone()
    def forward(self, x):
        x = self.once(self.twice(self.twice(self.stem(x))))
        return self.fc(self.second(self.first(x.mean((2, 3)))))
"""


def test_a_layer_counts_as_often_as_it_is_called(tmp_path: Path) -> None:
    (tmp_path / "calls.py").write_text(CALLS)
    model = build("./calls.py:Calls", base=tmp_path)
    result = LowRank(keep_ratio=0.6, of="macs", skip=["stem", "fc"]).reshape(model, BENCH)
    assert set(changed(result.model)) == {"once", "twice"}
    spent = 3 * 256 * 16 * 16 * 9
    saved = macs(model, (3, 16, 16)) - macs(result.model, (3, 16, 16))
    assert 0.5 * spent < spent - saved <= 0.6 * spent
    with pytest.raises(KdctlError, match="no layer of this model"):  # it has two names
        LowRank(energy=0.5, layers=["first"]).reshape(model, BENCH)


def test_a_chain_can_be_made_after_other_edits(tmp_path: Path) -> None:
    first = LowRank(keep_ratio=0.8, layers=["layer3.*"]).reshape(build("resnet8"), BENCH).model
    second = LowRank(keep_ratio=0.8, layers=["layer1.*"]).reshape(first, BENCH).model
    assert changed(second)[: len(changed(first))] == changed(first) and len(changed(second)) > len(changed(first))
    save_model(second, tmp_path / "m")
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(load_model(tmp_path / "m")(images), second(images))


# -------------------------------------------------------------------------------------------------------------- errors

READS = """
from torch import nn
class Reads(nn.Module):
    def __init__(self, *, num_classes: int):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 32, 3), nn.Linear(32, num_classes)
    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)) * self.conv.weight.mean())
"""


def test_a_forward_that_looks_into_its_layers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "reads.py").write_text(READS)
    model = build("./reads.py:Reads", base=tmp_path)
    with pytest.raises(KdctlError, match="name that layer in `skip`"):
        LowRank().reshape(model, BENCH)


def test_mistakes_are_said() -> None:
    model = build("resnet8")
    with pytest.raises(ConfigError, match="not from both"):
        LowRank(keep_ratio=0.4, energy=0.9)
    for key in ("layers", "skip"):
        with pytest.raises(ConfigError, match=f"{key}: 'layer9.*' meets no Linear or Conv2d"):
            LowRank(**{key: ["conv1", "layer9.*"]}).reshape(model, BENCH)  # type: ignore[arg-type]
    with pytest.raises(KdctlError, match=r"a share of 0.01 of these layers' parameters is too little: 0\.\d+ are"):
        LowRank(keep_ratio=0.01).reshape(model, BENCH)
    edited = build_model(ModelRecord("resnet8", {}, 10, model.record.class_names, [3, 16, 16], structure=[
        {"edit": "fake_quant", "path": "conv1"}
    ]))  # fmt: skip
    with pytest.raises(ConfigError, match="before quantisation-aware training"):
        LowRank().reshape(edited, BENCH)
