"""`kdctl report` as a user calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdctl.cli import app
from kdctl.errors import MissingError
from kdctl.report import claims, origin
from kdctl.runs import Run

sys.path.append(str(Path(__file__).parent.parent / "report"))
from made_runs import make_group, make_run, write


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, and pages without drawings, which take their time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kdctl.report.page.sections", lambda f, notes: [claims.summary(f), origin.limits(f, notes)])
    return tmp_path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], here: Path) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str) -> tuple[int, str, str]:
        code = app.run(["report", *arguments])
        seen = capsys.readouterr()
        return code, seen.out, seen.err

    return run


def test_the_latest_run_and_where_its_page_is(call: Callable[..., Any], here: Path) -> None:
    make_run(here / "runs", whole=False)
    code, out, _ = call("--no-analysis")
    assert code == 0 and out.startswith("wrote runs/made/001/report.html (") and out.endswith(" kB)\n")
    assert "<h1>" in (here / "runs/made/001/report.html").read_text()


def test_the_file_of_a_group_another_place_and_json(call: Callable[..., Any], here: Path) -> None:
    make_group(here / "runs", seeds=1, controls=("baseline",), whole=False)
    code, out, _ = call("runs/made/groups/001.json", "-o", "pages/a.html", "--no-analysis", "--json")
    document = json.loads(out)
    assert code == 0 and document["report"] == "pages/a.html" and document["notes"] == []
    assert document["runs"] == ["runs/made/001", "runs/made/002"]
    assert document["bytes"] == (here / "pages/a.html").stat().st_size


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nothing"], 4, "there is no run at 'nothing'"),
        (["a.txt"], 4, "neither a run nor the file of a group"),
        (["runs/made/groups/009.json"], 4, "no student of runs/made/groups/009.json has begun yet"),
        (["made", "-o", "runs"], 2, "runs is a directory"),
    ],
)
def test_what_cannot_be(call: Callable[..., Any], here: Path, arguments: list[str], code: int, said: str) -> None:
    make_run(here / "runs", whole=False)
    (here / "a.txt").write_text("text")
    write(here / "runs/made/groups/009.json", {"members": [{"role": "main", "seed": 0, "run": None}]})
    got, _, err = call(*arguments, "--no-analysis")
    assert got == code and said in err


def test_what_is_lacking_is_measured_first(
    call: Callable[..., Any], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def analyse(run: Run, experiment: Any, say: Callable[[str], None], **_: Any) -> dict[str, Path]:
        asked.append((str(run), [experiment.name]))
        if len(asked) == 1:
            say("cka was left out: no teacher's weights")
            return {}
        raise MissingError("no data 0.5")

    monkeypatch.setattr("kdctl.analysis.analyse.analyse", analyse)
    make_group(here / "runs", seeds=1, controls=("baseline", "self"), whole=False)
    code, out, err = call()
    assert code == 0 and asked == [("runs/made/001", ["made"]), ("runs/made/002", ["made"])]
    assert "measuring cka, robustness, cost of runs/made/001" in err
    assert (
        "note: cka was left out: no teacher's weights" in out and "runs/made/002 was not analysed: no data 0.5" in out
    )
    page = (here / "runs/made/001/report.html").read_text()
    assert '<span class="said">runs/made/002 was not analysed: no data 0.5</span>' in page


def test_nothing_is_measured_twice_or_of_what_is_not_done(
    call: Callable[..., Any], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdctl.analysis.analyse.analyse", lambda *_, **__: pytest.fail("measured"))
    make_run(here / "runs", "whole")
    make_run(here / "runs", "begun", status="interrupted")
    assert call("whole")[0] == call("begun")[0] == 0
    weights = here / "runs/whole/001/student.safetensors"
    os.utime(weights, (weights.stat().st_atime, weights.stat().st_mtime + 100))
    with pytest.raises(pytest.fail.Exception, match="measured"):
        call("whole")


def test_follow_until_the_run_is_done(call: Callable[..., Any], here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(here / "runs", status="running")
    page, seen = run / "report.html", []

    def sleep(seconds: float) -> None:
        seen.append('http-equiv="refresh"' in page.read_text())
        if len(seen) == 2:
            run.update(status="done")

    monkeypatch.setattr("time.sleep", sleep)
    code, out, err = call("--follow", "--no-analysis")
    assert code == 0 and seen == [True, True] and err.count("loads itself again") == 1
    assert 'http-equiv="refresh"' not in page.read_text() and "wrote runs/made/001/report.html" in out


def test_control_c_stops_following(call: Callable[..., Any], here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(seconds: float) -> None:
        raise KeyboardInterrupt

    make_run(here / "runs", status="running")
    monkeypatch.setattr("time.sleep", sleep)
    assert call("--follow", "--no-analysis")[0] == 130
    assert (here / "runs/made/001/report.html").is_file()


def test_a_page_costs_no_torch(here: Path) -> None:
    make_run(here / "runs", whole=False)
    code = (
        "import sys; from kdctl.cli import app; code = app.run(['report', '--no-analysis', '-q']); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True).returncode == 0
