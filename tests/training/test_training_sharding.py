"""Sharded training (train.sharding: fsdp) trains, ships and continues as without. Real processes."""

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

from kdctl import build, checkpoint, ranks, runs, sharding
from kdctl.build import build_data
from kdctl.config.expand import load_experiment
from kdctl.config.schema import RunSettings
from kdctl.errors import ConfigError
from kdctl.evaluate import evaluate_run
from kdctl.experiment import Plan, resume, train
from kdctl.ranks import Ranks
from kdctl.runs import Run
from kdctl.watch import Reporter

MINE = '''
"""Components of a user."""
import os, pathlib, signal
import torch
from torch import nn
from kdctl.losses.base import Loss


class Dies(Loss):
    """Zero, until a process is told to stop, or dies."""

    needs_teacher = False

    def __init__(self, *, call: int, what: str):
        super().__init__()
        self.call, self.what, self.calls = call, what, 0

    def forward(self, student, teacher, batch):
        self.calls += 1
        done = pathlib.Path("died." + self.what)
        if os.environ.get("RANK") == "1" and self.calls == self.call and not done.exists():
            done.touch()
            os.kill(os.getpid(), signal.Signals[self.what])
        return student.logits.sum() * 1e-9


class Net(nn.Module):
    """Blocks in a list, a weight of the net's own, batch normalisation, a layer that never moves."""

    def __init__(self, *, num_classes: int, in_channels: int):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 6, 3, padding=1, bias=False)  # the gradient of a bias would be noise
        self.bn = nn.BatchNorm2d(6)
        self.blocks = nn.ModuleList([nn.Conv2d(6, 6, 3, padding=1) for _ in range(2)])
        self.scale = nn.Parameter(torch.ones(6, 1, 1))
        self.unused = nn.Linear(7, 5)
        self.fc = nn.Linear(6, num_classes)

    def forward(self, x):
        x = self.bn(self.stem(x))
        for block in self.blocks:
            x = x + self.scale * block(x).relu()
        return self.fc(x.mean((2, 3)))


class Outside(nn.Module):
    """Uses the weights of a layer that it does not call."""

    def __init__(self, *, num_classes: int, in_channels: int):
        super().__init__()
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x):
        return nn.functional.linear(x.flatten(1), self.fc.weight)
'''
FILE = """
name: small
data:
  {kind: digits, limit: 301, batch_size: 33, val_fraction: 0.101, eval_batch_size: 65, augment: [{kind: random_crop}]}
teacher: {kind: mlp, hidden: [16], weights: teacher, control: true}
student: {kind: mlp, hidden: [12, 9]}
losses: [{kind: ce, weight: 0.3}, {kind: kd, weight: 0.7}]
optimizer: {kind: sgd, lr: 0.1, momentum: 0.9}
train: {epochs: 2, device: cpu, threads: 1, precision: fp32, layout: contiguous}
"""
SCENARIOS = {
    "plain": [],
    "everything": [
        "student={kind: './mine.py:Net'}", "train.ema=0.9", "train.clip_norm=0.2", "train.accumulate=3",
        "optimizer={kind: adamw, lr: 0.01}", "data.split_seed=1",
    ],
    "adapter": [
        "losses=[{kind: ce}, {kind: hint, weight: 0.1, taps: [layer1]}]", "train.clip_norm=0.1",
        "optimizer={kind: sgd, lr: 0.1, momentum: 0.9, decay_norm_and_bias: false, weight_decay: 0.01}",
    ],
    "frozen": [
        "student={kind: digits_cnn, width: 4}", "teacher=null", "losses=[{kind: ce}]",
        "stages=[{kind: train, name: student, frozen: [layer1, bn1]}]",
    ],
}  # fmt: skip
"""Overrides of what must be the same sharded and not. Of the 131 validated samples one process has a batch more."""


def dying(what: str, call: int) -> str:
    return f"losses=[{{kind: ce}}, {{kind: './mine.py:Dies', name: dies, call: {call}, what: {what}}}]"


KILLED = ["train.ema=0.9", "optimizer={kind: adamw, lr: 0.01}", "train.epochs=3"]
JOB = """
import json, sys
from pathlib import Path
from kdctl import pipeline, ranks
from kdctl.config.expand import load_experiment
from kdctl.experiment import Plan, resume, train
from kdctl.runs import Run
from kdctl.watch import Reporter

with ranks.joined() as everyone:
    if everyone.first:
        for name, overrides in json.loads(Path(sys.argv[1]).read_text()).items():
            if overrides is None:
                resume(Run(Path("runs") / name / "001"), Reporter())
                continue
            experiment = load_experiment(Path("small.yaml"), [*overrides, f"name={name}"]).experiment
            train(Plan(experiment, ""), Reporter())
        everyone.told(None)
    else:
        pipeline.follow()
"""
VOLATILE = ("seconds", "eval_seconds", "times", "samples_per_second")


def run_two(folder: Path, jobs: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Two processes train (name: overrides) or resume (name: None) one run after the other."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "job.py", "jobs.json"],
        cwd=folder, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def lines(run: Run) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in VOLATILE} for line in run.metrics()]


