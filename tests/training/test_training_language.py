"""Language models: trained, distilled live, from a store and on what they write themselves, resumed, measured again."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdctl import build, runs
from kdctl.config.expand import load_experiment
from kdctl.config.schema import Experiment
from kdctl.errors import ConfigError
from kdctl.evaluate import evaluate_run
from kdctl.experiment import Plan, load_run, resume, train
from kdctl.methods.on_policy import OnPolicy
from kdctl.models.record import load_model
from kdctl.signals import IGNORE
from kdctl.watch import Reporter

pytest.importorskip("tokenizers")

FILE = """
name: small
task: {kind: causal_lm}
data: {kind: corpus, root: texts, units: characters, max_length: 16, batch_size: 16, val_share: 0.1, test_share: 0.1}
student: {kind: gpt, depth: 1, width: 16, heads: 2}
optimizer: {kind: adamw, lr: 0.01}
train: {epochs: 2, device: cpu, threads: 1, precision: fp32, layout: contiguous}
"""
TAUGHT = (
    FILE
    + """
teacher: {kind: gpt, depth: 2, width: 24, heads: 2, control: true, train: {epochs: 3}}
losses:
  - {kind: ce, weight: 0.5}
  - {kind: jsd, weight: 0.5}
"""
)
ON_POLICY = TAUGHT + "method: {kind: on_policy, share: 0.5, prompt: 4}\n"
MASKED = """
name: masked
task: {kind: masked_lm}
data: {kind: corpus, root: texts, vocab_size: 60, max_length: 16, batch_size: 8, val_share: 0.1, test_share: 0.1}
teacher: {kind: bert, depth: 2, width: 24, heads: 2, control: true, train: {epochs: 1}}
student: {kind: bert, depth: 1, width: 16, heads: 2}
losses:
  - {kind: supervised, weight: 1}
  - {kind: kd, weight: 1, temperature: 2}
  - {kind: cosine, weight: 1, taps: [{student: bert.encoder.layer.0, teacher: bert.encoder.layer.1}]}
