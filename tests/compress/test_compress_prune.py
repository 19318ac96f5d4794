"""Structured pruning: the narrow net is the masked one, its record rebuilds it, and the budget holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdctl.compress.base import Workbench
from kdctl.compress.channels import narrow as narrow_module
from kdctl.compress.channels.budget import Costs, Ranking, Way, cheapest_first, search, uniform
from kdctl.compress.channels.importance import importance
from kdctl.compress.channels.narrow import masked, narrow, narrowed
from kdctl.compress.channels.rules import follow
from kdctl.compress.prune import Prune, recalibrate, within
from kdctl.errors import ConfigError, KdctlError
from kdctl.models.record import Model, ModelRecord, build_model, load_model, save_model
from kdctl.signals import CLEAN, Batch
from kdctl.tasks.classification import Classification

CLASSES = [str(i) for i in range(10)]


def make(kind: str, shape=(3, 16, 16), **arguments) -> Model:
    """A model whose normalisations are not the identity: a removed channel's bias would be seen."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = build_model(ModelRecord(kind, arguments, 10, CLASSES, list(shape)))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.5)
    return model.eval()


def bench_of(model: Model, count: int = 64) -> Workbench:
    task, generator = Classification(), np.random.default_rng(0)
    images = generator.random((count, *model.record.image_shape)).astype(np.float32)
    labels = generator.integers(0, 10, count)

    def batches():
        for start in range(0, count, 32):
            rows = torch.arange(start, min(start + 32, count))
            pixels, targets = torch.from_numpy(images[rows]), torch.from_numpy(labels[rows])
            yield Batch(pixels, targets, rows, torch.full_like(rows, CLEAN))

    return Workbench(
        task, lambda: iter([images[:32], images[32:]]), batches, lambda predict: 0.0, lambda: 0.0, lambda text: None
    )


