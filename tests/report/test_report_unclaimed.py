"""Runs and groups that show nothing, or less than they seem to: page and card say so."""

from __future__ import annotations

import json
from pathlib import Path

from made_runs import make_group, make_run, write

from kdctl.report import claims, curves
from kdctl.report.card import card
from kdctl.report.facts import collect


def test_an_interrupted_group_claims_nothing_yet(tmp_path: Path) -> None:
    runs, path = make_group(tmp_path / "runs", seeds=1, controls=("baseline",))
    document = json.loads(path.read_text())
    document.pop("result")
    write(path, document)
    runs[1].update(status="interrupted")
    facts = collect([runs[0]])
    claim = str(claims.summary(facts).blocks[0])
    assert not facts.training and "1 of 2 runs of the group are done" in claim and "no control" not in claim
    assert str(runs[1]) in claim and "is interrupted" in claim
    assert "is not finished: nothing is shown yet" in card(facts)


def test_a_run_of_no_epochs_trained_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs", whole=False)
    (run / "metrics.jsonl").unlink()
    assert "Nothing was trained" in str(curves.curves(collect([run])).blocks)


def test_a_teacher_of_an_earlier_stage_is_told(tmp_path: Path) -> None:
    """Hints first, labels alone in the last stage: summary.json has no teacher."""
    run = make_run(tmp_path / "runs", whole=False)
    write(run / "summary.json", json.loads((run / "summary.json").read_text()) | {"teacher": None})
    facts = collect([run])
    assert "no control" in str(claims.summary(facts).blocks[0]) and "its last stage had no teacher" in card(facts)
    run.config.write_text("name: made\ndata: {kind: digits}\nstudent: {kind: digits_cnn}\n")
    facts = collect([run])
    assert "without a teacher" in str(claims.summary(facts).blocks[0]) and "without a teacher" in card(facts)
