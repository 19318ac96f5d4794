"""compress: re-loaded from disk, measured on the whole test split, gated; damage is named; nothing half written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdctl import artefacts, build, pipeline, runs
from kdctl.cli.compress import show
from kdctl.compress.quantize import Quantize
from kdctl.config.recipe import read_recipe, stage_of_options, with_stages
from kdctl.errors import ConfigError, KdctlError
from kdctl.evaluate import evaluate_run
from kdctl.experiment import load_run


@pytest.fixture
def run(run_it: Callable[..., Any]) -> runs.Run:
    return run_it("train.epochs=6")[0]


def compress(run: runs.Run, **options: Any) -> dict[str, Any]:
    experiment, (stage,) = with_stages(run.config, [], stage_of_options(kind="quantize", dtype="int8", **options))
    return pipeline.compress(run, experiment, stage)


def test_compress_measures_what_lies_on_disk(run: runs.Run, capsys: pytest.CaptureFixture[str]) -> None:
    document = compress(run, max_drop=100.0, min_speedup=1e9)
    folder = run / "artefacts" / "int8-static"
    assert document["artefact"].endswith("artefacts/int8-static")
    assert document["after"]["bytes"] == (folder / "model.onnx").stat().st_size
    assert document["before"]["bytes"] == (run / "student.safetensors").stat().st_size
    assert document["samples"] == 500
    measured = evaluate_run(run, load_run(run))["metrics"]
    assert document["before"]["metrics"] == pytest.approx(measured, rel=1e-5)
    assert document["same_runtime"]["metrics"]["top1"] == pytest.approx(measured["top1"], abs=0.21)
    for column in ("before", "same_runtime", "after"):
        assert set(document[column]["latency_ms"]) == {"1", "32"}
    again = artefacts.evaluate_artefact(run, load_run(run), folder, "test")
    assert again["metrics"] == document["after"]["metrics"]
    assert again["agreement"] == document["agreement"]
    assert {g["name"]: g["passed"] for g in document["gates"]} == {"max_drop": True, "min_speedup": False}
    error = artefacts.check_gates(document)
    assert error is not None and error.code == 6 and "min_speedup" in str(error)
    assert document["notes"], "a net of a thousand weights cannot pay, and the notes say why"
    show(document)
    assert "gate min_speedup" in capsys.readouterr().out
    _damage_is_named(run, folder)


def _damage_is_named(run: runs.Run, folder: Path) -> None:
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(KdctlError, match=r"model\.onnx is damaged"):
        artefacts.evaluate_artefact(run, load_run(run), folder, "test")


def test_calibration_images_are_training_images(run: runs.Run) -> None:
    data = build.build_data(load_run(run))
    images = np.concatenate(list(artefacts._calibration_images(data)))
    train = {row.tobytes() for row in (data.train.images.numpy() / np.float32(255)).astype(np.float32)}  # type: ignore[union-attr]
    assert len(images) == len(data.train) and all(image.tobytes() in train for image in images)


def test_a_failed_conversion_leaves_the_run_as_it_was(run: runs.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KdctlError("no such operator")

    monkeypatch.setattr(Quantize, "convert", fail)
    before = sorted(str(p) for p in run.path.rglob("*"))
    with pytest.raises(KdctlError, match="no such operator"):
        compress(run)
    left = sorted(str(p) for p in run.path.rglob("*") if p.name != "artefacts")
    assert left == before


def test_a_recipe_is_checked_like_a_file(run: runs.Run, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("compress:\n  - kind: quantize\n    calibration: percentil\n")
    with pytest.raises(ConfigError) as error:
        with_stages(run.config, [], read_recipe(recipe))
    (problem,) = error.value.problems
    assert problem.file == str(recipe) and problem.line == 3 and "percentile" in str(problem)
    recipe.write_text("compress: [{kind: quantize, calibration: percentile, max_drop: 0.5}]\n")
    _, (stage,) = with_stages(run.config, [], read_recipe(recipe))
    assert stage.arguments["calibration"] == "percentile" and stage.max_drop == 0.5
    recipe.write_text("train: {}\n")
    with pytest.raises(ConfigError, match="one key"):
        read_recipe(recipe)


def test_gates_compare_with_their_limits() -> None:
    from kdctl.config.schema import OutputStage

    column = {"metrics": {"top1": 90.0}, "cpu_ms": {"1": 2.0}}
    document = {"before": column, "same_runtime": column, "after": {"metrics": {"top1": 89.5}, "cpu_ms": {"1": 1.0}}}
    for drop, speed, expected in ((0.5, 2.0, [True, True]), (0.49, 2.01, [False, False])):
        stage = OutputStage(kind="quantize", max_drop=drop, min_speedup=speed)
        assert [g["passed"] for g in artefacts.gates(document, stage, "top1")] == expected
