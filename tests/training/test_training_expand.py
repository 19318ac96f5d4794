"""Runs with further texts: they are learnt from the teacher alone, and a student without one does not see them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdctl import build, runs
from kdctl.config.schema import Experiment
from kdctl.control import control
from kdctl.experiment import load_run
from kdctl.report.compare import compare

pytest.importorskip("tokenizers")

FILE = """
name: small
task: {kind: text_classification}
data:
  {kind: text, root: texts, test: train.tsv, max_length: 16, vocab_size: 80, val_fraction: 0.2, batch_size: 80,
   expand: [{kind: ngrams, count: 20, shortest: 2}, {kind: swaps, count: 12}]}
student: {kind: bert, depth: 1, width: 16, heads: 2, dropout: 0}
teacher: {kind: bert, depth: 1, width: 24, heads: 2, dropout: 0, control: true, train: {epochs: 1}}
losses: [{kind: ce, weight: 0.5}, {kind: kd, weight: 0.5, T: 2}]
optimizer: {kind: adamw, lr: 0.01}
train: {epochs: 1, device: cpu, threads: 1}
"""


@pytest.fixture(autouse=True)
def texts(folder: Path) -> None:
    """60 texts of 6 to 12 words."""
    draw = random.Random(0)
    (folder / "texts").mkdir()
    lines = []
    for number in range(60):
        words = draw.choices(["the", "film", "was", "it", "and", "of", "good", "bad"], k=draw.randrange(6, 13))
        lines.append(f"{' '.join(words)}\t{number % 2}")
    (folder / "texts" / "train.tsv").write_text("\n".join(["text\tlabel", *lines]))


def first_terms(run: Any) -> dict[str, float]:
    terms: dict[str, float] = next(line for line in run.metrics() if line["stage"] == "student")["terms"]
    return terms


def test_further_texts_count_for_the_teachers_terms_alone(run_it: Callable[..., Any]) -> None:
    """In an epoch of one batch the supervised term is that of the labelled texts, whatever else the batch has."""
    run, _ = run_it("teacher_cache={dtype: fp32}", text=FILE)
    data = build.build_data(load_run(run))
    assert len(data.train) == 80 and sum(data.class_counts()) == 48
    terms = first_terms(run)
    plain = first_terms(run_it("name=plain", "data.expand=[]", text=FILE)[0])
    assert terms["supervised"] == pytest.approx(plain["supervised"], rel=1e-5)
    assert np.isfinite(terms["kd"]) and terms["kd"] != pytest.approx(plain["kd"], rel=1e-5)


def test_controls_without_a_teacher_are_not_shown_them(run_it: Callable[..., Any]) -> None:
    _, group = run_it(text=FILE, controls=["baseline", "shuffled_labels"])
    row = group["seeds"][0]
    alone, placebo = (
        runs.Run(Path(place)) for place in (row["baseline"]["run"], row["controls"]["shuffled_labels"]["run"])
    )
    main = runs.Run(Path(row["run"]))
    assert load_run(main).data.expand == load_run(placebo).data.expand and not load_run(alone).data.expand
    assert not [note for note in compare([str(main.path), str(alone.path)])["notes"] if "does not compare" in note]


@pytest.mark.parametrize(
    ("override", "kept"),
    [("data.limit=30", True), ("losses=[{kind: ce}, {kind: kd}]", False)],
)
def test_a_limit_takes_the_same_samples_with_and_without_a_teacher(
    override: str, kept: bool, experiment: Callable[..., Experiment]
) -> None:
    taught = experiment(override, text=FILE)
    alone = control(taught)
    assert bool(alone.data.expand) is kept
    mine, theirs = build.build_data(alone).class_counts(), build.build_data(taught).class_counts()
    assert mine == theirs
