"""A teacher that reads by another tokenizer than its student: what it says of a text is what it says alone."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdctl import build, runs
from kdctl.assembly.translated import Translated
from kdctl.config.schema import Experiment
from kdctl.data.tokenizer import Tokenizer
from kdctl.errors import ConfigError
from kdctl.evaluate import evaluate_run
from kdctl.experiment import load_run

pytest.importorskip("tokenizers")

WORDS = ["the", "film", "was", "it", "and", "of", "Ébène"]
TEACHER = """
name: teacher
task: {kind: text_classification}
data: {kind: text, root: texts, test: test.tsv, max_length: 120, vocab_size: 90, val_fraction: 0.2, batch_size: 16}
student: {kind: bert, depth: 1, width: 24, heads: 2}
optimizer: {kind: adamw, lr: 0.01}
train: {epochs: 3, device: cpu, threads: 1}
"""
STUDENT = (
    TEACHER.replace("name: teacher", "name: student").replace("vocab_size: 90", "tokenizer: other.json")
    + """
teacher: {kind: bert, weights: runs/teacher/001, tokenizer: runs/teacher/001, control: true}
losses:
  - {kind: kd, weight: 1, T: 2}
"""
)


@pytest.fixture(autouse=True)
def texts(folder: Path) -> Path:
    """60 training texts and 24 to test, and a tokenizer that cuts their words into other pieces than the usual one."""
    draw = random.Random(0)
    (folder / "texts").mkdir()
    for name, count in (("train", 60), ("test", 24)):
        rows = [[*draw.choices(WORDS, k=draw.randrange(9)), ("bad", "good")[n % 2]] for n in range(count)]
        lines = [f"{' '.join(row)}\t{' '.join(reversed(row))}\t{('neg', 'pos')[n % 2]}" for n, row in enumerate(rows)]
        (folder / "texts" / f"{name}.tsv").write_text("\n".join(["text\tpair\tlabel", *lines]))
    for name, kind in (("other", "wordpiece"), ("signs", "characters")):
        (folder / f"{name}.json").write_text(Tokenizer.trained([" ".join(WORDS), "good bad"], 42, kind).text)
    return folder / "texts"


@pytest.mark.parametrize(("pair", "other"), [("null", "signs"), ("pair", "other")])
def test_it_says_what_it_says_in_its_own_run(pair: str, other: str, folder: Path, run_it: Callable[..., Any]) -> None:
    """Logits of every test text agree with those of the teacher's own run, live and out of the store."""
    own, _ = run_it(f"data.pair={pair}", text=TEACHER)
    stored = "teacher_cache={store: logits, dtype: fp32}"
    text = STUDENT.replace("other.json", f"{other}.json")
    run, _ = run_it(f"data.pair={pair}", stored, text=text)
    (known,) = runs.read_json(run / "provenance.json")["teachers"]
    assert known["tokenizer_sha256"] == hashlib.sha256((own / "tokenizer.json").read_bytes()).hexdigest()
    experiment = load_run(run)
    data = build.build_data(experiment)
    (teacher,) = build.build_teachers(experiment.stages[-1], data, 0, lambda name: folder / name)
    assert isinstance(teacher, Translated) and teacher.record.tokens == data.tokens != teacher.record.reads
    test = data.split("test")
    with torch.no_grad():
        said = teacher.eval()(test.fetch(torch.arange(len(test))))
    with np.load(own / "eval" / "test.npz") as kept:
        torch.testing.assert_close(said, torch.from_numpy(kept["logits"]), rtol=1e-4, atol=1e-4)
    measured = evaluate_run(run, experiment, split="test")["teacher"]
    assert measured["top1"] == evaluate_run(own, load_run(own), split="test")["metrics"]["top1"]


def test_what_is_refused(folder: Path, experiment: Callable[..., Experiment], run_it: Callable[..., Any]) -> None:
    run_it(text=TEACHER)
    taps = "taps: [{student: bert.encoder.layer.0, teacher: bert.encoder.layer.0}]"
    tapped = STUDENT + "  - {kind: hidden_mse, weight: 0.1, " + taps + "}\n"
    with pytest.raises(ConfigError, match="its tokens are others") as caught:
        run_it(text=tapped)
    assert caught.value.problems[0].key == "losses.hidden_mse.taps"
    pooled = tapped.replace("bert.encoder.layer.0", "bert.pooler").replace("hidden_mse", "cosine")
    assert run_it(text=pooled)[1]["status"] == "done"
    with pytest.raises(ConfigError, match="another tokenizer") as caught:
        run_it(text=STUDENT.replace(", tokenizer: runs/teacher/001", ""))
    assert "teacher.tokenizer" in str(caught.value)
    words = TEACHER.split("data:")[0].replace("text_classification", "causal_lm")
    (folder / "texts" / "train.txt").write_text("the film was it and of " * 200)
    language = words + "data: {kind: corpus, root: texts, tokenizer: other.json, max_length: 12, batch_size: 8}\n"
    language += (
        "teacher: {kind: gpt, control: true, tokenizer: other.json}\nlosses: [{kind: kd}]\nstudent: {kind: gpt}\n"
    )
    with pytest.raises(ConfigError, match="each token") as caught:
        run_it(text=language)
    assert caught.value.problems[0].key == "teacher.tokenizer"
