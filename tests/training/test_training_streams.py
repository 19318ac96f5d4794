"""Strong views: a second version of every image, which each term sees beside the first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdctl import build, cache, registry
from kdctl.build import Built
from kdctl.clock import Clock
from kdctl.config.schema import Experiment
from kdctl.control import control
from kdctl.data.augment import Augment
from kdctl.data.loader import TrainLoader, as_inputs
from kdctl.data.prepare import Data
from kdctl.errors import ConfigError
from kdctl.experiment import Plan, train
from kdctl.signals import Batch
from kdctl.step import Step
from kdctl.watch import Reporter

FILE = """
name: small
data:
  kind: digits
  limit: 200
  batch_size: 48
  augment: [{kind: random_crop, padding: 1}]
  strong_augment: [{kind: random_crop, padding: 2}]
teacher: {kind: digits_cnn, width: 6, control: true}
student: {kind: mlp, hidden: [12]}
distill: {T: 2, alpha: 0.5}
optimizer: {kind: sgd, lr: 0.1}
train: {epochs: 2, device: cpu, threads: 1}
"""
SEES = '''
from kdctl.losses.base import Loss


class Sees(Loss):
    """What it is called with, and how often."""

    sees_streams = True

    def values(self, student, teacher, batch):
        calls.append((student, teacher, batch))
        return (student.logits - student.strong.logits).square().sum(1)


calls = []
'''


def built(experiment: Experiment, data: Data | None = None) -> Built:
    return build.build_stage(experiment, experiment.student_stage, data or build.build_data(experiment), Path)


@pytest.fixture
def load(experiment: Callable[..., Experiment]) -> Callable[..., Experiment]:
    def go(*overrides: str) -> Experiment:
        return experiment(*overrides, text=FILE)

    return go


def values(stage: Built, batch: Batch) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in stage.method.step(batch, 0.0).items()}


def test_every_term_sees_both_and_counts_both(load: Callable[..., Experiment]) -> None:
    stage = built(load())
    stage.method.trained.eval()
    batch = next(iter(stage.loader.epoch(0)))
    first, second = replace(batch, strong=None), batch.strongly()
    assert not torch.equal(first.inputs, second.inputs)
    both, one, other = (values(stage, seen) for seen in (batch, first, second))
    assert set(both) == {"supervised", "kd"}
    for name, value in both.items():
        assert value == pytest.approx(one[name] + other[name], rel=1e-5) and one[name] != other[name]
        assert stage.method.counts(batch)[name] == 2 * stage.method.counts(first)[name]
    # the value of a step is the mean over both, from the formula itself
    with torch.no_grad():
        log_p = [stage.method.student(seen.inputs).log_softmax(1) for seen in (first, second)]
    by_hand = -sum(float(rows[torch.arange(48), batch.targets].mean()) for rows in log_p) / 2
    assert both["supervised"] / int(stage.method.counts(batch)["supervised"]) == pytest.approx(by_hand, rel=1e-5)


def test_a_term_that_sees_streams_is_called_once(
    load: Callable[..., Experiment], folder: Path, recwarn: pytest.WarningsRecorder
) -> None:
    (folder / "sees.py").write_text(SEES)
    stage = built(load("distill=null", "losses=[{kind: ce}, {kind: './sees.py:Sees'}]"))
    assert not recwarn.list  # its gradient is not zero, for the dry run sees both versions as they are
    (term,) = [t for t in stage.method.terms if t.name == "Sees"]
    calls: list[Any] = type(term.loss).values.__globals__["calls"]
    calls.clear()
    batch = next(iter(stage.loader.epoch(0)))
    stage.method.trained.eval()
    value = values(stage, batch)["Sees"]
    ((student, teacher, seen),) = calls
    assert seen is batch and stage.method.counts(batch)["Sees"] == 48
    assert stage.teacher is not None
    torch.testing.assert_close(teacher.logits, stage.teacher(replace(batch, strong=None)).logits)
    torch.testing.assert_close(teacher.strong.logits, stage.teacher(batch.strongly()).logits)
    torch.testing.assert_close(student.strong.logits, stage.method.student(batch.strong))
    expected = (stage.method.student(batch.inputs) - stage.method.student(batch.strong)).square().sum()
    assert value == pytest.approx(float(expected.detach()), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------ pixels


def batches(loader: TrainLoader, epoch: int = 0) -> dict[int, tuple[Tensor, Tensor]]:
    """Both versions of each sample by its number."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for batch in loader.epoch(epoch):
        assert batch.strong is not None
        found |= {int(i): (batch.inputs[n], batch.strong[n]) for n, i in enumerate(batch.index)}
    return found