def every_other(channels) -> list[int]:
    return [unit for group in channels.groups() for unit in group.units[: len(group.units) // 2]]


NETS = [
    ("digits_cnn", (1, 8, 8), {}),
    ("lenet5", (1, 28, 28), {}),
    ("mlp", (1, 8, 8), {"hidden": [32, 16]}),
    ("vgg8", (3, 32, 32), {}),
    ("resnet8", (3, 16, 16), {}),
    ("resnet8", (3, 16, 16), {"shortcut": "pad"}),
    ("wrn_16_1", (3, 16, 16), {}),
    ("mobilenet_v2", (3, 32, 32), {}),
    ("shufflenet_v1", (3, 32, 32), {}),
    ("shufflenet_v2", (3, 32, 32), {"size": "0.5x"}),
    ("tiny_transformer", (3, 16, 16), {"depth": 2}),
]


@pytest.mark.parametrize(("kind", "shape", "arguments"), NETS, ids=[f"{k}-{a}" for k, _, a in NETS])
def test_the_narrow_net_is_the_masked_one_and_comes_back_from_disk(kind, shape, arguments, tmp_path):
    model = make(kind, shape, **arguments)
    channels = follow(model)
    removed = every_other(channels)
    result = narrow(model, channels, removed)
    images = torch.rand(3, *shape)
    with torch.no_grad():
        expected = masked(model, channels, removed)(images)
        assert torch.allclose(result(images), expected, atol=1e-5 * float(expected.abs().max()))
        assert not torch.allclose(expected, model(images), atol=1e-3)
        save_model(result, tmp_path / "small")
        assert torch.equal(load_model(tmp_path / "small")(images), result(images))
    assert sum(p.numel() for p in result.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())
    assert result.net.state_dict().keys() == model.net.state_dict().keys()


def test_the_residual_stream_is_cut_through_shortcuts_of_zeros():
    model = make("resnet8", shortcut="pad")
    channels = follow(model)
    groups = [group for group in channels.groups() if len(group.layers) > 3 or "layer3.0.conv2" in group.layers]
    stage3 = next(layer for layer in channels.layers if layer.path == "layer3.0.conv2").outputs
    stem = next(layer for layer in channels.layers if layer.path == "conv1").outputs
    assert list(stage3[24:40]) == list(stem)  # 16 channels, padded with 8 and then with 16 zeros on either side
    assert len(groups) >= 3
    gone = [int(stage3[0]), int(stage3[24]), int(stage3[63])]
    result = narrow(model, channels, gone)
    assert result.net.layer3[0].downsample.padding == (0, 0, 0, 0, 15, 15)
    assert result.net.conv1.out_channels == 15


def test_masked_means_that_no_layer_takes_the_channel():
    """Against zeroing the features themselves, after normalisation and ReLU."""
    model = make("digits_cnn", (1, 8, 8))
    channels = follow(model)
    numbers = next(layer for layer in channels.layers if layer.path == "layer1.conv").outputs
    gone = [int(numbers[3]), int(numbers[7])]
    images = torch.rand(2, 1, 8, 8)
    net = model.net
    with torch.no_grad():
        x = net.layer1(net.relu(net.bn1(net.conv1(images))))
        assert float(x[:, [3, 7]].abs().max()) > 0.01
        x[:, [3, 7]] = 0
        expected = net.fc(net.pool(net.layer3(net.layer2(x))).flatten(1))
        assert torch.allclose(narrow(model, channels, gone)(images), expected, atol=1e-5)


def test_heads_go_as_a_whole_and_the_stream_stays():
    model = make("tiny_transformer", depth=1, width=24, heads=3)
    channels = follow(model)
    attention, hidden = channels.groups()
    assert (len(attention.units), attention.width) == (3, 8)
    assert {"blocks.0.attention.q", "blocks.0.attention.k", "blocks.0.attention.v"} <= set(attention.layers)
    assert (hidden.name, len(hidden.units), hidden.width) == ("blocks.0.mlp.fc1", 48, 1)
    result = narrow(model, channels, attention.units[1:2])
    assert result.net.blocks[0].attention.q.out_features == 16
    assert result.net.blocks[0].attention.proj.in_features == 16


class Counted(nn.Module):
    """Attention with a plain number of heads, packed q, k and v, and torch's own product."""

    def __init__(self, *, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.num_heads = 4
        self.patch = nn.Conv2d(in_channels, 32, 4, 4)
        self.qkv = nn.Linear(32, 96)
        self.proj = nn.Linear(32, 32)
        self.fc = nn.Linear(32, num_classes)

    def forward(self, images):
        x = self.patch(images).flatten(2).transpose(1, 2)
        num, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(num, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.fc((x + self.proj(y)).mean(1))


class Fixed(nn.Module):
    """Grouped convolutions, a concatenation, a gate - and a width that is written into the forward pass."""

    def __init__(self, *, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=2)
        self.gate = nn.Conv2d(24, 24, 1)
        self.conv2 = nn.Conv2d(40, 12, 1)
        self.fc1 = nn.Linear(12, 16)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, images):
        x = F.relu(self.conv1(images))
        y = self.grouped(x)
        y = y * self.gate(F.adaptive_avg_pool2d(y, 1)).sigmoid()
        z = self.conv2(torch.cat([x, y], 1)).mean((2, 3))
        return self.fc(F.relu(self.fc1(z.view(-1, 12))))


class Axes(nn.Module):
    """`axis` where others write `dim`."""

    def __init__(self, *, num_classes: int, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(in_channels, 8, 3, padding=1)
        self.fc = nn.Linear(16, num_classes)

    def forward(self, images):
        x = torch.cat([self.conv1(images), self.conv2(images)], axis=1)
        x = torch.softmax(x.flatten(2), axis=2)
        return self.fc(x.sum(axis=2))


def own(tmp_path, cls, monkeypatch) -> Model:
    record = ModelRecord(f"{__name__}:{cls.__name__}", {}, 10, CLASSES, [3, 16, 16])
    torch.manual_seed(0)
    monkeypatch.setattr(narrow_module, "build_model", lambda record, base: _rebuild(cls, record))
    return Model(cls(num_classes=10), record).eval()


def _rebuild(cls, record) -> Model:
    from kdctl.models import structure

    net = cls(num_classes=10)
    structure.apply(net, record.structure)
    return Model(net, record)


def test_a_number_of_heads_follows(tmp_path, monkeypatch):
    model = own(tmp_path, Counted, monkeypatch)
    channels = follow(model)
    heads = next(group for group in channels.groups() if "qkv" in group.layers)
    assert (len(heads.units), heads.width) == (4, 24)
    result = narrow(model, channels, heads.units[:1])
    assert (result.net.num_heads, result.net.qkv.out_features, result.net.proj.in_features) == (3, 72, 24)


def test_groups_gates_and_concatenations_hold_and_a_written_width_stays(tmp_path, monkeypatch):
    model = own(tmp_path, Fixed, monkeypatch)
    said: list[str] = []
    bench = bench_of(model)
    bench.say = said.append
    result = Prune(ratio=0.5, importance="l2", scope="uniform", round_to=1).reshape(model, bench)
    net = result.model.net
    assert net.conv2.out_channels == 12
    assert net.fc1.out_features < 16
    assert list(result.details["broken"]) == ["conv2"]
    assert "fc1" in result.details["broken"]["conv2"]
    assert "conv2 stays as it is" in said[0]
    assert net.conv1.out_channels < 16
    assert net.grouped.out_channels < 24
    assert net.gate.out_channels == net.grouped.out_channels
    assert net.grouped.groups == 2
    assert net.conv2.in_channels == net.conv1.out_channels + net.grouped.out_channels
    assert result.details["macs"][1] <= 0.5 * result.details["macs"][0]


def test_an_axis_is_a_dim(tmp_path, monkeypatch):
    model = own(tmp_path, Axes, monkeypatch)
    channels = follow(model)
    assert {group.name: len(group.units) for group in channels.groups()} == {"conv1": 8, "conv2": 8}
    units = [unit for group in channels.groups() for unit in group.units[:3]]
    assert narrow(model, channels, units).net.fc.in_features == 10


# ------------------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("of", ["macs", "parameters"])
@pytest.mark.parametrize("scope", ["global", "uniform", "sensitivity"])
def test_a_budget_is_met_closely(of, scope):
    model = make("resnet8", (3, 8, 8), width=32, stem=32).train()
    before = [p.clone() for p in model.state_dict().values()]
    made = Prune(ratio=0.4, of=of, scope=scope, importance="l2", round_to=4, samples=8, recalibrate=False)
    result = made.reshape(model, bench_of(model))
    whole, left = result.details[of]
    assert 0.5 * whole < left <= 0.6 * whole
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert model.training
    assert not result.model.training
    widths = [after for name, (_, after) in result.details["channels"].items() if name != "fc"]
    assert all(width % 4 == 0 for width in widths)
    assert result.details["channels"]["fc"] == [10, 10]
    assert ("scan" in result.details) == (scope == "sensitivity")


def test_what_is_counted_is_what_is_measured():
    from kdctl.bench import cost

    for kind, shape, arguments in [NETS[4], NETS[7], NETS[1]]:
        model = make(kind, shape, **arguments)
        channels = follow(model)
        removed = every_other(channels)
        costs = Costs(channels, channels.groups(), cost.macs(model, shape), cost.parameters(model))
        small = narrowed(model, channels, removed)
        assert costs.of("macs")(removed) == cost.macs(small, shape)
        assert costs.of("parameters")(removed) == cost.parameters(small)


def test_channels_as_a_budget_and_skipped_layers():
    model = make("vgg8", (3, 32, 32))
    made = Prune(ratio=0.5, of="channels", scope="uniform", importance="random", skip=["*3*"], recalibrate=False)
    kept = made.reshape(model, bench_of(model)).details["channels"]
    changed = {name: (old, new) for name, (old, new) in kept.items() if new < old}
    assert changed and not any("3" in name for name in changed)
    assert all(new == old / 2 for old, new in changed.values())
    with pytest.raises(ConfigError, match="no layer is called 'layer9"):
        Prune(skip=["layer9.*"]).reshape(model, bench_of(model))


def test_a_budget_that_cannot_be_met_is_refused():
    model = make("resnet8")
    with pytest.raises(KdctlError, match="cannot reach"):
        Prune(ratio=0.999, importance="l1").reshape(model, bench_of(model))


def test_a_net_without_prunable_channels_is_refused():
    model = make("mlp", (1, 8, 8), hidden=[])
    with pytest.raises(KdctlError, match="nothing to prune"):
        Prune(importance="l1").reshape(model, bench_of(model))


def test_latency_is_searched_by_prediction_and_met_by_measurement():
    """The prediction says 20 % too little: what is measured first is over the budget, what is found in the end not."""
    channels = follow(make("resnet8"))
    groups = channels.groups()
    ranking = Ranking(groups, np.arange(2000, dtype=float), 1)
    total = Costs(channels, groups, 10**7, 10**5).of("channels")
    removed, details = within(uniform(ranking), ranking, total, lambda gone: 1.2 * total(gone), 200.0)
    tried = details["latency"]["tried"]
    assert tried[0]["measured_ms"] > 200 >= tried[-1]["measured_ms"] > 180
    assert 1.2 * total(removed) <= 200
    with pytest.raises(KdctlError, match="were not met"):
        within(uniform(ranking), ranking, total, lambda gone: 1000.0 + total(gone), 200.0)


def test_rounding_leaves_multiples_and_something_of_everything():
    (group,) = [g for g in follow(make("resnet8")).groups() if g.name == "layer3.0.conv1"]
    ranking = Ranking([group], np.arange(2000, dtype=float), 8)
    assert len(group.units) == 64
    assert ranking.levels(0) == [0, 8, 16, 24, 32, 40, 48, 56]
    assert ranking.rounded(0, 64) == 56
    assert ranking.least(0, 8) == set(sorted(group.units)[:8])


def test_the_cheapest_harm_goes_first():
    groups = [g for g in follow(make("resnet8")).groups() if g.name in ("layer1.0.conv1", "layer3.0.conv1")]
    ranking = Ranking(groups, np.arange(2000, dtype=float), 8)
    scan = [{0: 0.0, 8: 0.5}, {0: 0.0, 8: 0.4, 32: 0.45}]  # 32 units for 0.45 are cheaper than 8 for 0.4
    way = cheapest_first(ranking, scan, lambda gone: 1000.0 - len(list(gone)))
    assert [len(way.at(moment)) for moment in range(way.num_steps + 1)] == [0, 32, 40]


def test_search_gives_back_what_the_budget_allows():
    groups = follow(make("resnet8")).groups()
    scores = np.zeros(2000)
    ranking = Ranking(groups, scores, 8)
    cost = lambda gone: 1000.0 - len(list(gone))  # noqa: E731
    every = set().union(*ranking.ordered)
    way = Way(1, lambda moment: every if moment else set())
    assert 10 <= len(search(way, cost, 990.0, "units", ranking)) < 18 < len(every)


# ---------------------------------------------------------------------------------------------------------- importance


def test_norms_are_over_all_weights_of_a_unit():
    model = make("mlp", (1, 2, 2), hidden=[3])
    channels = follow(model)
    groups = channels.groups()
    first, last = model.net.layer1.linear.weight.detach(), model.net.fc.weight.detach()
    rows, columns = first.pow(2).sum(1).sqrt(), last.pow(2).sum(0).sqrt()
    expected = rows / rows.mean() + columns / columns.mean()
    found = importance("l2", model, channels, groups, bench_of(model), 8)[groups[0].units]
    assert np.allclose(found, expected.numpy(), rtol=1e-5)


def test_taylor_estimates_what_the_loss_loses():
    """For a tiny weight into the next layer the first order is all there is."""
    model = make("digits_cnn", (1, 8, 8))
    with torch.no_grad():
        model.net.layer2.conv.weight.mul_(1e-3)
    channels = follow(model)
    groups = channels.groups()
    bench = bench_of(model, 16)
    (batch,) = list(bench.batches())
    numbers = next(layer for layer in channels.layers if layer.path == "layer1.conv").outputs.tolist()
    scores = importance("taylor", model, channels, groups, bench, 16)

    def loss(net) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(net.double()(batch.inputs.double()), batch.targets))

    whole = loss(masked(model, channels, []))
    for number in numbers[:4]:
        change = loss(masked(model, channels, [number])) - whole
        assert scores[number] == pytest.approx(change**2, rel=0.05)


def test_importance_needs_what_it_reads():
    model = make("mlp", (1, 8, 8), hidden=[16])
    with pytest.raises(ConfigError, match="batch normalisation"):
        Prune(importance="bn").reshape(model, bench_of(model))
    model = make("resnet8")
    channels = follow(model)
    scores = importance("bn", model, channels, channels.groups(), bench_of(model), 8)
    inner = next(layer for layer in channels.layers if layer.path == "layer2.0.bn1")
    assert np.allclose(scores[inner.outputs], inner.module.weight.detach().abs().numpy())


def test_recalibration_takes_the_statistics_of_the_images():
    model = make("digits_cnn", (1, 8, 8))
    bench = bench_of(model)
    model.net.bn1.num_batches_tracked.fill_(100)  # of a training: none of it counts any more
    assert recalibrate(model, bench, 64) == 64
    images = torch.from_numpy(np.concatenate(list(bench.images())))
    with torch.no_grad():
        features = model.net.conv1(images)
    assert torch.allclose(model.net.bn1.running_mean, features.mean((0, 2, 3)), atol=1e-5)
    assert model.net.bn1.momentum == 0.1
    assert not model.net.bn1.training


def test_a_net_that_breaks_is_refused_by_name(monkeypatch):
    model = make("resnet8")
    cut = narrow_module._cut

    def wrong(net, channels, removed):
        state = cut(net, channels, removed)
        state["layer2.0.conv2.weight"] = state["layer2.0.conv2.weight"].flip(1)
        return state

    monkeypatch.setattr(narrow_module, "_cut", wrong)
    with pytest.raises(KdctlError, match="does not compute what the masked one does"):
        narrow(model, channels := follow(model), every_other(channels))
