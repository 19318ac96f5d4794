"""README.md and CONTRIBUTING.md are true: what they tell a user to type is typed, in order, in an empty directory.

In a ```console block a line `$ command` is run (`kdctl ...`, or `python FILE` of a file that the document shows), the
lines below it must be printed in that order (numbers may differ, `...` stands for any lines), `$ echo $?` shows the
exit code, and `^C` means that the command is stopped after its first epoch. Commands on files of configs/ want data
that may not be here: they are parsed and checked, not run. Blocks of ```yaml and ```python that begin with a file's
name are the files that the commands read.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import typer.main
from test_layers import ORDER

from kdctl.bench.latency import Cell, Row
from kdctl.cli import app, completion
from kdctl.config.expand import load_experiment
from kdctl.errors import Interrupted, KdctlError

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "data",
    "losses",
    "teachers",
    "own_model",
    "own_loss",
    "python",
    "distributed",
    "compression",
    "deployment",
    "reports",
    "text",
]
"""Pages of docs/ whose commands are all run as they stand."""
UNTIMED = ["compression", "python", "deployment", "reports", "text"]
"""Those that measure latencies in fresh processes, which takes longer than all else: test_readme has that."""
DOCS = ["README.md", "CONTRIBUTING.md", *(f"docs/{page}.md" for page in PAGES)]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"[-+]?\d+(,\d{3})*(\.\d+)?")


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def prose_of(document: str) -> str:
    return FENCED.sub("", text_of(document))


def blocks(document: str, language: str) -> list[str]:
    return [body for kind, body in FENCED.findall(text_of(document)) if kind == language]


def files_of(document: str) -> dict[str, str]:
    """The file that each block of YAML or Python shows, by the path that its first line names."""
    found = {}
    for body in [*blocks(document, "yaml"), *blocks(document, "python")]:
        named = re.match(r"# (\S+)\n", body)
        assert named, f"{document}: a block does not begin with the name of its file:\n{body[:80]}"
        found[named[1]] = body
    return found


# ------------------------------------------------------------------------------------------------------ the commands


@dataclass
class Command:
    """One `$ kdctl ...` of a block, or `$ python FILE`, and what the block shows of it."""

    program: str
    words: list[str]
    shown: list[str] = field(default_factory=list)
    code: int = 0
    interrupted: bool = False


def commands_of(document: str) -> list[Command]:
    found: list[Command] = []
    for block in blocks(document, "console"):
        lines = iter(block.splitlines())
        for line in lines:
            if line == "$ echo $?":
                found[-1].code = int(next(lines))
            elif line == "^C":
                found[-1].interrupted, found[-1].code = True, 130
            elif line.startswith("$ "):
                program, *words = shlex.split(line[2:], comments=True)
                assert program in ("kdctl", "python"), f"{document}: a console block runs {program}"
                found.append(Command(program, words))
            else:
                found[-1].shown.append(line)
    return found


def parse(words: list[str]) -> None:
    """Fails where the command line has no such command or option."""
    group = typer.main.get_command(app.app)
    verb = group.get_command(None, words[0])  # type: ignore[attr-defined]
    assert verb is not None, f"there is no command {words[0]}"
    with contextlib.redirect_stdout(io.StringIO()):
        verb.make_context(words[0], list(words[1:]))


def in_process(words: list[str]) -> tuple[int, str]:
    """Exit code and what a terminal would show of it."""
    seen = io.StringIO()
    with contextlib.redirect_stdout(seen), contextlib.redirect_stderr(seen):
        code = app.run(words)
    return code, seen.getvalue()


def in_several(words: list[str]) -> tuple[int, str]:
    """The same of a command that starts itself anew in several processes."""
    done = subprocess.run(
        [sys.executable, "-m", "kdctl", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, done.stdout


def as_script(words: list[str]) -> tuple[int, str]:
    """The same of a Python file of the working directory, in this process."""
    seen = io.StringIO()
    with contextlib.redirect_stdout(seen):
        runpy.run_path(words[0], run_name="__main__")
    return 0, seen.getvalue()


def stopped(words: list[str]) -> tuple[int, str]:
    """The same of a process that gets SIGINT after its first epoch."""
    process = subprocess.Popen(
        [sys.executable, "-m", "kdctl", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if re.match(r"\w+ +1/\d+ ", line):
            process.send_signal(signal.SIGINT)
            break
    seen += process.stdout.read()
    return process.wait(), seen


def masked(line: str) -> str:
    """The line without its numbers (also `p < 0.001` for `p = 0.012`) and the width of its columns."""
    return re.sub(r"\s+", " ", NUMBER.sub("#", line).replace("p < #", "p = #")).strip()


def first_unprinted(shown: list[str], printed: str) -> str | None:
    """The first line that was not printed after those before it."""
    lines = iter([masked(line) for line in printed.splitlines()])
    for line in shown:
        if line != "..." and masked(line) not in lines:  # `in` moves the iterator on: order counts
            return line
    return None


def follow(document: str) -> None:
    """Types the document's commands in the working directory."""
    for command in commands_of(document):
        line = shlex.join([command.program, *command.words])
        if any(word.startswith("configs/") for word in command.words):
            parse(command.words)
            path, *overrides = [w for w in command.words[1:] if not w.startswith("-")]
            load_experiment(ROOT / path, [o for o in overrides if "=" in o], require_files=False)
            continue
        way = stopped if command.interrupted else in_several if "--nproc" in command.words else in_process
        way = as_script if command.program == "python" else way
        code, printed = way(command.words)
        assert code == command.code, f"`{line}` ended with {code}:\n{printed}"
        absent = first_unprinted(command.shown, printed)
        assert absent is None, f"`{line}` did not print `{absent}`:\n{printed}"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its artefact timed in fresh processes; the models of the report are not, which is the same once more."""
    monkeypatch.setattr("kdctl.analysis.cost.measure", _one_each)
    for name, body in files_of("README.md").items():
        (here / name).write_text(body)
    follow("README.md")


@pytest.mark.parametrize("page", PAGES)
def test_page(page: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page in UNTIMED:
        for place in ("artefacts.measure.measure_latency", "analysis.cost.measure", "bench.latency.measure"):
            monkeypatch.setattr(f"kdctl.{place}", _one_each)
    monkeypatch.syspath_prepend(here)  # as `python FILE` has it
    files = files_of(f"docs/{page}.md")
    for name, body in files.items():
        (here / name).write_text(body)
    own = {Path(name).stem for name in files if name.endswith(".py")}
    assert not own & set(sys.modules), "a file of the page would hide a module that is loaded"
    try:
        follow(f"docs/{page}.md")
    finally:
        for name in own:
            sys.modules.pop(name, None)


def _one_each(cells: list[Cell], **_: object) -> list[Row]:
    return [Row(c.what, "", c.batch, c.threads, 1.0, 1.0, 1.0, 1000.0, 1, 1) for c in cells]


def test_contributing(here: Path) -> None:
    for name, body in files_of("CONTRIBUTING.md").items():
        (here / Path(name).name).write_text(body)
    follow("CONTRIBUTING.md")
    (metrics,) = here.glob("runs/cosine/001/metrics.jsonl")
    last = json.loads(metrics.read_text().splitlines()[-1])
    (term,) = [name for name in last["terms"] if "FeatureCosine" in name]
    assert last["terms"][term] > 0


@pytest.mark.parametrize("document", DOCS)
def test_experiments_load_and_name_components_that_exist(document: str, here: Path) -> None:
    files = files_of(document)
    for name, body in files.items():
        (here / Path(name).name).write_text(body)
    experiments = [name for name in files if name.endswith(".yaml") and not name.startswith("recipe")]
    assert experiments
    for name in experiments:
        assert load_experiment(here / name, require_files=False).experiment.stages


# ------------------------------------------------------------------------------------------- a loss in three steps


def test_the_new_loss_is_a_file_a_line_and_a_test(tmp_path: Path) -> None:
    """In a copy of the package the three steps suffice: the new test and all of test_losses_all.py pass."""
    shutil.copytree(ROOT / "kdctl", tmp_path / "kdctl", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests/losses").mkdir(parents=True)
    for name in ("conftest.py", "cases.py", "test_losses_all.py"):
        shutil.copy(ROOT / "tests/losses" / name, tmp_path / "tests/losses")
    steps = {name: body for name, body in files_of("CONTRIBUTING.md").items() if name.endswith(".py")}
    table = steps.pop("kdctl/losses/__init__.py").split("\n", 1)[1]
    (kind,) = ast.literal_eval("{" + table + "}")
    assert set(steps) == {f"kdctl/losses/{kind}.py", f"tests/losses/test_losses_{kind}.py"}
    for name, body in steps.items():
        (tmp_path / name).write_text(body)
    init = tmp_path / "kdctl/losses/__init__.py"
    init.write_text(init.read_text().replace("\n}\n", "\n" + table + "}\n", 1))

    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", kind, "tests/losses"],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 10, done.stdout


# ------------------------------------------------------------------------------------------------ what the text names


@pytest.mark.parametrize("document", [*DOCS, "CHANGELOG.md"])
def test_commands_and_options_in_the_text_exist(document: str) -> None:
    prose = prose_of(document)
    for line in re.findall(r"`kdctl ([^`]+)`", prose):
        words = line.split()
        if words[0] in completion.OPTIONS:
            continue
        assert words[0] in app.COMMANDS
        if len(words) > 1:  # else only the command is spoken of
            parse(words)
    known = {
        option
        for name in app.COMMANDS
        for parameter in typer.main.get_command(app.app).get_command(None, name).params  # type: ignore[attr-defined]
        for option in [*parameter.opts, *parameter.secondary_opts]
    }
    assert set(re.findall(r"`(--[a-z-]+)", prose)) <= known


def test_what_is_said_to_be_missing_is_missing_and_the_rest_is_named() -> None:
    (absent,) = re.findall(r"^- The commands? (.*)\.$", text_of("README.md"), re.MULTILINE)
    assert not set(re.findall(r"`(\w+)`", absent)) & set(app.COMMANDS)
    named = set(re.findall(r"`(\w+)`", text_of("CHANGELOG.md").split("\n- ")[1]))
    assert named >= set(app.COMMANDS)


@pytest.mark.parametrize("document", [*DOCS, "CHANGELOG.md"])
def test_links_and_scripts_lead_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", text_of(document)):
        assert target.startswith("https://") or ((ROOT / document).parent / target).is_file(), target
    for script in re.findall(r"scripts/[\w-]+(?:/[\w-]+)*(?:\.py)?", text_of(document)):
        assert (ROOT / script).is_file(), script
        assert script.endswith(".py") or os.access(ROOT / script, os.X_OK), script


def test_exit_codes_are_those_of_the_errors() -> None:
    listed = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", text_of("README.md"), re.MULTILINE)
              for code in row.split(",")}  # fmt: skip
    errors = {kind.code for kind in [KdctlError, *KdctlError.__subclasses__()] if kind is not Interrupted}
    assert listed == {0, *errors, 128 + signal.SIGINT, 128 + signal.SIGTERM}


def test_variables_are_those_that_the_tests_read() -> None:
    named = set(re.findall(r"^\| `(KDCTL_\w+)`", text_of("README.md"), re.MULTILINE))
    read = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        read |= set(re.findall(r"environ(?:\.get\(|\[)\"(KDCTL_\w+)\"", path.read_text()))
    assert named == read - {"KDCTL_OFFLINE", "KDCTL_SNAPSHOTS", "KDCTL_CACHE"}


def test_the_house_is_as_described() -> None:
    (plan,) = [block for block in blocks("CONTRIBUTING.md", "") if block.startswith("errors")]
    rooms = [room for line in plan.splitlines() for room in re.split(r", | \| ", line.split("  ")[0])]
    package = {p.stem for p in (ROOT / "kdctl").iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert set(rooms) == package - {"__init__", "__main__"}
    row_of = {room: number for number, row in enumerate(ORDER) for room in row}
    rows = [row_of[room] for room in rooms]
    assert rows == sorted(rows)


# ------------------------------------------------------------------------------------- the checks themselves can fail


def test_lines_must_be_printed_in_order() -> None:
    printed = "run runs/a/001\nepoch 1\nstudent, best   97.40  3.15\nagreement 80.00 %\n"
    assert first_unprinted(["run runs/a/007", "...", "student, best  9.1 -3", "agreement 8 %"], printed) is None
    assert first_unprinted(["agreement 80.00 %", "run runs/a/001"], printed) == "run runs/a/001"
    assert first_unprinted(["teacher, best 97.40 3.15"], printed) == "teacher, best 97.40 3.15"


@pytest.mark.parametrize("words", [["trian", "a.yaml"], ["train", "a.yaml", "--seed", "3"], ["train"]])
def test_a_command_that_does_not_parse_is_found(words: list[str]) -> None:
    with pytest.raises(Exception, match=r"no command|No such option|Missing parameter"):
        parse(words)