optimizer: {kind: adamw, lr: 0.01}
train: {epochs: 2, device: cpu, threads: 1, precision: fp32, layout: contiguous}
"""
VOLATILE = ("seconds", "eval_seconds", "times", "samples_per_second")


class Crash(Exception):
    """The process dies here."""


class CrashAt(Reporter):
    """Dies at the n-th step of the run."""

    def __init__(self, step: int) -> None:
        self.steps = step

    def step(self, stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
        self.steps -= 1
        if self.steps == 0:
            raise Crash


@pytest.fixture(autouse=True)
def texts(folder: Path) -> None:
    draw = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "slept"]
    (folder / "texts").mkdir()
    (folder / "texts" / "train.txt").write_text(" ".join(draw.choice(words) for _ in range(1200)))


def lines(run: runs.Run) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in VOLATILE} for line in run.metrics()]


def experiment_of(text: str) -> Experiment:
    Path("file.yaml").write_text(text)
    return load_experiment("file.yaml").experiment


def trained(text: str, reporter: Reporter | None = None) -> runs.Run:
    done = train(Plan(experiment_of(text), text), reporter or Reporter())
    return runs.Run(Path(done["run"]))


def test_a_language_model_learns_and_is_measured_from_disk() -> None:
    run = trained(FILE)
    document = evaluate_run(run, load_run(run))
    metrics = document["metrics"]
    assert list(metrics) == ["top1", "perplexity", "nll"] and metrics["perplexity"] < 12 < 25
    assert metrics["perplexity"] == pytest.approx(np.exp(metrics["nll"]))
    assert document["per_class"] == [] and document["quality"]["student"] is None
    data = build.build_data(load_run(run))
    model, total, count = load_model(run.path), 0.0, 0
    assert data.test is not None
    for row in range(len(data.test)):  # one text after the other, by hand
        (tokens,) = data.test.fetch(torch.tensor([row]))
        log_p = model(tokens[None])[0, :-1].log_softmax(1)
        total -= float(log_p[torch.arange(len(tokens) - 1), tokens[1:]].sum())
        count += len(tokens) - 1
    assert document["samples"] == count and metrics["nll"] == pytest.approx(total / count, rel=1e-4)


def test_a_teacher_out_of_a_store_teaches_as_a_live_one() -> None:
    a, b = trained(TAUGHT), trained(TAUGHT + "teacher_cache: {store: logits, dtype: fp32}\n")
    for mine, other in zip(lines(a), lines(b), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
    few = trained(TAUGHT + "teacher_cache: {store: logits, dtype: fp32, top_k: 5}\n")
    loss = lines(few)[-1]["terms"]["jsd"]
    assert 0 < loss and loss == pytest.approx(lines(a)[-1]["terms"]["jsd"], rel=0.5)


@pytest.mark.parametrize(("text", "steps"), [(ON_POLICY, 60), (MASKED, 20)], ids=["on_policy", "masked"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(text: str, steps: int) -> None:
    whole = trained(text)
    with pytest.raises(Crash):
        trained(text, CrashAt(steps))
    stopped = runs.Run(whole.path.with_name("002"))
    resume(stopped, Reporter())
    assert lines(stopped) == lines(whole)


def method_of(text: str, **changes: Any) -> tuple[OnPolicy, build.Built]:
    """The method of a stage, built with an untrained teacher."""
    changed = text.replace(", train: {epochs: 3}", "").replace("share: 0.5", "share: 1.0")
    for name, value in changes.items():
        changed = changed.replace("prompt: 4", f"prompt: 4, {name}: {value}")
    experiment = experiment_of(changed)
    built = build.build_stage(experiment, experiment.student_stage, build.build_data(experiment), Path)
    assert isinstance(built.method, OnPolicy)
    return built.method, built


def test_the_student_writes_what_it_learns_on() -> None:
    method, built = method_of(ON_POLICY)
    (batch, *_) = list(built.loader.epoch(0))
    given = method.begin_step(batch, 0.0)
    assert given.inputs[:, :4].equal(batch.inputs[:, :4]) and not given.inputs.equal(batch.inputs)
    assert given.keep is not None and given.keep.sum(1).eq(given.inputs.shape[1] - 4).all()
    assert given.targets.eq(IGNORE).all()  # what a student wrote is no truth
    counts = method.counts(given)
    assert int(counts["supervised"]) == 0 and int(counts["jsd"]) == int(given.keep.sum())
    sums = method.step(given, 0.0)
    assert float(sums["supervised"]) == 0 and float(sums["jsd"]) > 0
    again = method.begin_step(batch, 0.0)
    assert again.inputs.equal(given.inputs) and not method.begin_step(batch, 1.0).inputs.equal(given.inputs)
    assert method.student.net.training


def test_the_teacher_writes_once_and_its_texts_are_learnt() -> None:
    method, built = method_of(ON_POLICY, sampler="teacher", temperature=0)
    (batch, *_) = list(built.loader.epoch(0))
    given = method.begin_step(batch, 0.0)
    model = built.teachers[0]
    logits = model(given.inputs[:, :-1])
    assert model.record.tokens is not None
    logits[..., model.record.tokens.pad] = -torch.inf
    assert given.inputs[:, 4:].equal(logits.argmax(2)[:, 3:])
    assert given.keep is not None and given.targets[given.keep].equal(given.inputs[:, 4:].flatten())
    model.forward = None  # type: ignore[assignment]
    model.net.forward = None  # type: ignore[assignment]
    assert method.begin_step(batch, 5.0).inputs.equal(given.inputs)  # not asked again


def test_a_share_of_the_steps_is_on_policy() -> None:
    method, built = method_of(ON_POLICY)
    method.share = 0.3
    (batch, *_) = list(built.loader.epoch(0))
    steps = range(200)
    own = sum(method.begin_step(batch, step / len(built.loader)).targets.eq(IGNORE).all().item() for step in steps)
    assert 40 <= own <= 80


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (ON_POLICY + "teacher_cache: {store: logits}\n", "cannot be stored"),
        (MASKED + "method: {kind: on_policy}\n", "next token is learnt"),
    ],
)
def test_what_cannot_be_written_is_refused(text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        trained(text)


def test_a_model_that_sees_the_answer_is_refused() -> None:
    with pytest.raises(ConfigError, match="bert sees later tokens") as caught:
        trained(FILE.replace("kind: gpt", "kind: bert"))
    assert caught.value.problems[0].key == "student"
    with pytest.raises(ConfigError, match="bert sees later tokens") as caught:
        trained(TAUGHT.replace("kind: gpt, depth: 2", "kind: bert, depth: 2"))
    assert caught.value.problems[0].key == "student"  # of the stage that trains the teacher
