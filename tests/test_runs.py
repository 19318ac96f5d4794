"""The run directory: made whole or not at all, numbered, found, locked, and cut back on resume."""

from __future__ import annotations

import errno
import multiprocessing
from pathlib import Path

import pytest

from kdctl import runs
from kdctl.errors import KdctlError, MissingError, UsageError


def make(root: Path, name: str = "x", role: str = "main", **more: object) -> runs.Run:
    return runs.create(name, "a: 1\n", "a: 1 # mine\n", stages=["student"], seed=0, role=role, root=root, **more)  # type: ignore[arg-type]


def test_runs_are_numbered_and_never_overwritten(tmp_path: Path) -> None:
    first, second = make(tmp_path), make(tmp_path)
    assert [first.path.name, second.path.name] == ["001", "002"]
    assert first.info["number"] == 1 and first.info["status"] == "running"
    assert first.config.read_text() == "a: 1\n" and (first / "config.source.yaml").read_text() == "a: 1 # mine\n"
    assert runs.read_json(first / "env.json")["packages"]["torch"]


def test_a_named_directory_is_refused_when_it_holds_something(tmp_path: Path) -> None:
    place = tmp_path / "mine"
    run = make(tmp_path, run_dir=place)
    assert run.path == place
    with pytest.raises(UsageError, match="never overwritten"):
        make(tmp_path, run_dir=place)


def test_a_failed_creation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> dict[str, object]:
        raise OSError("disk full")

    monkeypatch.setattr(runs, "environment", fail)
    with pytest.raises(OSError, match="disk full"):
        make(tmp_path)
    assert list((tmp_path / "x").iterdir()) == []


def test_two_creations_at_once_get_two_numbers(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.map(make, [tmp_path] * 12)
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == [f"{n:03d}" for n in range(1, 13)]


def test_latest_is_the_newest_main_run(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no run under"):
        runs.find(None, tmp_path)
    make(tmp_path)
    main = make(tmp_path, "y")
    make(tmp_path, "y", role="control")
    assert runs.find("latest", tmp_path).path == main.path.resolve()
    (tmp_path / "latest").unlink()  # a tree that was moved, or a crash before the file was written
    assert runs.find(None, tmp_path).path == main.path


def test_runs_are_found_by_name_number_and_path(tmp_path: Path) -> None:
    run = make(tmp_path, "digits")
    make(tmp_path, "digits", role="control")  # is later, and not what the name means
    for text in ("digits", "digits/001", str(run.path)):
        assert runs.find(text, tmp_path).path.resolve() == run.path.resolve()
    with pytest.raises(MissingError) as error:
        runs.find("digits/003", tmp_path)
    assert error.value.problems[0].hint


def test_metrics_are_cut_back_to_a_checkpoint(tmp_path: Path) -> None:
    run = make(tmp_path)
    size = run.append_metrics({"epoch": 1})
    run.append_metrics({"epoch": 2})
    run.cut_metrics(size)
    assert run.metrics() == [{"epoch": 1}]
    run.cut_metrics(10**6)
    assert run.metrics() == [{"epoch": 1}]


def _hold(run: runs.Run, held: object, release: object) -> None:
    with run.locked():
        held.set()  # type: ignore[attr-defined]
        release.wait(20)  # type: ignore[attr-defined]


def test_a_run_in_use_is_refused_until_its_process_ends(tmp_path: Path) -> None:
    run = make(tmp_path)
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(run, held, release))
    process.start()
    assert held.wait(20)
    with pytest.raises(KdctlError, match="in use"), run.locked():
        pass
    release.set()
    process.join(20)
    with run.locked():
        pass


def test_a_damaged_json_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"a": ')
    with pytest.raises(MissingError, match=r"run\.json"):
        runs.read_json(tmp_path / "run.json")


def test_a_damaged_run_does_not_hide_the_others(tmp_path: Path) -> None:
    run = make(tmp_path)
    (make(tmp_path) / "run.json").write_text("{")
    assert [r.path for r in runs.all_runs(tmp_path)] == [run.path]


@pytest.mark.parametrize("content", ["{}", "[]", '"x"'])
def test_a_record_of_nothing_is_damaged(tmp_path: Path, content: str) -> None:
    run = make(tmp_path)
    (run / "run.json").write_text(content)
    with pytest.raises(MissingError, match="damaged"):
        _ = run.info


def test_reserved_names_are_refused(tmp_path: Path) -> None:
    for name in runs.RESERVED:
        with pytest.raises(UsageError, match="cannot be called"):
            make(tmp_path, name)


def test_a_copied_tree_finds_its_own_latest(tmp_path: Path) -> None:
    make(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert runs.find("latest", tmp_path / "b").path.resolve() == (tmp_path / "b" / "x" / "001").resolve()


def test_a_file_system_without_locks_guards_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    run = make(tmp_path)
    monkeypatch.setattr("fcntl.flock", refuse)
    with run.locked():
        pass
