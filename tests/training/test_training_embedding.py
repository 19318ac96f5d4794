"""Embeddings distilled without labels: trained, measured, exported, predicted, and what a file may not ask for."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from kdctl import build
from kdctl.config.expand import load_experiment
from kdctl.config.schema import Experiment
from kdctl.control import control
from kdctl.data.tokenizer import Tokenizer
from kdctl.errors import ConfigError
from kdctl.evaluate import evaluate_run
from kdctl.experiment import load_run
from kdctl.export.onnx import Onnx as Exporter
from kdctl.export.onnx import OnnxPredictor, record_metadata
from kdctl.models.bert import Bert
from kdctl.models.record import load_model
from kdctl.predict import open_student, predict_files
from kdctl.report.card import card
from kdctl.report.facts import collect
from kdctl.smoke import smoke
from kdctl.watch import Reporter

pytest.importorskip("tokenizers")

FILE = """
name: small
task: {kind: sentence_embedding}
data: {kind: text, root: ., test: test.tsv, tokenizer: encoder, max_length: 12, val_fraction: 0.2, batch_size: 16}
teacher: {kind: bert, depth: 1, width: 24, heads: 2, weights: encoder}
student: {kind: bert, depth: 1, width: 16, heads: 2, dropout: 0}
losses:
  - {kind: cosine, weight: 1, taps: [bert.pooler]}
  - {kind: pkt, weight: 10, taps: [bert.pooler]}
