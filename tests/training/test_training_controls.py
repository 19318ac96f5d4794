"""The controls of a group: each differs from the distillation, or from the baseline, in what its name says alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kdctl import build, runs
from kdctl.cli import app
from kdctl.cli.train import _show_group
from kdctl.config.schema import Experiment, TapPair
from kdctl.control import CONTROLS, Made, control, parse_controls
from kdctl.errors import ConfigError, UsageError
from kdctl.experiment import Plan, load_run, resume, train
from kdctl.group import _control, _teachers_share, state, why_no_gain
from kdctl.models.record import load_model
from kdctl.signals import Batch, Signals
from kdctl.teachers.shuffled import ShuffledTeacher
from kdctl.watch import Reporter

ALL = tuple(CONTROLS)
OTHERS = [name for name in ALL if name != "baseline"]
HINTS = ("distill=null", "losses=[{kind: ce, weight: 0.2}, {kind: kd}, {kind: fitnet, weight: 3, "
         "taps: [{student: layer1, teacher: layer2}]}]")  # fmt: skip


@pytest.fixture
def made(run_it: Callable[..., tuple[runs.Run, dict[str, Any]]]) -> Made:
    """The runs that controls are made from: the small experiment, with its baseline, of seed 0."""
    run, document = run_it(controls=("baseline",))
    own = {"main": run, "baseline": runs.Run(Path(document["seeds"][0]["baseline"]["run"]))}
    return Made(run, own, [own])


def settings(experiment: Experiment) -> dict[str, Any]:
    """All of an experiment but its student's terms and teachers."""
    stages = [s.model_dump(exclude={"teacher", "losses"}) for s in experiment.train_stages if s.role == "student"]
    return experiment.model_dump(exclude={"stages"}) | {"stages": stages}


# --------------------------------------------------------------------------------------------------- one at a time


def test_smoothing_is_the_baseline_with_soft_labels(experiment: Callable[..., Experiment], made: Made) -> None:
    loaded = experiment()
    smooth, files = CONTROLS["label_smoothing"].make(loaded, made)
    (stage,) = smooth.train_stages
    assert [(x.kind, x.weight, x.arguments["label_smoothing"]) for x in stage.losses] == [("supervised", 1.0, 0.1)]
    assert settings(smooth) == settings(control(loaded)) and stage.teacher is None and not files


def test_equal_time_trains_for_as_long_as_the_distillation_took(
    experiment: Callable[..., Experiment], made: Made
) -> None:
    made.same_seed["main"].update(seconds={"teacher": 100.0, "student": 7.6})
    made.same_seed["baseline"].update(seconds={"student": 0.6})  # of two epochs; the ten of below take 3.0
    longer, _ = CONTROLS["equal_time"].make(experiment("train.epochs=10"), made)
    assert [stage.epochs for stage in longer.train_stages] == [25]
    made.same_seed["main"].update(seconds={"student": 2.0})  # a teacher from a store, on a lucky day
    same, _ = CONTROLS["equal_time"].make(experiment("train.epochs=10"), made)
    assert [stage.epochs for stage in same.train_stages] == [10]


def test_equal_time_is_that_of_all_seeds(experiment: Callable[..., Experiment], made: Made, folder: Path) -> None:
    """The first seed fills the store, which costs it more than the others."""
    made.same_seed["main"].update(seconds={"student": 9.0})
    made.same_seed["baseline"].update(seconds={"student": 0.6})
    second = {role: runs.Run(shutil.copytree(run.path, folder / role)) for role, run in made.same_seed.items()}
    second["main"].update(seconds={"student": 3.0})
    for own in (made.same_seed, second):
        both = Made(made.first, own, [made.same_seed, second])
        longer, _ = CONTROLS["equal_time"].make(experiment("train.epochs=10"), both)
        assert [stage.epochs for stage in longer.train_stages] == [20]


