"""eval/<split>.json of a run, and what is said of it: quality, fidelity, confusions."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from kdctl import evaluate, runs
from kdctl.cli.eval import show
from kdctl.evaluate import evaluate_config, evaluate_run
from kdctl.experiment import load_run
from kdctl.quality.calibration import fit_temperature
from kdctl.quality.fidelity import describe_fidelity


def of(run: runs.Run, split: str) -> tuple[dict[str, Any], Any, Any]:
    """The document of a split, and the predictions beside it."""
    files = [np.load(run / "eval" / f"{split}{who}.npz") for who in ("", ".teacher")]
    return runs.read_json(run / "eval" / f"{split}.json"), *files


def test_the_document_that_training_left(run: runs.Run) -> None:
    document, student, teacher = of(run, "test")
    assert {"samples", "metrics", "per_class", "split", "checkpoint", "teacher", "agreement", "notes"} <= set(document)
    fidelity = document["fidelity"]
    expected = describe_fidelity(student["logits"], teacher["logits"], student["targets"])
    assert fidelity == pytest.approx(expected) and fidelity["agreement"] == document["agreement"]
    for who, metrics in (("student", document["metrics"]), ("teacher", document["teacher"])):
        quality = document["quality"][who]
        assert (quality["nll"], quality["ece"]) == pytest.approx((metrics["nll"], metrics["ece"]))
        assert sum(row["samples"] for row in quality["reliability"]) == document["samples"] == 500
        assert np.trace(document["confusion"][who]) / 5 == pytest.approx(metrics["top1"])
        assert quality["groups"] is None
    wrong = {(row["truth"], row["chosen"]): row["samples"] for row in document["confused"]}
    assert len(wrong) == 10 and all(
        document["confusion"]["student"][int(truth)][int(chosen)] == count for (truth, chosen), count in wrong.items()
    )


def test_the_temperature_is_fitted_on_validation(run: runs.Run) -> None:
    evaluate_run(run, load_run(run), split="val")
    document, student, teacher = of(run, "val")
    for who, said in (("student", student), ("teacher", teacher)):
        assert document["quality"][who]["temperature"] is document["quality"][who]["scaled"] is None
        expected = fit_temperature(said["logits"], said["targets"])
        quality = of(run, "test")[0]["quality"][who]
        assert quality["temperature"] == (None if np.isnan(expected) else pytest.approx(expected))
    assert of(run, "test")[0]["quality"]["student"]["scaled"].keys() == {"nll", "brier", "ece", "adaptive_ece"}


def test_last_weights_and_a_run_without_validation(run: runs.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    predict = evaluate.predict
    monkeypatch.setattr(evaluate, "predict", lambda *given: (asked.append(len(given[1])), predict(*given))[1])
    document = evaluate_run(run, load_run(run), checkpoint="last", with_teacher=False)
    assert asked == [500] and document["quality"]["student"]["temperature"] is None
    assert document["quality"]["teacher"] is document["fidelity"] is document["confusion"]["teacher"] is None
    document = evaluate_run(run, load_run(run, ["data.val_fraction=0"]))
    assert asked == [500] * 3 and document["quality"]["teacher"]["scaled"] is None


def test_a_file_with_weights(run: runs.Run) -> None:
    document = evaluate_config(load_run(run, [f"student.weights={run.path.resolve()}"]))
    left = of(run, "test")[0]
    assert document["metrics"] == pytest.approx(left["metrics"])
    assert document["quality"]["student"]["brier"] == pytest.approx(left["quality"]["student"]["brier"])
    assert document["quality"]["teacher"] is None and document["confusion"]["student"] == left["confusion"]["student"]


def test_what_is_shown(run: runs.Run, capsys: pytest.CaptureFixture[str]) -> None:
    document = of(run, "test")[0]
    show(document)
    out = capsys.readouterr().out
    assert (
        f"student: Brier {document['quality']['student']['brier']:.4g}, adaptive ece" in out and "teacher: Brier" in out
    )
    assert f"KL(teacher || student) {document['fidelity']['kl']:.4g}" in out
    document["quality"]["student"]["brier"] = None
    document["per_class"][3] |= {"samples": 0, "top1": None}
    older = {
        key: value for key, value in document.items() if key not in ("quality", "fidelity", "confusion", "confused")
    }
    show(document)
    show(older)
    out = capsys.readouterr().out
    assert "Brier -," in out and out.count("fidelity: ") == 1
    assert json.dumps(document, allow_nan=False)
