"""`kdctl check --deep`: what it finds, against numbers worked out another way; that it changes and writes nothing."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdctl.cli import app, doctor
from kdctl.config.expand import load_experiment
from kdctl.forecast import forecast
from kdctl.methods.synthesizer import Synthesizer
from kdctl.step import Step
from kdctl.teachers.cached import CachedTeacher

FILE = """\
name: deep
data: {kind: digits, limit: 300, batch_size: 50}
teacher: {kind: digits_cnn, width: 8, train: {epochs: 2}}
student: {kind: digits_cnn, width: 4}
losses:
  - {kind: ce, weight: {0: 1, 1: 0.5}}
  - {kind: kd, weight: 0.00001, temperature: 2}
  - {kind: fitnet, weight: {0: 0, 2: 1}, taps: [layer3]}
optimizer: {kind: adamw, lr: 0.01}
train: {epochs: 4, device: cpu, threads: 1, precision: fp32}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep.yaml").write_text(FILE)
    return tmp_path


@pytest.fixture
def deep(here: Path) -> Callable[..., dict[str, Any]]:
    """The forecast of the file with overrides, or of another text."""

    def look(*overrides: str, text: str = FILE) -> dict[str, Any]:
        (here / "deep.yaml").write_text(text)
        return forecast(load_experiment(here / "deep.yaml", overrides).experiment)

    return look