def test_a_random_teacher_is_the_same_net_untrained(experiment: Callable[..., Experiment], made: Made) -> None:
    loaded = experiment()
    changed, _ = CONTROLS["random_teacher"].make(loaded, made)
    (stage,) = changed.train_stages
    (spec,) = stage.teachers
    assert (spec.kind, spec.arguments["width"], spec.weights, spec.control) == ("digits_cnn", 8, None, True)
    assert stage.losses == loaded.student_stage.losses and settings(changed)["stages"] == settings(loaded)["stages"]
    data = build.build_data(loaded)
    (untrained,) = build.build_teachers(stage, data, 0, lambda name: made.first.stage_dir(name) / "model")
    trained = load_model(made.first / "teacher")
    assert untrained.record.to_dict() == trained.record.to_dict()
    assert not torch.equal(*(next(model.net.parameters()) for model in (untrained, trained)))


def test_a_random_teacher_of_given_weights_has_their_architecture(
    experiment: Callable[..., Experiment], made: Made
) -> None:
    """The file that names a run of another width, and cannot know what is in it."""
    loaded = experiment("teacher.train=null", f"teacher.weights={made.first.path / 'teacher.safetensors'}")
    loaded.student_stage.teachers[0].model_extra.pop("width")
    changed, _ = CONTROLS["random_teacher"].make(loaded, made)
    assert changed.student_stage.teachers[0].arguments["width"] == 8


def test_shuffled_labels_change_the_teacher_alone(experiment: Callable[..., Experiment], made: Made) -> None:
    loaded = experiment()
    changed, files = CONTROLS["shuffled_labels"].make(loaded, made)
    (stage,) = changed.train_stages
    (spec,) = stage.teachers
    assert spec.shuffled and spec.weights == "teachers/teacher.safetensors"
    assert files[spec.weights] == made.first.stage_dir("teacher") / "model.safetensors"
    assert stage.losses == loaded.student_stage.losses


def test_itself_as_teacher_taps_the_students_own_layers(experiment: Callable[..., Experiment], made: Made) -> None:
    loaded = experiment(*HINTS)
    assert any(isinstance(tap, TapPair) for loss in loaded.student_stage.losses for tap in loss.taps)
    changed, files = CONTROLS["self"].make(loaded, made)
    (stage,) = changed.train_stages
    (spec,) = stage.teachers
    assert (spec.kind, spec.arguments["width"], spec.weights) == ("digits_cnn", 4, "teachers/self.safetensors")
    assert files[spec.weights] == made.same_seed["baseline"] / "student.safetensors"
    assert stage.losses[2].taps == ["layer1"] and stage.losses[2].weight == 3


def test_the_shuffled_teacher_gives_each_answer_to_the_next_sample() -> None:
    class Known:
        models, taps = [], ("a",)
        flushed = False

        def __call__(self, batch: Batch, taps: Any = None, logits: bool = True) -> Signals:
            member = Signals(batch.inputs * 2, features={"a": batch.inputs * 3})
            return Signals(batch.inputs, features={"a": batch.inputs * 3}, members=(member,))

        def flush(self) -> None:
            self.flushed = True

    teacher, known = None, Known()
    teacher = ShuffledTeacher(known)  # type: ignore[arg-type]
    inputs = torch.tensor([[1.0], [2.0], [3.0]])
    said = teacher(Batch(inputs, torch.zeros(3), torch.arange(3), torch.zeros(3)))
    assert said.logits.flatten().tolist() == [3, 1, 2]
    assert said.features["a"].flatten().tolist() == [9, 3, 6]
    assert said.members[0].logits.flatten().tolist() == [6, 2, 4]
    teacher.flush()
    assert known.flushed and teacher.taps == ("a",)


def test_the_student_of_a_shuffled_teacher_gets_the_shuffled_answers(experiment: Callable[..., Experiment]) -> None:
    loaded = experiment("teacher.train=null", "teacher.control=true")
    data, stage = build.build_data(loaded), loaded.student_stage
    shuffled = stage.model_copy(update={"teacher": stage.teachers[0].model_copy(update={"shuffled": True})})
    plain, other = (build.build_stage(loaded, s, data, lambda name: Path(name)) for s in (stage, shuffled))
    batch = next(iter(plain.loader.epoch(0)))
    assert plain.teacher is not None and other.teacher is not None
    assert torch.equal(other.teacher(batch).logits, plain.teacher(batch).logits.roll(1, 0))
    assert torch.equal(other.members[0](batch).logits, plain.teacher(batch).logits)  # what is checked and stored


