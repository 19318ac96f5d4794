"""Several teachers, balance, orders of classes and strong views in a file; methods that teach; their controls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kdctl import registry
from kdctl.config.dump import dump_yaml
from kdctl.config.expand import load_experiment
from kdctl.config.schema import Experiment
from kdctl.control import control
from kdctl.errors import ConfigError
from kdctl.methods import METHODS
from kdctl.methods.base import Method

ALL = """\
name: all
data: {kind: digits, augment: [{kind: horizontal_flip}], strong_augment: [{kind: random_crop, padding: 1}]}
student: {kind: digits_cnn, width: 4}
teacher:
  - {kind: digits_cnn, width: 8, control: true, classes: [a, "1", "0"]}
  - {kind: digits_cnn, width: 6, train: {epochs: 1, data: {strong_augment: []}}}
ensemble: {kind: weighted, weights: [1, 3]}
balance: gradient
losses:
  - {kind: ce, weight: 0.1}
  - {kind: fitnet, weight: {0: 0, 20 steps: 1}, taps: [{student: layer1, teacher: [layer1, layer2]}]}
"""
STAGED = """\
name: staged
data: {kind: digits}
student: {kind: digits_cnn, width: 4}
teacher: {kind: digits_cnn, control: true, classes: by_name}
ensemble: {kind: mean}
balance: gradient
method: dot
stages:
  - {name: first, role: teacher, student: {kind: mlp, hidden: [8]}}
  - {name: second, data: {strong_augment: [{kind: horizontal_flip}]}}
  - name: third
    teacher: [{kind: mlp, hidden: [8], from: first}, {kind: digits_cnn, control: true}]
    ensemble: {kind: ebkd}
    balance: none
    method: {kind: distill}
""".replace("method: dot", "method: {kind: dot}")


@pytest.fixture
def load(write: Callable[..., Path]) -> Callable[..., Experiment]:
    def go(text: str, *overrides: str) -> Experiment:
        return load_experiment(write(text), overrides).experiment

    return go


@pytest.mark.parametrize("text", [ALL, STAGED])
def test_expansion_is_a_fixed_point(load: Callable[..., Experiment], text: str) -> None:
    once = load(text)
    assert load(dump_yaml(once)) == once
    alone = control(once)
    assert load(dump_yaml(alone)) == alone
    assert {stage.ensemble.kind for stage in alone.train_stages} == {"mean_logits"}


def test_what_the_new_keys_come_to(load: Callable[..., Experiment]) -> None:
    made, student = load(ALL).train_stages
    assert (made.ensemble.kind, made.balance, made.data.strong_augment) == ("mean_logits", "none", [])
    assert (student.ensemble.kind, student.ensemble.arguments) == ("weighted", {"weights": [1, 3]})
    assert student.balance == "gradient" and student.teachers[0].classes == ["a", "1", "0"]
    assert student.teachers[1].classes is None
    (crop,) = load(ALL).data.strong_augment
    assert crop.kind == "random_crop" and crop.arguments["padding"] == 1 and len(crop.arguments) > 1  # defaults too
    first, second, third = load(STAGED).train_stages
    assert [s.method.kind for s in (first, second, third)] == ["distill", "dot", "distill"]
    assert [s.ensemble.kind for s in (first, second, third)] == ["mean_logits", "mean", "ebkd"]
    assert [s.balance for s in (first, second, third)] == ["none", "gradient", "none"]
    assert second.data.strong_augment is not None and third.data.strong_augment is None
    assert second.teachers[0].classes == "by_name"


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("ensemble: {kind: weighted}", "ensemble.weights"),
        ("ensemble: {kind: weighted, weights: [1, 0]}", "ensemble.weights.1"),
        ("ensemble: {kind: ebkd, variant: other}", "ensemble.variant"),
        ("ensemble: {kind: means}", "ensemble.kind"),
        ("balance: gradients", "balance"),
        ("teacher: {kind: digits_cnn, control: true, classes: by_number}", "teacher.classes"),
        ("teacher: {kind: digits_cnn, control: true, classes: []}", "teacher.classes"),
        ("method: {kind: dot, difference: 2}", "method.difference"),
    ],
)
def test_what_is_refused_with_its_line(load: Callable[..., Experiment], line: str, key: str) -> None:
    base = "data: {kind: digits}\nstudent: {kind: digits_cnn, width: 4}\n"
    with pytest.raises(ConfigError) as caught:
        load(base + line + "\n")
    found = {problem.key: problem.line for problem in caught.value.problems}
    assert found[key] == 3


# ------------------------------------------------------------------------------------------------------------ methods


def teaches(kind: str) -> bool:
    method: type[Method] = registry.load(registry.find("methods", kind))
    return method.provides_teacher


def text_of(kind: str, with_teacher: bool, losses: str = "losses: [{kind: ce, weight: 0.5}, {kind: kd}]\n") -> str:
    teacher = "teacher: {kind: digits_cnn, width: 8, control: true}\n" if with_teacher else ""
    given = {"few_sample": ", layers: [layer1]"}
    return (
        f"name: m\ndata: {{kind: digits}}\nstudent: {{kind: digits_cnn, width: 4}}\n{teacher}{losses}"
        f"method: {{kind: {kind}{given.get(kind, '')}}}\n"
        "optimizer: {kind: sgd, lr: 0.1, momentum: 0.9}\nbalance: gradient\n"
    )


@pytest.mark.parametrize("kind", sorted(METHODS))
def test_a_method_that_teaches_needs_no_teacher(load: Callable[..., Experiment], kind: str) -> None:
    if teaches(kind):
        assert load(text_of(kind, False)).student_stage.teachers == []
        # without losses it is the default of distillation: else nothing would be taught
        kinds = [loss.kind for loss in load(text_of(kind, False, "")).student_stage.losses]
        assert kinds == ["supervised", "kd"]
        (_, kd) = load(text_of(kind, False, "distill: {T: 3, alpha: 0.5}\n")).student_stage.losses
        assert kd.arguments["temperature"] == 3
        staged = text_of(kind, False) + "stages: [{name: student}]\n"
        assert [loss.kind for loss in load(staged).student_stage.losses] == ["supervised", "kd"]
        return
    for more in ("", "stages: [{name: student}]\n"):
        with pytest.raises(ConfigError, match="'kd' needs a teacher"):
            load(text_of(kind, False) + more)


@pytest.mark.parametrize("kind", sorted(set(METHODS) - {"data_free"}))  # which has no control: no real image trains it
def test_the_control_of_a_method_is_plain_training(load: Callable[..., Experiment], kind: str) -> None:
    alone = control(load(text_of(kind, not teaches(kind))))
    stage = alone.student_stage
    method = kind if kind in ("qat", "sparse") else "distill"  # which round and prune the student itself
    assert (stage.method.kind, stage.teacher, stage.balance, stage.ensemble.kind) == (
        method, None, "none", "mean_logits",
    )  # fmt: skip
    assert [(loss.kind, loss.weight) for loss in stage.losses] == [("supervised", 1.0)]
    assert load(dump_yaml(alone)) == alone


def test_a_moment_that_is_none_is_refused_in_words(tmp_path: Path) -> None:
    text = "data: {kind: digits}\nstudent: {kind: digits_cnn}\nlosses: [{kind: ce, weight: {5 epochs: 2}}]\n"
    (tmp_path / "e.yaml").write_text(text)
    with pytest.raises(ConfigError, match="allowed as a key: a whole number or a number of steps as `500 steps`") as e:
        load_experiment(tmp_path / "e.yaml")
    assert e.value.problems[0].line == 3
