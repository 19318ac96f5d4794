"""Data-free distillation: losses by hand, the rounds of every preset, and that no real image is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytest import approx
from torch import nn

from kdctl import runs
from kdctl.config.expand import load_experiment
from kdctl.config.schema import Experiment
from kdctl.data.base import ArraySplit
from kdctl.data.loader import TrainLoader
from kdctl.data.prepare import prepare
from kdctl.device import settle_by_rule
from kdctl.errors import ConfigError
from kdctl.evaluate import validate
from kdctl.experiment import Plan, resume, train
from kdctl.methods.data_free import DataFree, Synthetic
from kdctl.methods.synthesis import (
    PRESETS,
)  # fmt: skip
from kdctl.methods.synthesizer import Synthesizer
from kdctl.models.record import Model, ModelRecord, build_model, load_model
from kdctl.signals import CLEAN, IGNORE
from kdctl.tasks.classification import Classification
from kdctl.watch import Reporter

FILE = """
name: small
data: {kind: digits, limit: 300, batch_size: 16}
teacher: {kind: digits_cnn, width: 4, control: true}
student: {kind: digits_cnn, width: 4}
method: {kind: data_free, preset: PRESET, steps: 5, kd_steps: 2, latent: 8, generator_width: 4, inversion_steps: 3,
    warmup: 1, shift: 1, memory: 40, negatives: 20, pool_size: 40}
losses: [{kind: kd, temperature: 4}]
optimizer: {kind: adamw, lr: 0.01}
train: {epochs: 2, device: cpu, threads: 1, precision: fp32, layout: contiguous, keep: last}
"""
CPU = torch.device("cpu")
SHAPE = [1, 8, 8]
VOLATILE = ("seconds", "eval_seconds", "times", "samples_per_second")


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Experiment]:
    monkeypatch.chdir(tmp_path)

    def load(preset: str, *overrides: str, text: str = FILE) -> Experiment:
        if preset in ("dfad", "zskt"):  # their adversarial term is all that they have
            text = text.replace("warmup: 1", "warmup: 0")
        (tmp_path / "small.yaml").write_text(text.replace("PRESET", preset))
        loaded = load_experiment(tmp_path / "small.yaml", overrides).experiment
        return loaded.model_copy(update={"train": settle_by_rule(loaded.train)})

    return load


def trained(experiment: Experiment) -> runs.Run:
    return runs.Run(Path(train(Plan(experiment, ""), Reporter())["run"]))


# ------------------------------------------------------------------------------------------------------------- recipes


def test_presets_are_the_rows_of_the_published_table() -> None:
    rows = {
        name: (r.adversarial, r.bn, r.one_hot, r.activation, r.balance, r.distance, r.g_steps, r.kd_steps)
        for name, r in PRESETS.items()
    }
    assert rows == {
        "dafl": (0, 0, 1, 0.001, 20, "kl", 1, 5),
        "dfad": (1, 0, 0, 0, 0, "l1", 1, 5),
        "zskt": (1, 0, 0, 0, 0, "kl", 1, 5),
        "dfq": (1, 1, 1, 0, 20, "kl", 1, 10),
        "deep_inversion": (1, 10, 1, 0, 0, "jsd", 1, 400),
        "cmi": (0.5, 1, 1, 0, 0, "kl", 200, 400),
        "fast": (1.1, 10, 0.4, 0, 0, "kl", 5, 400),
    }
    assert [name for name, r in PRESETS.items() if r.masked] == ["cmi", "fast"]


def test_given_numbers_take_the_place_of_the_presets() -> None:
    assert DataFree(preset="dafl").recipe == PRESETS["dafl"]
    changed = DataFree(preset="fast", balance=3.0, flip=False, masked=False, warmup=0, one_hot=0.0).recipe
    assert changed == replace(PRESETS["fast"], balance=3.0, flip=False, masked=False, warmup=0, one_hot=0.0)


# ------------------------------------------------------------------------------------------------------------ training


def test_batches_have_no_labels_and_no_real_image() -> None:
    split = ArraySplit(torch.full((9, *SHAPE), 77, dtype=torch.uint8), torch.zeros(9, dtype=torch.int64))
    loader: Synthetic = DataFree(steps=3).loader(TrainLoader(split, batch_size=4))
    assert len(loader) == 3 and len(list(loader.epoch(0))) == 3 and len(list(loader.epoch(5, start_step=2))) == 1
    for batch in [loader.few(3), *loader.epoch(1)]:
        assert batch.targets.tolist() == [IGNORE] * batch.size and batch.view.tolist() == [CLEAN] * batch.size
        assert batch.index.tolist() == list(range(batch.size)) and batch.inputs.shape[1:] == (1, 8, 8)
        assert not (batch.inputs == 77 / 255).any()
    assert loader.few(3).size == 3 and loader.few(8).size == 4


@pytest.mark.parametrize(
    "preset", [pytest.param(name, marks=pytest.mark.slow if name == "cmi" else []) for name in PRESETS]
)
def test_every_preset_trains_and_ships_what_was_validated(preset: str, experiment: Any) -> None:
    loaded = experiment(preset)
    run = trained(loaded)
    student, lines = load_model(run / "student.safetensors"), run.metrics()
    assert len(lines) == 2 and all(np.isfinite(line["loss"]) and line["loss"] > 0 for line in lines)
    val = prepare(loaded.data).val
    assert val is not None
    got = validate(student, val, Classification(), CPU, 64, "fp32")
    assert got["top1"] == approx(lines[-1]["val"]["top1"])
    assert not any("generator" in name or "teacher" in name for name in student.state_dict())


@pytest.mark.parametrize("preset", ["dfq", "deep_inversion", pytest.param("cmi", marks=pytest.mark.slow), "fast"])
def test_an_interrupted_training_goes_on_bit_identically(preset: str, experiment: Any) -> None:
    class Crash(Exception):
        pass

    class Crashing(Reporter):
        def epoch(self, line: dict[str, Any], epochs: int) -> None:
            self.after = True

        def step(self, stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
            if hasattr(self, "after") and step == 2:
                raise Crash

    def outcome(run: runs.Run) -> tuple[bytes, list[dict[str, Any]]]:
        lines = [{k: v for k, v in line.items() if k not in VOLATILE} for line in run.metrics()]
        return (run / "student.safetensors").read_bytes(), lines

    whole = trained(experiment(preset, "name=whole"))
    with pytest.raises(Crash):
        train(Plan(experiment(preset), ""), Crashing())
    run = runs.find("small", Path("runs"))
    assert len(run.metrics()) == 1
    resume(run, Reporter())
    assert outcome(run) == outcome(whole)


GARBAGE = """
import torch
from kdctl.data.base import ArraySplit, Source
from kdctl.data.digits import Digits


