"""Runs whose student begins with weights of its teacher, and their controls, which begin with nothing of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kdctl import build
from kdctl.assembly.inherit import projection
from kdctl.config.schema import Experiment
from kdctl.control import control
from kdctl.data.tokens import TokenSplit
from kdctl.errors import ConfigError
from kdctl.experiment import load_run
from kdctl.forecast import forecast
from kdctl.models.record import load_model
from kdctl.runs import Run

pytest.importorskip("tokenizers")

WORDS = "bert.embeddings.word_embeddings"
FILE = f"""
name: small
task: {{kind: text_classification}}
data: {{kind: text, root: texts, test: test.tsv, max_length: 12, vocab_size: 60, val_fraction: 0.2, batch_size: 16}}
teacher: {{kind: bert, depth: 3, width: 16, heads: 2, control: true, train: {{epochs: 1}}}}
student: {{kind: bert, depth: 2, width: 8, heads: 1, dropout: 0, inherit: {{}}}}
frozen: [{WORDS}]
losses: [{{kind: ce, weight: 0.5}}, {{kind: kd, weight: 0.5}}]
optimizer: {{kind: adamw, lr: 0.01}}
train: {{epochs: 1, device: cpu, threads: 1}}
"""
TEACHER = "teacher: {from: teacher, control: true}"
STAGES = (
    "stages=[{name: teacher, role: teacher, student: {kind: bert, depth: 3, width: 16, heads: 2}}, "
    f"{{name: first, {TEACHER}}}, {{name: student, {TEACHER}}}]"
)


@pytest.fixture(autouse=True)
def texts(folder: Path) -> None:
    draw = random.Random(0)
    (folder / "texts").mkdir()
    for name, count in (("train", 48), ("test", 16)):
        lines = [
            f"{' '.join(draw.choices(['the', 'film', 'was', ('bad', 'good')[n % 2]], k=6))}\t{n % 2}"
            for n in range(count)
        ]
        (folder / "texts" / f"{name}.tsv").write_text("\n".join(["text\tlabel", *lines]))


def words(path: Path) -> torch.Tensor:
    return load_model(path).net.state_dict()[f"{WORDS}.weight"]


def test_frozen_embeddings_are_the_teachers_projected_and_controls_have_their_own(run_it: Callable[..., Any]) -> None:
    """Controls with another teacher, too, begin with fresh weights: what they are compared with does."""
    names = ("baseline", "random_teacher", "self")
    run, document = run_it(text=FILE, controls=names)
    train = build.build_data(load_run(run)).train
    assert isinstance(train, TokenSplit)
    table = words(run / "teacher")
    basis, kept = projection(table, torch.bincount(train.ids.long(), minlength=len(table)), 8)
    projected = table @ basis.float()
    torch.testing.assert_close(words(run / "student"), projected)
    said = (run / "log.txt").read_text()
    assert f"bert.encoder.layer 0, 2, projected with {kept:.1%} of the embeddings' squares kept" in said
    (seed,) = document["seeds"]
    for name in names:
        other = Run(Path((seed["controls"] | {"baseline": seed["baseline"]})[name]["run"]))
        (stage,) = (stage for stage in load_run(other).train_stages if stage.role == "student")
        assert stage.student is not None and stage.student.inherit is None and stage.frozen == [], name
        assert not torch.allclose(words(other / "student"), projected, atol=1e-2), name


@pytest.mark.parametrize("overrides", [(), (STAGES, "teacher=null")])
def test_the_baseline_has_nothing_of_the_teacher(overrides: tuple[str, ...], experiment: Callable[..., Any]) -> None:
    given = experiment(*overrides, text=FILE)
    mine = [stage for stage in given.train_stages if stage.role == "student"]
    assert mine[0].student.inherit is not None and all(stage.frozen == [WORDS] for stage in mine)
    alone = control(given)
    assert [(s.student.inherit, s.frozen) for s in alone.train_stages] == [(None, [])] * len(mine)


def test_what_is_frozen_without_being_inherited_stays_so(experiment: Callable[..., Any]) -> None:
    assert control(experiment("student.inherit=null", text=FILE)).train_stages[0].frozen == [WORDS]


def test_a_forecast_says_what_is_inherited(experiment: Callable[..., Experiment]) -> None:
    document = forecast(experiment(text=FILE))
    (student,) = (stage for stage in document["stages"] if stage["name"] == "student")
    assert any(note.startswith("the student begins with") for note in student["notes"])


def test_a_module_to_freeze_that_is_not_there(run_it: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        run_it(f"frozen=[{WORDS}s]", text=FILE)
    (problem,) = caught.value.problems
    assert problem.key == "frozen" and f"no module '{WORDS}s'" in problem.message and WORDS in (problem.hint or "")