def load(folder: Path, name: str) -> Run:
    return Run(folder / "runs" / name / "001")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory in which two processes have trained all scenarios, sharded and not."""
    folder = tmp_path_factory.mktemp("sharding")
    for name, text in {"mine.py": MINE, "job.py": JOB, "small.yaml": FILE}.items():
        (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        alone = ["teacher=null", "losses=[{kind: ce}]", "student.hidden=[16]", "train.epochs=1"]
        experiment = load_experiment(folder / "small.yaml", alone).experiment
        train(Plan(experiment, "", run_dir=folder / "teacher"), Reporter())
    jobs = SCENARIOS | {f"{name}_sharded": [*overrides, "train.sharding=fsdp"] for name, overrides in SCENARIOS.items()}
    jobs["calm"] = [*KILLED, dying("SIGKILL", 0), "train.sharding=fsdp"]
    ended = run_two(folder, jobs)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def assert_alike(one: Run, other: Run) -> None:
    """Two runs have the same losses, validation and weights."""
    assert len(lines(one)) == len(lines(other)) > 1
    for a, b in zip(lines(one), lines(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["terms"] == pytest.approx(b["terms"], abs=1e-5)
        assert a["val"] == pytest.approx(b["val"], abs=1e-5)
    a, b = (load_file(run / "student.safetensors") for run in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)


@pytest.mark.parametrize("name", SCENARIOS)
def test_sharded_is_as_not_sharded(name: str, folder: Path) -> None:
    assert_alike(load(folder, name), load(folder, f"{name}_sharded"))


@pytest.mark.parametrize("name", SCENARIOS)
def test_checkpoints_have_the_same_whole_states(name: str, folder: Path) -> None:
    def shapes(state: Any) -> Any:
        if isinstance(state, dict):
            return {key: shapes(value) for key, value in state.items()}
        if isinstance(state, list):
            return [shapes(value) for value in state]
        return (type(state), state.shape, state.dtype) if isinstance(state, torch.Tensor) else type(state)

    for file in ("last.pt", "best.pt"):
        a, b = (
            checkpoint.load(load(folder, n).stage_dir("student") / "checkpoints" / file)
            for n in (name, f"{name}_sharded")
        )
        for part in a.keys() - {"optimizer", "progress"}:
            assert shapes(a[part]) == shapes(b[part])
        assert shapes(a.get("optimizer", {}).get("state")) == shapes(b.get("optimizer", {}).get("state"))


def test_the_shipped_student_evaluates_as_it_was_validated(folder: Path) -> None:
    run = load(folder, "plain_sharded")
    experiment = load_experiment(run.config).experiment
    measured = evaluate_run(run, experiment, split="val", data=build_data(experiment), with_teacher=False)
    best = next(line for line in reversed(lines(run)) if line["best"])
    assert measured["metrics"] == pytest.approx(best["val"], abs=1e-4)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_end(folder: Path) -> None:
    ended = run_two(folder, {"killed": [*KILLED, dying("SIGKILL", 15), "train.sharding=fsdp"]})
    assert ended.returncode != 0 and not (load(folder, "killed") / "student.safetensors").exists()
    ended = run_two(folder, {"killed": None})
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert_alike(load(folder, "killed"), load(folder, "calm"))


@pytest.mark.slow
def test_a_stopped_run_resumes_in_one_process(folder: Path) -> None:
    assert run_two(folder, {"alone": [*KILLED, dying("SIGTERM", 15), "train.sharding=fsdp"]}).returncode != 0
    resume(load(folder, "alone"), Reporter())
    assert_alike(load(folder, "alone"), load(folder, "calm"))


@pytest.mark.parametrize(
    "changed", [{"precision": "fp16"}, {"layout": "channels_last"}, {"compile": True}], ids=lambda c: next(iter(c))
)
def test_what_sharding_does_not_go_with_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"sharded|fp16"):
        sharding.check(RunSettings(**changed))
    sharding.check(RunSettings(precision="bf16", layout="contiguous", compile=False))


def test_a_shared_weight_is_refused() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    net[1].weight = net[0].weight
    with pytest.raises(ConfigError, match="two modules of the student share a weight"):
        sharding.shard(net, torch.device("cpu"))


@pytest.mark.slow
def test_a_net_that_reaches_into_a_block_is_refused(folder: Path) -> None:
    ended = run_two(folder, {"outside": ["student={kind: './mine.py:Outside'}", "train.sharding=fsdp"]})
    assert ended.returncode != 0
    assert "this student cannot be sharded" in ended.stderr


def test_one_process_shards_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = RunSettings(sharding="fsdp")
    assert not sharding.wanted(settings)
    monkeypatch.setattr(ranks, "current", lambda: Ranks(0, 2))
    assert sharding.wanted(settings) and not sharding.wanted(RunSettings())
    assert runs.read_json(load(folder, "plain_sharded") / "summary.json")["status"] == "done"


def test_balancing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are not measured where weights are sharded."""
    text = "data: {kind: digits, limit: 100}\nstudent: {kind: digits_cnn, width: 4}\nbalance: gradient\n"
    (tmp_path / "e.yaml").write_text(text)
    experiment = load_experiment(tmp_path / "e.yaml").experiment
    monkeypatch.setattr(sharding, "wanted", lambda settings: True)
    monkeypatch.setattr(sharding, "check", lambda settings: None)
    with pytest.raises(ConfigError, match="not measured where weights are sharded"):
        build.build_stage(experiment, experiment.train_stages[-1], build_data(experiment), lambda name: tmp_path / name)
