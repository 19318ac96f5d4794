"""What training promises: the teacher stays as it was, the control is fair, and what cannot work stops at once."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kdctl import build, runs
from kdctl.clock import Clock
from kdctl.config.schema import Experiment
from kdctl.control import control
from kdctl.errors import ConfigError, DivergedError, MissingError
from kdctl.evaluate import evaluate_config, evaluate_run
from kdctl.experiment import Plan, train
from kdctl.models.record import load_model
from kdctl.step import Step
from kdctl.watch import Reporter

ALONE = """
name: alone
data: {kind: digits, limit: 300}
student: {kind: digits_cnn, width: 4}
optimizer: {kind: sgd, lr: 0.1, momentum: 0.9}
train: {epochs: 1, device: cpu, threads: 1}
"""


def stage_of(experiment: Experiment, data: Any, name: str = "student") -> build.Built:
    stage = next(s for s in experiment.train_stages if s.name == name)
    stage = stage.model_copy(update={"teacher": None if stage.teacher is None else stage.teachers[0].model_copy(
        update={"stage": None})})  # fmt: skip
    return build.build_stage(experiment, stage, data, Path)


def steps(built: build.Built, experiment: Experiment, count: int, accumulate: int = 1) -> None:
    stage = experiment.train_stages[-1].model_copy(update={"accumulate": accumulate})
    step = Step(built, stage, Clock(), Reporter(), stage.accumulate)
    built.method.train()
    for number, batch in enumerate(built.loader.epoch(0)):
        if number == count:
            return
        step(batch, 0.0)


# ------------------------------------------------------------------------------------------------------------ teacher


def test_training_leaves_weights_buffers_and_modes_of_the_teacher_alone(experiment: Callable[..., Experiment]) -> None:
    loaded = experiment()
    built = stage_of(loaded, build.build_data(loaded))
    teacher = built.teachers[0]
    before = copy.deepcopy(teacher.state_dict())
    steps(built, loaded, 2)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    trained = {id(p) for p in built.method.trained.parameters()}
    assert not trained & {id(p) for p in teacher.parameters()}


def test_the_dry_run_leaves_the_buffers_of_both_models_alone(experiment: Callable[..., Experiment]) -> None:
    loaded = experiment("losses=[{kind: ce}, {kind: kd}, {kind: fitnet, taps: [layer1]}]", "distill=null")
    built = stage_of(loaded, build.build_data(loaded))
    for model in (built.method.student, *built.teachers):
        counts = [v for name, v in model.net.named_buffers() if name.endswith("num_batches_tracked")]
        assert counts and all(int(c) == 0 for c in counts)


def test_a_random_teacher_is_refused_unless_it_is_declared(folder: Path, run_it: Callable[..., Any]) -> None:
    text = """
name: random
data: {kind: digits, limit: 300}
teacher: {kind: digits_cnn, width: 8, control: CONTROL}
student: {kind: digits_cnn, width: 4}
train: {epochs: 1, device: cpu, threads: 1}
"""
    run_it(text=text.replace("CONTROL", "true"))
    teacher = """
