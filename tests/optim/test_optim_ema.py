"""The moving average of weights."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from kdctl.optim.ema import EMA


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


def test_the_average_by_hand() -> None:
    module = nn.Linear(1, 1, bias=False)
    ema, expected = EMA(module, 0.3), module.weight.item()
    for n, value in enumerate([1.0, 5.0, -2.0, 4.0], start=1):
        module.weight.data.fill_(value)
        ema.update(module)
        decay = min(0.3, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    ema.swap(module)
    assert module.weight.item() == pytest.approx(expected, rel=1e-6)


def test_buffers_are_averaged_and_counters_copied() -> None:
    module = net()
    ema = EMA(module, 0.9)
    for _ in range(3):
        module(5 + torch.randn(4, 1, 6, 6))
        ema.update(module)
    own = copy.deepcopy(module.state_dict())
    ema.swap(module)
    assert module[1].num_batches_tracked == 3
    assert module[1].running_mean.dtype == torch.float32
    assert not torch.equal(module[1].running_mean, own["1.running_mean"])


def test_two_swaps_undo_each_other_also_with_shared_weights() -> None:
    module = net()
    module.add_module("tied", nn.Conv2d(1, 2, 3))
    module.tied.weight = module[0].weight
    ema = EMA(module, 0.9)
    module[0].weight.data.add_(1)
    ema.update(module)
    own, average = copy.deepcopy(module.state_dict()), copy.deepcopy(ema.state_dict()["average"])
    ema.swap(module)
    assert torch.equal(module[0].weight, average["0.weight"])
    assert not torch.equal(module[0].weight, own["0.weight"])
    ema.swap(module)
    assert all(torch.equal(value, own[name]) for name, value in module.state_dict().items())


def test_a_restored_average_continues_bit_by_bit() -> None:
    module, file = net(), io.BytesIO()
    ema = EMA(module, 0.99)
    ema.update(module)
    torch.save(ema.state_dict(), file)
    file.seek(0)
    restored = EMA(net(1), 0.99)
    restored.load_state_dict(torch.load(file, weights_only=True))
    module[0].weight.data.mul_(2)
    for average in (ema, restored):
        average.update(module)
    a, b = ema.state_dict(), restored.state_dict()
    assert a["num_updates"] == b["num_updates"] == 2
    assert all(torch.equal(a["average"][name], b["average"][name]) for name in a["average"])


def test_the_average_is_detached_from_the_module() -> None:
    module = net()
    ema = EMA(module, 0.9)
    before = ema.state_dict()["average"]["0.weight"].clone()
    module[0].weight.data.add_(1)
    assert torch.equal(ema.state_dict()["average"]["0.weight"], before)
    assert not ema.state_dict()["average"]["0.weight"].requires_grad
