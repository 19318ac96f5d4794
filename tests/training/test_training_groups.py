"""Groups, controls of several stages, and starts that fail: what a review found broken stays mended."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdctl import build, pipeline, runs
from kdctl.cli import app
from kdctl.config.schema import Experiment
from kdctl.control import control
from kdctl.errors import ConfigError, Interrupted, MissingError
from kdctl.evaluate import evaluate_run
from kdctl.experiment import Plan, load_run, resume, train
from kdctl.models.record import load_model, save_model
from kdctl.watch import Reporter

STAGES = """
name: staged
data: {kind: digits, limit: 300}
optimizer: {kind: adamw, lr: 0.01}
student: {kind: digits_cnn, width: 4}
train: {epochs: 1, device: cpu, threads: 1}
stages:
  - {kind: train, name: teacher, role: teacher, student: {kind: digits_cnn, width: 8}, epochs: 3}
  - {kind: train, name: hints, teacher: {from: teacher}, losses: [{kind: fitnet, taps: [layer2]}]}
  - kind: train
    name: logits
    from: hints
    epochs: 2
    teacher: {from: teacher}
    losses: [{kind: ce, weight: 0.1}, {kind: ce, name: smooth, weight: 0.3, label_smoothing: 0.1}, {kind: kd}]
"""
GENERATIONS = """
name: born-again
data: {kind: digits, limit: 300}
student: {kind: digits_cnn, width: 4}
train: {epochs: 1, device: cpu, threads: 1}
optimizer: {kind: adamw, lr: 0.01}
stages:
  - {kind: train, name: gen1, role: assistant, epochs: 4}
  - {kind: train, name: gen2, student: {from: gen1}, teacher: {from: gen1}, losses: [{kind: ce}, {kind: kd}]}
"""
OWN_LOSS = """
from kdctl.losses.kd import KD


class Own(KD):
    \"\"\"The usual one under a name of its own.\"\"\"
"""
DROPOUT = """
import torch
from torch import nn

from kdctl.data.base import Dataset, ItemSplit
from kdctl.data.digits import Digits


class Decoded:
    \"\"\"Digits, decoded one by one.\"\"\"

    def __init__(self) -> None:
        self.loaded = Digits().load()

    def load(self):
        train = self.loaded.train
        split = ItemSplit(train.images.__getitem__, train.targets, (1, 8, 8), stamp="1").subset(torch.arange(300))
        return Dataset(split, test=self.loaded.test, class_names=self.loaded.class_names)


class Drop(nn.Module):
    \"\"\"A linear map behind dropout.\"\"\"

    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(64, num_classes)

    def forward(self, x):
        return self.fc(self.drop(x.flatten(1)))
"""


def test_a_group_on_the_command_line_has_its_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "staged.yaml").write_text(STAGES)
    code = app.run(["train", "staged.yaml", "--seeds", "2", "--with-baseline", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert code == 0 and document["ok"]
    assert (
        set(document["summary"]) == {"metric", "student", "baseline", "gain", "metrics", "controls"}
        and document["verdict"]
    )
    assert len(document["seeds"]) == 2 and document["artefacts"] == []
    assert app.run(["resume", document["seeds"][0]["run"]]) == 0
    assert "verdict: " in capsys.readouterr().out


def test_the_control_of_several_stages_trains_as_long(experiment: Callable[..., Experiment]) -> None:
    loaded = experiment(text=STAGES)
    alone = control(loaded)
    assert [(s.name, s.start, s.epochs) for s in alone.train_stages] == [("hints", "fresh", 1), ("logits", "hints", 2)]
    hints, logits = alone.train_stages
    assert [loss.kind for loss in hints.losses] == ["supervised"]
    assert [loss.weight for loss in logits.losses] == [0.25, 0.75]


def test_further_seeds_take_everything_from_the_first_run_and_stay_whole(
    folder: Path, run_it: Callable[..., Any]
) -> None:
    _, group = run_it(text=GENERATIONS, seeds=2)
    second = runs.Run(Path(group["seeds"][1]["run"]))
    first = runs.Run(Path(group["seeds"][0]["run"]))
    shared = second / "teachers" / "gen1.safetensors"
    assert shared.read_bytes() == (first.stage_dir("gen1") / "model.safetensors").read_bytes()
    moved = runs.Run(folder / "moved")
    shutil.move(second.path, moved.path)
    shutil.rmtree(first.path)
    assert evaluate_run(moved, load_run(moved))["agreement"] == group["seeds"][1]["student"]["agreement"]


def test_a_stage_goes_on_from_what_the_first_run_made(run_it: Callable[..., Any]) -> None:
    """`from:` an assistant's stage, which the runs of further seeds do not have."""
    text = GENERATIONS.replace("student: {from: gen1}", "from: gen1")
    _, group = run_it(text=text, seeds=2, controls=("baseline", "shuffled_labels"))
    for run in (group["seeds"][1]["run"], group["seeds"][1]["controls"]["shuffled_labels"]["run"]):
        (stage,) = load_run(runs.Run(Path(run))).train_stages
        assert (stage.name, stage.start) == ("gen2", "fresh")
        assert stage.student is not None and str(stage.student.weights).endswith("teachers/gen1.safetensors")