optimizer: {kind: adamw, lr: 0.01}
train: {epochs: 8, device: cpu, threads: 1}
"""


@pytest.fixture(autouse=True)
def encoder(folder: Path) -> None:
    """80 training texts and 40 to test, each about one of two things, and an encoder of random weights for them."""
    draw = random.Random(0)
    words = {"sea": ["ship", "wave", "salt", "fish"], "sky": ["bird", "wind", "cloud", "star"]}
    lines = [f"{' '.join(draw.choices(words[name], k=4))}\t{name}" for name in draw.choices(list(words), k=120)]
    (folder / "train.tsv").write_text("\n".join(["text\tlabel", *lines[:80]]))
    (folder / "test.tsv").write_text("\n".join(["text\tlabel", *lines[80:]]))
    tokenizer = Tokenizer.trained(lines, 80)
    torch.manual_seed(0)
    vocabulary = tokenizer.tokens(12).vocab_size
    net = Bert(depth=1, width=24, heads=2, num_classes=0, vocab_size=vocabulary, max_length=12, head="embedding")
    (folder / "encoder").mkdir()
    (folder / "encoder" / "tokenizer.json").write_text(tokenizer.text)
    state = {name.removeprefix("bert."): value.clone() for name, value in net.state_dict().items()}
    safetensors.torch.save_file(state, folder / "encoder" / "model.safetensors")


def test_a_narrower_student_learns_where_texts_lie(run_it: Callable[..., Any], folder: Path) -> None:
    run, document = run_it("teacher_cache.store=features", text=FILE)
    lines = run.metrics()
    assert lines[-1]["terms"]["cosine"] < 0.5 * lines[0]["terms"]["cosine"]
    experiment = load_run(run)
    measured = evaluate_run(run, experiment)
    assert measured["metrics"]["nearest"] > 80 and measured["teacher"]["nearest"] > 80
    assert measured["agreement"] == pytest.approx(document["agreement"])
    record = json.loads((run / "student.json").read_text())
    assert record["head"] == record["link"] == "embedding" and record["class_names"] == []
    kept, teacher = (np.load(run / "eval" / name)["logits"] for name in ("test.npz", "test.teacher.npz"))
    assert kept.shape == (40, 16) and teacher.shape == (40, 24)
    text = card(collect([run]))
    assert "An encoder of texts" in text and "embeddings = model(tokens)" in text

    (folder / "new.txt").write_text("salt fish wave\nthe bird and a star\n")
    predictor = open_student(run)
    said = predict_files(predictor, ["new.txt"], home=run.path)
    assert [len(row["embedding"]) for row in said["predictions"]] == [16, 16]

    model = load_model(run / "student")
    path = folder / "small.onnx"
    Exporter().convert(model, model.record.input_shape, path, record_metadata(model.record.to_dict()))
    exported = OnnxPredictor(path, 1)
    assert (exported.head, exported.num_classes, exported.class_names) == ("embedding", 16, [])
    again = predict_files(exported, ["new.txt"], home=run.path)
    for one, other in zip(said["predictions"], again["predictions"], strict=True):
        np.testing.assert_allclose(one["embedding"], other["embedding"], atol=1e-5)


def test_no_text_needs_a_label(run_it: Callable[..., Any], folder: Path) -> None:
    for name in ("train", "test"):
        lines = (folder / f"{name}.tsv").read_text().splitlines()
        (folder / f"{name}.tsv").write_text("\n".join(line.split("\t")[0] for line in lines))
    run, document = run_it("data.label=null", "data.val_fraction=0", "train.epochs=2", text=FILE)
    assert document["agreement"] >= 0
    data = build.build_data(load_run(run))
    assert data.class_names == [] and len(data.train) == 80


def test_without_its_teacher_nothing_is_left_to_learn(experiment: Callable[..., Experiment]) -> None:
    with pytest.raises(ConfigError, match="no term is left without the teacher"):
        control(experiment(text=FILE))


@pytest.mark.parametrize(
    "term",
    [
        "{kind: hidden_mse, weight: 1, taps: [bert.pooler]}",
        "{kind: rkd, weight: 1, taps: [bert.pooler]}",
        "{kind: similarity_preserving, weight: 1, taps: [bert.pooler]}",
        "{kind: text_nst, weight: 1, taps: [bert.encoder.layer.0]}",
    ],
)
def test_terms_on_features_teach_it(experiment: Callable[..., Experiment], term: str) -> None:
    given = experiment(text=FILE.replace("  - {kind: pkt, weight: 10, taps: [bert.pooler]}", f"  - {term}"))
    assert smoke(given, Reporter())["stages"] == ["student"]


REFUSED = {
    "losses: [{kind: supervised}]": ("losses.0", "'supervised' looks at labels or logits"),
    "losses: [{kind: kd, force: true}]": ("losses.0", "'kd' looks at labels or logits"),
    "losses: [{kind: logit_mse}]": ("losses.0", "'logit_mse' looks at labels or logits"),
    "losses: null": ("losses", "no terms are given"),
    "losses: null\ndistill: {T: 2}": ("distill", "softens a softmax"),
    "teacher: {kind: bert, weights: null, train: {epochs: 1}}": ("teacher.train", "cannot be trained here"),
    "teacher: {kind: bert, weights: encoder, classes: [a, b]}": ("teacher.classes", "have no classes"),
    "teacher_cache: {store: both, top_k: 3}": ("teacher_cache.top_k", "no logits"),
    "data: {kind: digits}": ("data.kind", "embeddings of texts"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_has_no_meaning_for_embeddings_is_one_clear_error(folder: Path, change: str) -> None:
    key, message = REFUSED[change]
    (folder / "base.yaml").write_text(FILE)
    (folder / "small.yaml").write_text(f"extends: base.yaml\n{change}\n")
    with pytest.raises(ConfigError) as caught:
        build.build_data(load_experiment(folder / "small.yaml").experiment)
    (problem,) = caught.value.problems
    assert problem.key == key and message in problem.message and problem.hint


def test_teachers_of_unlike_width_have_no_mean(experiment: Callable[..., Experiment]) -> None:
    one = "{kind: bert, depth: 1, heads: 2, control: true, width: "
    other = f"teacher=[{one}24}}, {one}%d}}]"
    assert smoke(experiment(other % 24, text=FILE), Reporter())["stages"] == ["student"]
    padded = "losses=[{kind: similarity_preserving, weight: 1, taps: [bert.encoder.layer.0]}]"
    with pytest.raises(ConfigError, match="padding among these tokens"):
        smoke(experiment(other % 24, padded, text=FILE), Reporter())
    with pytest.raises(ConfigError) as caught:
        smoke(experiment(other % 32, text=FILE), Reporter())
    (problem,) = caught.value.problems
    assert problem.key == "teacher.1" and "32 dimensions" in problem.message and "one width" in str(problem.hint)