@pytest.mark.parametrize(
    ("method", "kept"),
    [("{kind: sparse, sparsity: 0.5}", "sparse"), ("{kind: qat}", "qat"), ("{kind: simkd}", "distill")],
)
def test_the_baseline_computes_with_what_the_student_computes_with(
    experiment: Callable[..., Experiment], method: str, kept: str
) -> None:
    """Against one that is neither pruned nor rounded it would show what these cost, not what a teacher gives."""
    alone = control(experiment(f"method={method}"))
    assert alone.student_stage.method.kind == kept and not alone.student_stage.teachers


# ------------------------------------------------------------------------------------------------------- a whole group


def test_a_group_with_every_control(folder: Path, run_it: Callable[..., Any]) -> None:
    _, group = run_it("train.epochs=1", *HINTS, seeds=2, controls=ALL)
    document = runs.read_json(Path(group["group"]))
    assert [(m["control"], m["seed"]) for m in document["members"]] == [
        *((name, seed) for seed in (0, 1) for name in (None, *ALL) if name != "equal_time"),
        *(("equal_time", seed) for seed in (0, 1)),
    ]
    for member in document["members"]:
        info = runs.Run(folder / "runs" / "small" / member["run"]).info
        assert (info["control"], info["role"]) == (member["control"], member["role"])
    for row in group["seeds"]:
        assert list(row["controls"]) == OTHERS
        run, own = (runs.Run(Path(row["controls"][name]["run"])) for name in ("shuffled_labels", "self"))
        assert (run / "teachers" / "teacher.safetensors").is_file()
        baseline = Path(row["baseline"]["run"]) / "student.safetensors"
        assert (own / "teachers" / "self.safetensors").read_bytes() == baseline.read_bytes()
    summary = group["summary"]
    assert list(summary["controls"]) == OTHERS
    for name, measured in summary["controls"].items():
        values = [row["controls"][name]["test"]["top1"] for row in group["seeds"]]
        gains = [row["student"]["test"]["top1"] - v for row, v in zip(group["seeds"], values, strict=True)]
        above = [v - row["baseline"]["test"]["top1"] for row, v in zip(group["seeds"], values, strict=True)]
        assert measured["values"]["mean"] == pytest.approx(sum(values) / 2)
        assert measured["gain"]["mean"] == pytest.approx(sum(gains) / 2)
        assert measured["against_baseline"]["mean"] == pytest.approx(sum(above) / 2)
    first, plain = (runs.Run(Path(row["run"])) for row in (group["seeds"][0], group["seeds"][0]["baseline"]))
    lines = [line for line in first.metrics() if line["stage"] == "student"]
    own = [100 * (1 - line["gradient_shares"]["supervised"]) for line in lines]
    share = _teachers_share({"main": {0: first}, "baseline": {0: plain}}, "student")
    assert share == pytest.approx(sum(own) / len(own), abs=0.01) and 0 < share < 100
    nll = summary["metrics"]["nll"]
    assert nll["gain"]["mean"] == pytest.approx(nll["student"]["mean"] - nll["baseline"]["mean"])
    assert group["statements"][0] == group["verdict"] and len(group["statements"]) == 1 + 5 + 2
    assert resume(runs.Run(Path(group["seeds"][0]["run"])), Reporter())["statements"] == group["statements"]


def test_a_group_stopped_between_its_controls_goes_on(
    folder: Path, experiment: Callable[..., Experiment], run_it: Callable[..., Any]
) -> None:
    class StopsInTheSeventhRun(Reporter):
        started = 0

        def say(self, text: str) -> None:
            self.started += " run runs/" in text
            if self.started == 7:
                raise RuntimeError

    plan: dict[str, Any] = {"seeds": 2, "controls": ("baseline", "shuffled_labels", "self")}
    _, whole = run_it("name=whole", **plan)
    with pytest.raises(RuntimeError):
        train(Plan(experiment(), "", **plan), StopsInTheSeventhRun())
    goes_on = resume(runs.find("small"), Reporter())
    for key in ("student", "baseline", "gain", "metrics", "controls"):
        assert goes_on["summary"][key] == whole["summary"][key]