def test_a_group_without_a_test_split_or_its_time(folder: Path, run_it: Callable[..., Any]) -> None:
    drawn = np.random.default_rng(0)
    images, labels = drawn.integers(0, 255, (120, 8, 8), dtype=np.uint8), np.arange(120) % 4
    np.savez(folder / "mine.npz", x_train=images, y_train=labels)
    data = f"data={{kind: npz, path: {folder / 'mine.npz'}}}"
    limits = ("teacher.control=true", "teacher.train=null", "train.max_minutes=0.000001")
    _, group = run_it(data, *limits, seeds=2, controls=("baseline",))
    assert group["statements"][-1].startswith("measured on the val split, for there is no test split")
    assert all(row["baseline"]["agreement"] is not None for row in group["seeds"])
    for role in ("main", "baseline"):
        assert f"{role}: 2 of 2 runs ended before their last epoch: time budget spent" in group["notes"]


def test_a_group_keeps_the_code_it_began_with(folder: Path, experiment: Callable[..., Experiment]) -> None:
    """The user's own file is changed, then goes, and the tree of runs is moved, while members are still to come."""

    class Stops(Reporter):
        def say(self, text: str) -> None:
            if "seed 1" in text:
                raise RuntimeError

    own = folder / "own.py"
    own.write_text(OWN_LOSS)
    losses = "losses=[{kind: ce}, {kind: ./own.py:Own, weight: 2}]"
    with pytest.raises(RuntimeError):
        train(Plan(experiment("distill=null", losses), "", seeds=2), Stops())
    own.unlink()
    shutil.move(folder / "runs" / "small", folder / "elsewhere")
    result = resume(runs.Run(folder / "elsewhere" / "001"), Reporter())
    codes = [Path(row["run"]) / "code" / "own.py" for row in result["seeds"]]
    assert [code.read_text() for code in codes] == [OWN_LOSS] * 2


def test_a_run_that_a_dead_process_made_is_taken_up(folder: Path, experiment: Callable[..., Experiment]) -> None:
    class Dies(Reporter):
        def epoch(self, line: dict[str, Any], epochs: int) -> None:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        train(Plan(experiment(), "", seeds=2), Dies())
    (group,) = (folder / "runs" / "small" / "groups").glob("*.json")
    document = json.loads(group.read_text())
    document["members"][0]["run"] = None  # it died between making the run and noting it
    group.write_text(json.dumps(document))
    result = resume(runs.find("small/001"), Reporter())
    assert [row["run"] for row in result["seeds"]] == ["runs/small/001", "runs/small/002"]


def test_the_teachers_time_is_not_the_students(run_it: Callable[..., Any]) -> None:
    run, _ = run_it("train.max_minutes=5")
    loaded = load_run(run)
    run.update(seconds={"teacher": 299.0, "student": 100.0})
    assert pipeline._budget(run, loaded, loaded.student_stage) == pytest.approx(200)
    assert pipeline._budget(run, loaded, loaded.train_stages[0]) == float("inf")


# ------------------------------------------------------------------------------------------------------ failed starts


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        (("distill=null", "losses=[{kind: ce}, {kind: attention_transfer, taps: [nowhere]}]", "teacher.train=null",
          "teacher.control=true"), ConfigError),
        (("data={kind: cifar10, root: .}",), MissingError),
        (("train.device=cuda:77",), MissingError),
    ],
)  # fmt: skip
def test_a_start_that_fails_leaves_nothing(
    overrides: tuple[str, ...], kind: type[Exception], folder: Path, experiment: Callable[..., Experiment]
) -> None:
    for seeds in (1, 2):
        with pytest.raises(kind):
            train(Plan(experiment(*overrides), "", seeds=seeds), Reporter())
        left = [p for p in folder.rglob("*") if p.is_file() and p.name != "small.yaml" and p.suffix != ".lock"]
        assert [p for p in left if p.name != "latest"] == []
        with pytest.raises(MissingError):
            runs.find("latest")


