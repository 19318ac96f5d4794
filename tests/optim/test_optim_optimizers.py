"""Optimizers: groups, the fused form, names of torch.optim, errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from kdctl import registry
from kdctl.errors import ConfigError
from kdctl.optim import OPTIMIZERS
from kdctl.optim.optimizers import build_optimizer


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("kind", "arguments", "reference"),
    [
        ("sgd", {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}, torch.optim.SGD),
        ("adam", {"lr": 0.1, "weight_decay": 1e-2}, torch.optim.Adam),
        ("adamw", {"lr": 0.1, "betas": (0.8, 0.9)}, torch.optim.AdamW),
        ("RMSprop", {"lr": 0.1}, torch.optim.RMSprop),
    ],
)
def test_steps_are_those_of_torch(kind: str, arguments: dict[str, Any], reference: Any) -> None:
    ours, theirs = net(), net()
    train(ours, build_optimizer(kind, arguments, ours))
    train(theirs, reference(theirs.parameters(), **arguments, foreach=False))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Adam"])
def test_defaults_are_those_of_torch(kind: str) -> None:
    theirs = getattr(torch.optim, kind)(net().parameters(), lr=0.1).defaults
    ours = build_optimizer(kind.lower(), {"lr": 0.1}, net()).defaults
    assert {k: v for k, v in ours.items() if k != "fused"} == {k: v for k, v in theirs.items() if k != "fused"}
    assert ours["fused"] is True


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_decay_may_spare_norms_and_biases(kind: str) -> None:
    model = net()
    arguments = {"lr": 0.1, "weight_decay": 0.5, "decay_norm_and_bias": False}
    groups = build_optimizer(kind, arguments, model).param_groups
    assert [(g["weight_decay"], {p.ndim for p in g["params"]}) for g in groups] == [(0.5, {2}), (0.0, {1})]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    (only,) = build_optimizer(kind, {"lr": 0.1, "weight_decay": 0.5}, model).param_groups
    assert only["weight_decay"] == 0.5 and len(only["params"]) == 6


def test_frozen_parameters_stay_out_and_shared_ones_come_once() -> None:
    model = net()
    model[0].requires_grad_(False)
    modules = nn.ModuleDict({"student": model, "again": model[2]})
    (group,) = build_optimizer("sgd", {"lr": 0.3}, modules).param_groups
    assert [p.shape for p in group["params"]] == [p.shape for p in [*model[1].parameters(), *model[2].parameters()]]
    assert group["initial_lr"] == group["lr"] == 0.3


def test_a_restored_optimizer_continues_bit_by_bit() -> None:
    arguments = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "decay_norm_and_bias": False}
    model = net()
    optimizer = build_optimizer("sgd", arguments, model)
    train(model, optimizer)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer)
    other = net()
    other.load_state_dict(weights)
    restored = build_optimizer("sgd", arguments, other)
    restored.load_state_dict(state)
    train(other, restored)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("kind", "momentum"), [("sgd", {"momentum": 0.9}), ("adam", {}), ("adamw", {})])
def test_state_follows_the_memory_layout_of_its_model(kind: str, momentum: dict[str, float]) -> None:
    trained = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
        x = torch.randn(2, 3, 6, 6)
        optimizer = build_optimizer(kind, {"lr": 0.01, **momentum}, model)
        for _ in range(2):
            model(x).square().mean().backward()
            optimizer.step()
        model.to(memory_format=layout)
        resumed = build_optimizer(kind, {"lr": 0.01, **momentum}, model)
        resumed.load_state_dict(optimizer.state_dict())
        resumed.zero_grad()
        for _ in range(2):
            model(x).square().mean().backward()
            resumed.step()
        trained.append(model[0].weight.detach())
    torch.testing.assert_close(trained[0], trained[1], rtol=1e-4, atol=1e-5)


def test_errors_are_the_users() -> None:
    with pytest.raises(ConfigError, match="no parameter to train"):
        build_optimizer("sgd", {"lr": 0.1}, net().requires_grad_(False))
    with pytest.raises(ConfigError, match="sgd"):
        build_optimizer("sdg", {"lr": 0.1}, net())
    with pytest.raises(ConfigError, match="Nesterov"):
        build_optimizer("sgd", {"lr": 0.1, "nesterov": True}, net())
    with pytest.raises(ConfigError, match="lr"):
        build_optimizer("sgd", {}, net())


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_signatures_are_read_without_import(kind: str) -> None:
    known = registry.signature(registry.find("optimizers", kind))
    assert {"lr", "weight_decay", "decay_norm_and_bias"} <= set(known.arguments) and not known.accepts_any
    assert "params" not in known.arguments


def test_fused_steps_work_with_gradient_scaling() -> None:
    model = net()
    optimizer = build_optimizer("sgd", {"lr": 0.1}, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(model(torch.ones(2, 4)).sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert scaler.get_scale() == 512


@pytest.mark.parametrize("kind, reference", [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_a_parameter_may_get_its_first_gradient_later_than_others(kind: str, reference: Any) -> None:
    """As the adapters of a term do whose weight begins at zero."""
    arguments = {"lr": 0.1} | ({"momentum": 0.9, "nesterov": True} if kind == "sgd" else {})
    ours, theirs = net(), net()
    for model, optimizer in (
        (ours, build_optimizer(kind, arguments, ours)),
        (theirs, reference(theirs.parameters(), **arguments, foreach=False)),
    ):
        for parts in (model[:1], model, model):
            optimizer.zero_grad()
            (parts(torch.ones(3, 4)) - 1).square().mean().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