def test_a_control_repeats_from_its_own_files(folder: Path, run_it: Callable[..., Any]) -> None:
    _, group = run_it("train.epochs=1", controls=("baseline", "shuffled_labels"))
    run = runs.Run(Path(group["seeds"][0]["controls"]["shuffled_labels"]["run"]))
    assert load_run(run).student_stage.teachers[0].shuffled
    assert app.run(["train", str(run.config), "--quiet"]) == 0
    again = runs.find("latest")
    assert (again / "student.safetensors").read_bytes() == (run / "student.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------------------ refusals


def test_names_of_controls_are_read() -> None:
    assert parse_controls("self, random_teacher,baseline,self") == ["baseline", "random_teacher", "self"]
    with pytest.raises(UsageError, match="did you mean 'random_teacher'") as caught:
        parse_controls("random_teachr")
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("overrides", "name", "says"),
    [
        (("distill=null", "losses=[{kind: kd}]", "method.kind=data_free"), "baseline", "makes its samples"),
        (("distill=null", "losses=[{kind: ce, label_smoothing: 0.1}, {kind: kd}]"), "label_smoothing", "would be the"),
        (("distill=null", "teacher=null", "losses=[{kind: ce}]"), "self", "this experiment has none"),
        (("distill=null", "teacher=null", "losses=[{kind: ce}]"), "shuffled_labels", "this experiment has none"),
        (("data.batch_size=4", "train.accumulate=4"), "shuffled_labels", "leaves no other sample"),
        (("method.kind=few_sample", "method.layers=[layer1]"), "self", "few_sample fits student and teacher"),
    ],
)
def test_what_cannot_be_controlled_is_refused_before_training(
    experiment: Callable[..., Experiment], folder: Path, overrides: tuple[str, ...], name: str, says: str
) -> None:
    loaded = experiment(*overrides)
    with pytest.raises(ConfigError, match=says):
        train(Plan(loaded, "", controls=("baseline", name)), Reporter())
    assert not (folder / "runs").exists()