def test_a_mistake_in_a_later_stage_keeps_what_was_trained(folder: Path, experiment: Callable[..., Experiment]) -> None:
    loaded = experiment("distill=null", "losses=[{kind: ce}, {kind: attention_transfer, taps: [nowhere]}]")
    with pytest.raises(ConfigError, match="nowhere"):
        train(Plan(loaded, ""), Reporter())
    assert runs.find("small").info["stages"] == {"teacher": "done", "student": "running"}


# --------------------------------------------------------------------------------------------------- what is loaded


def test_classes_in_another_order_are_refused(folder: Path, run_it: Callable[..., Any]) -> None:
    made, _ = run_it()
    model = load_model(made / "teacher")
    model.record.class_names = model.record.class_names[::-1]
    save_model(model, folder / "reversed")
    with pytest.raises(ConfigError, match="class 0 of the model is '9', of the data '0'"):
        run_it(f"teacher={{kind: digits_cnn, weights: {folder}/reversed.safetensors}}")


def test_weights_with_a_record_say_what_they_are(folder: Path, run_it: Callable[..., Any]) -> None:
    made, _ = run_it()
    weights = f"weights: {made.path.resolve()}/teacher.safetensors"
    _, document = run_it(f"teacher={{kind: digits_cnn, {weights}}}")
    assert document["teacher"]["parameters"] == 4370  # width 8, from the record, where the default is another
    for wrong, got in (("kind: mlp, hidden: [8]", "teacher.kind"), ("kind: digits_cnn, width: 16", "teacher.width")):
        with pytest.raises(ConfigError, match=got):
            run_it(f"teacher={{{wrong}, {weights}}}")
    with pytest.raises(ConfigError, match=r"teacher\.normalize"):
        run_it(f"teacher={{kind: digits_cnn, normalize: none, {weights}}}")