name: teacher
data: {kind: digits, limit: 300}
student: {kind: digits_cnn, width: 8}
optimizer: {kind: sgd, lr: 1e-9}
train: {epochs: 1, device: cpu, threads: 1}
"""
    made, _ = run_it(text=teacher)
    text = text.replace("control: CONTROL", f"weights: {made.path.resolve()}")
    with pytest.raises(ConfigError, match="no better than chance"):
        run_it(text=text)


def test_class_counts_that_cannot_match_are_refused(folder: Path, run_it: Callable[..., Any]) -> None:
    made, _ = run_it(text=ALONE)
    record = json.loads((made / "student.json").read_text())
    model = load_model(made.path)
    model.record.num_classes, model.record.class_names = 3, ["a", "b", "c"]
    last = [m for m in model.net.modules() if isinstance(m, torch.nn.Linear)][-1]
    last.weight, last.bias = torch.nn.Parameter(last.weight[:3]), torch.nn.Parameter(last.bias[:3])
    last.out_features = 3
    from kdctl.models.record import save_model

    save_model(model, folder / "three")
    assert record["num_classes"] == 10
    text = ALONE.replace(
        "student:", f"teacher: {{kind: digits_cnn, width: 4, weights: {folder}/three.safetensors}}\nstudent:"
    )
    with pytest.raises(ConfigError, match="3 classes, the data 10"):
        run_it(text=text)


# ---------------------------------------------------------------------------------------------------------- the terms


def test_a_term_whose_gradient_cannot_reach_the_student_stops_the_run(
    folder: Path, experiment: Callable[..., Experiment]
) -> None:
    (folder / "mine.py").write_text(
        "from kdctl.losses.base import Loss\n\n\nclass Detached(Loss):\n"
        '    """A loss that forgets the graph."""\n\n'
        "    def __init__(self) -> None:\n        super().__init__()\n\n"
        "    def forward(self, student, teacher, batch):\n        return student.rows().detach().sum()\n"
    )
    loaded = experiment("distill=null", "losses=[{kind: ce}, {kind: './mine.py:Detached'}]")
    with pytest.raises(ConfigError, match="no gradient of this term reaches the student"):
        train(Plan(loaded, ""), Reporter())
    assert not list(folder.glob("runs/*/*/stages/student/checkpoints/*"))


def test_a_tap_that_does_not_exist_is_refused(experiment: Callable[..., Experiment]) -> None:
    loaded = experiment("distill=null", "losses=[{kind: ce}, {kind: attention_transfer, taps: [stage9]}]")
    with pytest.raises(ConfigError, match="stage9"):
        stage_of(loaded, build.build_data(loaded))


def test_micro_batches_give_the_same_update(experiment: Callable[..., Experiment]) -> None:
    """On a net without batch statistics, with unlabelled samples unevenly spread over the micro-batches."""
    loaded = experiment("student={kind: mlp, hidden: [16]}", "teacher={kind: mlp, hidden: [32], control: true}",
                        "optimizer={kind: sgd, lr: 0.1}")  # fmt: skip
    data = build.build_data(loaded)
    results = []
    for accumulate in (1, 4):
        built = stage_of(loaded, data)
        steps(built, loaded, 2, accumulate)
        results.append(torch.cat([p.detach().flatten() for p in built.method.student.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_an_unlabelled_batch_trains_on_the_teacher_alone(experiment: Callable[..., Experiment]) -> None:
    loaded = experiment()
    data = build.build_data(loaded)
    built = stage_of(loaded, data)
    batch = next(built.loader.epoch(0))
    batch.targets.fill_(-100)
    state = Step(built, loaded.train_stages[-1], Clock(), Reporter(), 1)(batch, 0.0)
    assert float(state.sums["supervised"]) == 0 and int(state.counts["supervised"]) == 0
    assert float(state.sums["kd"]) > 0 and int(state.counts["kd"]) == batch.size


def test_a_loss_that_is_not_finite_stops_before_the_update(folder: Path, experiment: Callable[..., Experiment]) -> None:
    loaded = experiment("optimizer={kind: sgd, lr: 1e30}", "schedule={kind: constant}", "train.epochs=5", text=ALONE)
    with pytest.raises(DivergedError, match=r"supervised.*stopped before anything was saved"):
        train(Plan(loaded, ""), Reporter())
    assert runs.find("alone").info["status"] == "failed"


# ------------------------------------------------------------------------------------------------------------ control


def test_the_control_differs_in_the_teacher_alone(experiment: Callable[..., Experiment]) -> None:
    loaded = experiment()
    alone = control(loaded)
    (stage,) = alone.train_stages
    assert stage.teacher is None
    assert [(loss.kind, loss.weight) for loss in stage.losses] == [("supervised", 1.0)]
    mine = loaded.train_stages[-1]
    for key in ("student", "optimizer", "schedule", "epochs", "data", "clip_norm"):
        assert getattr(stage, key) == getattr(mine, key)
    assert alone.data == loaded.data and alone.train == loaded.train


def test_student_and_control_start_alike_and_see_the_same_pixels(experiment: Callable[..., Experiment]) -> None:
    loaded = experiment()
    data = build.build_data(loaded)
    mine = stage_of(loaded, data)
    alone = stage_of(control(loaded), data)
    for a, b in zip(mine.method.student.parameters(), alone.method.student.parameters(), strict=True):
        assert torch.equal(a, b)
    for x, y in zip(mine.loader.epoch(1), alone.loader.epoch(1), strict=True):
        assert torch.equal(x.inputs, y.inputs) and torch.equal(x.targets, y.targets)


@pytest.mark.parametrize(
    "changed",
    [
        ("distill.alpha=1",),
        ("distill=null", "losses=[{kind: kd}]"),
        ("distill=null", "losses=[{kind: ce, weight: {0: 1, 1: 0}}, {kind: dkd}]"),
    ],
)
def test_a_student_of_its_teacher_alone_is_compared_with_one_of_its_labels(
    experiment: Callable[..., Experiment], changed: tuple[str, ...]
) -> None:
    (alone,) = control(experiment(*changed)).train_stages
    assert [(term.kind, term.weight) for term in alone.losses] == [("supervised", 1.0)] and alone.teacher is None


def test_a_group_trains_its_teacher_once_and_pairs_its_seeds(run_it: Callable[..., Any]) -> None:
    _, group = run_it(seeds=2, controls=("baseline",))
    assert [row["seed"] for row in group["seeds"]] == [0, 1]
    first, second = (runs.Run(Path(row["run"])) for row in group["seeds"])
    assert "teacher" in first.info["stages"] and "teacher" not in second.info["stages"]
    gains = [row["student"]["test"]["top1"] - row["baseline"]["test"]["top1"] for row in group["seeds"]]
    assert group["summary"]["gain"]["mean"] == pytest.approx(sum(gains) / 2)
    assert group["summary"]["gain"]["n"] == 2 and group["verdict"]
    assert all(0 <= row["baseline"]["agreement"] <= 100 for row in group["seeds"])


# ---------------------------------------------------------------------------------------------------------- the stages


def test_early_stop_and_time_budget_end_a_stage(run_it: Callable[..., Any]) -> None:
    run, document = run_it("train.epochs=30", "train.early_stop=1", "optimizer={kind: sgd, lr: 1e-12}", text=ALONE)
    assert document["epochs"] == 2
    assert "early stop" in runs.read_json(run / "stages" / "student" / "result.json")["finished"]
    run, document = run_it("train.epochs=30", "train.max_minutes=1e-6", text=ALONE)
    assert document["epochs"] == 1
    assert "budget" in runs.read_json(run / "stages" / "student" / "result.json")["finished"]


def test_frozen_modules_do_not_move(run_it: Callable[..., Any]) -> None:
    text = ALONE + "stages: [{kind: train, name: head, frozen: [layer1]}]\n"
    run, _ = run_it(text=text)
    trained = load_model(run.path).net.state_dict()
    start = torch.load(run / "stages" / "head" / "checkpoints" / "best.pt", weights_only=True)["student"]
    assert trained.keys() == start.keys()
    built = build.build_stage(load(run), load(run).train_stages[0], build.build_data(load(run)), Path)
    fresh = built.method.student.net.state_dict()
    moved = {name for name in fresh if not torch.equal(fresh[name], trained[name])}
    assert moved and not any(name.startswith("layer1.") for name in moved)


def load(run: runs.Run) -> Experiment:
    from kdctl.config.expand import load_experiment

    return load_experiment(run.config).experiment


def test_a_stage_starts_from_the_one_before(run_it: Callable[..., Any]) -> None:
    text = ALONE + (
        "stages:\n  - {kind: train, name: one}\n"
        "  - {kind: train, name: two, optimizer: {kind: sgd, lr: 1e-12}, keep: last}\n"
    )
    run, _ = run_it(text=text)
    one, two = (load_model(run.stage_dir(name) / "model") for name in ("one", "two"))
    for (name, a), b in zip(one.net.named_parameters(), two.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)


# -------------------------------------------------------------------------------------------------------- measuring


def test_a_moved_run_is_measured_to_the_same_numbers(folder: Path, run_it: Callable[..., Any]) -> None:
    run, document = run_it()
    moved = runs.Run(folder / "elsewhere")
    shutil.move(run.path, moved.path)
    measured = evaluate_run(moved, load(moved))
    assert measured["metrics"] == document["student"]["best"]["test"]
    assert measured["teacher"] == document["teacher"]["test"]
    assert measured["agreement"] == document["agreement"]
    assert sum(row["samples"] for row in measured["per_class"]) == 500


def test_a_run_repeats_itself_from_its_own_config(folder: Path, run_it: Callable[..., Any]) -> None:
    run, _ = run_it()
    again = train(Plan(load(run), ""), Reporter())
    other = runs.Run(Path(again["run"]))
    assert (other / "student.safetensors").read_bytes() == (run / "student.safetensors").read_bytes()


def test_a_file_without_weights_is_not_measured(experiment: Callable[..., Experiment]) -> None:
    with pytest.raises(MissingError, match="no weights to measure"):
        evaluate_config(experiment(text=ALONE))


def test_a_users_own_model_trains_and_its_run_can_be_moved(folder: Path, run_it: Callable[..., Any]) -> None:
    (folder / "mine.py").write_text(
        "from torch import nn\n\n\nclass Tiny(nn.Module):\n"
        '    """A linear map."""\n\n'
        "    def __init__(self, *, num_classes: int, scale: float = 1.0) -> None:\n"
        "        super().__init__()\n        self.scale = scale\n        self.fc = nn.Linear(64, num_classes)\n\n"
        "    def forward(self, x):\n        return self.fc(x.flatten(1)) * self.scale\n"
    )
    run, document = run_it(text=ALONE.replace("{kind: digits_cnn, width: 4}", "{kind: ./mine.py:Tiny, scale: 2.0}"))
    moved = runs.Run(folder / "there" / "run")
    moved.path.parent.mkdir()
    shutil.move(run.path, moved.path)
    (folder / "mine.py").unlink()
    assert evaluate_run(moved, load(moved))["metrics"] == document["student"]["best"]["test"]