def test_the_command_line_trains_controls(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a.yaml").write_text(
        "data: {kind: digits, limit: 100}\nstudent: {kind: digits_cnn, width: 4}\nteacher: {kind: digits_cnn, "
        "control: true}\ntrain: {epochs: 1, threads: 1, device: cpu}\n"
    )
    assert app.run(["train", "a.yaml", "--controls", "random_teacher", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert list(document["seeds"][0]["controls"]) == ["random_teacher"] and document["baseline"]
    assert app.run(["train", "a.yaml", "--controls", "nothing"]) == 2
    assert app.run(["train", "a.yaml", "--controls", "self", "--run-dir", "x"]) == 2


# ---------------------------------------------------------------------------------------------------------- statements


def result(low: float, high: float) -> dict[str, Any]:
    return {"mean": (low + high) / 2, "std": 1.0, "ci95": [low, high], "n": 5, "p_value": 0.01}


def group_of(gain: dict[str, Any], **controls: tuple[bool, dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    """The summary of a group whose controls are (placebo, student - control, control - baseline)."""
    parts = {
        name: {"placebo": placebo, "gain": over, "against_baseline": against}
        for name, (placebo, over, against) in controls.items()
    }
    return {"gain": gain, "controls": parts}


ALIKE = {"mean": 1.0, "std": 0.0, "ci95": None, "n": 5, "p_value": None}
"""All seeds differ by the same."""
GAIN, NONE, LOSS = result(1.0, 3.0), result(-1.0, 1.0), result(-3.0, -1.0)


@pytest.mark.parametrize(
    ("summary", "begins", "doubt"),
    [
        (group_of(GAIN), "a gain: +2.00", None),
        (group_of(GAIN, random_teacher=(True, GAIN, NONE)), "a gain", None),
        (group_of(GAIN, random_teacher=(True, GAIN, LOSS), self=(False, GAIN, GAIN)), "a gain", None),
        (group_of(GAIN, shuffled_labels=(True, NONE, NONE)), "a gain", "see shuffled_labels"),
        (group_of(GAIN, shuffled_labels=(True, GAIN, GAIN)), "a gain", "see shuffled_labels"),
        (
            group_of(GAIN, self=(False, NONE, GAIN), equal_time=(False, LOSS, GAIN)),
            "a gain",
            "from the teacher: see self; but it is not shown to be worth its time: see equal_time",
        ),
        (
            group_of(GAIN, equal_time=(False, NONE, GAIN)),
            "a gain",
            "seeds, p = 0.010; but it is not shown to be worth its time: see equal_time",
        ),
        (group_of(GAIN, random_teacher=(True, GAIN, ALIKE)), "a gain", "see random_teacher"),
        (group_of(NONE, random_teacher=(True, NONE, NONE)), "no evidence of a gain", None),
        (group_of(LOSS, self=(False, NONE, LOSS)), "a loss", None),
    ],
)
def test_the_claim_is_no_larger_than_its_controls(summary: dict[str, Any], begins: str, doubt: str | None) -> None:
    claim, *others = state(summary)
    assert claim.startswith(begins)
    assert (doubt is None and "not shown" not in claim) or (doubt is not None and claim.endswith(doubt))
    for name, measured in summary["controls"].items():
        assert any(text.startswith(f"against {name}: ") for text in others)
        assert any(text.startswith(f"placebo {name} ") for text in others) == measured["placebo"]


@pytest.mark.parametrize(
    ("gain", "teacher", "share", "said"),
    [
        (NONE, 50.0, 90.0, ["the teacher has top1 50.00 and the student alone 70.00"]),
        (LOSS, 99.0, 5.0, ["5 % of the gradient came from the teacher"]),
        (NONE, 70.0, 19.9, ["the teacher has top1 70.00", "20 % of the gradient"]),
        (NONE, 99.0, 90.0, []),
        (NONE, None, None, []),
        (GAIN, 50.0, 5.0, []),
    ],
)
def test_what_kept_a_student_from_gaining(
    gain: dict[str, Any], teacher: float | None, share: float | None, said: list[str]
) -> None:
    reasons = why_no_gain({"metric": "top1", "baseline": {"mean": 70.0}, "gain": gain}, teacher, share)
    assert len(reasons) == len(said) and all(text in reason for text, reason in zip(said, reasons, strict=True))


def test_without_a_control_nothing_is_claimed() -> None:
    assert state({"controls": {}}) == [
        "no control was run: --with-baseline trains the same student without its teacher"
    ]


def test_a_run_without_a_number_shows_nothing() -> None:
    """Spearman or mAP of a split may have no value, and then no interval has one."""
    rows = [{"student": {"test": {"map": 3.0}}, "baseline": {"test": {"map": None}},
             "controls": {"self": {"test": {"map": 2.0}}}}]  # fmt: skip
    control = _control("self", rows, "map")
    assert control["gain"] is None and control["verdict"] == "nothing is shown: map has no value in some run"
    assert state({"metric": "map", "gain": None, "controls": {"self": control}}) == [control["verdict"]]
    claim, other = state({"metric": "map", "gain": GAIN, "controls": {"self": control}})
    assert claim.endswith("see self") and other == f"against self: {control['verdict']}"
    assert why_no_gain({"metric": "map", "gain": None}, 1.0, 1.0) == []
    _show_group({
        "summary": {"metric": "map", "student": None, "baseline": None, "gain": None, "controls": {"self": control}},
        "seeds": [row | {"seed": 0, "run": "x"} for row in rows], "teacher": {"kind": "a", "test": {"map": None}},
        "verdict": claim, "statements": [claim], "group": "g",
    })  # fmt: skip
