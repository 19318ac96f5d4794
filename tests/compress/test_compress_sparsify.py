"""Sparsity in one shot: exactly as many zeros, in the right places, and the truth about their worth."""

from __future__ import annotations

import pytest
import torch

from kdctl.compress.base import Workbench
from kdctl.compress.sparsify import Sparsify
from kdctl.errors import ConfigError, KdctlError
from kdctl.methods.masks import cubic
from kdctl.models.record import Model, ModelRecord, build_model
from kdctl.tasks.classification import Classification

BENCH = Workbench(
    Classification(), lambda: iter([]), lambda: iter([]), lambda predict: 0.0, lambda: 0.0, lambda text: None
)


def make(kind: str = "resnet8", **arguments) -> Model:
    torch.manual_seed(0)
    return build_model(ModelRecord(kind, arguments, 10, [str(i) for i in range(10)], [3, 16, 16])).eval()


def layers(model: Model) -> dict[str, torch.Tensor]:
    return {
        path: m.weight.detach() for path, m in model.net.named_modules() if hasattr(m, "weight") and m.weight.dim() > 1
    }


def test_the_smallest_weights_of_all_layers_go():
    model = make()
    before = [w.clone() for w in layers(model).values()]
    made = Sparsify(sparsity=0.9).reshape(model, BENCH)
    whole = torch.cat([w.abs().flatten() for w in before])
    after = torch.cat([w.abs().flatten() for w in layers(made.model).values()])
    assert int((after == 0).sum()) == int(0.9 * whole.numel())
    assert float(whole[after == 0].max()) <= float(after[after > 0].min())
    assert all(torch.equal(a, b) for a, b in zip(before, layers(model).values(), strict=True))
    assert made.details["gzip_bytes"] < 0.25 * made.details["bytes"]
    assert made.details["bytes"] == 4 * sum(p.numel() for p in model.net.parameters())


def test_each_layer_alike_and_skipped_ones():
    made = Sparsify(sparsity=0.5, scope="layer", skip=["conv1", "layer3*"]).reshape(make(), BENCH)
    shares = {path: float((w == 0).float().mean()) for path, w in layers(made.model).items()}
    assert {path for path, share in shares.items() if share == 0} == {
        path for path in shares if "layer3" in path or path == "conv1"
    }
    assert all(share == pytest.approx(0.5, abs=0.002) for path, share in shares.items() if share)
    with pytest.raises(ConfigError, match="no layer is called 'block"):
        Sparsify(skip=["block*"]).reshape(make(), BENCH)


@pytest.mark.parametrize(("pattern", "kept", "wide"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4)])
def test_of_every_m_neighbours_along_the_input_the_n_largest_stay(pattern, kept, wide):
    model = make()
    made = Sparsify(pattern=pattern).reshape(model, BENCH)
    assert "conv1" not in made.details["layers"]  # three input channels: no group of four
    old, new = model.net.layer2[0].conv2.weight, made.model.net.layer2[0].conv2.weight
    for out, y, x in [(0, 0, 0), (7, 2, 1)]:
        for start in range(0, 32, wide):
            group = slice(start, start + wide)
            largest = old[out, group, y, x].abs().topk(kept).indices
            assert set(new[out, group, y, x].nonzero().flatten().tolist()) == set(largest.tolist())


def test_a_net_without_a_layer_for_the_pattern_is_refused():
    with pytest.raises(KdctlError, match="pattern 4:8"):
        Sparsify(pattern="4:8", skip=["layer*", "fc"]).reshape(make(), BENCH)


def test_the_cubic_schedule():
    assert [round(cubic(0.8, t, 10, 30), 4) for t in (0, 10, 20, 29, 30, 99)] == [0.0, 0.0, 0.7, 0.7999, 0.8, 0.8]
    assert cubic(0.8, 0, 0, 0) == 0.8