def files(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_stages_models_and_taps(deep: Callable[..., dict[str, Any]]) -> None:
    found = deep()
    teacher, student = found["stages"]
    assert (teacher["name"], teacher["epochs"], teacher["teachers"]) == ("teacher", 2, [])
    assert (student["samples"], student["steps"], student["batch_size"]) == (300, 6, 50)
    assert student["input_shape"] == [1, 8, 8]
    assert student["student"]["parameters"] == 1182 and student["teachers"][0]["parameters"] == 4370
    assert student["student"]["taps"] == {"layer3": [8, 4, 4]} and student["teachers"][0]["taps"] == {
        "layer3": [16, 4, 4]
    }
    convolutions = 9 * (1 * 4 * 64 + 4 * 4 * 64 + 4 * 8 * 16 + 8 * 8 * 16)
    assert student["student"]["macs"] == convolutions + 8 * 10
    assert any("teacher digits_cnn is trained by stage teacher" in note for note in student["notes"])


def test_terms_at_their_final_weights(deep: Callable[..., dict[str, Any]]) -> None:
    student = deep()["stages"][1]
    terms = {term["name"]: term for term in student["terms"]}
    assert [term["weight"] for term in terms.values()] == [0.5, 0.00001, 1.0]
    assert terms["supervised"]["value"] == pytest.approx(2.3, abs=0.3)  # log 10, before the first update
    for term in terms.values():
        assert term["weighted"] == pytest.approx(term["weight"] * term["value"])
    assert sum(term["share"] for term in terms.values()) == pytest.approx(1)
    adapters = terms["fitnet"]["adapters"]
    assert sum(part["parameters"] for part in adapters) == 8 * 16 + 2 * 16  # a 1 x 1 convolution, and its batch norm
    assert not terms["kd"]["adapters"]
    warned = [text for text in student["warnings"] if text.startswith("losses.kd: ")]
    assert len(warned) == 1 and "hardly trains the student" in warned[0]


def test_a_term_that_drowns_the_others(deep: Callable[..., dict[str, Any]]) -> None:
    student = deep("losses.kd.weight=1", "losses.fitnet.weight=1e5")["stages"][1]
    assert any(text.startswith("losses.fitnet: ") and "no say" in text for text in student["warnings"])
    assert deep("losses.kd.weight=1", "losses.fitnet.weight=1e5", "balance=gradient")["stages"][1]["warnings"] == []


def test_a_loss_that_is_not_finite_is_a_warning(deep: Callable[..., dict[str, Any]]) -> None:
    student = deep("losses.fitnet.weight=1e39", "losses.kd.weight=1")["stages"][1]
    assert any("not finite" in text and "fitnet" in text for text in student["warnings"])


def test_memory(deep: Callable[..., dict[str, Any]]) -> None:
    memory = deep()["stages"][0]["memory"]
    assert memory["gradients"] == 4 * 4370
    assert 4 * 4370 < memory["weights"] < 4 * 4370 + 1000  # statistics of batch norm beside them
    assert 2 * 4 * 4370 <= memory["optimizer"] <= 2 * 4 * 4370 + 200  # two moments, and a step count a tensor
    parts = ("weights", "gradients", "optimizer", "teachers", "activations")
    assert memory["peak"] == sum(memory[name] for name in parts) and memory["how"].startswith("estimated")
    double = deep("data.batch_size=100")["stages"][0]["memory"]
    assert double["activations"] == pytest.approx(2 * memory["activations"], rel=0.002)


def test_time_is_that_of_all_steps(deep: Callable[..., dict[str, Any]]) -> None:
    found = deep()
    for stage in found["stages"]:
        spent = stage["time"]
        steps = stage["epochs"] * (stage["steps"] * spent["step_ms"] / 1000 + spent["evaluation_seconds"])
        assert spent["seconds"] == pytest.approx(steps + spent["before_seconds"])
    assert found["total"]["seconds"] == pytest.approx(sum(s["time"]["seconds"] for s in found["stages"]), abs=0.1)
    assert deep("train.max_minutes=0.0001")["stages"][1]["time"]["seconds"] == pytest.approx(0.006)


def test_the_store(deep: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    text = FILE + "teacher_cache: {store: logits}\ncompress: [{kind: prune, ratio: 0.5}, {kind: finetune, epochs: 1}]\n"
    before = files(Path(os.environ["KDCTL_CACHE"]))
    monkeypatch.setattr(CachedTeacher, "__call__", lambda *_: pytest.fail("a step would fill the store"))
    found = deep("data.views=2", "data.augment=[{kind: random_crop, padding: 1}]", text=text)
    student, finetune = found["stages"][1:]
    assert student["store"]["rows"] == 2 * 300 + 130  # both views of the training samples, validation once
    assert student["store"]["bytes"] == 20 * student["store"]["rows"]  # ten logits in fp16
    assert finetune["store"]["shared_with"] == "student"
    assert found["total"]["store_bytes"] == student["store"]["bytes"]
    assert any("prune-0.5 makes" in note for note in finetune["notes"])
    assert files(Path(os.environ["KDCTL_CACHE"])) == before and not Path("runs").exists()


def test_stages_that_start_from_others(deep: Callable[..., dict[str, Any]]) -> None:
    text = """\
data: {kind: digits, limit: 100, batch_size: 50}
student: {kind: digits_cnn, width: 4}
stages:
  - {name: big, role: teacher, student: {kind: digits_cnn, width: 8}, epochs: 1}
  - {name: hints, teacher: {from: big}, losses: [{kind: fitnet, taps: [layer3]}], epochs: 1}
  - {name: logits, from: hints, teacher: {from: big}, epochs: 1}
  - {name: none, from: logits, teacher: {from: big}, epochs: 0}
train: {device: cpu, threads: 1}
"""
    stages = deep(text=text)["stages"]
    assert [s["teachers"][0]["parameters"] for s in stages[1:]] == [4370, 4370, 4370]
    assert [s["student"]["parameters"] for s in stages] == [4370, 1182, 1182, 1182]
    assert any("starts from stage hints" in note for note in stages[2]["notes"])
    assert stages[1]["terms"][0]["share"] == 1.0
    assert stages[3]["terms"] == [] and stages[3]["time"] is None


def test_nothing_is_written_and_no_state_changes(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(here), files(Path(os.environ["KDCTL_CACHE"]))
    torch.manual_seed(3)
    generator, threads = torch.get_rng_state(), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    assert app.run(["check", "deep.yaml", "--deep", "--json"]) == 0
    assert (files(here), files(Path(os.environ["KDCTL_CACHE"]))) == before
    assert torch.equal(torch.get_rng_state(), generator) and torch.get_num_threads() == threads
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] and document["plan"]["deep"]["stages"][1]["name"] == "student"
    assert document["plan"]["deep"]["needs"] == []
    assert "deep" not in _document(["check", "deep.yaml"], capsys)["plan"]


def _document(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    app.run([*arguments, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_for_people(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def attempt(code: str) -> doctor.Outcome:
        tried.append(code)
        return True, "runs a one-layer model"

    monkeypatch.setattr(doctor, "_attempt", attempt)
    (here / "deep.yaml").write_text(FILE + "compress: [{kind: quantize, dtype: int8}]\nexport: [{kind: onnx}]\n")
    assert app.run(["check", "deep.yaml", "--deep", "train.epochs=1"]) == 0
    text = capsys.readouterr().out
    for expected in (
        "tap layer3: 8 x 4 x 4", "term", "gradient", "adapter  fitnet: adapters.0", "memory   ", "ms a step",
        "needs    onnx for int8, onnx: runs a one-layer model", "total    ", "at the weights that the schedules end in",
    ):  # fmt: skip
        assert expected in text, expected
    assert len(tried) == 1 and "onnx" in tried[0]


def test_the_errors_of_training(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    document = _document(["check", "deep.yaml", "--deep", "losses.fitnet.taps=[nowhere]"], capsys)
    assert document["code"] == 3 and "nowhere" in document["errors"][0]["message"]
    monkeypatch.setattr("kdctl.loggers.base.util", SimpleNamespace(find_spec=lambda name: None))
    document = _document(["check", "deep.yaml", "--deep", "loggers=[{kind: wandb}]"], capsys)
    assert document["code"] == 4 and document["errors"][0]["hint"] == "pip install 'kdctl[wandb]'"
    (here / "deep.yaml").write_text(FILE.replace("kind: digits,", "kind: cifar10, root: ./none, download: true,"))
    document = _document(["check", "deep.yaml", "--deep", "--offline"], capsys)
    assert (document["ok"], document["code"]) == (False, 4), document


WRONG = """\
data: {kind: digits, limit: 300}
teacher:
  kind: digits_cnn
  weights: WEIGHTS
student: {kind: digits_cnn, width: 4}
losses:
  - {kind: ce}
  - kind: fitnet
    taps: [{student: block.1, teacher: layer1}, {student: layer1, teacher: nope}]
train: {epochs: 1, threads: 1, device: cpu, precision: fp32}
"""
STAGES = """\
stages:
- name: first
  epochs: 1
  losses: [{kind: ce}]
- name: second
  epochs: 1
  losses: [{kind: fitnet, taps: [layer9]}]
"""


def test_what_only_building_shows_has_its_place(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Term, model, file and line of taps, of normalisation and of weights that do not fit."""
    torch.save({"a": torch.ones(2)}, here / "w.pth")

    def problems(text: str, *overrides: str, verb: tuple[str, ...] = ("check", "--deep")) -> list[tuple[Any, ...]]:
        (here / "wrong.yaml").write_text(text)
        found = _document([verb[0], "wrong.yaml", *verb[1:], *overrides], capsys)
        return [(Path(p["file"]).name, p["line"], p["key"], p["message"]) for p in found["errors"]]

    untrained = WRONG.replace("weights: WEIGHTS", "train: {epochs: 1}")
    said = [
        ("wrong.yaml", 9, "losses.fitnet.taps", "the student (digits_cnn) has no module 'block.1'"),
        ("wrong.yaml", 9, "losses.fitnet.taps", "the teacher (digits_cnn) has no module 'nope'"),
    ]
    assert problems(untrained) == said
    assert problems(untrained, verb=("train", "--smoke")) == said
    (missed,) = problems(untrained, "losses.fitnet.taps=[layer1#3]")
    assert missed[:3] == ("override 1", None, "losses.fitnet.taps") and missed[3].startswith("student: tap 'layer1#3'")
    lacks, more = problems(WRONG.replace("WEIGHTS", "w.pth"))
    assert lacks[:3] == more[:3] == ("wrong.yaml", 4, "teacher.weights") and "lacks conv1.weight" in lacks[3]
    several = WRONG.replace("teacher:\n  kind: digits_cnn\n  weights: WEIGHTS", "teacher:\n- {kind: digits_cnn}\n- T")
    several = several.replace("- {kind: digits_cnn}", "- {kind: digits_cnn, control: true}")
    second = problems(several.replace("- T", "- {kind: digits_cnn, weights: w.pth}"))
    assert second[0][:3] == ("wrong.yaml", 4, "teacher.1.weights")
    grey = problems(untrained.replace("width: 4", "normalize: imagenet"))
    assert grey[0][:3] == ("wrong.yaml", 5, "student.normalize") and "the images have 1" in grey[0][3]
    staged = WRONG.partition("losses:")[0].replace("weights: WEIGHTS", "control: true") + STAGES
    assert problems(staged)[0][:3] == ("wrong.yaml", 12, "losses.fitnet.taps")


DATA_FREE = """\
name: deep
data: {kind: digits, limit: 300, batch_size: 16}
teacher: {kind: digits_cnn, width: 8, control: true}
student: {kind: digits_cnn, width: 4}
method: {kind: data_free, preset: deep_inversion, steps: 20, inversion_steps: 1, kd_steps: 10}
losses: [{kind: kd, temperature: 4}]
train: {epochs: 4, device: cpu, threads: 1, precision: fp32}
"""


def test_rounds_of_synthesis_are_in_the_time(
    deep: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Synthesizer.round

    def slow(self: Synthesizer) -> None:
        real(self)
        time.sleep(0.3)

    monkeypatch.setattr(Synthesizer, "round", slow)
    (stage,) = deep(text=DATA_FREE)["stages"]
    assert stage["time"]["step_ms"] >= 30 and stage["time"]["seconds"] >= 4 * 20 * 0.03


def test_each_timed_step_is_another_one(deep: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A method may draw by the step what it does in it."""
    seen: list[float] = []
    real = Step.__call__
    monkeypatch.setattr(Step, "__call__", lambda self, batch, epoch: seen.append(epoch) or real(self, batch, epoch))
    deep()
    assert len(seen) > 10 and all(later != now for now, later in itertools.pairwise(seen))