def test_the_strong_version_is_a_function_of_index_and_view(load: Callable[..., Experiment]) -> None:
    data = build.build_data(load())
    same = {"data.augment": "[{kind: random_crop, padding: 2}]"}
    loaders = [
        built(load(*(f"{k}={v}" for k, v in {**same, **more}.items())), data).loader
        for more in ({}, {"data.batch_size": "7", "train.seed": "9"})
    ]  # fmt: skip
    first, other = (batches(loader) for loader in loaders)
    assert set(first) == set(other) and len(first) == len(data.train)
    for index, pair in first.items():
        assert torch.equal(pair[0], other[index][0]) and torch.equal(pair[1], other[index][1])
    differ = [not torch.equal(*pair) for pair in first.values()]  # the same operation, drawn anew
    assert sum(differ) > 0.8 * len(differ)
    later = batches(loaders[0], 1)
    assert sum(not torch.equal(later[i][1], pair[1]) for i, pair in first.items()) > 0.8 * len(first)
    rows = torch.arange(20)
    crop = Augment([registry.create("augment", "random_crop", {"padding": 2})], seed=0)
    numbers = data.train.index[rows]
    by_hand = as_inputs(crop(data.train.fetch(rows), numbers, numbers * 0, stream=1))
    assert all(torch.equal(by_hand[n], first[int(i)][1]) for n, i in enumerate(numbers))


def test_the_control_sees_the_same_pixels(load: Callable[..., Experiment]) -> None:
    loaded = load()
    data = build.build_data(loaded)
    one, other = (built(x, data).loader for x in (loaded, control(loaded)))
    for mine, its in zip(one.epoch(1), other.epoch(1), strict=True):
        assert torch.equal(mine.inputs, its.inputs) and torch.equal(mine.strong, its.strong)
        assert torch.equal(mine.index, its.index)


def test_a_stage_may_have_its_own_or_none(load: Callable[..., Experiment]) -> None:
    own = "{strong_augment: [{kind: horizontal_flip}]}"
    loaded = load(f"stages=[{{name: a, data: {{strong_augment: []}}}}, {{name: b, data: {own}}}]")
    data = build.build_data(loaded)
    loaders = [build.build_loader(loaded, stage, data, torch.device("cpu")) for stage in loaded.train_stages]
    assert loaders[0].strong is None and loaders[1].strong is not None
    assert type(loaders[1].strong.operations[0]).__name__ == "HorizontalFlip"


def test_strong_images_of_another_shape_are_refused(load: Callable[..., Experiment]) -> None:
    with pytest.raises(ConfigError, match="strong images have shape"):
        built(load("data.strong_augment=[{kind: random_crop, padding: 0, size: 6}]"))


# ------------------------------------------------------------------------------------------------ steps, stores, runs


def test_micro_batches_add_up(load: Callable[..., Experiment]) -> None:
    loaded = load()
    data = build.build_data(loaded)
    weights, losses = [], []
    for parts in (1, 5):
        stage = built(loaded, data)
        step = Step(stage, loaded.student_stage, Clock(), Reporter(), parts)
        batch = next(iter(stage.loader.epoch(0)))
        done = step(batch, 0.0)
        losses.append(float(done.loss))
        weights.append(torch.cat([p.detach().flatten() for p in stage.method.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


STORE = "teacher_cache={store: logits, dtype: fp32, dir: store, fill: FILL}"


@pytest.mark.parametrize("fill", ["lazy", "before"])
def test_the_store_keeps_both_versions(
    load: Callable[..., Experiment], folder: Path, fill: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load("data.views=1", STORE.replace("FILL", fill))
    plain = train(Plan(load("data.views=1"), ""), Reporter())
    asked: list[int] = []
    whole = cache.fill

    def counting(*given: Any) -> int:
        asked.append(whole(*given))
        return asked[-1]

    monkeypatch.setattr(cache, "fill", counting)
    document = train(Plan(loaded, ""), Reporter())
    held = {name for name in ("train.0.0", "train.0.1") if list((folder / "store").glob(f"{name}.*"))}
    assert held == {"train.0.0", "train.0.1"}
    rows = len(build.build_data(loaded).train)
    val = len(build.build_data(loaded).val or [])
    assert asked == ([2 * rows] if fill == "before" else [])  # the check of the teacher has stored validation
    assert document["student"]["best"]["test"] == plain["student"]["best"]["test"]
    stage = built(loaded)
    (member,) = stage.members
    batch = next(iter(stage.loader.epoch(0)))
    live = member.live  # type: ignore[attr-defined]
    for seen in (replace(batch, strong=None), batch.strongly()):
        assert not bool(member.store.turn("train", 0, seen.stream).missing(batch.index.numpy()).any())  # type: ignore[attr-defined]
        torch.testing.assert_close(member(seen).logits, live(seen).logits, rtol=1e-5, atol=1e-5)
    described = cache.show(loaded, build.build_data(loaded))["stores"][0]
    assert described["expected"] == 2 * rows + val
    assert [part.get("stream", 0) for part in described["parts"]] == [0, 0, 1]
    with pytest.raises(ConfigError, match="augment"):  # other strong views are another store
        built(load("data.views=1", STORE.replace("FILL", fill), "data.strong_augment.0.padding=1"))
