"""init -i: questions on a terminal, and files that `kdctl check` accepts."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdctl import registry, runs
from kdctl.cli import app
from kdctl.config.expand import load_experiment
from kdctl.config.schema import Experiment


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def answer(monkeypatch, capsys):
    """Runs `init -i` with these answers; the exit code, what was asked and what was said."""

    def call(*answers: str, options: tuple[str, ...] = ()) -> tuple[int, list[str], str]:
        left: Iterator[str] = iter(answers)
        asked: list[str] = []

        def ask(prompt: str = "") -> str:
            asked.append(prompt)
            try:
                return next(left)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", ask)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
        code = app.run(["init", "-i", *options])
        return code, asked, capsys.readouterr().err

    return call


def written(name: str = "experiment.yaml") -> Experiment:
    """The experiment of the file, which has to be one that check accepts with all that it names."""
    assert app.run(["check", name, "-q"]) == 0
    return load_experiment(Path(name)).experiment


DEFAULTS = [""] * 12


def test_enter_alone_is_an_experiment(answer):
    code, asked, err = answer(*DEFAULTS)
    assert code == 0, err
    experiment = written()
    assert experiment.name == "experiment" and experiment.data.kind == "digits"
    assert [s.role for s in experiment.stages] == ["teacher", "student"]
    assert (experiment.student.arguments["width"], experiment.student_stage.teachers[0].arguments["width"]) == (8, 32)
    assert len(asked) <= 10
    text = Path("experiment.yaml").read_text()
    assert "# digits_cnn teaches digits_cnn on digits." in text and "alpha is the teacher's share" in text


def test_a_loss_with_taps_and_int8(answer):
    answers = ["digits", "train", "digits_cnn", "4", "digits_cnn", "at", "50", "layer1, layer2", "7", "yes"]
    code, _, err = answer(*answers, options=("-o", "new/mine.yaml"))
    assert code == 0, err
    experiment = written("new/mine.yaml")
    stage = experiment.student_stage
    assert [(term.kind, term.weight) for term in stage.losses] == [("supervised", 1.0), ("attention_transfer", 50.0)]
    assert stage.losses[1].taps == ["layer1", "layer2"] and stage.epochs == 7
    assert experiment.stages[0].epochs == 4 and experiment.stages[-1].kind == "quantize"


def test_a_student_alone_on_ones_own_arrays(answer, here):
    (here / "my data.npz").touch()
    code, asked, err = answer("npz", "my data.npz", "none", "cifar_resnet", "14", "3", "no", options=("-o", "d/e.yaml"))
    assert code == 0, err
    experiment = written("d/e.yaml")
    assert experiment.data.arguments["path"] == str(here / "my data.npz")  # read against the file, which stands in d
    assert "../my data.npz" in Path("d/e.yaml").read_text()
    assert experiment.student.arguments["depth"] == 14 and not experiment.student_stage.teachers
    assert not any("alpha" in question or "method" in question for question in asked)


def test_a_teacher_that_is_there_says_what_it_is(answer, here):
    run = here / "runs/t/001"
    runs.write_json(run / "student.json", {"kind": "digits_cnn"})
    (run / "student.safetensors").touch()
    code, asked, err = answer("digits", "runs/t/001", "digits_cnn", "distill", "2", "0.5", "3", "")
    assert code == 0, err
    (teacher,) = written().student_stage.teachers
    assert (teacher.kind, teacher.weights) == ("digits_cnn", str(run))
    assert not any(question.startswith("teacher model") for question in asked)


def test_each_answer_is_checked_and_asked_again(answer):
    answers = [
        "digitz", "digits", "no/such/file", "train", "resnet21", "cifar_resnet", "abc", "14", "0", "3",
        "digits_cnn", "ce", "attention_transfr", "distill", "-1", "4", "1.5", "0.9", "x", "2", "maybe", "no",
    ]  # fmt: skip
    code, asked, err = answer(*answers)
    assert code == 0, err
    for part in (
        "did you mean 'digits'", "no weights file", "did you mean 'resnet", "whole number of 1 or more",
        "needs no teacher", "did you mean 'attention_transfer'", "above 0", "from 0 to 1", "yes or no",
    ):  # fmt: skip
        assert part in err
    assert len(asked) == len(answers)
    assert written().student_stage.teachers[0].arguments["depth"] == 14


def test_what_check_refuses_is_asked_anew(answer):
    """A loss of several teachers is valid by itself, and not in this file."""
    code, _, err = answer("", "", "", "", "", "ca_mkd", "1", "layer1", "3", "no", "distill", "", "")
    assert code == 0, err
    assert "choose another method" in err or written().student_stage.losses[1].kind == "ca_mkd"
    written()


@pytest.mark.parametrize("kind", ["kd", "top_k_kl", "cwd", "crd", "reviewkd", "balanced_kd"])
def test_a_loss_of_any_sort_ends_in_a_valid_file(answer, kind):
    signature = registry.signature(registry.find("losses", kind))
    taps = ["layer1, layer2"] if signature.attributes.get("needs_taps") else []
    code, _, err = answer("", "", "", "", "", kind, "1", *taps, "3", "no", "distill", "", "")
    assert code == 0, err
    written()


@pytest.mark.parametrize("answers", [[], ["digits"], DEFAULTS[:6]])
def test_the_end_of_the_answers_leaves_nothing(answer, here, answers):
    assert answer(*answers, options=("-o", "new/e.yaml"))[0] == 130
    assert list(here.iterdir()) == []


def test_never_over_a_file(answer):
    Path("experiment.yaml").write_text("mine")
    code, asked, err = answer(*DEFAULTS)
    assert (code, asked) == (2, []) and "not overwritten" in err
    assert Path("experiment.yaml").read_text() == "mine"


def test_a_template_and_questions_do_not_go_together(answer):
    code, _, err = answer(*DEFAULTS, options=("cifar10/resnet20_pretrained",))
    assert code == 2 and "copies no template" in err


def test_without_a_terminal(monkeypatch, capsys, here):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False)
    assert app.run(["init", "-i"]) == 2
    assert "no terminal" in capsys.readouterr().err and list(here.iterdir()) == []


_CHILD = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts this in the background had it ignored
from kdctl.__main__ import main
sys.argv = ["kdctl", "init", "-i"]
sys.exit(main())
"""


@pytest.mark.parametrize(("lines", "codes", "left"), [(10, [0], ["experiment.yaml"]), (1, [130, -signal.SIGINT], [])])
def test_on_a_real_terminal(here, lines, codes, left):
    """So many times Enter, and then Ctrl-C until it ends."""
    master, slave = pty.openpty()
    child = subprocess.Popen([sys.executable, "-c", _CHILD], stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    seen = b""
    while True:
        if not select.select([master], [], [], 0.2)[0]:
            if lines < 0:
                child.send_signal(signal.SIGINT)  # again: one that comes just before it begins to read is not seen
            continue
        try:
            seen += os.read(master, 4096)
        except OSError:  # the other side is closed
            break
        if seen.endswith(b"]: "):
            lines -= 1
            if lines >= 0:
                os.write(master, b"\n")
    os.close(master)
    assert child.wait() in codes, seen.decode()
    assert [path.name for path in here.iterdir()] == left
