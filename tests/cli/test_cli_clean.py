"""clean deletes what kdctl made and was asked for, and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from kdctl import runs
from kdctl.cli import app


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDCTL_CACHE", str(tmp_path / "cache"))
    return tmp_path


def make(place: str, *, days: float = 0, config: str = "", **info: object) -> Path:
    """A run made this many days ago, whose files are as old."""
    run = Path("runs", place)
    (run / "stages/student/checkpoints").mkdir(parents=True)
    (run / "stages/student/checkpoints/last.pt").write_bytes(b"x" * 1000)
    (run / "config.yaml").write_text(config)
    made = datetime.now(UTC) - timedelta(days=days)
    known = {"role": "main", "status": "done", "created": made.isoformat(), "group": None, "seed": 0}
    runs.write_json(run / "run.json", known | info)
    age(run, days)
    return run


def age(path: Path, days: float) -> None:
    then = time.time() - days * 86400
    for each in [*path.rglob("*"), path]:
        os.utime(each, (then, then))


@pytest.fixture
def call(home, capsys):
    def call(*arguments: str) -> dict:
        code = app.run(["clean", *arguments, "--json"])
        return json.loads(capsys.readouterr().out) | {"code": code}

    return call


def paths(document: dict) -> list[str]:
    return [item["path"] for item in document["items"]]


def test_nothing_happens_without_yes(call, home):
    run = make("a/001")
    before = sorted(home.rglob("*"))
    document = call(str(run))
    assert (document["code"], document["deleted"], paths(document)) == (0, False, ["runs/a/001"])
    size = sum(p.stat().st_size for p in run.rglob("*") if p.is_file())
    assert document["bytes"] == size and document["items"][0]["files"] == 3
    assert sorted(home.rglob("*")) == before


def test_a_named_run_goes_whole(call):
    make("a/001")
    kept = make("b/001")
    (Path("runs/latest")).write_text("a/001\n")
    document = call("runs/a/001", "--yes")
    assert document["code"] == 0 and document["items"][0]["deleted"]
    assert not Path("runs/a").exists() and kept.exists()
    assert not Path("runs/latest").exists() and runs.find().path == kept


def test_unknown_files_and_links_stay(call, home):
    run = make("a/001")
    (run / "thesis.tex").write_text("mine")
    (run / ".my.settings").write_text("mine")
    (home / "elsewhere").mkdir()
    (home / "elsewhere/data.bin").write_text("mine")
    (run / "plots").symlink_to(home / "elsewhere")
    (run / "stages/student/link").symlink_to(home / "elsewhere")
    (item,) = call("runs/a/001", "--yes")["items"]
    assert item["unknown"] == [".my.settings", "plots", "thesis.tex"]
    assert sorted(p.name for p in run.iterdir()) == item["unknown"]
    assert (home / "elsewhere/data.bin").exists()


def test_a_link_to_a_run_is_not_followed(call, home):
    run = make("a/001", days=40)
    (home / "link").symlink_to(run)
    document = call("link", "--yes")
    assert document["code"] == 2 and "is a link" in document["errors"][0]["message"]
    Path("runs/b").symlink_to(Path("a"))
    assert "runs/b/001" not in paths(call("--older", "30d"))


def test_only_runs_are_deleted(call, home):
    (home / "folder").mkdir()
    (home / "folder/file").touch()
    assert call("folder", "--yes")["code"] == 4 and (home / "folder/file").exists()
    make("a/001")
    make("a/002")
    document = call("a", "--yes")
    assert document["code"] == 2 and "several runs: runs/a/001, runs/a/002" in document["errors"][0]["message"]


def test_older(call):
    for place, days in (("a/001", 40), ("a/002", 20), ("b/001", 50)):
        make(place, days=days)
    make("c/001", days=60, status="running")
    Path("runs/latest").write_text("b/001\n")
    document = call("--older", "30d", "--yes")
    assert paths(document) == ["runs/a/001"]
    assert {k["path"]: k["why"] for k in document["kept"]}.keys() == {"runs/b/001", "runs/c/001"}
    assert Path("runs/a/002").exists() and Path("runs/b/001").exists() and not Path("runs/a/001").exists()
    assert call("--older", "3 fortnights")["code"] == 2
    assert paths(call("--older", "2w")) == ["runs/a/002"]


def test_a_run_at_work_is_never_deleted(call):
    held, fresh, killed = (
        make("a/001", days=9),
        make("b/001", status="running"),
        make("c/001", days=9, status="running"),
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(runs.Run(held).locked())
        document = call("runs/a/001", "runs/b/001", "runs/c/001", "--yes")
    assert paths(document) == ["runs/c/001"] and not killed.exists()
    assert {k["path"] for k in document["kept"]} == {"runs/a/001", "runs/b/001"} and held.exists() and fresh.exists()


def test_looking_leaves_the_lock_as_it_is(call):
    run = make("c/001", status="running")
    (run / "run.lock").touch()
    age(run, 9)
    call("runs/c/001")
    assert paths(call("runs/c/001")) == ["runs/c/001"]  # else it had just been changed


def test_a_teacher_stays_unless_it_is_named(call):
    teacher = make("t/001", days=40)
    weights = f"stages:\n  - kind: train\n    teacher:\n      weights: {teacher.resolve()}/student.safetensors\n"
    make("s/001", config=weights)
    document = call("--older", "30d", "--yes")
    assert paths(document) == [] and document["kept"] == [{"path": "runs/t/001", "why": "teacher of runs/s/001"}]
    assert "teacher of runs/s/001" in call("runs/t/001")["items"][0]["why"]
    assert "teacher" not in call("runs/t/001", "runs/s/001")["items"][0]["why"]


def test_runs_of_an_unfinished_group_stay(call):
    for number in ("001", "002"):
        make(f"g/{number}", days=40, group="groups/001.json")
    file = Path("runs/g/groups/001.json")
    members = [{"role": "main", "seed": 0, "run": "001"}, {"role": "main", "seed": 1, "run": "002"}]
    runs.write_json(file, {"members": members})
    assert paths(call("--older", "30d")) == []
    runs.write_json(file, {"members": members, "result": {"verdict": "a gain"}})
    make("z/001")  # else one of the group is the latest
    assert len(paths(call("--older", "30d", "--yes"))) == 2
    file.with_suffix(".yaml").touch()
    file.with_suffix(".code").mkdir()
    assert paths(call()) == []  # its file was just written
    age(file.parent, 1)
    assert paths(call("--yes")) == ["runs/g/groups/001.json"]
    assert not Path("runs/g").exists()


def test_leftovers_of_killed_processes(call):
    run = make("a/001", days=1)
    for place in ("runs/a/.new-abc123_z", "runs/a/.old-abc123_z", "runs/a/001/artefacts/.int8-abc123_z"):
        Path(place).mkdir(parents=True)
        Path(place, "model").write_bytes(b"x" * 10)
    (run / "eval").mkdir()
    (run / "eval/.test.json.abc123_z").write_text("half")
    (run / "eval/.mine.abc123_z").write_text("not ours")
    age(Path("runs"), 1)
    Path("runs/a/.new-justmade").mkdir()
    document = call("--yes")
    assert paths(document) == [
        "runs/a/.new-abc123_z", "runs/a/.old-abc123_z", "runs/a/001/artefacts/.int8-abc123_z",
        "runs/a/001/eval/.test.json.abc123_z",
    ]  # fmt: skip
    assert Path("runs/a/.new-justmade").exists() and (run / "eval/.mine.abc123_z").exists()
    assert call()["items"] == []


def test_checkpoints_alone(call):
    run = make("a/001", days=1)
    failed = make("b/001", days=1, status="failed")
    document = call("--checkpoints", "--yes")
    assert paths(document) == ["runs/a/001/stages/student/checkpoints"] and document["bytes"] == 1000
    assert runs.is_run(run) and not (run / "stages/student/checkpoints").exists()
    assert (failed / "stages/student/checkpoints/last.pt").exists() and document["kept"][0]["path"] == "runs/b/001"


def test_the_stores_of_teachers(call, home):
    store = home / "cache/teachers/resnet-0123"
    store.mkdir(parents=True)
    (store / "key.json").write_text("{}")
    (store / "train.clean.0.block").write_bytes(b"x" * 500)
    (store / "notes.txt").write_text("mine")
    other = home / "cache/teachers/other"
    other.mkdir()
    (other / "file").touch()
    run = make("a/001", days=40)
    document = call("--cache", "--yes")
    assert [Path(path).name for path in paths(document)] == ["resnet-0123"] and document["bytes"] == 502
    assert [p.name for p in store.iterdir()] == ["notes.txt"] and other.exists() and run.exists()


def test_files_with_two_names_count_once(call):
    run = make("a/001")
    os.link(run / "config.yaml", run / "config.source.yaml")
    (run / "summary.json").write_bytes(b"x" * 300)
    os.link(run / "summary.json", run / "bench.json")
    document = call("runs/a/001")
    size = 300 + 1000 + (run / "run.json").stat().st_size
    assert document["bytes"] == size


def test_for_people(call, capsys):
    make("a/001")
    assert app.run(["clean", "runs/a/001"]) == 0
    out = capsys.readouterr().out
    assert "runs/a/001" in out and "nothing was deleted: --yes deletes it" in out
    assert app.run(["clean"]) == 0 and "nothing to delete" in capsys.readouterr().out
