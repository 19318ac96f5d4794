"""The launcher of several processes: who speaks, who is waited for, and what is said when one of them dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kdctl import launch
from kdctl.errors import KdctlError

HEAD = "import os, sys, time, signal, pathlib; rank = int(os.environ['RANK'])\n"


def start(script: str, count: int = 3) -> int:
    return launch.start(count, [sys.executable, "-c", HEAD + script])


def gone(folder: Path, count: int) -> bool:
    """Whether the processes that wrote their ids into `folder` are no longer there."""
    ids = [int(path.name) for path in folder.iterdir()]
    assert len(ids) == count
    return not any(Path(f"/proc/{number}").exists() for number in ids)


def test_each_process_knows_its_place_and_only_the_first_speaks(tmp_path, capfd):
    names = "('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR')"
    place = f"pathlib.Path({str(tmp_path)!r}, str(rank)).write_text(' '.join(os.environ[n] for n in {names}))"
    assert start(f"{place}\nprint('out', rank)\nprint('err', rank, file=sys.stderr)") == 0
    assert [(tmp_path / str(n)).read_text() for n in range(3)] == [f"{n} {n} 3 3 127.0.0.1" for n in range(3)]
    assert capfd.readouterr() == ("out 0\n", "err 0\n")


def test_the_first_process_ends_the_others_and_its_code_is_handed_on(tmp_path):
    script = f"pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch()\n"
    wait = f"\nwhile len(os.listdir({str(tmp_path)!r})) < 3: time.sleep(0.01)\n"
    began = time.monotonic()
    assert start(script + wait + "if rank == 0: sys.exit(7)\ntime.sleep(60)") == 7
    assert gone(tmp_path, 3)
    assert time.monotonic() - began < 30


def test_a_process_that_ignores_sigterm_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "_PATIENCE", 0.3)
    script = (
        f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\npathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch()\n"
    )
    wait = f"\nwhile len(os.listdir({str(tmp_path)!r})) < 3: time.sleep(0.01)\n"
    assert start(script + wait + "if rank == 0: sys.exit(3)\ntime.sleep(60)") == 3
    assert gone(tmp_path, 3)


def test_a_killed_process_is_named_with_its_signal(capfd):
    assert start("if rank == 2: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(0.3)\nsys.exit(1)") == 1
    assert capfd.readouterr().err == "process 2 of 3 was killed by SIGKILL\n"
    with pytest.raises(KdctlError, match="process 0 of 3 was killed by SIGSEGV") as error:
        start("if rank == 0: os.kill(os.getpid(), signal.SIGSEGV)\ntime.sleep(0.3)\nsys.exit(1)")
    assert error.value.code == 1


def test_the_first_process_explains_what_failed_in_another(capfd):
    """It ends by itself after the other one, and it is its code that counts."""
    script = (
        "if rank == 1: sys.exit(1)\ntime.sleep(0.3)\nprint('why', file=sys.stderr)\nsys.exit(4 if rank == 0 else 1)"
    )
    assert start(script) == 4
    assert capfd.readouterr().err == "why\n"


def test_what_a_process_wrote_is_shown_where_the_first_one_cannot_explain(monkeypatch):
    monkeypatch.setattr(launch, "_PATIENCE", 0.3)
    script = "if rank == 1:\n    print('no such thing', file=sys.stderr)\n    sys.exit(4)\ntime.sleep(60)"
    with pytest.raises(KdctlError, match="process 1 of 3 ended with code 4\nrank 1: no such thing") as error:
        start(script)
    assert error.value.code == 4


def test_a_child_looks_for_modules_where_this_process_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    environment = launch.child_environment(OTHER="yes")
    assert (environment["PYTHONSAFEPATH"], environment["OTHER"]) == ("1", "yes")
    monkeypatch.syspath_prepend(tmp_path)  # as `python -m kdctl` has it, also in a checkout that is not installed
    assert "PYTHONSAFEPATH" not in launch.child_environment()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_goes_to_the_first_process_once(number, code, tmp_path):
    body = (
        f"caught = []\nhere = pathlib.Path({str(tmp_path)!r})\n"
        "signal.signal(signal.SIGTERM, lambda n, _: caught.append(n))\n"
        "signal.signal(signal.SIGINT, lambda n, _: caught.append(n))\n"
        "(here / f'ready{rank}').touch()\n"
        "while not caught and not (here / 'end').exists(): time.sleep(0.01)\n"
        "time.sleep(0.2)\n"
        "(here / f'caught{rank}').write_text(str(caught))\n"
        "(here / 'end').touch()\n"
        "while not (here / 'caught1').exists(): time.sleep(0.01)\n"
        "sys.exit(128 + caught[0] if rank == 0 else 0)"
    )
    program = (
        f"import sys\nfrom kdctl import launch\nsys.exit(launch.start(2, [sys.executable, '-c', {HEAD + body!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    while not all((tmp_path / f"ready{rank}").exists() for rank in range(2)):
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(30) == code
    assert [(tmp_path / f"caught{rank}").read_text() for rank in range(2)] == [str([int(number)]), "[]"]


def test_processes_end_when_the_launcher_is_killed(tmp_path):
    body = (
        "from kdctl import launch\nlaunch.end_with_launcher()\n"
        f"pathlib.Path({str(tmp_path)!r}, str(os.getpid())).touch()\ntime.sleep(60)"
    )
    program = f"import sys\nfrom kdctl import launch\nlaunch.start(2, [sys.executable, '-c', {HEAD + body!r}])"
    process = subprocess.Popen([sys.executable, "-c", program])
    while len(os.listdir(tmp_path)) < 2:
        time.sleep(0.01)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while not gone(tmp_path, 2):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_torchrun_is_known_again_after_its_restart(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/tmp/torchelastic_ab/none_cd/attempt_0/1/error.json")
    before = launch.agent()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/tmp/torchelastic_ab/none_cd/attempt_1/0/error.json")
    assert before and launch.agent() == before
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/tmp/torchelastic_ab/none_zw/attempt_0/0/error.json")
    assert launch.agent() != before
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    assert launch.agent() == ""
