"""Pruning heads and feed-forward units: what goes, that the rest says what it said, and that the record rebuilds it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from kdctl.compress.base import Workbench
from kdctl.compress.prune_heads import Part, PruneHeads, attentions, feed_forwards, least_important, taylor, without
from kdctl.errors import ConfigError, KdctlError
from kdctl.models.record import Model, ModelRecord, build_model, load_model, save_model
from kdctl.signals import IGNORE, Batch, TokenInput
from kdctl.taps import Taps
from kdctl.tasks.classification import Classification
from kdctl.tasks.tokens import CausalLM

TOKENS = TokenInput(vocab_size=40, length=10, pad=0, first=1, separator=2)
SMALL = {"depth": 2, "width": 24, "heads": 3, "hidden": 32}
COUNT = 24


def make(kind: str, **others) -> Model:
    torch.manual_seed(0)
    texts = kind != "tiny_transformer"
    record = ModelRecord(
        kind, SMALL | others, 3, list("abc"), [] if texts else [3, 8, 8],
        tokens=TOKENS if texts else None, head="vocabulary" if kind == "gpt" else "sample",
    )  # fmt: skip
    model = build_model(record).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # as initialised, every head has next to nothing to say
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def inputs_of(model: Model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if model.record.tokens is None:
        return torch.rand(COUNT, 3, 8, 8, generator=generator)
    texts = torch.randint(3, 40, (COUNT, 10), generator=generator)
    texts[::2, 6:] = 0
    return texts


def bench(model: Model, labelled: bool = True) -> Workbench:
    inputs, nobody = inputs_of(model), torch.full((COUNT,), -1)
    if model.record.head == "vocabulary":
        targets = torch.cat([inputs[:, 1:], torch.zeros(COUNT, 1, dtype=torch.int64)], 1)
        keep = targets != 0
        targets = targets.masked_fill(~keep if labelled else torch.ones_like(keep), IGNORE)
        batch = Batch(inputs, targets, torch.arange(COUNT), nobody, keep)
        task = CausalLM()
    else:
        targets = torch.arange(COUNT) % 3 if labelled else torch.full((COUNT,), IGNORE)
        batch, task = Batch(inputs, targets, torch.arange(COUNT), nobody), Classification()
    return Workbench(task, lambda: iter([]), lambda: iter([batch]), lambda p: 0.0, lambda: 0.0)


def with_zeros(model: Model, gone: dict[Part, list[int]]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model as it is, with what these heads and units give set to zero while it runs."""
    model = copy.deepcopy(model)
    for part, pieces in gone.items():

        def zero(_, arguments, part=part, pieces=pieces):
            cut = arguments[0].clone().unflatten(-1, (part.count, part.width))
            cut[..., pieces, :] = 0
            return (cut.flatten(-2),)

        model.net.get_submodule(part.taker).register_forward_pre_hook(zero)
    return model


@pytest.mark.parametrize("kind", ["bert", "gpt", "tiny_transformer"])
@torch.no_grad()
def test_the_rest_says_what_it_said_and_comes_back(kind, tmp_path):
    model = make(kind)
    inputs, whole = inputs_of(model), make(kind)(inputs_of(model))
    heads, units = attentions(model.net), feed_forwards(model.net)
    assert [(part.count, part.width) for part in heads + units] == [(3, 8), (3, 8), (32, 1), (32, 1)]
    gone = {heads[0]: [1], heads[1]: [0, 2], units[0]: [3, 4, 30], units[1]: []}
    small = without(model, gone)
    expected = with_zeros(model, gone)(inputs)
    torch.testing.assert_close(small(inputs), expected, rtol=0, atol=1e-5)
    assert (whole - expected).abs().max() > 0.1
    assert torch.equal(model(inputs), whole)
    layers = dict(small.net.named_modules())
    assert [layers[path].out_features for path in heads[1].makers] == [8, 8, 8]
    assert (layers[heads[0].taker].in_features, layers[units[0].makers[0]].out_features) == (16, 29)
    save_model(small, tmp_path / "small")
    again = load_model(tmp_path / "small")
    assert torch.equal(again(inputs), small(inputs))
    assert [part.count for part in attentions(again.net)] == [2, 1]  # so that it can be pruned again
    twice = without(again, {attentions(again.net)[0]: [0]})
    both = gone | {heads[0]: [0, 1]}
    torch.testing.assert_close(twice(inputs), with_zeros(model, both)(inputs), rtol=0, atol=1e-5)


