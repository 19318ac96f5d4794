"""The published recipes of configs/text at a size for tests: which weights each of their stages trains."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from kdctl.config.expand import load_experiment
from kdctl.config.schema import Experiment, TrainStage
from kdctl.device import settle_by_rule
from kdctl.experiment import Plan, train
from kdctl.models.record import load_model
from kdctl.runs import Run
from kdctl.watch import Reporter

pytest.importorskip("tokenizers")

TEXT = Path(__file__).resolve().parents[2] / "configs" / "text"
COMMON = (
    "data.root=texts", "data.tokenizer=null", "data.vocab_size=60", "data.max_length=12", "data.batch_size=8",
    "teacher.weights=null", "teacher.control=true", "train.threads=1", "train.device=cpu", "train.precision=fp32",
    "train.keep=last",
)  # fmt: skip
TINYBERT = (
    "data.expand=[]", "teacher.width=12", "teacher.positions=null", "student.width=12", "student.hidden=16",
    "student.positions=null", "student.weights=null",
)  # fmt: skip
_SIZES = ("width=16", "heads=4", "embedding=8", "depth=2")
MOBILEBERT = (
    *(f"{who}.{size}" for who in ("teacher", "student") for size in _SIZES), "teacher.bottleneck=24",
    "student.bottleneck=8", "data.val_share=0.1", "data.test_share=0.1",
)  # fmt: skip


@pytest.fixture(autouse=True)
def texts(folder: Path) -> None:
    """48 texts of a few words, as a table with labels and as one text."""
    draw = random.Random(0)
    lines = [f"{' '.join(draw.choices(['the', 'film', 'was', ('bad', 'good')[n % 2]], k=6))}" for n in range(48)]
    (folder / "texts").mkdir()
    rows = [f"{line}\t{number % 2}" for number, line in enumerate(lines)]
    for name in ("train.tsv", "dev.tsv"):
        (folder / "texts" / name).write_text("\n".join(["sentence\tlabel", *rows]))
    (folder / "texts" / "train.txt").write_text("\n".join(lines))


def recipe(name: str, *overrides: str) -> Experiment:
    found = load_experiment(TEXT / f"{name}.yaml", (*COMMON, *overrides), require_files=False).experiment
    return found.model_copy(update={"train": settle_by_rule(found.train)})


def weights_after(experiment: Experiment, epochs: dict[str, int]) -> tuple[Run, dict[str, dict[str, Tensor]]]:
    """Runs the named stages alone for so many epochs each; the run, and the student's weights after each of them."""
    chosen: list[TrainStage] = []
    for stage in experiment.train_stages:
        if stage.name in epochs:
            start = chosen[-1].name if chosen else "fresh"
            chosen.append(stage.model_copy(update={"epochs": epochs[stage.name], "start": start}))
    document = train(Plan(experiment.model_copy(update={"stages": chosen}), ""), Reporter())
    run = Run(Path(document["run"]))
    return run, {name: load_model(run.stage_dir(name) / "model.safetensors").net.state_dict() for name in epochs}


def changed(before: dict[str, Tensor], after: dict[str, Any]) -> set[str]:
    return {name for name, value in before.items() if not value.equal(after[name])}


def test_tinybert_learns_states_then_answers() -> None:
    given = recipe("tinybert", *TINYBERT)
    assert [[term.kind for term in stage.losses] for stage in given.train_stages] == [
        ["hidden_mse", "attention_mse"],
        ["kd"],
    ]
    _, early = weights_after(given, {"intermediate": 1})
    _, late = weights_after(given, {"intermediate": 2, "student": 1})
    before, after = early["intermediate"], late["intermediate"]
    rest = {name for name in before if name.startswith(("bert.pooler.", "classifier."))}
    assert rest and changed(before, after) == set(before) - rest
    # A key's bias adds the same to all scores of a row: the answers do not depend on it.
    assert changed(after, late["student"]) >= {name for name in before if not name.endswith("key.bias")}


def test_mobilebert_learns_one_layer_after_the_other_from_the_teachers_embeddings() -> None:
    given = recipe("mobilebert", *MOBILEBERT)
    layers = [stage.name for stage in given.train_stages]
    assert layers == [*(f"layer{number}" for number in range(24)), "student"]
    for number, stage in enumerate(given.train_stages[:-1]):
        assert {pair for term in stage.losses for pair in term.taps} == {
            f"mobilebert.encoder.layer.{number}",
            f"mobilebert.encoder.layer.{number}.attention.self.softmax:in",
        }
    run, after = weights_after(given, {"layer0": 1, "layer1": 1, "student": 1})
    moved = changed(after["layer0"], after["layer1"])
    assert moved and all(name.startswith("mobilebert.encoder.layer.1.") for name in moved)
    everything = changed(after["layer1"], after["student"])
    for part in ("embeddings", "encoder.layer.0", "encoder.layer.1"):
        assert any(name.startswith(f"mobilebert.{part}.") for name in everything), part
    assert "cls.bias" in everything
    assert load_model(run / "student").record.kind == "mobilebert"


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("distilbert", ("data.val_share=0.1", "data.test_share=0.1", "train.accumulate=2")),
        ("minilmv2", ("data.val_share=0.1", "data.test_share=0.1", "losses.token_relations.heads=6")),
        ("pkd", ("teacher.positions=null", "student.positions=null")),
    ],
)
def test_recipes_of_one_stage(name: str, overrides: tuple[str, ...]) -> None:
    """Every term has a value."""
    sizes = ("teacher.width=24", "student.width=12") if name == "minilmv2" else ("teacher.width=24", "student.width=24")
    given = recipe(name, *sizes, *overrides)
    (stage,) = given.train_stages
    run, _ = weights_after(given, {"student": 1})
    (line,) = [line for line in run.metrics() if "loss" in line]
    terms = [term.label for term in stage.losses]
    assert set(line["terms"]) == set(terms) and all(line["terms"][term] > 0 for term in terms)
    assert (
        name != "distilbert"
        or "from the teacher, bert.encoder.layer 0, 2, 4, 7, 9, 11" in (run / "log.txt").read_text()
    )


def test_mobilebert_begins_with_its_teachers_embeddings() -> None:
    given = recipe("mobilebert", *MOBILEBERT)
    (first,) = [stage for stage in given.train_stages if stage.name == "layer0"]
    assert first.student is not None and first.student.inherit is not None
    run, after = weights_after(given, {"layer0": 1})
    assert "begins with 7 of its" in (run / "log.txt").read_text()
    assert {name for name in after["layer0"] if "embeddings" in name} == {
        f"mobilebert.embeddings.{name}"
        for name in (
            "word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight",
            "embedding_transformation.weight", "embedding_transformation.bias", "LayerNorm.weight", "LayerNorm.bias",
        )
    }  # fmt: skip
