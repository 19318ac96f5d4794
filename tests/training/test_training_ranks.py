"""Several processes train as one would, and end, fail and continue together. Real processes, over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdctl import runs
from kdctl.build import build_data, build_task
from kdctl.config.dump import plain
from kdctl.config.expand import load_experiment
from kdctl.errors import MissingError
from kdctl.evaluate import TorchPredictor, load_student, metrics, predict
from kdctl.experiment import Plan, resume, train
from kdctl.pipeline import follow
from kdctl.ranks import Ranks
from kdctl.runs import Run
from kdctl.watch import Reporter

MINE = '''
"""Components of a user."""
import os, pathlib, signal
import torch
from kdctl.losses.base import Loss


class Pairs(Loss):
    """The distances of all pairs of a batch, the student's through a layer that trains."""

    batchwise = True

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(10, 10)

    def forward(self, student, teacher, batch):
        s, t = self.logit_pair(student, teacher)
        assert len(s) == len(batch.index)
        s = self.head(s)
        return (torch.cdist(s, s) - torch.cdist(t, t)).pow(2).sum() / len(s)


class Dies(Loss):
    """Zero, until a process does what it was asked for."""

    needs_teacher = False

    def __init__(self, *, rank: int, call: int, what: str):
        super().__init__()
        self.rank, self.call, self.what, self.calls = rank, call, what, 0

    def forward(self, student, teacher, batch):
        self.calls += 1
        here = os.environ.get("RANK") == str(self.rank) and self.calls == self.call
        if here and not pathlib.Path(os.environ["DONE"]).exists():
            pathlib.Path(os.environ["DONE"]).touch()
            if self.what == "raise":
                raise ValueError("a fault of the user's")
            if self.what == "nan":
                return student.logits.sum() * float("nan")
            os.kill(os.getpid(), signal.Signals[self.what])
        return student.logits.sum() * 1e-9