def test_attention_that_is_tapped_has_the_heads_that_are_left():
    model = make("bert")
    small = without(model, {attentions(model.net)[0]: [1]})
    inputs, path = inputs_of(model), "bert.encoder.layer.0.attention.self.softmax"
    with torch.no_grad(), Taps(model.net, [path]) as old, Taps(small.net, [path]) as new:
        with old.recording() as before, new.recording() as after:
            model(inputs)
            told = small(inputs)
    assert torch.allclose(after[path], before[path][:, [0, 2]], atol=1e-6)
    torch.testing.assert_close(told, small(inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "gpt"])
def test_importance_is_the_slope_of_gates(kind):
    """Against finite differences: a gate on a head's output is a factor on the weights that take it."""
    model = make(kind).double()
    own = bench(model)
    (batch,) = own.batches()
    parts = [attentions(model.net)[1], feed_forwards(model.net)[0]]

    @torch.no_grad()
    def losses(part: Part, piece: int, gate: float) -> torch.Tensor:
        copied = copy.deepcopy(model)
        copied.net.get_submodule(part.taker).weight[:, part.places([piece])] *= gate
        found = []
        for row in range(COUNT):
            one = batch.take(slice(row, row + 1))
            signals = own.task.signals(own.task.forward(copied, one), one)
            found.append(own.task.supervised(signals, one)["ce"][0])
        return torch.stack(found)

    for part, scores in zip(parts, taylor(model, parts, own, COUNT), strict=True):
        for piece in (0, part.count - 1):
            slopes = (losses(part, piece, 1 + 1e-4) - losses(part, piece, 1 - 1e-4)) / 2e-4
            assert scores[piece] == pytest.approx(float(slopes.abs().mean()), rel=1e-4)


def test_samples_without_a_label_count_as_well():
    """One label among many does not decide alone."""
    model = make("bert")
    parts = attentions(model.net)
    (batch,) = bench(model).batches()
    batch.targets[1:] = IGNORE

    def sums(*rows: int) -> list[np.ndarray]:
        some = batch.take(torch.tensor(rows))
        found = taylor(model, parts, dataclasses.replace(bench(model), batches=lambda: iter([some])), COUNT)
        return [len(rows) * scores for scores in found]

    for together, *apart in zip(sums(*range(16)), sums(0), sums(*range(1, 16)), strict=True):
        np.testing.assert_allclose(together, sum(apart), rtol=1e-5)
        assert (together > 1.5 * apart[0]).all()


@pytest.mark.parametrize("kind", ["bert", "gpt"])
@pytest.mark.parametrize("importance", ["taylor", "magnitude"])
@pytest.mark.parametrize("labelled", [True, False])
def test_heads_that_do_nothing_go_first(kind, importance, labelled):
    model = make(kind)
    dead, units = attentions(model.net), feed_forwards(model.net)
    with torch.no_grad():
        for part, pieces in ((dead[0], [2]), (dead[1], [0, 1]), (units[0], list(range(5, 13)))):
            for path in (*part.makers, part.taker):
                weight = model.net.get_submodule(path).weight
                (weight if path != part.taker else weight.t())[part.places(pieces)] *= 1e-4
            for path in part.makers:  # a bias would give a unit something to say
                model.net.get_submodule(path).bias[part.places(pieces)] *= 1e-4
    whole = model(inputs_of(model))
    result = PruneHeads(heads=3, units=8 / 64, importance=importance).reshape(model, bench(model, labelled))
    assert result.details["removed_heads"] == {dead[0].path: [2], dead[1].path: [0, 1]}
    assert result.details["units"] == {units[0].path: [32, 24], units[1].path: [32, 32]}
    torch.testing.assert_close(result.model(inputs_of(model)), whole, rtol=0, atol=1e-2)
    assert result.details["parameters"][1] == sum(p.numel() for p in result.model.parameters())
    assert result.details["macs"][1] < result.details["macs"][0]


