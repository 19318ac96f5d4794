"""Runs on texts: trained, measured, resumed, and distilled from a deeper model, also out of a store."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdctl import build, runs
from kdctl.config.schema import Experiment
from kdctl.data.tokens import TokenSplit
from kdctl.evaluate import evaluate_run
from kdctl.experiment import Plan, load_run, resume, train
from kdctl.models.record import load_model
from kdctl.watch import Reporter

pytest.importorskip("tokenizers")

FILE = """
name: small
task: {kind: text_classification}
data: {kind: text, root: texts, test: test.tsv, max_length: 12, vocab_size: 80, val_fraction: 0.2, batch_size: 16}
student: {kind: bert, depth: 1, width: 16, heads: 2}
optimizer: {kind: adamw, lr: 0.01}
train: {epochs: 3, device: cpu, threads: 1}
"""
DISTILLED = (
    FILE
    + """
teacher: {kind: bert, depth: 2, width: 24, heads: 2, control: true, train: {epochs: 2}}
losses:
  - {kind: kd, weight: 1, T: 2}
  - {kind: hidden_mse, weight: 0.1, taps: [{student: bert.encoder.layer.0, teacher: bert.encoder.layer.1}]}
  - kind: attention_mse
    weight: 0.1
    taps:
      - student: bert.encoder.layer.0.attention.self.softmax:in
        teacher: bert.encoder.layer.1.attention.self.softmax:in
"""
)
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
def texts(folder: Path) -> Path:
    """60 training texts of 1 to 12 words and 24 to test: one word in each says what its class is."""
    draw = random.Random(0)
    (folder / "texts").mkdir()

    def line(number: int) -> str:
        words = [draw.choice(["the", "film", "was", "it", "and", "of"]) for _ in range(draw.randrange(12))]
        words.insert(draw.randrange(len(words) + 1), ("bad", "good")[number % 2])
        return f"{' '.join(words)}\t{('neg', 'pos')[number % 2]}"

    for name, count in (("train", 60), ("test", 24)):
        lines = [line(number) for number in range(count)]
        (folder / "texts" / f"{name}.tsv").write_text("\n".join(["text\tlabel", *lines]))
    return folder / "texts"


def outcome(run: runs.Run) -> tuple[bytes, list[dict[str, Any]]]:
    lines = [{k: v for k, v in line.items() if k not in VOLATILE} for line in run.metrics()]
    return (run / "student.safetensors").read_bytes(), lines


def test_texts_are_learnt_and_measured_in_their_own_order(run_it: Callable[..., Any]) -> None:
    run, _ = run_it("train.epochs=20", "optimizer.lr=0.005", "student.dropout=0", text=FILE)
    experiment = load_run(run)
    data = build.build_data(experiment)
    measured = evaluate_run(run, experiment)
    assert measured["metrics"]["top1"] > 80
    assert [row["samples"] for row in measured["per_class"]] == [12, 12]
    with np.load(run / "eval" / "test.npz") as kept:
        logits, targets, index = (torch.from_numpy(kept[name]) for name in ("logits", "targets", "index"))
    test = data.split("test")
    assert isinstance(test, TokenSplit) and targets.equal(test.targets) and index.equal(test.index)
    model = load_model(run.path)
    with torch.no_grad():  # one by one, so without any padding
        alone = torch.cat([model(test.fetch(torch.tensor([row]))) for row in range(len(test))])
    torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)
    assert (run / "tokenizer.json").read_text() == data.tokenizer


@pytest.mark.parametrize("step", [2, 5])
def test_a_crash_resumes_bit_identically(
    step: int, folder: Path, experiment: Callable[..., Experiment], run_it: Callable[..., Any]
) -> None:
    hidden = "data.augment=[{kind: mask_tokens, rate: 0.2}]"
    whole, _ = run_it("name=whole", hidden, text=FILE)
    with pytest.raises(Crash):
        train(Plan(experiment(hidden, text=FILE), FILE), CrashAt(step))
    run = runs.find("small", folder / "runs")
    resume(run, Reporter())
    assert outcome(run) == outcome(whole)


def test_distilled_with_taps_with_and_without_a_store(folder: Path, run_it: Callable[..., Any]) -> None:
    """The second run with a store reads what the first one wrote, and reads the same; without one all is close."""
    store = "teacher_cache={dtype: fp32, store: both}"
    found = {}
    for name, more in (("live", []), ("filling", [store]), ("reading", [store])):
        run, _ = run_it(f"name={name}", "data.views=1", *more, text=DISTILLED)
        found[name] = outcome(run)
    lines = [line for line in found["filling"][1] if line["stage"] == "student"]
    assert {"kd", "hidden_mse", "attention_mse"} <= set(lines[0]["terms"])
    assert all(0 < line["terms"][name] < 100 for line in lines for name in ("kd", "hidden_mse", "attention_mse"))
    assert found["reading"] == found["filling"]
    for one, other in zip(found["live"][1], found["filling"][1], strict=True):
        for name in ("kd", "attention_mse"):
            if one["epoch"] == 0 and name in one["terms"]:
                assert other["terms"][name] == pytest.approx(one["terms"][name], rel=0.02)


def test_a_store_in_half_precision_takes_scores_of_attention(run_it: Callable[..., Any]) -> None:
    run, _ = run_it("teacher_cache={dtype: fp16, store: both}", "data.views=2", "train.epochs=2", text=DISTILLED)
    assert all(np.isfinite(line["loss"]) for line in run.metrics())


def test_gradient_accumulation_gives_the_same_loss(run_it: Callable[..., Any]) -> None:
    """Without dropout, whose draws differ: micro-batches of texts have the padding of their batch, and none counts."""
    plain = ["student.dropout=0", "teacher.dropout=0", "train.epochs=2"]
    losses = []
    for parts in (1, 3):
        run, _ = run_it(f"name=parts{parts}", f"train.accumulate={parts}", *plain, text=DISTILLED)
        losses.append([[line["loss"], *line["terms"].values()] for line in run.metrics() if line["stage"] == "student"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-3)


def test_texts_without_label_take_part_in_what_the_teacher_says(folder: Path, run_it: Callable[..., Any]) -> None:
    path = folder / "texts" / "train.tsv"
    lines = path.read_text().splitlines()
    bare = [line.split("\t")[0] + "\t" for line in lines[41:]]
    path.write_text("\n".join([*lines[:41], *bare]))
    run, _ = run_it(text=DISTILLED)
    data = build.build_data(load_run(run))
    assert int((data.train.targets < 0).sum()) == 20
    first = next(line for line in run.metrics() if line["stage"] == "student")
    assert first["terms"]["kd"] > 0 and np.isfinite(first["loss"])
