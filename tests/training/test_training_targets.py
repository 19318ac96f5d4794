"""Several labels, numbers and tagged words from a file to predictions: one small run of each, and its ONNX file."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdctl import runs
from kdctl.cli import app
from kdctl.cli.train import show as show_trained
from kdctl.config.expand import load_experiment
from kdctl.errors import ConfigError
from kdctl.export.onnx import Onnx as Exporter
from kdctl.export.onnx import OnnxPredictor, record_metadata
from kdctl.models.record import load_model
from kdctl.predict import open_student, predict_files
from kdctl.report.card import card
from kdctl.report.facts import collect
from kdctl.smoke import smoke
from kdctl.watch import Reporter

pytest.importorskip("tokenizers")

FILE = """
name: small
task: {{kind: {task}}}
data:
  {{kind: text, root: ., train: {file}, test: {file}, vocab_size: 80, max_length: 12, batch_size: 16,
   val_fraction: 0.2}}
teacher: {{kind: bert, depth: 1, width: 16, heads: 2, dropout: 0, train: {{epochs: {teacher}}}}}
student: {{kind: bert, depth: 1, width: 32, heads: 2, dropout: 0, pooling: mean}}
losses: [{{kind: supervised, weight: 0.9}}, {{kind: {loss}, weight: 0.1}}]
optimizer: {{kind: adamw, lr: 0.01}}
train: {{epochs: {epochs}, seed: {seed}, device: cpu, threads: 1}}
"""
NAMES = ["ann", "bob"]


def texts(task: str) -> str:
    """96 texts in the form of the task: what is said in them is their label."""
    draw, rest, content = random.Random(0), ["the", "film", "was", "it"], ""
    for _ in range(96):
        words = draw.choices(rest, k=3)
        if task == "multilabel":
            labels = [name for name in ("red", "blue", "round") if draw.random() < 0.5]
            words += labels
            draw.shuffle(words)
            content += f"{' '.join(words)}\t{','.join(labels) or 'none'}\n"
        elif task == "regression":
            good = draw.randrange(4)
            content += f"{' '.join(['good'] * good + ['bad'] * (3 - good))},{good / 3}\n"
        else:
            name, place = [draw.choice(NAMES), "lee"][: draw.randrange(1, 3)], draw.randrange(4)
            tags = ["O"] * 3
            words[place:place], tags[place:place] = name, ["B-PER", "I-PER"][: len(name)]
            content += "".join(f"{word} {tag}\n" for word, tag in zip(words, tags, strict=True)) + "\n"
    return {"multilabel": "text\tlabel\n", "regression": "text,label\n"}.get(task, "") + content


KINDS = {
    "multilabel": ("several.tsv", "binary_kd"),
    "regression": ("numbers.csv", "logit_mse"),
    "token_classification": ("words.conll", "kd"),
}


def file_of(folder: Path, task: str, loss: str | None = None, epochs: int = 10) -> str:
    name, own = KINDS[task]
    (folder / name).write_text(texts(task))
    seed = 2 if task == "multilabel" else 0  # with 77 texts not every beginning learns every class
    return FILE.format(task=task, file=name, loss=loss or own, epochs=epochs, teacher=min(epochs, 2), seed=seed)


def exported(run: runs.Run) -> OnnxPredictor:
    model = load_model(run.path)
    path = run / "model.onnx"
    Exporter().convert(model, model.record.input_shape, path, record_metadata(model.record.to_dict()))
    return OnnxPredictor(path, 1)


@pytest.fixture
def trained(folder: Path, run_it: Callable[..., Any]) -> Callable[[str], tuple[runs.Run, dict[str, Any]]]:
    return lambda task: run_it(text=file_of(folder, task))


def said(run: runs.Run, folder: Path, text: str) -> list[dict[str, Any]]:
    """What the run's student says of a text; its ONNX file has to say the same."""
    (folder / "new.txt").write_text(text)
    one, other = (
        predict_files(predictor, ["new.txt"], top=2, home=run.path) for predictor in (open_student(run), exported(run))
    )
    assert not one["failed"] and len(one["predictions"]) == len(other["predictions"]) > 0
    for mine, theirs in zip(one["predictions"], other["predictions"], strict=True):
        assert _rounded(mine) == _rounded(theirs)
    return one["predictions"]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(own) for name, own in value.items()}
    if isinstance(value, list):
        return [_rounded(own) for own in value]
    return pytest.approx(value, abs=1e-4) if isinstance(value, float) else value