def test_choice_of_the_least():
    scores = [np.array([4.0, 1.0, 2.0]), np.array([3.0, 0.5, 5.0])]
    assert least_important(scores, 3, 1, "global") == [[1, 2], [1]]
    assert least_important([scores[0] / 10, scores[1]], 3, 1, "global") == [[1, 2], [1]]  # one stays
    assert least_important(scores, 2, 1, "uniform") == [[1], [1]]
    many = [np.arange(18.0), np.arange(20.0) + 100]
    assert least_important(many, 9, 8, "global") == [list(range(10)), []]  # 18 = 2 + 8 + 8: multiples of 8 stay
    assert least_important(many, 30, 8, "global") == [list(range(10)), list(range(12))]
    assert least_important([np.arange(6.0)], 3, 8, "global") == [[]]


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"heads": 5}, "bert", "5 heads are to go; of the 6 in 2 layers at most 4 can"),
        ({"heads": 0.9}, "bert", "at most 4 can"),
        ({"units": 0.9}, "bert", "of 64 at most 48 can"),
        ({}, "resnet14", "has no attention"),
        ({"heads": 0}, "resnet14", "has no feed-forward layer"),
    ],
)
def test_what_cannot_be_pruned_is_refused(options, kind, match):
    if kind == "bert":
        model = make(kind)
    else:
        model = build_model(ModelRecord(kind, {}, 3, list("abc"), [3, 16, 16])).eval()
    with pytest.raises(ConfigError, match=match):
        PruneHeads(**options).reshape(model, bench(make("bert")))


def test_options_that_mean_nothing_are_refused():
    with pytest.raises(ConfigError, match="share below 1 or a whole number"):
        PruneHeads(heads=1.5)
    with pytest.raises(ConfigError, match="nothing would be removed"):
        PruneHeads(heads=0, units=0)
    model = make("bert")
    empty = Workbench(Classification(), lambda: iter([]), lambda: iter([]), lambda p: 0.0, lambda: 0.0)
    with pytest.raises(KdctlError, match="no gradient in the training samples"):
        PruneHeads().reshape(model, empty)


def test_a_share_of_less_than_one_head_is_told():
    model = make("bert")
    said: list[str] = []
    tools = dataclasses.replace(bench(model), say=said.append)
    details = PruneHeads(heads=0.05, units=0.25, importance="magnitude").reshape(model, tools).details
    assert said == ["prune_heads: 0.05 of the heads rounds to none: all of them stay"]
    assert all(before == after for before, after in details["heads"].values())
    assert any(before > after for before, after in details["units"].values())


def test_a_net_that_does_more_between_is_refused(monkeypatch):
    monkeypatch.setattr("kdctl.models.bert._Intermediate.forward", lambda self, x: self.dense(x).softmax(-1))
    model = make("bert")
    with pytest.raises(KdctlError, match="of the largest output from the one"):
        without(model, {feed_forwards(model.net)[0]: [0]})


@pytest.mark.parametrize("kind", ["bert", "distilbert", "electra"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_models_of_the_transformers_library(kind, attention):
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
    if kind == "distilbert":
        sizes = {"dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 32}
    config = {"model_type": kind, "max_position_embeddings": 12, **sizes}
    record = ModelRecord(
        f"huggingface:{kind}", {"config": config, "attention": attention}, 3, list("abc"), [], tokens=TOKENS
    )
    model = build_model(record).eval()
    result = PruneHeads(heads=0.5, units=0.25).reshape(model, bench(model))
    assert sum(after for _, after in result.details["heads"].values()) == 3
    assert result.details["parameters"][1] < result.details["parameters"][0]
