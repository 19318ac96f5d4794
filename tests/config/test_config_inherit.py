"""What a file may say of weights that a student begins with, and of modules that do not train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdctl.config.dump import dump_yaml
from kdctl.config.expand import load_experiment
from kdctl.config.schema import Experiment
from kdctl.errors import ConfigError, MissingError

BASE = """
data: {kind: text, root: .}
teacher: {kind: bert, depth: 6, width: 48, heads: 4, control: true}
student: {kind: bert, depth: 2, width: 16, inherit: {}}
"""
STAGED = (
    BASE
    + """
stages:
  - {name: hints, losses: [{kind: hidden_mse, taps: [bert.encoder.layer.1]}]}
  - {name: student}
"""
)


@pytest.fixture
def load(write: Callable[..., Path]) -> Callable[..., Experiment]:
    def call(text: str, *overrides: str) -> Experiment:
        return load_experiment(write(text), overrides, require_files=False).experiment

    return call


def test_defaults_and_the_dump_reads_back(load: Callable[..., Experiment], write: Callable[..., Path]) -> None:
    experiment = load(BASE, "frozen=[bert.embeddings]")
    (stage,) = experiment.train_stages
    assert stage.student is not None and stage.student.inherit is not None and stage.frozen == ["bert.embeddings"]
    assert stage.student.inherit.model_dump() == {
        "source": "teacher", "parts": "all", "layers": None, "widths": "svd"
    }  # fmt: skip
    assert load(dump_yaml(experiment)) == experiment


def test_the_first_stage_inherits_and_the_next_goes_on(load: Callable[..., Experiment]) -> None:
    experiment = load(STAGED, "frozen=[bert.embeddings]", "stages.student.frozen=[]")
    first, second = experiment.train_stages
    assert first.student is not None and first.student.inherit is not None and first.frozen == ["bert.embeddings"]
    assert second.start == "hints" and second.student is not None and second.student.inherit is None
    assert second.frozen == [] and load(dump_yaml(experiment)) == experiment


def test_only_students_are_frozen(load: Callable[..., Experiment]) -> None:
    teacher = "teacher={kind: bert, depth: 6, width: 48, heads: 4, train: {epochs: 1}}"
    made = load(BASE, teacher, "frozen=[bert.embeddings]", "compress=[{kind: finetune}]")
    assert [(stage.name, stage.frozen) for stage in made.train_stages] == [
        ("teacher", []), ("student", ["bert.embeddings"]), ("finetune", [])
    ]  # fmt: skip
    assert made.train_stages[2].student is not None and made.train_stages[2].student.inherit is None


def test_a_source_is_a_path_beside_its_file(write: Callable[..., Path]) -> None:
    path = write(BASE.replace("inherit: {}", "inherit: {source: weights/encoder}"), "folder/exp.yaml")
    (path.parent / "data").mkdir()
    found = load_experiment(path, require_files=False).experiment.student.inherit
    assert found is not None and found.source == str(path.parent / "weights" / "encoder")
    with pytest.raises(MissingError) as caught:
        load_experiment(path)
    assert "student.inherit.source" in [problem.key for problem in caught.value.problems]


WRONG: list[tuple[list[str], str, str, str]] = [
    (["student.inherit.layers=[0, 6]"], "student.inherit.layers", "got layer 6; allowed: 0 to 5", "from 0"),
    (["student.inherit.layers=[0]"], "student.inherit.layers", "got 1 layer for a student of 2", "0, 5"),
    (["student.inherit.layers=[-1, 0]"], "student.inherit.layers.0", "got -1; allowed: a number >= 0", ""),
    (["student.inherit.layers=[]"], "student.inherit.layers", "allowed", ""),
    (["student.depth=8"], "student.inherit.layers", "a student of 8 layers inherits from 6", "some of them twice"),
    (["student.width=64"], "student.width", "width 64 cannot inherit from a teacher of width 48", "up to 48"),
    (["student.inherit={parts: embeddings, layers: [0, 1]}"], "student.inherit.layers", "no effect", "parts: all"),
    (["student.inherit.widths=pca"], "student.inherit.widths", "allowed: 'svd' or 'truncate'", ""),
    (["student.inherit.parts=head"], "student.inherit.parts", "allowed: 'all' or 'embeddings'", ""),
    (["student.inherit.layer=[0, 1]"], "student.inherit.layer", "unknown key", "'layers'"),
    (["student.inherit=true"], "student.inherit", "got true", ""),
    (["teacher=null"], "student.inherit.source", "has no teacher to inherit from", "add teacher"),
    (["student.weights=x"], "student.inherit", "both weights and inherit are given", "remove one"),
    (["teacher.inherit={}"], "teacher.inherit", "a teacher inherits from nobody", "the student"),
    (["frozen=bert"], "frozen", "allowed: a list", ""),
]


@pytest.mark.parametrize(("overrides", "key", "words", "hint"), WRONG)
def test_refused(load: Callable[..., Experiment], overrides: list[str], key: str, words: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(BASE, *overrides)
    found: dict[str | None, Any] = {problem.key: problem for problem in caught.value.problems}
    assert words in found[key].message and hint in (found[key].hint or "")


def test_refused_in_stages(load: Callable[..., Experiment]) -> None:
    """A stage that goes on and says that it inherits, one without a teacher, and frozen that nobody takes."""
    own = "{kind: bert, depth: 2, width: 16, inherit: {}}"
    cases = [
        ([f"stages.student.student={own}", "stages.student.from=hints"], "stages.1.student.inherit", "goes on with"),
        (["stages.hints={name: hints, teacher: null}"], "student.inherit.source", "stage 'hints' has no teacher"),
        (["stages.hints.frozen=[]", "stages.student.frozen=[]", "frozen=[a]"], "frozen", "this has no effect"),
    ]
    for overrides, key, words in cases:
        with pytest.raises(ConfigError) as caught:
            load(STAGED, *overrides)
        assert [words in p.message for p in caught.value.problems if p.key == key] == [True], caught.value