def test_several_labels(trained: Callable[..., Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, document = trained("multilabel")
    measured = document["student"]["best"]["test"]
    assert measured["map"] > 80 and document["teacher"]["test"]["map"] > 0
    (row,) = said(run, folder, "the film was red and round")
    assert {one["label"] for one in row["labels"]} == {"red", "round"} and len(row["top"]) == 2
    assert all(one["probability"] > 0.5 for one in row["labels"])
    assert load_model(run.path).record.link == "sigmoid" and ".sigmoid()" in card(collect([run]))
    evaluation = runs.read_json(run / "eval" / "test.json")
    with np.load(run / "eval" / "test.npz") as kept:
        lines = [line.split("\t")[1].split(",") for line in texts("multilabel").splitlines()[1:]]
        names = ["blue", "none", "red", "round"]
        assert kept["targets"].tolist() == [[int(name in line) for name in names] for line in lines]
    assert [row["name"] for row in evaluation["per_class"]] == names
    capsys.readouterr()
    assert app.run(["eval", str(run)]) == 0
    assert "worst classes: " in capsys.readouterr().out
    assert app.run(["report", str(run), "-o", "page.html"]) == 0
    assert "average precision" in (folder / "page.html").read_text()


def test_a_number(trained: Callable[..., Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, document = trained("regression")
    capsys.readouterr()
    show_trained(document)
    agreement = f"agreement with the teacher {document['agreement']:.2f} (Spearman's correlation x 100)\n"
    assert agreement in capsys.readouterr().out
    assert app.run(["eval", str(run)]) == 0
    assert agreement in capsys.readouterr().out
    assert document["student"]["best"]["test"]["spearman"] > 90
    low, high = said(run, folder, "bad bad bad\ngood good good\n")
    assert low["value"] < high["value"] and set(low) == {"input", "value"}
    text = card(collect([run]))
    assert "[:, 0]" in text and "softmax" not in text and "text-regression" in text


def test_tagged_words(trained: Callable[..., Any], folder: Path) -> None:
    run, document = trained("token_classification")
    assert document["student"]["best"]["test"]["top1"] > 95
    short, long = said(run, folder, "it was ann lee\n" + "the " * 20 + "ann\n")
    assert [(one["word"], one["label"]) for one in short["words"]] == [
        ("it", "O"), ("was", "O"), ("ann", "B-PER"), ("lee", "I-PER")
    ]  # fmt: skip
    assert [one["label"] for one in long["words"]] == ["O"] * 10 + [None] * 11
    quality = runs.read_json(run / "eval" / "test.json")["quality"]
    assert quality["student"]["entity_f1"] > 90 and quality["teacher"]["entity_f1"] is not None
    assert ".softmax(dim=2)" in card(collect([run]))
    made = exported(run)
    assert made.num_classes == 3 and made(np.array([[2, 9, 9, 3]])).shape == (1, 4, 3)


@pytest.mark.parametrize("task", KINDS)
def test_stand_ins_where_there_are_no_data(task: str, folder: Path) -> None:
    text = file_of(folder, task).replace("root: .", "root: nowhere")
    (folder / "small.yaml").write_text(text)
    document = smoke(load_experiment(folder / "small.yaml", require_files=False).experiment, Reporter())
    assert document["stages"] == ["teacher", "student"] and "synthetic texts" in document["notes"][0]


def test_a_softmax_over_several_labels_is_refused_unless_forced(folder: Path, run_it: Callable[..., Any]) -> None:
    text = file_of(folder, "multilabel", "kd", epochs=1)
    with pytest.raises(ConfigError, match="'kd' is meant for softmax, and multilabel has sigmoid logits") as caught:
        run_it(text=text)
    problem = caught.value.problems[0]
    assert problem.key == "losses.1" and "binary_kd" in str(problem.hint)
    _, document = run_it(text=text.replace("kind: kd,", "kind: kd, force: true,"))
    assert document["status"] == "done"