'''
FILE = """
name: small
data: {kind: digits, limit: 301, batch_size: 33, labels_per_class: 4, augment: [{kind: random_crop, padding: 1}]}
teacher: {kind: mlp, hidden: [16], weights: teacher, control: true}
student: {kind: mlp, hidden: [12]}
losses: [{kind: ce, weight: 0.3}, {kind: kd, weight: 0.7}]
optimizer: {kind: sgd, lr: 0.1, momentum: 0.9}
train: {epochs: 2, device: cpu, threads: 1, precision: fp32, layout: contiguous}
"""
SCENARIOS = {
    "calm": ["losses=[{kind: ce}, {kind: './mine.py:Dies', name: dies, rank: -1, call: 0, what: SIGKILL}]"],
    "plain": [],
    "everything": ["train.ema=0.9", "train.clip_norm=0.5", "train.accumulate=3", "data.limit=269"],
    "pairs": [
        "losses=[{kind: ce}, {kind: './mine.py:Pairs', weight: 0.05, name: pairs}]",
        "train.clip_norm=1",
        "data.limit=265",
    ],
    "stored": ["teacher_cache={store: logits, dir: store}", "data.views=1", "data.limit=null", "data.batch_size=256"],
    "unused": [
        "optimizer={kind: adamw, lr: 0.01}",
        "losses=[{kind: hint, weight: {0: 0, 1: 1}, taps: [layer1]}, {kind: ce, weight: {0: 1, 1: 0}}]",
    ],
}
"""Overrides of what one and two processes must do alike. The last batch has 4 samples; of 269 samples 5, of which one
process has 2 and the other 3; of 265 one, which is joined to the batch before."""
BATCH_NORM = ["student={kind: digits_cnn, width: 4}", "train.ema=0.5"]
JOB = """
import json, sys
from pathlib import Path
from kdctl import pipeline, ranks
from kdctl.config.expand import load_experiment
from kdctl.experiment import Plan, train
from kdctl.watch import Reporter

with ranks.joined() as everyone:
    if everyone.first:
        for name, overrides in json.loads(Path("scenarios.json").read_text()).items():
            experiment = load_experiment(Path("small.yaml"), [*overrides, f"name={name}"]).experiment
            train(Plan(experiment, ""), Reporter())
        experiment = load_experiment(Path("small.yaml"), ["name=group"]).experiment
        train(Plan(experiment, "", seeds=2, controls=("baseline",)), Reporter())
        everyone.told(None)
    else:
        pipeline.follow()
"""
VOLATILE = ("seconds", "eval_seconds", "times", "samples_per_second")


def make(folder: Path) -> None:
    """The files of an experiment, and a teacher."""
    (folder / "mine.py").write_text(MINE)
    (folder / "job.py").write_text(JOB)
    (folder / "small.yaml").write_text(FILE)
    (folder / "scenarios.json").write_text(json.dumps(SCENARIOS | {"batch_norm": BATCH_NORM}))
    alone = [
        "teacher=null",
        "losses=[{kind: ce}]",
        "student.hidden=[16]",
        "data.labels_per_class=all",
        "train.epochs=1",
    ]
    run_one(folder, "teacher", *alone, run_dir=folder / "teacher")


def run_one(folder: Path, name: str, *overrides: str, **plan: Any) -> Run:
    """Trains in this process."""
    experiment = load_experiment(folder / "small.yaml", [*overrides, f"name={name}"]).experiment
    return Run(Path(train(Plan(experiment, "", **plan), Reporter())["run"]))


def torchrun(folder: Path, *arguments: str, done: str, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """Two processes of `kdctl`; `done` is the file by which a process knows that it has died before."""
    settings = ["--standalone", "--nproc-per-node", "2", "--max-restarts", str(restarts)]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *settings, *arguments],
        cwd=folder, capture_output=True, text=True, timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DONE": str(folder / done)},
    )  # fmt: skip


def lines(run: Run) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in VOLATILE} for line in run.metrics()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which two processes have trained all scenarios, into runs/<scenario>/001."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make(folder)
    ended = torchrun(folder, "job.py", done="none")
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_train_as_one(name: str, folder: Path) -> None:
    two = Run(folder / "runs" / name / "001")
    one = run_one(folder, name, *SCENARIOS[name])
    assert one.path != two.path
    for a, b in zip(lines(one), lines(two), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["terms"] == pytest.approx(b["terms"], abs=1e-5)
        assert a["val"] == pytest.approx(b["val"], abs=1e-4)
    a, b = (load_file(run / "student.safetensors") for run in (one, two))
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)
    a, b = (runs.read_json(run / "summary.json") for run in (one, two))
    assert a["student"]["best"]["test"] == pytest.approx(b["student"]["best"]["test"], abs=1e-3)


def dying(rank: int, what: str, call: int = 14) -> str:
    """A term by which a process dies at its n-th call; 10 steps are an epoch, and one call is the dry run's."""
    return f"losses=[{{kind: ce}}, {{kind: './mine.py:Dies', name: dies, rank: {rank}, call: {call}, what: {what}}}]"


def nproc(folder: Path, name: str, what: str, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """`kdctl train --nproc 2` in which the second process fails: exit code, JSON document and stderr."""
    given = ["train", "small.yaml", f"name={name}", dying(1, what), "--nproc", "2", "--json", *arguments]
    ended = subprocess.run(
        [sys.executable, "-m", "kdctl", *given], cwd=folder, capture_output=True, text=True, timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DONE": str(folder / name)},
    )  # fmt: skip
    assert "Traceback" not in ended.stderr
    return ended.returncode, json.loads(ended.stdout), ended.stderr


def test_a_killed_process_ends_the_others_and_the_run_resumes(folder: Path) -> None:
    code, document, _ = nproc(folder, "killed", "SIGKILL")
    run, calm = (Run(folder / "runs" / name / "001") for name in ("killed", "calm"))
    assert (code, document["code"]) == (1, 1)
    assert any("process 1 of 2" in error["message"] for error in document["errors"])
    assert run.info["status"] == "failed"
    assert [line["epoch"] for line in lines(run)] == [1]
    resume(run, Reporter())
    assert [line["loss"] for line in lines(run)] == pytest.approx([line["loss"] for line in lines(calm)], abs=1e-5)


@pytest.mark.slow
def test_torchrun_restarts_into_the_same_run(folder: Path) -> None:
    arguments = ["-m", "kdctl", "train", "small.yaml", "name=restarted", dying(1, "SIGKILL")]
    ended = torchrun(folder, *arguments, done="restarted", restarts=1)
    assert ended.returncode == 0, ended.stderr
    assert [p.name for p in (folder / "runs" / "restarted").iterdir()] == ["001"]
    run, calm = (Run(folder / "runs" / name / "001") for name in ("restarted", "calm"))
    assert lines(run) == lines(calm)
    assert (run / "student.safetensors").read_bytes() == (calm / "student.safetensors").read_bytes()


def test_a_signal_to_one_process_stops_all_and_prints_one_document(folder: Path) -> None:
    code, document, _ = nproc(folder, "stopped", "SIGTERM")
    run = Run(folder / "runs" / "stopped" / "001")
    assert (code, document["status"], document["run"]) == (143, "interrupted", "runs/stopped/001")
    assert run.info["status"] == "interrupted"
    resume(run, Reporter())
    assert run.info["status"] == "done"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "code", "text"),
    [("raise", 1, "process 1 of 2: ValueError: a fault"), ("nan", 7, "the loss is not finite")],
)
def test_the_first_process_says_what_went_wrong_in_another(what: str, code: int, text: str, folder: Path) -> None:
    got, document, _ = nproc(folder, what, what)
    assert (got, document["code"]) == (code, code)
    assert text in document["errors"][0]["message"]


def test_a_group_is_the_same_in_two_processes(folder: Path) -> None:
    two = runs.read_json(folder / "runs" / "group" / "groups" / "001.json")["result"]
    run_one(folder, "group", seeds=2, controls=("baseline",))
    one = runs.read_json(folder / "runs" / "group" / "groups" / "002.json")["result"]
    assert len(two["seeds"]) == 2
    for a, b in zip(one["seeds"], two["seeds"], strict=True):
        for who in ("student", "baseline"):
            assert a[who]["test"] == pytest.approx(b[who]["test"], abs=1e-3)
    assert one["summary"]["gain"]["mean"] == pytest.approx(two["summary"]["gain"]["mean"], abs=1e-3)


def test_statistics_of_batch_norm_are_those_that_were_validated(folder: Path) -> None:
    """Every process has running statistics of its own; those of the first one are validated and shipped."""
    run = Run(folder / "runs" / "batch_norm" / "001")
    assert (run / "log.txt").read_text().count("BatchNorm, on a CPU,") == 1
    experiment = load_experiment(run.config).experiment
    data = build_data(experiment)
    assert data.val is not None
    said = predict(TorchPredictor(load_student(run, experiment, "last")), data.val, build_task(experiment), 512)
    assert lines(run)[-1]["val"]["nll"] == pytest.approx(metrics(said, build_task(experiment))["nll"], abs=1e-5)


def test_a_store_filled_by_two_processes_is_whole(folder: Path) -> None:
    names = sorted(path.name for path in (folder / "store").iterdir())
    assert "train.0.0.block" in names
    assert not [name for name in names if name.startswith("train.0") and name.endswith(".segment")]


def test_a_process_that_does_not_see_the_run_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = {"run": str(folder / "runs" / "plain" / "001"), "created": "another one of that name"}
    experiment = load_experiment(folder / "small.yaml", []).experiment
    order |= {"experiment": plain(experiment), "stage": "student"}
    monkeypatch.setattr(Ranks, "told", lambda self, value=None: order)
    with pytest.raises(MissingError, match="does not see the run directory"):
        follow()


TEXTS = """
name: texts
task: {kind: text_classification}
data: {kind: text, root: ., max_length: 12, vocab_size: 60, val_fraction: 0.2, batch_size: 8}
student: {kind: bert, depth: 1, width: 16, heads: 2, dropout: 0}
teacher: {kind: bert, depth: 1, width: 24, heads: 2, control: true}
losses: [{kind: ce}, {kind: dist, weight: 1}]
optimizer: {kind: sgd, lr: 0.01}
train: {epochs: 1, device: cpu, threads: 1, precision: fp32, layout: contiguous}
"""


def test_texts_of_other_lengths_are_compared_across_processes(folder: Path) -> None:
    """Each process pads to the longest of its own texts, and a term on the whole batch gathers them."""
    pytest.importorskip("tokenizers")
    rows = [f"{' '.join('ab' * (n % 7 + 1))}\t{n % 2}" for n in range(60)]
    (folder / "train.tsv").write_text("\n".join(["text\tlabel", *rows]))
    (folder / "texts.yaml").write_text(TEXTS)
    found = []
    for processes in ("1", "2"):
        command = [sys.executable, "-m", "kdctl", "train", "texts.yaml", "--nproc", processes, "--json"]
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
        assert ended.returncode == 0, ended.stderr
        found.append(lines(Run(folder / json.loads(ended.stdout)["run"]))[0])
    assert found[0]["terms"] == pytest.approx(found[1]["terms"], abs=1e-4)
