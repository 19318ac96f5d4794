"""The small vision transformer: its attention, its size, fewer heads, export."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn

from kdctl.bench.cost import macs
from kdctl.errors import ConfigError
from kdctl.models import structure
from kdctl.models.record import Model, ModelRecord, build_model
from kdctl.models.tiny_transformer import Attention


def build(shape: tuple[int, int, int] = (3, 32, 32), **arguments: object) -> Model:
    torch.manual_seed(0)
    model = build_model(ModelRecord("tiny_transformer", dict(arguments), 10, list("abcdefghij"), list(shape)))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def test_its_size() -> None:
    model = build()
    assert sum(p.numel() for p in model.parameters()) == 460_714
    assert macs(model, (3, 32, 32)) == 33_326_016
    assert build((1, 28, 28), patch=7, depth=2).net.tokens.position.shape == (1, 16, 96)


def test_attention_is_that_of_pytorch() -> None:
    ours, theirs = Attention(24, 3), nn.MultiheadAttention(24, 3, batch_first=True)
    theirs.in_proj_weight.data = torch.cat([ours.q.weight, ours.k.weight, ours.v.weight])
    theirs.in_proj_bias.data = torch.cat([nn.init.normal_(layer.bias) for layer in (ours.q, ours.k, ours.v)])
    theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0], rtol=1e-4, atol=1e-6)


def test_tokens_know_their_place() -> None:
    net = build((3, 8, 8), depth=1).net
    image = torch.rand(1, 3, 8, 8)
    swapped = torch.cat([image[:, :, 4:], image[:, :, :4]], 2)
    assert not torch.allclose(net(image), net(swapped), atol=1e-3)
    nn.init.zeros_(net.tokens.position)
    torch.testing.assert_close(net(image), net(swapped), rtol=1e-4, atol=1e-5)


def test_fewer_heads_and_units_are_edits_of_its_layers() -> None:
    full = build(depth=1).net
    attention, mlp = full.blocks[0].attention, full.blocks[0].mlp
    heads, units = torch.arange(16, 64), torch.arange(100)
    small = copy.deepcopy(full)
    edits = [{"edit": "resize", "path": f"blocks.0.attention.{name}", "in": 96, "out": 48} for name in "qkv"]
    edits.append({"edit": "resize", "path": "blocks.0.attention.proj", "in": 48, "out": 96})
    edits.append({"edit": "resize", "path": "blocks.0.mlp.fc1", "in": 96, "out": 100})
    edits.append({"edit": "resize", "path": "blocks.0.mlp.fc2", "in": 100, "out": 96})
    structure.apply(small, edits)
    state: dict[str, Tensor] = full.state_dict()
    for name in "qkv":
        for kind in ("weight", "bias"):
            state[f"blocks.0.attention.{name}.{kind}"] = state[f"blocks.0.attention.{name}.{kind}"][heads]
    state["blocks.0.attention.proj.weight"] = attention.proj.weight[:, heads]
    state["blocks.0.mlp.fc1.weight"], state["blocks.0.mlp.fc1.bias"] = mlp.fc1.weight[units], mlp.fc1.bias[units]
    state["blocks.0.mlp.fc2.weight"] = mlp.fc2.weight[:, units]
    small.load_state_dict(state)
    with torch.no_grad():
        gone = [column for column in range(96) if column not in heads.tolist()]
        attention.proj.weight[:, gone] = 0
        mlp.fc2.weight[:, 100:] = 0
        images = torch.rand(2, 3, 32, 32)
        torch.testing.assert_close(small(images), full(images), rtol=1e-4, atol=1e-5)


def test_it_is_traced_and_exported_for_any_batch() -> None:
    model = build((3, 8, 8), depth=2)
    images = torch.rand(5, 3, 8, 8)
    traced = fx.symbolic_trace(model.net)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (torch.rand(2, 3, 8, 8),), dynamic_shapes=({0: batch},))
    for other in (traced, program.module()):
        torch.testing.assert_close(other(images), model(images))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"heads": 5}, "a width of 96 cannot be divided among 5 heads"), ({"patch": 5}, "patches of 5x5")],
)
def test_what_does_not_divide_is_refused(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build(**arguments)
