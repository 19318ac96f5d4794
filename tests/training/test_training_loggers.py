"""Loggers in training: all runs of a group have them, a resumed run tells nothing twice, a missing one stops it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kdctl import runs
from kdctl.artefacts import measure
from kdctl.bench.latency import Row
from kdctl.config.recipe import recipe_of_options, with_stages
from kdctl.config.schema import Experiment
from kdctl.errors import MissingError
from kdctl.experiment import Plan, resume, train
from kdctl.extension import extend
from kdctl.loggers.mlflow import _allowed
from kdctl.watch import Reporter

RECORDER = '''
import json
from pathlib import Path

from kdctl.loggers.base import Logger, role

class Recorder(Logger):
    """Writes what it is told to a file beside the runs."""

    def start(self, run, experiment):
        self.where = f"{run.path.name} {role(run)}"
        return "recorder"

    def epoch(self, line, number):
        with open("told.jsonl", "a") as file:
            file.write(json.dumps([self.where, line["stage"], line["epoch"], number, line["loss"]]) + chr(10))

    def finish(self, summary):
        with open("told.jsonl", "a") as file:
            file.write(json.dumps([self.where, "finish", summary and summary["status"]]) + chr(10))
'''


@pytest.fixture
def recorded(folder: Path) -> Callable[[], list[Any]]:
    """Puts the recorder beside the experiment; what it was told."""
    import json

    (folder / "recorder.py").write_text(RECORDER)
    return lambda: [json.loads(line) for line in (folder / "told.jsonl").read_text().splitlines()]


RECORDED = "loggers=[{kind: './recorder.py:Recorder'}]"
QUICK = ("teacher.train.epochs=1", "train.epochs=1")


def test_every_run_of_a_group(run_it: Callable[..., Any], recorded: Callable[[], list[Any]]) -> None:
    run_it(RECORDED, *QUICK, controls=("baseline",))
    told = [row[:4] for row in recorded()]
    assert told == [
        ["001 main", "teacher", 1, 1],
        ["001 main", "student", 1, 2],
        ["001 main", "finish", "done"],
        ["002 control baseline", "student", 1, 1],
        ["002 control baseline", "finish", "done"],
    ]


def test_a_resumed_run_goes_on(experiment: Callable[..., Experiment], recorded: Callable[[], list[Any]]) -> None:
    class Dies(Reporter):
        """Dies after an epoch was told and before its checkpoint."""

        def epoch(self, line: dict[str, Any], epochs: int) -> None:
            if line["stage"] == "student":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(Plan(experiment(RECORDED, *QUICK), ""), Dies())
    assert recorded()[-1][1:] == ["finish", None]
    resume(runs.find("small/001"), Reporter())
    epochs = [row[1:4] for row in recorded() if row[1] != "finish"]
    assert epochs == [["teacher", 1, 1], ["student", 1, 2]]
    assert recorded()[-1][1:] == ["finish", "done"]


def test_a_missing_package_stops_before_anything(
    experiment: Callable[..., Experiment], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdctl.loggers.base.util", SimpleNamespace(find_spec=lambda name: None))
    with pytest.raises(MissingError, match="needs mlflow"):
        train(Plan(experiment("loggers=[{kind: mlflow}]"), ""), Reporter())
    assert not list(folder.glob("runs/small/0*"))


def test_a_finetune_of_a_finished_run_is_told(
    run_it: Callable[..., Any], recorded: Callable[[], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more epoch, after those of the run; an extension that trains nothing has nothing to tell."""

    def untimed(cells: Any) -> list[Row]:
        return [Row(c.what, "", c.batch, c.threads, 1.0, 1.0, 1.0, 1000.0, 1, 1) for c in cells]

    monkeypatch.setattr(measure, "measure_latency", untimed)
    run, _ = run_it(RECORDED, *QUICK)
    before = len(recorded())
    for stage in ({"kind": "finetune", "epochs": 1}, {"kind": "low_rank"}):
        extend(run, with_stages(run.config, [], recipe_of_options([stage])), Reporter())
    assert [row[:4] for row in recorded()[before:]] == [["001 main", "finetune", 1, 3], ["001 main", "finish", "done"]]


def test_names_of_other_scripts_stay_apart_in_mlflow() -> None:
    names = [_allowed(f"student/terms/{sign}") for sign in "αβ_"]
    assert len(set(names)) == 3 and all(name.isascii() for name in names)
