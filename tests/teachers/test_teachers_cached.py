"""A stored teacher says what the live one says, and is asked once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kdctl import build, cache
from kdctl.config.expand import load_experiment
from kdctl.device import autocast, settle_by_rule
from kdctl.errors import ConfigError
from kdctl.signals import Batch
from kdctl.teachers.cached import CachedTeacher
from kdctl.teachers.ensemble import Ensemble
from kdctl.teachers.live import LiveTeacher
from kdctl.teachers.store import open_store

FILE = """
data: {kind: digits, limit: 100, batch_size: 32, augment: [{kind: random_crop, padding: 1}], views: 2}
teacher: {kind: digits_cnn, width: 8, control: true}
student: {kind: digits_cnn, width: 4}
losses:
  - {kind: kd}
  - {kind: attention_transfer, taps: [layer2]}
train: {epochs: 3, device: cpu, threads: 1}
teacher_cache: {store: both}
"""
TAPS = ["layer2"]


class Counting(LiveTeacher):
    """Remembers which samples it was asked for, and for what."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.asked = []

    def __call__(self, batch, taps=None, logits=True):
        self.asked.append((batch.index.tolist(), None if taps is None else list(taps), logits))
        return super().__call__(batch, taps, logits)


class Stage:
    """What build makes of the file, as far as a teacher needs it."""

    def __init__(self, path: Path, *overrides: str) -> None:
        experiment = load_experiment(path, overrides).experiment
        self.experiment = experiment.model_copy(update={"train": settle_by_rule(experiment.train)})
        self.stage = self.experiment.student_stage
        self.task = build.build_task(experiment)
        self.data = build.build_data(experiment).for_stage(self.stage.data)
        self.models = build.build_teachers(self.stage, self.data, 0, lambda name: path)
        self.loader = build.build_loader(self.experiment, self.stage, self.data, torch.device("cpu"))

    def live(self, number: int = 0) -> Counting:
        return Counting(self.models[number], self.task, TAPS if len(self.models) == 1 else ())

    def cached(self, number: int = 0) -> CachedTeacher:
        """Another process's teacher: a store that is opened anew."""
        taps = TAPS if len(self.models) == 1 else ()
        store = open_store(self.experiment, self.stage, number, self.models[number], self.data, taps)
        return CachedTeacher(self.live(number), store)

    def epoch(self, number: int) -> list[Batch]:
        return list(self.loader.epoch(number))


@pytest.fixture
def stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDCTL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.yaml").write_text(FILE)
    return lambda *overrides: Stage(tmp_path / "a.yaml", *overrides)


def asked(teacher) -> list[int]:
    return [number for numbers, _, _ in teacher.live.asked for number in numbers]


def same(one, other, relative=0.0, absolute=0.0):
    torch.testing.assert_close(one.logits, other.logits.float(), rtol=relative, atol=absolute)
    assert list(one.features) == list(other.features)
    for tap, value in one.features.items():
        torch.testing.assert_close(value, other.features[tap].float(), rtol=relative, atol=absolute)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_stored_teacher_says_what_the_live_one_says(stage, precision):
    here = stage(f"train.precision={precision}")
    live, filling = here.live(), here.cached()
    with autocast(torch.device("cpu"), precision):
        for batch in here.epoch(0):
            same(filling(batch), live(batch), 2**-11, 2**-24)
    filling.flush()
    reading = here.cached()
    for batch in here.epoch(2):  # of two views the first again, in another order
        same(reading(batch), here.cached()(batch))
        same(reading(batch), filling(batch))
        with autocast(torch.device("cpu"), precision):
            same(reading(batch), live(batch), 2**-7 if precision == "bf16" else 1e-3, 1e-4)
    assert asked(reading) == [] and len(asked(filling)) == 100


def test_top_k_trains_on_nearly_the_same(stage):
    here = stage("teacher_cache.top_k=4", "teacher_cache.store=logits")
    batch = here.epoch(0)[0]
    said = here.live()(batch, ()).logits
    got = here.cached()(batch, ()).logits
    top = said.topk(4).indices
    torch.testing.assert_close(got.softmax(1).gather(1, top), said.softmax(1).gather(1, top), rtol=2e-3, atol=1e-4)


def test_only_missing_samples_are_asked_for(stage):
    here = stage()
    batch = here.epoch(0)[0]
    teacher = here.cached()
    teacher(batch.take(slice(3, 9)))
    teacher(batch)
    numbers = batch.index.tolist()
    assert [sorted(a[0]) for a in teacher.live.asked] == [sorted(numbers[3:9]), sorted(numbers[:3] + numbers[9:])]
    teacher(here.epoch(1)[0])
    assert len(teacher.live.asked) == 3, "another view is another question"


