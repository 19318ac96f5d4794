"""The one place that runs a verb: options, errors, exit codes, JSON, overrides."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Annotated

import pytest

from kdctl import __version__, registry
from kdctl.cli import app, console
from kdctl.cli.verb import Argument, ExperimentOptions, Option, Options, Reply
from kdctl.errors import ConfigError, GateError, Interrupted, Problem


def plain(options: Options, word: Annotated[str, Argument()] = "latest") -> Reply:
    """A verb of the test."""
    print("a library chatters")
    console.say("working")
    console.detail("in detail")
    document = {"word": word, "offline": os.environ.get("KDCTL_OFFLINE"), "accuracy": float("nan")}
    return Reply(document, lambda d: console.out(f"word {d['word']}"))


def reading(
    options: ExperimentOptions,
    run: Annotated[str, Argument()] = "latest",
    times: Annotated[int, Option("--times", min=1)] = 1,
) -> Reply:
    """Another verb of the test."""
    return Reply({"run": run, "times": times, "overrides": options.overrides}, lambda d: console.out(str(d)))


def needing(options: ExperimentOptions, config: Annotated[str, Argument()]) -> Reply:
    return Reply({"config": config, "overrides": options.overrides}, lambda d: None)


def failing(options: Options) -> Reply:
    raise ERRORS.pop()


def gated(options: Options) -> Reply:
    return Reply({"drop": 3.0}, lambda d: console.out("measured"), GateError("the drop of 3.00 points is above 1.00"))


ERRORS: list[BaseException] = []


@pytest.fixture(autouse=True)
def verbs(monkeypatch):
    """The verbs above as commands, and an environment that each test starts anew."""
    for name in ("plain", "reading", "needing", "failing", "gated"):
        monkeypatch.setitem(app.COMMANDS, name, (f"{__name__}:{name}", "a verb of the test"))
    for name in ("KDCTL_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "before")
        monkeypatch.delenv(name)


def test_for_people(run):
    assert run("plain", "abc") == (0, "a library chatters\nword abc\n", "working\n")


def test_quiet_and_verbose(run):
    assert run("plain", "-q")[2] == ""
    assert run("plain", "-v")[2] == "working\nin detail\n"
    assert run("plain")[2] == "working\n"


def test_json_is_the_only_thing_on_stdout(run):
    code, out, err = run("plain", "--json")
    document = json.loads(out)
    assert (code, document["schema_version"], document["ok"], document["word"]) == (0, 1, True, "latest")
    assert document["accuracy"] is None
    assert "a library chatters" in err


def test_offline(run):
    assert json.loads(run("plain", "--json")[1])["offline"] is None
    assert json.loads(run("plain", "--json", "--offline")[1])["offline"] == "1"
    assert os.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("arguments", "run_name", "overrides"),
    [
        ([], "latest", []),
        (["runs/x"], "runs/x", []),
        (["train.seed=3"], "latest", ["train.seed=3"]),
        (["train.seed=3", "runs/x", "data.root=a=b"], "runs/x", ["train.seed=3", "data.root=a=b"]),
        (["runs/x", "losses.0.weight={0: 1}"], "runs/x", ["losses.0.weight={0: 1}"]),
        (["runs/x", "train.device=cpu", "--device", "cuda:1"], "runs/x", ["train.device=cpu", "train.device=cuda:1"]),
        (["./a=b/x"], "./a=b/x", []),
    ],
)
def test_overrides_stand_anywhere(run, arguments, run_name, overrides):
    code, out, err = run("reading", "--json", *arguments)
    document = json.loads(out)
    assert code == 0, err
    assert (document["run"], document["overrides"]) == (run_name, overrides)


def test_a_path_that_exists_is_no_override(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "seed=3").mkdir()
    document = json.loads(run("reading", "--json", "seed=3")[1])
    assert (document["run"], document["overrides"]) == ("seed=3", [])


def test_too_many_words(run):
    code, _, err = run("reading", "runs/x", "runs/y")
    assert code == 2 and "unexpected argument 'runs/y'" in err and "key=value" in err


@pytest.mark.parametrize("arguments", [[], ["train.seed=3"]])
def test_missing_argument(run, arguments):
    code, _, err = run("needing", *arguments)
    assert code == 2 and "missing argument" in err.lower() and "CONFIG" in err


def test_numbers_are_converted_and_checked(run):
    assert json.loads(run("reading", "--json", "--times", "3")[1])["times"] == 3
    for wrong in ("0", "two"):
        code, _, err = run("reading", "--times", wrong)
        assert code == 2 and "--times" in err and "Traceback" not in err


def test_unknown_option(run):
    code, _, err = run("plain", "--jsn")
    assert code == 2 and "--jsn" in err and "--json" in err


@pytest.mark.parametrize(("word", "meant"), [("lst", "list"), ("chek", "check"), ("Train", "train")])
def test_unknown_command(run, word, meant):
    code, out, err = run(word)
    assert (code, out) == (2, "") and f"did you mean '{meant}'?" in err


def test_unlike_any_command(run):
    code, _, err = run("xyzzy")
    assert code == 2 and "kdctl --help" in err


def test_usage_error_as_json(run):
    code, out, err = run("plain", "--times", "--json")
    document = json.loads(out)
    assert code == document["code"] == 2 and document["ok"] is False and err == ""
    assert "--times" in document["errors"][0]["message"]


def test_every_problem_with_its_place_and_hint(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    there = str(tmp_path / "a.yaml")
    problems = [Problem("is 3, allowed: 1 or 2", there, 7, "train.x", "use 1"), Problem("one more")]
    ERRORS.append(ConfigError(*problems))
    assert run("failing", "-q") == (3, "", "a.yaml:7: train.x: is 3, allowed: 1 or 2\n  hint: use 1\none more\n")
    ERRORS.append(ConfigError(*problems))
    code, out, _ = run("failing", "--json")
    document = json.loads(out)
    assert code == document["code"] == 3
    assert document["errors"][0] == {
        "file": there, "line": 7, "key": "train.x", "message": "is 3, allowed: 1 or 2", "hint": "use 1",
    }  # fmt: skip


def test_a_fault_of_ours_is_one_line(run):
    ERRORS.append(ZeroDivisionError("division by zero"))
    code, out, err = run("failing")
    assert (code, out) == (1, "")
    assert err.startswith("internal error: ZeroDivisionError: division by zero\n")
    assert "--debug" in err and "Traceback" not in err


def test_a_fault_in_the_users_own_file_names_its_line(run, tmp_path):
    (tmp_path / "mine.py").write_text("class Mine:\n    def load(self):\n        return undefined\n")
    try:
        registry.create("data", "./mine.py:Mine", {}, tmp_path).load()
    except NameError as error:
        ERRORS.append(error)
    code, _, err = run("failing")
    assert code == 1 and err.startswith(f"{tmp_path}/mine.py:3, in load: NameError: name 'undefined' is not defined\n")
    assert "fault of kdctl" not in err


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), ConfigError("x")])
def test_debug_shows_the_traceback(run, error):
    ERRORS.append(error)
    assert "Traceback (most recent call last)" in run("failing", "--debug")[2]


class FakeCudaError(RuntimeError):
    """Named like the error of torch.cuda below."""


FakeCudaError.__name__ = "OutOfMemoryError"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (MemoryError(), 5, "memory does not suffice"),
        (FakeCudaError("CUDA out of memory"), 5, "batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 5, "memory does not suffice"),
        (RuntimeError("shapes differ"), 1, "internal error"),
        (PermissionError(13, "Permission denied", "runs/x"), 1, "runs/x: Permission denied"),
        (Interrupted(15, "stopped, saved"), 143, "stopped, saved"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes(run, error, code, text):
    ERRORS.append(error)
    got, _, err = run("failing")
    assert got == code and text in err and "Traceback" not in err


def terminated(options: Options) -> Reply:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
    raise AssertionError("the signal did not stop this")


def test_what_a_signal_stops_at_once_has_a_document_too(run, monkeypatch):
    monkeypatch.setitem(app.COMMANDS, "terminated", (f"{__name__}:terminated", "a verb of the test"))
    for verb, code in [("failing", 130), ("terminated", 143)]:
        ERRORS[:] = [KeyboardInterrupt()]
        got, out, err = run(verb, "--json")
        document = json.loads(out)
        assert (got, document["code"], document["ok"], err) == (code, code, False, "")
        assert document["errors"][0]["message"] == "stopped before it was done"
        ERRORS[:] = [KeyboardInterrupt()]
        assert run(verb)[:2] == (code, "")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_reply_that_is_whole_and_fails(run):
    code, out, err = run("gated")
    assert (code, out) == (6, "measured\n") and "above 1.00" in err
    code, out, _ = run("gated", "--json")
    document = json.loads(out)
    assert (code, document["ok"], document["code"], document["drop"]) == (6, False, 6, 3.0)
    assert document["errors"][0]["message"].endswith("above 1.00")


def test_no_arguments_is_help(run):
    assert run()[1] == run("--help")[1] == run("-h")[1]
    assert "Commands:" in run()[1]


def test_version_anywhere_before_a_command(run):
    assert run("--version")[1] == run("--version", "list")[1] == f"kdctl {__version__}\n"


@pytest.mark.parametrize("verb", ["plain", "reading"])
def test_help_names_the_common_options(run, verb):
    code, out, _ = run(verb, "-h")
    assert code == 0 and "verb of the test" in out
    for option in ("-q, --quiet", "-v, --verbose", "--json", "--debug", "--offline", "-h, --help"):
        assert option in out
    assert ("--device" in out) == ("[RUN] [KEY=VALUE]...\n" in out) == (verb == "reading")


@pytest.mark.skipif(os.name == "nt", reason="no pipes of this kind")
def test_a_closed_pipe_is_quiet():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "kdctl", "list", "losses"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device")
@pytest.mark.parametrize(
    ("words", "code", "out", "err"),
    [
        ("list tasks >&-", 0, "", ""),
        ("list nope 2>&-", 2, "", ""),
        ("list nope --json >&- 2>&-", 2, "", ""),
        ("list tasks --json > /dev/full", 1, "", "stdout: No space left on device\n"),
        ("list tasks > /dev/full", 1, "", "No space left on device\n"),
    ],
)
def test_streams_that_are_closed_or_full(words, code, out, err):
    command = ["sh", "-c", f'exec "$0" -m kdctl {words}', sys.executable]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


def test_shell_completion_knows_the_commands():
    environment = {**os.environ, "_KDCTL_COMPLETE": "complete_bash", "COMP_WORDS": "kdctl ex", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-m", "kdctl"], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["explain", "export"], done.stderr
