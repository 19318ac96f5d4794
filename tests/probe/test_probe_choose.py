"""What a run settles: by measurement, kept where the user set it, remembered, and never in the way of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kdctl import build, runs
from kdctl.config.expand import load_experiment
from kdctl.config.schema import Experiment, RunSettings
from kdctl.device import settle_by_rule
from kdctl.errors import ConfigError, KdctlError
from kdctl.probe import choose
from kdctl.probe.race import Choice
from kdctl.probe.trial import Trial

SETTLE = choose.settle
"""The real one: other tests settle by rule."""
FILE = """
name: small
data: {kind: digits, limit: 200, batch_size: 32}
teacher: {kind: digits_cnn, width: 8, train: {epochs: 1}}
student: {kind: digits_cnn, width: 4}
distill: {T: 4, alpha: 0.9}
train: {epochs: 1, device: cpu}
"""


class Bench:
    """Known times; counts how often it is asked."""

    def __init__(self, **factors: float) -> None:
        self.factors, self.calls, self.now = factors, 0, 0.0

    def __call__(self, choice: Choice) -> float:
        self.calls += 1
        seconds = 0.01
        for name in (choice.precision, choice.layout, f"threads{choice.threads}"):
            seconds *= self.factors.get(name, 1.0)
        self.now += seconds
        return seconds

    def clock(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two idle cores with fast bf16, nothing set in the environment, nothing remembered; the cache's folder."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KDCTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choose, "usable_cores", lambda: 2)
    monkeypatch.setattr(choose, "has_fast_bf16", lambda _: True)
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0), raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def small(*overrides: str, text: str = FILE) -> Experiment:
    Path("small.yaml").write_text(text)
    return load_experiment(Path("small.yaml"), overrides).experiment


def settled(experiment: Experiment, bench: Any = None) -> tuple[RunSettings, list[str]]:
    said: list[str] = []
    clock = {} if bench is None or not hasattr(bench, "clock") else {"clock": bench.clock}
    data = build.build_data(experiment)
    return SETTLE(experiment, data, said.append, bench, **clock), said


def chosen(settings: RunSettings) -> tuple[Any, ...]:
    return settings.precision, settings.layout, settings.threads, settings.compile


# ----------------------------------------------------------------------------------------------------------- the choice


def test_the_fastest_is_chosen_and_said() -> None:
    settings, said = settled(small(), Bench(bf16=0.5, channels_last=0.8, threads2=0.5))
    assert chosen(settings) == ("bf16", "channels_last", 2, False)
    assert settings.device == "cpu"
    assert said == ["probe: bf16, channels_last, 2 threads: 500 samples/s (fp32 contiguous 200)"]


def test_what_the_user_set_is_kept() -> None:
    bench = Bench(bf16=0.5, channels_last=0.5, threads2=0.5)
    kept = ("train.precision=fp32", "train.layout=contiguous", "train.threads=1", "train.compile=true")
    assert chosen(settled(small(kept[0]), bench)[0]) == ("fp32", "channels_last", 2, False)
    assert chosen(settled(small(kept[1]), bench)[0]) == ("bf16", "contiguous", 2, False)
    assert chosen(settled(small(kept[2]), bench)[0]) == ("bf16", "channels_last", 1, False)
    assert chosen(settled(small(kept[3]), bench)[0]) == ("bf16", "channels_last", 2, True)


def test_nothing_to_choose_is_nothing_to_measure() -> None:
    bench = Bench()
    settings, said = settled(small("train.precision=fp32", "train.layout=channels_last", "train.threads=1"), bench)
    assert chosen(settings) == ("fp32", "channels_last", 1, False)
    assert (bench.calls, said) == (0, [])


def test_the_environment_says_how_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert settled(small(), Bench(threads2=0.1))[0].threads == 1


def test_slow_bf16_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "has_fast_bf16", lambda _: False)
    assert settled(small(), Bench(bf16=0.1))[0].precision == "fp32"


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="fp16"):
        settled(small("train.precision=fp16"), Bench())


def test_threads_leave_room_for_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "usable_cores", lambda: 8)
    monkeypatch.setattr(choose, "num_workers", lambda *_: 2)
    assert settled(small(), Bench(threads6=0.5, threads8=0.1))[0].threads == 6


# ---------------------------------------------------------------------------------------------------------- remembering


def test_a_choice_is_remembered(machine: Path) -> None:
    bench = Bench(bf16=0.5)
    first, _ = settled(small(), bench)
    calls = bench.calls
    second, said = settled(small("train.seed=7", "distill.T=2"), bench)
    assert bench.calls == calls
    assert chosen(second) == chosen(first)
    assert said == ["probe: bf16, contiguous, 1 thread: 200 samples/s (fp32 contiguous 100) (remembered)"]
    assert [p.name for p in machine.iterdir()] == ["probe.json"]


@pytest.mark.parametrize(
    "override",
    ["student.width=6", "teacher.width=6", "data.batch_size=16", "train.precision=fp32", "optimizer.kind=adamw"],
)
def test_what_the_speed_depends_on_is_measured_anew(override: str) -> None:
    bench = Bench()
    settled(small(), bench)
    calls = bench.calls
    settled(small(override), bench)
    assert bench.calls > calls


def test_another_machine_measures_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    for change in (("usable_cores", lambda: 3), ("processor", lambda _: "another")):
        settled(small(), bench)
        calls = bench.calls
        monkeypatch.setattr(choose, *change)
        settled(small(), bench)
        assert bench.calls > calls


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 1}', '{"format": 1, "choices": []}', '{"format": 2, "choices": {}}', "\x00\xff"]
)
def test_a_damaged_file_is_measured_anew(text: str, machine: Path) -> None:
    bench = Bench()
    settled(small(), bench)
    (machine / "probe.json").write_text(text)
    calls = bench.calls
    settled(small(), bench)
    assert bench.calls > calls
    settled(small(), bench)
    assert len(json.loads((machine / "probe.json").read_text())["choices"]) == 1


@pytest.mark.parametrize(
    "change",
    [{"choice": {"precision": "fp16", "layout": "contiguous", "threads": 1}}, {"choice": {"speed": 3}}, {"choice": 4}],
)
def test_a_damaged_entry_is_measured_anew(change: dict[str, Any], machine: Path) -> None:
    bench = Bench()
    before, _ = settled(small(), bench)
    document = json.loads((machine / "probe.json").read_text())
    for entry in document["choices"].values():
        entry.update(change)
    (machine / "probe.json").write_text(json.dumps(document))
    calls = bench.calls
    assert settled(small(), bench)[0] == before
    assert bench.calls > calls


def test_what_a_busy_machine_said_is_believed_for_a_day(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    monkeypatch.setattr("os.getloadavg", lambda: (2.0, 0.0, 0.0), raising=False)
    monkeypatch.setattr("time.time", lambda: 1000.0)
    assert settled(small(), bench)[1][0].endswith("; the machine is busy")
    calls = bench.calls
    monkeypatch.setattr("time.time", lambda: 1000.0 + 3600)
    settled(small(), bench)
    assert bench.calls == calls
    monkeypatch.setattr("time.time", lambda: 1000.0 + 90_000)
    settled(small(), bench)
    assert bench.calls > calls


def test_a_cache_that_cannot_be_written_is_no_error(machine: Path) -> None:
    machine.write_text("a file where the folder should be")
    assert settled(small(), Bench(bf16=0.5))[0].precision == "bf16"


# ---------------------------------------------------------------------------------------------- what a step consists of


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str], int]]:
    """(student, teachers, samples) of every trial that is made instead of measured."""
    made: list[tuple[str, list[str], int]] = []

    def trial(
        experiment: Any, stage: Any, data: Any, student: Any, teachers: Any, device: Any, rows: int, shape: Any
    ) -> Bench:
        made.append((student.kind, [t.kind for t in teachers], rows))
        assert all(spec.weights is None for spec in (student, *teachers))
        return Bench()

    monkeypatch.setattr(choose, "Trial", trial)
    return made


@pytest.mark.parametrize(
    ("overrides", "live"),
    [
        ([], True),
        (["teacher_cache.store=logits"], False),
        (["teacher_cache.store=both"], False),
        (["teacher_cache.store=features"], True),
        (["distill.alpha=0"], False),
    ],
)
def test_the_teacher_counts_where_it_is_asked_at_every_step(
    overrides: list[str], live: bool, trials: list[tuple[str, list[str], int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = small()
    if any(text.startswith("teacher_cache") for text in overrides):
        cache = {"store": overrides[0].partition("=")[2]}
        experiment = Experiment.model_validate(experiment.model_dump(by_alias=True) | {"teacher_cache": cache})
    else:
        experiment = small(*overrides)
    settled(experiment)
    assert trials == [("digits_cnn", ["digits_cnn"] if live else [], 32)]


def test_a_feature_that_no_store_holds_is_asked_of_the_teacher(trials: list[tuple[str, list[str], int]]) -> None:
    losses = (
        "losses: [{kind: supervised}, {kind: attention_transfer, taps: [block1]}]\nteacher_cache: {store: logits}\n"
    )
    settled(small(text=FILE.replace("distill: {T: 4, alpha: 0.9}\n", losses)))
    assert trials[0][1] == ["digits_cnn"]


def test_micro_batches_are_what_a_step_runs_on(trials: list[tuple[str, list[str], int]]) -> None:
    settled(small("train.accumulate=3"))
    assert trials[0][2] == 11


# ----------------------------------------------------------------------------------------------------------- real steps


def test_real_steps_are_measured_and_leave_no_trace(machine: Path) -> None:
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    settings, said = settled(small("train.threads=1"))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads
    assert settings.precision in ("fp32", "bf16") and settings.layout in ("contiguous", "channels_last")
    assert len(said) == 1 and said[0].startswith(f"probe: {settings.precision}, {settings.layout}, 1 thread: ")
    assert (machine / "probe.json").is_file()


def trial(experiment: Experiment, rows: int = 32) -> Trial:
    data = build.build_data(experiment)
    stage = experiment.student_stage
    return Trial(
        experiment, stage, data, experiment.student, stage.teachers, torch.device("cpu"), rows, data.input_shape
    )


def test_steps_are_timed_at_the_size_that_augmentation_gives() -> None:
    experiment = small()
    data, stage = build.build_data(experiment), experiment.student_stage
    subject = Trial(experiment, stage, data, experiment.student, [], torch.device("cpu"), 5, (1, 12, 10))
    assert subject._batch.inputs.shape == (5, 1, 12, 10)


def test_a_step_trains_the_student_alone() -> None:
    subject = trial(small())
    choice = Choice("fp32", "contiguous", 1)
    subject(choice)
    models = subject._in_layout("contiguous")
    student, teacher = models.student.net.state_dict(), models.teachers[0].models[0].net.state_dict()
    before = [{name: value.clone() for name, value in state.items()} for state in (student, teacher)]
    subject(choice)
    assert any(not torch.equal(student[name], value) for name, value in before[0].items())
    assert all(torch.equal(teacher[name], value) for name, value in before[1].items())


def test_a_step_has_the_precision_layout_and_threads_that_are_asked_for() -> None:
    subject = trial(small())
    seen: list[tuple[Any, bool, int]] = []

    def look(_: Any, inputs: Any, output: torch.Tensor) -> None:
        weight = convolution.weight
        seen.append((output.dtype, weight.is_contiguous(memory_format=torch.channels_last), torch.get_num_threads()))

    for choice in (Choice("fp32", "contiguous", 1), Choice("bf16", "channels_last", 2)):
        net = subject._in_layout(choice.layout).student.net
        convolution = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d)][-1]
        handle = convolution.register_forward_hook(look)
        subject(choice)
        handle.remove()
        wanted = (torch.bfloat16 if choice.precision == "bf16" else torch.float32, choice.layout == "channels_last")
        assert seen[-1] == (*wanted, choice.threads)


@pytest.mark.parametrize(("seconds", "samples"), [(1e-4, 64), (0.01, 16), (9.0, 4)])
def test_a_long_step_is_timed_with_fewer_samples(seconds: float, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = trial(small(), rows=64)
    monkeypatch.setattr(subject, "_timed", lambda choice, steps: seconds * subject._batch.size)
    assert subject(Choice("fp32", "contiguous", 1)) == pytest.approx(seconds)
    assert subject._batch.size == samples


def test_too_little_memory_takes_fewer_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = trial(small(), rows=64)

    def timed(choice: Choice, steps: int) -> float:
        if subject._batch.size > 8:
            raise torch.OutOfMemoryError("too large")
        return 1e-4

    monkeypatch.setattr(subject, "_timed", timed)
    subject(Choice("fp32", "contiguous", 1))
    assert subject._batch.size == 4


# ------------------------------------------------------------------------------------------------------------ fall-back


def test_where_nothing_can_be_measured_the_rule_holds(machine: Path) -> None:
    def broken(choice: Choice) -> float:
        raise RuntimeError("shapes do not fit\nand more")

    settings, said = settled(small(), broken)
    assert chosen(settings) == ("fp32", "contiguous", 2, False)
    assert said == ["probe: fp32, contiguous, 2 threads, by rule, for nothing could be measured: shapes do not fit"]
    assert not machine.exists()


def test_a_mistake_of_the_users_is_told_as_ever() -> None:
    def broken(choice: Choice) -> float:
        raise KdctlError("the model has 3 classes")

    with pytest.raises(KdctlError, match="3 classes"):
        settled(small(), broken)


def test_the_model_of_an_earlier_stage_is_built_from_its_spec(trials: list[tuple[str, list[str], int]]) -> None:
    text = """
name: chain
data: {kind: digits, limit: 200}
student: {kind: digits_cnn, width: 4}
train: {epochs: 1, device: cpu}
stages:
  - {name: big, role: teacher, student: {kind: resnet8}}
  - {name: middle, role: assistant, student: {kind: resnet8x4}, teacher: {kind: resnet8, from: big}}
  - {name: student, teacher: {kind: resnet8x4, from: middle}}
"""
    settled(small(text=text))
    assert trials[0][:2] == ("digits_cnn", ["resnet8x4"])


def test_the_cache_has_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCTL_CACHE", "/somewhere")
    assert runs.cache_home() == Path("/somewhere")
    monkeypatch.delenv("KDCTL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    assert runs.cache_home() == Path("/shared/kdctl")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert runs.cache_home() == Path.home() / ".cache" / "kdctl"


def test_rule_and_measurement_settle_the_same_things() -> None:
    by_rule, measured = settle_by_rule(small().train), settled(small(), Bench())[0]
    assert "auto" not in [*chosen(by_rule), *chosen(measured), by_rule.device, measured.device]