def test_what_is_not_stored_is_asked_of_the_live_teacher(stage):
    here = stage("teacher_cache.store=logits")
    batch = here.epoch(0)[0]
    teacher = here.cached()
    same(teacher(batch), here.live()(batch))
    assert teacher.store.turn("train", 0).held == 0
    assert teacher(batch, ()).features == {} and teacher.store.turn("train", 0).held == 32
    assert teacher.live.asked[-1][1:] == ([], True), "and only for what is kept"
    teacher(batch, ())
    assert len(teacher.live.asked) == 2


def test_a_store_of_features_gives_no_logits(stage):
    here = stage("teacher_cache.store=features")
    batch = here.epoch(0)[0]
    teacher = here.cached()
    signals = teacher(batch, TAPS, False)
    assert signals.logits.shape == (32, 0) and list(signals.features) == TAPS
    assert teacher(batch, TAPS, True).logits.shape == (32, 10)
    assert len(teacher.live.asked) == 2 and teacher.store.turn("train", 0).held == 32


def test_members_of_an_ensemble_are_stored_by_themselves(stage):
    here = stage("teacher=[{kind: digits_cnn, width: 8, control: true}, {kind: digits_cnn, width: 6, control: true}]",
                 "losses=[{kind: kd}]", "teacher_cache.store=logits")  # fmt: skip
    members = [here.cached(0), here.cached(1)]
    together, live = Ensemble(members), Ensemble([here.live(0), here.live(1)])
    batch = here.epoch(0)[0]
    same(together(batch), live(batch), 2**-10, 1e-3)
    together.flush()
    assert members[0].store.folder != members[1].store.folder
    mean = torch.stack([member(batch).logits for member in members]).mean(0)
    assert torch.equal(together(batch).logits, mean)


def test_filled_before_and_filled_while_training_are_equal(stage):
    lazy, before = stage(), stage("teacher_cache.dir=named")
    first = lazy.cached()
    for epoch in (0, 1):
        for batch in lazy.epoch(epoch):
            first(batch)
    first.flush()
    member = cache.Member(
        before.stage, before.cached(), before.loader, before.data, 512, "fp32", torch.device("cpu")
    )  # fmt: skip
    assert cache.fill(member, lambda text: None) == 100 * 2 + len(before.data.val)
    second = before.cached()
    for batch in lazy.epoch(1):
        same(first(batch), second(batch), 1e-3, 1e-4)
    assert asked(second) == [] and cache.fill(member, lambda text: None) == 0


def test_a_changed_crop_or_teacher_is_another_store(stage):
    folders = {
        stage(*overrides).cached().store.folder
        for overrides in [
            [], ["data.augment.random_crop.padding=2"], ["data.augment_seed=1"], ["teacher.width=6"],
            ["train.precision=bf16"], ["teacher_cache.dtype=fp32"], ["data.views=all"], ["data.split_seed=1"],
        ]
    }  # fmt: skip
    assert len(folders) == 8
    for overrides in [["data.views=5"], ["train.epochs=9"], ["student.width=5"], ["losses.kd.temperature=2"],
                      ["train.seed=0"], ["data.limit=50"], ["data.batch_size=8"]]:  # fmt: skip
        assert stage(*overrides).cached().store.folder in folders


def test_one_changed_weight_is_another_teacher(stage, tmp_path):
    here = stage(f"teacher_cache.dir={tmp_path / 'named'}")
    here.cached()(here.epoch(0)[0])
    teacher = here.cached()
    teacher(here.epoch(0)[0])
    teacher.flush()
    with torch.no_grad():
        next(here.models[0].net.parameters()).view(-1)[0] += 1e-6
    with pytest.raises(ConfigError, match="the teacher's weights changed"):
        here.cached()


def test_clean_logits_are_measured_once_and_kept_to_the_bit(stage):
    here = stage()
    numbers = np.random.default_rng(0).normal(size=(len(here.data.test), 10)).astype(np.float32) * 1e6
    calls = []

    def measure():
        calls.append(1)
        return numbers

    for _ in range(2):
        got = cache.clean_logits(here.experiment, here.stage, 0, here.models[0], here.data, "test", measure)
        assert got.tobytes() == numbers.tobytes()
    assert len(calls) == 1
    unsound = numbers[: len(here.data.val)] * np.float32(np.inf)
    got = cache.clean_logits(here.experiment, here.stage, 0, here.models[0], here.data, "val", lambda: unsound)
    assert got is unsound


def test_a_stopped_build_keeps_what_it_has_asked(stage):
    here = stage("data.eval_batch_size=32")
    member = cache.Member(here.stage, here.cached(), here.loader, here.data, 32, "fp32", torch.device("cpu"))
    asked_before_stop = iter(range(2))

    def check():
        if next(asked_before_stop, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.fill(member, lambda text: None, check)
    again = cache.Member(here.stage, here.cached(), here.loader, here.data, 32, "fp32", torch.device("cpu"))
    assert cache.fill(again, lambda text: None) == 130 + 200 - 3 * 32