class Garbage(Source):
    def load(self):
        data = Digits().load()
        images = torch.randint(0, 256, data.train.images.shape, dtype=torch.uint8)
        return type(data)(ArraySplit(images, data.train.targets.flip(0)), test=data.test, class_names=data.class_names)
"""


def test_no_real_image_influences_the_student(experiment: Any, tmp_path: Path) -> None:
    (tmp_path / "garbage.py").write_text(GARBAGE)
    taught = trained(experiment("dfq", "teacher={kind: digits_cnn, width: 4, train: {epochs: 1}}"))
    teacher = f"teacher={{kind: digits_cnn, width: 4, weights: {taught / 'teacher.safetensors'}, control: true}}"

    def student(*overrides: str) -> Model:
        return load_model(trained(experiment("dfq", teacher, *overrides)) / "student.safetensors")

    garbage = "data={kind: './garbage.py:Garbage', limit: 300, batch_size: 16}"
    real, other = student(), student(garbage)
    assert real.record == other.record
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in real.state_dict().items())
    own = student(garbage, "method.normalize=own")  # the statistics of the data, that of garbage
    assert own.record.normalize != real.record.normalize
    assert not torch.equal(own.net.get_parameter("fc.weight"), real.net.get_parameter("fc.weight"))


@pytest.mark.parametrize(("warmup", "kd_steps", "rounds"), [(0, 5, 2), (3, 5, 5), (0, 1, 10), (2, 20, 3)])
def test_a_round_comes_before_so_many_steps_of_the_student(
    warmup: int, kd_steps: int, rounds: int, experiment: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    monkeypatch.setattr(Synthesizer, "round", lambda self: done.append(1))
    trained(experiment("dfq", f"method.warmup={warmup}", f"method.kd_steps={kd_steps}"))  # two epochs of five steps
    assert len(done) == rounds


def test_micro_batches_do_not_change_the_loss(experiment: Any) -> None:
    plain = ["student={kind: mlp, hidden: [8]}", "name=x"]
    losses = [
        [line["loss"] for line in trained(experiment("dfq", *plain, *more)).metrics()]
        for more in ((), ("train.accumulate=4",))
    ]
    assert losses[0] == approx(losses[1], rel=1e-4)


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("preset", "override", "said"),
    [
        ("dfq", "losses=[{kind: ce}, {kind: kd}]", "needs labels"),
        ("dfq", "teacher=[{kind: mlp, hidden: [8], control: true}, {kind: mlp, hidden: [8], control: true}]", "are 2"),
        ("dfq", "teacher_cache={store: logits, dir: store}", "cannot be stored"),
        ("dfq", "teacher={kind: mlp, hidden: [8], control: true}", "no batch normalisation"),
        ("dfad", "method.adversarial=0", "need a goal"),
        ("dfad", "method.warmup=1", "no goal"),
        ("fast", "method={kind: data_free, preset: fast, bn: 0, one_hot: 0}", "no goal"),
        ("dfq", "method.contrastive=1", "no rounds"),
        ("fast", "method.bn_momentum=1", "below 1"),
    ],
)
def test_refuses_what_cannot_work(preset: str, override: str, said: str, experiment: Any) -> None:
    with pytest.raises(ConfigError, match=said):
        trained(experiment(preset, override))


def test_refuses_to_invert_no_teacher() -> None:
    student = build_model(ModelRecord("digits_cnn", {"width": 4}, 10, [str(i) for i in range(10)], [1, 8, 8]))
    with pytest.raises(ConfigError, match="are 0"):
        DataFree().prepare(student, [], lambda number: student)
    bare = Model(nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()), student.record)
    with pytest.raises(ConfigError, match="no linear layer"):
        DataFree(preset="dafl").prepare(student, [bare], lambda number: student)


def test_lenet5_has_the_size_of_the_original() -> None:
    def size(width: int, image_shape: list[int], **arguments: Any) -> int:
        record = ModelRecord("lenet5", {"width": width, **arguments}, 10, [str(i) for i in range(10)], image_shape)
        made = build_model(record).eval()
        assert made(torch.rand(2, *image_shape)).shape == (2, 10)
        return sum(p.numel() for p in made.parameters())

    conv = 6 * 26 + 16 * (6 * 25 + 1)
    assert size(6, [1, 28, 28]) == conv + 400 * 120 + 120 + 120 * 84 + 84 + 84 * 10 + 10 == 61_706
    assert size(6, [1, 28, 28], batch_norm=True) == 61_706 + 6 + 16 + 120 + 84
    size(3, [3, 32, 32])
    size(3, [1, 8, 8])
    with pytest.raises(ConfigError, match="too small"):
        size(6, [1, 3, 8])
