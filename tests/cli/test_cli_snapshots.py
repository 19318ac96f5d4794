"""What commands print, compared with the files in snapshots/: terminals of 80 and 200 columns, pipe, NO_COLOR, quiet,
JSON, and streams that know ASCII alone. `KDCTL_SNAPSHOTS=write pytest tests/cli/test_cli_snapshots.py` rewrites them.

One group is trained, on a pseudo-terminal; the other outputs show what it made, with fixed numbers in place of measured
ones.
"""

from __future__ import annotations

import io
import json
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kdctl import runs
from kdctl.cli import app, console

SNAPSHOTS = Path(__file__).parent / "snapshots"
FILE = """\
name: small
data: {kind: digits, limit: 300, labels_per_class: 10, augment: [{kind: random_crop, padding: 1}]}
teacher: {kind: digits_cnn, width: 8, train: {epochs: 3, data: {labels_per_class: all}}}
student: {kind: digits_cnn, width: 4}
distill: {T: 4, alpha: 0.9}
optimizer: {kind: adamw, lr: 0.01}
train: {epochs: 2, device: cpu, threads: 1}
"""
WRONG = "data: {kind: digits, batch_sise: 8}\nstudent: {kind: resnet21}\ntrain: {epochs: many}\n"


@dataclass(frozen=True)
class Mode:
    """A way to look at a command: columns of the terminal (None: a pipe), encoding, environment, further arguments."""

    columns: int | None = 80
    encoding: str = "utf-8"
    environment: tuple[tuple[str, str], ...] = ()
    arguments: tuple[str, ...] = ()


MODES = {
    "terminal of 80 columns": Mode(),
    "terminal of 200 columns": Mode(200),
    "pipe": Mode(None),
    "NO_COLOR": Mode(environment=(("NO_COLOR", "1"),)),
    "dumb terminal": Mode(environment=(("TERM", "dumb"),)),
    "--quiet": Mode(None, arguments=("--quiet",)),
    "--json": Mode(None, arguments=("--json",)),
    "ASCII": Mode(encoding="ascii"),
    "LC_ALL=C": Mode(environment=(("LC_ALL", "C"),)),
}
CASES = {
    "train_run": ["train", "small.yaml"],
    "train_group": ["train", "small.yaml", "--seeds", "2", "--with-baseline"],
    "eval": ["eval", "runs/small/001"],
    "check": ["check", "small.yaml"],
    "list_optimizers": ["list", "optimizers"],
    "list_runs": ["list", "runs"],
    "error": ["train", "wrong.yaml"],
}
MEASURED = ("train_run", "train_group", "eval")
"""The JSON of these is kept as its keys and types: their values are another test's."""


class Stream(io.TextIOWrapper):
    """A stream that keeps what it got, and is a terminal or not."""

    def __init__(self, encoding: str, terminal: bool) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", newline="\n", write_through=True)
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    @property
    def text(self) -> str:
        return self.buffer.getvalue().decode(self.encoding)


# -------------------------------------------------------------------------------------------------------- one training


@dataclass
class Trained:
    """The folder of a trained group, the document of `kdctl train`, and all that its pseudo-terminal got."""

    folder: Path
    document: dict[str, Any]
    text: str


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """Two seeds with their baselines, trained in front of a pseudo-terminal of 80 columns."""
    pty = pytest.importorskip("pty")
    import fcntl
    import termios

    folder = tmp_path_factory.mktemp("group")
    (folder / "small.yaml").write_text(FILE)
    (folder / "wrong.yaml").write_text(WRONG)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    got: list[bytes] = []
    reader = threading.Thread(target=_read, args=(ours, got))
    reader.start()
    out = Stream("utf-8", terminal=False)
    with pytest.MonkeyPatch.context() as patch, open(theirs, "w", encoding="utf-8") as terminal:
        patch.chdir(folder)
        patch.delenv("COLUMNS", raising=False)
        patch.setenv("TERM", "xterm")
        patch.setattr("sys.stderr", terminal)
        patch.setattr("sys.stdout", out)
        patch.setattr("kdctl.cli.progress._PAUSE_S", 0.0)
        assert app.run([*CASES["train_group"], "--json", "data.batch_size=32"]) == 0, out.text
        terminal.flush()
    reader.join(timeout=10)
    os.close(ours)
    yield Trained(folder, json.loads(out.text), b"".join(got).decode("utf-8"))


def _read(terminal: int, got: list[bytes]) -> None:
    """Takes what comes until the other end is closed."""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:
            return
        if not part:
            return
        got.append(part)


def test_no_line_of_a_training_is_wider_than_its_terminal(trained: Trained) -> None:
    pieces = re.split(r"[\r\n]+", trained.text)
    assert max(map(console.columns, pieces)) < 80
    drawn = [piece for piece in pieces if re.match(r"student 2/2  .*left \d+:\d\d / \d+:\d\d", piece)]
    assert len(drawn) >= 4
    assert any(re.search(r"supervised \d\.\d{4}  kd \d\.\d{4}", piece) for piece in drawn)
    assert "\x1b" not in trained.text  # a line is written over, and nothing is coloured


def test_the_live_line_leaves_nothing_behind(trained: Trained) -> None:
    shown = [row.rpartition("\r")[2] for row in trained.text.replace("\r\n", "\n").split("\n")]
    assert not any("left 0:00 /" in row for row in shown)
    epochs = [row for row in shown if re.match(r"student +[12]/2  loss", row)]
    assert len(epochs) == 8  # two of four runs each