def test_a_good_teacher_passes_on_data_sorted_by_class(
    experiment: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = experiment()
    data = build.build_data(loaded)
    assert data.val is not None
    data.val = data.val.subset(torch.argsort(data.val.targets, stable=True))
    seen: list[float] = []
    monkeypatch.setattr(pipeline, "_TEACHER_CHECK_SAMPLES", 50)
    monkeypatch.setattr(build, "check_teacher", lambda top1, chance, spec: seen.append(chance))
    stage = loaded.student_stage.model_copy(
        update={"teacher": loaded.student_stage.teachers[0].model_copy(update={"stage": None})}
    )
    pipeline._check_teachers(build.build_stage(loaded, stage, data, Path), stage, loaded)
    assert seen[0] < 20


def test_several_teachers_train_a_student_by_logits_and_by_features(experiment: Callable[..., Experiment]) -> None:
    two = "[{kind: digits_cnn, width: 8, control: true}, {kind: digits_cnn, width: 16, control: true}]"
    features = "losses=[{kind: ce}, {kind: fitnet, taps: [layer1]}]"
    for loaded in (experiment(f"teacher={two}"), experiment(f"teacher={two}", "distill=null", features)):
        document = train(Plan(loaded, ""), Reporter())
        assert document["status"] == "done" and document["teacher"] is not None


def test_keeping_the_last_weights_reports_their_epoch(run_it: Callable[..., Any]) -> None:
    run, document = run_it("train.keep=last", "train.epochs=4")
    lines = [line for line in run.metrics() if line["stage"] == "student"]
    assert document["student"]["best"]["epoch"] == 4 and document["student"]["best"]["val"] == lines[-1]["val"]
    assert document["student"]["best"]["test"] == document["student"]["last"]["test"]


@pytest.mark.parametrize("workers", [0, 2])
def test_dropout_and_decoding_workers_resume_bit_identically(
    workers: int, folder: Path, experiment: Callable[..., Experiment]
) -> None:
    (folder / "drop.py").write_text(DROPOUT)
    text = (
        "name: drop\ndata: {kind: './drop.py:Decoded', batch_size: 50}\nstudent: {kind: './drop.py:Drop'}\n"
        "train: {epochs: 2, device: cpu, threads: 1}\n"
    )

    class Stops(Reporter):
        def step(self, stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
            if (epoch, step) == (0, 3):
                os.kill(os.getpid(), signal.SIGTERM)

    train(Plan(experiment("data.workers=0", text=text), "", run_dir=folder / "whole"), Reporter())
    with pytest.raises(Interrupted):
        train(Plan(experiment(f"data.workers={workers}", text=text), "", run_dir=folder / "stopped"), Stops())
    resume(runs.Run(folder / "stopped"), Reporter())
    whole, stopped = (load_model(folder / name).net.state_dict() for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_a_random_control_teacher_is_the_same_net_whenever_it_is_measured(
    folder: Path, experiment: Callable[..., Experiment]
) -> None:
    loaded = experiment("teacher={kind: digits_cnn, width: 8, control: true}")
    document = train(Plan(loaded, ""), Reporter())
    run = runs.Run(Path(document["run"]))
    torch.manual_seed(5)
    again = evaluate_run(run, load_run(run))
    assert again["teacher"] == document["teacher"]["test"] and again["agreement"] == document["agreement"]
    data = build.build_data(loaded)
    taught = build.build_stage(loaded, loaded.student_stage, data, Path).teachers[0]
    measured = build.build_teachers(loaded.student_stage, data, loaded.train.seed, Path)[0]
    assert all(torch.equal(a, b) for a, b in zip(taught.parameters(), measured.parameters(), strict=True))


def test_a_moved_tree_of_runs_goes_on_where_it_is(folder: Path, experiment: Callable[..., Experiment]) -> None:
    class Dies(Reporter):
        def say(self, text: str) -> None:
            if text.startswith("baseline run"):
                raise RuntimeError

    with pytest.raises(RuntimeError):
        train(Plan(experiment(), "", seeds=2, controls=("baseline",)), Dies())
    shutil.move(folder / "runs", folder / "moved")
    result = resume(runs.find("latest", folder / "moved"), Reporter())
    assert len(result["seeds"]) == 2 and "gain" in result["summary"]
    assert not (folder / "runs").exists() or not list((folder / "runs").glob("small/0*"))


@pytest.mark.parametrize("kind", ["LBFGS", "SparseAdam"])
def test_an_optimizer_of_another_kind_is_refused(kind: str, experiment: Callable[..., Experiment]) -> None:
    with pytest.raises(ConfigError, match="does not take one step"):
        train(Plan(experiment(f"optimizer={{kind: {kind}, lr: 0.1}}"), ""), Reporter())


def test_a_model_that_cannot_take_the_images_says_so(folder: Path, experiment: Callable[..., Experiment]) -> None:
    (folder / "big.py").write_text(
        "from torch import nn\n\n\nclass Big(nn.Module):\n"
        '    """Wants 224 x 224."""\n\n'
        "    def __init__(self, *, num_classes: int) -> None:\n        super().__init__()\n"
        "        self.fc = nn.Linear(224, num_classes)\n\n"
        "    def forward(self, x):\n        assert x.shape[-1] == 224, 'wrong height'\n"
        "        return self.fc(x.mean((1, 2)))\n"
    )
    with pytest.raises(ConfigError, match=r"cannot take images of shape \(1, 8, 8\).*wrong height"):
        train(Plan(experiment("student={kind: './big.py:Big'}"), ""), Reporter())
    train(Plan(experiment("student={kind: './big.py:Big', input_size: 224}"), ""), Reporter())


def test_data_of_another_kind_are_refused_at_eval(run_it: Callable[..., Any]) -> None:
    run, _ = run_it()
    model = load_model(run.path)
    model.record.image_shape = [3, 8, 8]
    data = build.build_data(load_run(run))
    with pytest.raises(ConfigError, match="3 channels, the data have 1"):
        build.check_fits(model.record, data, "student")


def test_a_signal_during_the_measurement_stops_the_group(
    experiment: Callable[..., Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, measured = pipeline.summarize, []

    def summarize(run: runs.Run, *rest: Any) -> dict[str, Any]:
        measured.append(run)
        if len(measured) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(run, *rest)

    monkeypatch.setattr(pipeline, "summarize", summarize)
    with pytest.raises(Interrupted):
        train(Plan(experiment("train.epochs=1"), "", seeds=2), Reporter())
    (first,) = measured
    assert first.info["status"] == "interrupted" and (first / "summary.json").exists()
    resume(first, Reporter())
    assert len(measured) == 2 and first.info["status"] == "done"
