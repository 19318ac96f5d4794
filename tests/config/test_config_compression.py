"""Stages of compression: what a `finetune` comes to, which model each takes, and further stages for a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from kdctl.config.dump import dump_yaml
from kdctl.config.expand import load_experiment
from kdctl.config.recipe import Extended, read_recipe, recipe_of_options, with_stages
from kdctl.config.schema import TrainStage
from kdctl.errors import ConfigError

TAUGHT = """\
data: {kind: digits}
student: {kind: digits_cnn, width: 8}
teacher: {kind: digits_cnn, width: 32, train: {epochs: 3}}
losses: [{kind: ce, weight: 0.2}, {kind: kd, weight: 0.8, T: 2}]
optimizer: {kind: adamw, lr: 1e-2}
train: {epochs: 4}
"""
COMPRESS = """\
compress:
  - {kind: prune, ratio: 0.5}
  - {kind: low_rank, keep_ratio: 0.5}
  - {kind: finetune, name: tuned, epochs: 2}
  - {kind: finetune, name: qat, method: {kind: qat, weight_bits: 8}, epochs: 1}
  - {kind: quantize}
  - {kind: export, target: onnx, from: tuned}
"""
Write = Callable[..., Path]


def test_each_stage_takes_the_last_model(write: Write) -> None:
    experiment = load_experiment(write(TAUGHT + COMPRESS)).experiment
    assert [(s.name, s.kind, s.start) for s in experiment.products] == [
        ("prune-0.5", "prune", "student"), ("low_rank-0.5", "low_rank", "prune-0.5"),
        ("tuned", "train", "low_rank-0.5"), ("qat", "train", "tuned"),
        ("int8", "quantize", "qat"), ("onnx", "export", "tuned"),
    ]  # fmt: skip
    assert experiment.student_stage.name == "student"
    assert {experiment.origin(s).name for s in experiment.products} == {"student"}


def test_a_finetune_has_the_teacher_the_terms_and_a_fifth_of_the_rate(write: Write) -> None:
    experiment = load_experiment(write(TAUGHT + COMPRESS)).experiment
    student, tuned = experiment.student_stage, experiment.products[2]
    assert isinstance(tuned, TrainStage)
    assert tuned.kind == "train" and tuned.role == "compressed" and tuned.epochs == 2
    assert tuned.teacher == student.teacher and tuned.losses == student.losses
    assert tuned.optimizer.arguments["lr"] == pytest.approx(student.optimizer.arguments["lr"] / 5)
    assert tuned.schedule == student.schedule and tuned.method.kind == "distill"
    aware = experiment.products[3]
    assert isinstance(aware, TrainStage) and aware.optimizer.kind == "adam", "what its method asks for"


def test_without_a_teacher_the_model_as_it_was_teaches(write: Write) -> None:
    alone = "data: {kind: digits}\nstudent: {kind: digits_cnn, width: 8}\ntrain: {epochs: 1}\n"
    tuned = load_experiment(write(alone + "compress: [{kind: prune}, {kind: finetune}]\n")).experiment.products[1]
    assert tuned.teachers[0].stage == "student" and tuned.teachers[0].arguments == {"width": 8}
    assert [loss.kind for loss in tuned.losses] == ["supervised", "kd"] and tuned.epochs == 5


def test_names_say_what_was_asked_for(write: Write) -> None:
    stages = "[{kind: prune, latency_ms: 0.4}, "
    stages += "{kind: quantize, dtype: int4, mode: weight_only}, {kind: quantize, target: pt2}]"
    experiment = load_experiment(write(TAUGHT + f"compress: {stages}\n")).experiment
    assert [s.name for s in experiment.products] == ["prune-0.4ms", "int4-weight_only", "pt2-int8"]


def test_a_dump_comes_to_the_same(write: Write) -> None:
    experiment = load_experiment(write(TAUGHT + COMPRESS)).experiment
    text = dump_yaml(experiment)
    assert dump_yaml(load_experiment(write(text, "config.yaml")).experiment) == text


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        ("compress: [{kind: train, name: x}]", "compress.0.kind", "has a kind: prune, low_rank, finetune"),
        ("compress: [{name: x}]", "compress.0.kind", "has a kind: prune, low_rank, finetune"),
        ("compress: [{kind: finetune, student: {kind: resnet8}}]", "compress.0.student", "that a stage has made"),
        ("compress: [{kind: finetune, role: teacher}]", "compress.0.role", "no role of its own"),
        ("compress: [{kind: finetune, from: fresh}]", "compress.0.from", "starts from the model of a stage"),
        ("compress: [{kind: finetune, epochs: 0}]", "compress.0.epochs", "does nothing"),
        ("compress: [{kind: finetune, teacher: null, losses: [{kind: kd}]}]", "compress.0.losses.0", "needs a teacher"),
        ("compress: [{kind: quantize, from: nowhere}]", "compress.0.from", "no earlier stage 'nowhere'"),
        ("compress: [{kind: prune, name: a}, {kind: quantize, name: a}]", "compress.1.name", "two stages are called"),
        ("compress: [{kind: quantize, name: q}, {kind: prune, from: q}]", "compress.1.from", "with a model to take"),
        ("compress: [{kind: prun}]", "compress.0.kind", "no compressor 'prun'"),
        ("compress: [{kind: quantize, max_drop: -1}]", "compress.0.max_drop", "a number >= 0"),
    ],
)
def test_what_is_wrong_is_said(write: Write, text: str, key: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_experiment(write(TAUGHT + text + "\n"))
    found = {problem.key: problem.message for problem in error.value.problems}
    assert key in found and message in found[key]


def test_a_finetune_stops_early_by_a_validation_split_alone(write: Write) -> None:
    path = write(TAUGHT + "compress: [{kind: finetune, early_stop: 2}]\n")
    load_experiment(path)
    with pytest.raises(ConfigError, match="needs a validation split") as error:
        load_experiment(path, ["data.val_fraction=0"])
    assert error.value.problems[0].key == "compress.0.early_stop"


def test_a_student_is_trained_first(write: Write) -> None:
    with pytest.raises(ConfigError, match="no student yet to compress"):
        load_experiment(write("data: {kind: digits}\nstudent: {kind: mlp}\nstages: [{kind: prune}, {kind: train}]\n"))


# ---------------------------------------------------------------------------------------------------- further stages


@pytest.fixture
def run_config(write: Write) -> Path:
    resolved = dump_yaml(load_experiment(write(TAUGHT)).experiment)
    return write(resolved, "config.yaml")


def more(config: Path, *stages: dict[str, object]) -> Extended:
    return with_stages(config, [], recipe_of_options(stages))


def test_further_stages_stand_in_the_config(run_config: Path) -> None:
    extended = more(
        run_config, {"kind": "prune", "ratio": 0.5}, {"kind": "finetune", "epochs": 2}, {"kind": "quantize"}
    )
    assert extended.names == extended.waiting == ["prune-0.5", "finetune", "int8"]
    assert extended.known == ["teacher", "student"]
    run_config.write_text(extended.config)
    again = load_experiment(run_config, require_files=False).experiment
    assert again == extended.experiment
    assert again.products[1].teachers[0].stage == "teacher"  # that of the student's own stage


def test_a_model_that_is_there_is_not_made_again(run_config: Path) -> None:
    run_config.write_text(more(run_config, {"kind": "prune", "ratio": 0.5}, {"kind": "finetune", "epochs": 2}).config)
    second = more(run_config, {"kind": "prune", "ratio": 0.5}, {"kind": "finetune", "epochs": 3}, {"kind": "quantize"})
    assert second.names == ["prune-0.5", "finetune-2", "int8"] and second.waiting == ["finetune-2", "int8"]
    assert second.experiment.products[2].start == "prune-0.5"
    run_config.write_text(second.config)
    third = more(run_config, {"kind": "prune", "ratio": 0.5}, {"kind": "finetune", "epochs": 3},
                 {"kind": "quantize", "max_drop": 1.0})  # fmt: skip
    assert third.names == second.names and third.waiting == ["int8"], "a file is made and measured anew"
    assert third.experiment.products[-1].max_drop == 1.0
    assert len(yaml.safe_load(third.config)["stages"]) == len(yaml.safe_load(second.config)["stages"])


def test_a_stage_of_the_same_name_is_replaced(run_config: Path) -> None:
    run_config.write_text(more(run_config, {"kind": "quantize", "name": "small"}).config)
    second = more(run_config, {"kind": "quantize", "name": "small", "calibration": "entropy"})
    assert second.waiting == ["small"] and second.known == ["teacher", "student", "small"]
    stages = yaml.safe_load(second.config)["stages"]
    assert [s["calibration"] for s in stages if s["name"] == "small"] == ["entropy"]
    assert len(stages) == 3


def test_what_stands_on_a_replaced_model_is_made_again(run_config: Path) -> None:
    def recipe(ratio: float) -> Extended:
        pruned = {"kind": "prune", "name": "p", "ratio": ratio}
        return more(run_config, pruned, {"kind": "finetune", "epochs": 2}, {"kind": "quantize"})

    run_config.write_text(recipe(0.3).config)
    assert recipe(0.3).waiting == ["int8"], "all is there"
    second = recipe(0.5)
    assert second.waiting == ["p", "finetune", "int8"]
    assert [s["name"] for s in yaml.safe_load(second.config)["stages"]] == [
        "teacher", "student", "p", "finetune", "int8",
    ]  # fmt: skip


def test_a_replaced_stage_comes_after_what_it_is_made_of_now(run_config: Path) -> None:
    run_config.write_text(more(run_config, {"kind": "prune", "name": "p"}).config)
    first = {"kind": "low_rank", "name": "a"}
    run_config.write_text(more(run_config, first, {"kind": "prune", "name": "p"}).config)
    assert [s.start for s in load_experiment(run_config, require_files=False).experiment.products] == ["student", "a"]


def test_a_name_that_is_given_is_not_taken_by_another(run_config: Path) -> None:
    named = more(run_config, {"kind": "quantize"}, {"kind": "quantize", "name": "int8", "calibration": "mse"})
    assert named.names == ["int8-2", "int8"]


def test_a_recipe_does_not_train_the_student(run_config: Path) -> None:
    with pytest.raises(ConfigError, match="a stage of a recipe has a kind"):
        more(run_config, {"kind": "train", "name": "more"})


def test_only_what_was_done_is_kept(run_config: Path) -> None:
    extended = more(run_config, {"kind": "prune", "ratio": 0.5}, {"kind": "quantize"})
    assert [s["name"] for s in yaml.safe_load(extended.config_of(["prune-0.5"]))["stages"]] == [
        "teacher", "student", "prune-0.5",
    ]  # fmt: skip


def test_paths_of_the_run_stay_relative(write: Write) -> None:
    """A run can be moved, also after its compression."""
    text = TAUGHT.replace("train: {epochs: 3}", "weights: teachers/teacher.safetensors")
    resolved = dump_yaml(load_experiment(write(text), require_files=False).experiment)
    config = write(resolved.replace(str(write("", "x").parent) + "/", "./"), "config.yaml")
    stages = yaml.safe_load(more(config, {"kind": "prune"}, {"kind": "finetune"}).config)["stages"]
    assert stages[-1]["teacher"]["weights"] == "./teachers/teacher.safetensors"


def test_a_recipe_is_checked_like_a_file(run_config: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("compress:\n  - kind: quantize\n    calibration: percentil\n")
    with pytest.raises(ConfigError) as error:
        with_stages(run_config, [], read_recipe(recipe))
    (problem,) = error.value.problems
    assert problem.file == str(recipe) and problem.line == 3 and "percentile" in str(problem)
    recipe.write_text("train: {}\n")
    with pytest.raises(ConfigError, match="one key"):
        read_recipe(recipe)