# ----------------------------------------------------------------------------------------------------------- snapshots


@pytest.fixture
def shown(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Mode], str]:
    """What a command prints in a mode: exit code, stdout and stderr, as a snapshot holds them."""
    monkeypatch.chdir(trained.folder)
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "COLORTERM", "LC_ALL", "PYTHONIOENCODING", "PYTHONUTF8"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("kdctl.experiment.train", lambda plan, reporter: _replay(trained, plan, reporter))
    monkeypatch.setattr("kdctl.evaluate.evaluate_run", lambda run, *_, **__: _steady(_evaluation(run)))

    def look(case: str, mode: Mode) -> str:
        streams = [Stream(mode.encoding, mode.columns is not None) for _ in range(2)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdout", streams[0])
            patch.setattr("sys.stderr", streams[1])
            patch.setenv("TERM", "xterm-256color")
            if mode.columns is not None:
                patch.setenv("COLUMNS", str(mode.columns))
            for name, value in mode.environment:
                patch.setenv(name, value)
            code = app.run([*CASES[case], *mode.arguments])
        console.set_up()
        out, err = (_masked(stream.text) for stream in streams)
        if "--json" in mode.arguments and case in MEASURED:
            out = json.dumps(_shape(json.loads(out)), indent=1) + "\n"
        return f"exit code {code}\n--- stdout\n{out}--- stderr\n{err}"

    return look


@pytest.mark.parametrize("case", CASES)
def test_output(case: str, shown: Callable[[str, Mode], str]) -> None:
    text = "".join(f"=== {name}\n{shown(case, mode)}" for name, mode in MODES.items())
    text = text.replace("\x1b", "ESC")
    place = SNAPSHOTS / f"{case}.txt"
    if os.environ.get("KDCTL_SNAPSHOTS") == "write":
        place.write_text(text, encoding="utf-8")
    assert text == place.read_text(encoding="utf-8"), "KDCTL_SNAPSHOTS=write rewrites what is meant"


@pytest.mark.parametrize("case", CASES)
def test_pipes_and_plain_terminals_get_plain_text(case: str, shown: Callable[[str, Mode], str]) -> None:
    for name in ("pipe", "dumb terminal", "--quiet", "--json"):
        text = shown(case, MODES[name])
        assert "\r" not in text and "\x1b" not in text, name
    assert not re.search(r"\x1b\[[\d;]*3\d", shown(case, MODES["NO_COLOR"]))  # weight of letters is no colour
    assert shown(case, MODES["ASCII"]).isascii() and shown(case, MODES["LC_ALL=C"]).isascii()


@pytest.mark.parametrize("case", CASES)
def test_json_is_one_document_and_quiet_only_the_result(case: str, shown: Callable[[str, Mode], str]) -> None:
    text = shown(case, MODES["--json"])
    document = json.loads(text.partition("--- stdout\n")[2].partition("--- stderr\n")[0])
    assert {"schema_version", "ok"} <= set(document)
    quiet = shown(case, MODES["--quiet"])
    assert (quiet.partition("--- stderr\n")[2] == "") == (case != "error")


def _replay(trained: Trained, plan: Any, reporter: Any) -> dict[str, Any]:
    """Tells a reporter what the training of a run told, and returns its document; numbers are fixed ones."""
    run = runs.Run(trained.folder / "runs/small/001")
    reporter.say("run runs/small/001")
    reporter.say(
        "stage student: digits_cnn (1,182 parameters), teacher digits_cnn; supervised x 0.1 + kd x 0.9; 9 epochs"
    )
    for line in run.metrics()[-2:]:
        shares = dict.fromkeys(line["gradient_shares"], 0.5)
        reporter.epoch(_steady(line) | {"epoch": line["epoch"], "gradient_shares": shares, "best": True}, 2)
    if plan.seeds == 1:
        return _steady(runs.read_json(run / "summary.json") | {"artefacts": []})
    texts = {"verdict": "a verdict in so many words, +12.34 points", "statements": ["a verdict", "a second statement"]}
    document = {k: v for k, v in trained.document.items() if k not in ("schema_version", "ok")}
    return _steady(document) | texts


def _evaluation(run: runs.Run) -> dict[str, Any]:
    found: dict[str, Any] = runs.read_json(run / "eval" / "test.json")
    return found


def _steady(value: Any, key: str = "") -> Any:
    """The document with a fixed number in the place of each that is measured."""
    if isinstance(value, dict):
        return {k: _steady(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_steady(item, key) for item in value]
    if isinstance(value, str):
        return re.sub(r"[+-]?\d+\.\d+", "12.34", value)
    if key in ("epoch", "best_epoch") and isinstance(value, int):
        return 1
    return 12.34 if isinstance(value, float) and not isinstance(value, bool) else value


def _masked(text: str) -> str:
    """The text without what differs from one machine or moment to the next."""
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", "TIME", text)
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "YYYY-MM-DD HH:MM", text)
    return text.replace(str(Path.cwd()), "FOLDER").replace(os.path.realpath(Path.cwd()), "FOLDER")


def _shape(value: Any) -> Any:
    """The keys and types of a document; of a list its first item."""
    if isinstance(value, dict):
        return {key: _shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shape(item) for item in value[:1]]
    return "null" if value is None else type(value).__name__
