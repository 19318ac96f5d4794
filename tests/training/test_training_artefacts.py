"""compress: re-loaded from disk, measured on the whole test split, gated; damage is named; nothing half written."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from kdctl import build, extension, runs
from kdctl.artefacts import make, measure
from kdctl.artefacts.measure import check_gates, evaluate_artefact, gates
from kdctl.artefacts.yardstick import Yardstick
from kdctl.bench.latency import Row
from kdctl.cli import products
from kdctl.compress.low_rank import LowRank
from kdctl.compress.quantize import Quantize
from kdctl.config.recipe import recipe_of_options, with_stages
from kdctl.config.schema import OutputStage
from kdctl.errors import Interrupted, KdctlError
from kdctl.evaluate import evaluate_run
from kdctl.experiment import load_run, resume
from kdctl.models.record import load_model
from kdctl.watch import Reporter


@pytest.fixture
def run(run_it: Callable[..., Any]) -> runs.Run:
    return run_it("train.epochs=6")[0]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times nothing: the fresh processes of a measurement take longer than all else that a test looks at."""

    def one_each(cells: Any) -> list[Row]:
        return [Row(c.what, "", c.batch, c.threads, 1.0, 1.0, 1.0, 1000.0, 1, 1) for c in cells]

    monkeypatch.setattr(measure, "measure_latency", one_each)


def extend(run: runs.Run, *stages: dict[str, Any], reporter: Reporter | None = None) -> list[dict[str, Any]]:
    return extension.extend(run, with_stages(run.config, [], recipe_of_options(stages)), reporter or Reporter())


def compress(run: runs.Run, **options: Any) -> dict[str, Any]:
    return extend(run, {"kind": "quantize", "dtype": "int8", "mode": "static", **options})[0]


def everything(run: runs.Run) -> dict[str, bytes]:
    """Every file of a run but its log."""
    files = (p for p in run.path.rglob("*") if p.is_file() and p.name not in ("log.txt", "run.lock"))
    return {str(p.relative_to(run.path)): p.read_bytes() for p in files}


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
        assert document[column]["parameters"] == 1182 and document[column]["macs"] > 10_000
    again = evaluate_artefact(run, load_run(run), folder, "test")
    assert again["metrics"] == document["after"]["metrics"]
    assert again["agreement"] == document["agreement"]
    assert {g["name"]: g["passed"] for g in document["gates"]} == {"max_drop": True, "min_speedup": False}
    error = check_gates(document)
    assert error is not None and error.code == 6 and "min_speedup" in str(error)
    assert document["notes"], "a net of a thousand weights cannot pay, and the notes say why"
    assert run.info["status"] == "done" and run.info["stages"]["int8-static"] == "done"
    known = hashlib.sha256(run.config.read_bytes()).hexdigest()
    assert runs.read_json(run / "provenance.json")["config_sha256"] == known
    products.show([document])
    assert "gate min_speedup" in capsys.readouterr().out
    _damage_is_named(run, folder)


def _damage_is_named(run: runs.Run, folder: Path) -> None:
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(KdctlError, match=r"model\.onnx is damaged"):
        evaluate_artefact(run, load_run(run), folder, "test")


def test_calibration_images_are_training_images(run: runs.Run) -> None:
    data = build.build_data(load_run(run))
    with Yardstick(run, load_run(run), data) as yardstick:
        images = np.concatenate(list(yardstick.workbench(load_run(run).student_stage).images()))
        labels = np.concatenate(
            [batch.targets.numpy() for batch in yardstick.workbench(load_run(run).student_stage).batches()]
        )
    train = {row.tobytes() for row in (data.train.images.numpy() / np.float32(255)).astype(np.float32)}  # type: ignore[union-attr]
    assert len(images) == len(data.train) and all(image.tobytes() in train for image in images)
    count = int((data.train.targets >= 0).sum())
    assert 0 < count < len(labels) and (labels[:count] >= 0).all() and (labels[count:] < 0).all(), "labelled ones first"


def test_quality_is_of_the_validation_split(run: runs.Run) -> None:
    experiment, data = load_run(run), build.build_data(load_run(run))
    seen = []

    def always_three(images: Any) -> Any:
        seen.append(images)
        return np.eye(10, dtype=np.float32)[np.full(len(images), 3)]

    with Yardstick(run, experiment, data) as yardstick:
        quality = yardstick.workbench(load_run(run).student_stage).quality(always_three)
    assert data.val is not None
    assert quality == pytest.approx(100 * float((data.val.targets == 3).float().mean()))
    assert sum(map(len, seen)) == len(data.val)


def test_a_failed_stage_leaves_the_run_as_it_was(run: runs.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KdctlError("no such operator")

    monkeypatch.setattr(Quantize, "convert", fail)
    before = everything(run)
    with pytest.raises(KdctlError, match="no such operator"):
        compress(run)
    assert everything(run) == before and not (run / "artefacts").exists()
    monkeypatch.setattr(LowRank, "reshape", fail)
    with pytest.raises(KdctlError, match="no such operator"):
        extend(run, {"kind": "low_rank"}, {"kind": "quantize"})
    assert everything(run) == before


@pytest.mark.usefixtures("quick")
def test_a_failed_stage_takes_none_before_it_along(run: runs.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KdctlError("no such operator")

    with monkeypatch.context() as patch:
        patch.setattr(Quantize, "convert", fail)
        with pytest.raises(KdctlError):
            extend(run, {"kind": "low_rank"}, {"kind": "quantize"})
    assert [p.name for p in run.artefacts] == ["low_rank-0.5"] and run.info["status"] == "done"
    assert [s.name for s in load_run(run).products] == ["low_rank-0.5"]
    made = (run / "stages" / "low_rank-0.5" / "model.safetensors").stat().st_mtime_ns
    documents = extend(run, {"kind": "low_rank"}, {"kind": "quantize"})
    assert [d["variant"] for d in documents] == ["low_rank-0.5", "int8"]
    assert (run / "stages" / "low_rank-0.5" / "model.safetensors").stat().st_mtime_ns == made, "it was made anew"


@pytest.mark.usefixtures("quick")
def test_a_pipeline_of_all_kinds(run: runs.Run, tmp_path: Path) -> None:
    documents = extend(
        run,
        {"kind": "prune", "ratio": 0.4, "round_to": 1},
        {"kind": "low_rank", "keep_ratio": 0.7, "round_to": 1},
        {"kind": "finetune", "epochs": 1},
        {"kind": "finetune", "name": "qat", "epochs": 1, "method": {"kind": "qat"}},
        {"kind": "export", "target": "onnx", "opset": 19},
    )
    assert [d["target"] for d in documents] == ["torch"] * 4 + ["onnx"]
    opsets = {o.domain: o.version for o in onnx.load(Path(documents[-1]["artefact"]) / "model.onnx").opset_import}
    assert opsets[""] == 19, "an option of the exporter holds for what learnt to be quantised too"
    sizes = [d["after"]["parameters"] for d in documents]
    assert documents[0]["before"]["parameters"] > sizes[0] > sizes[1]
    assert documents[0]["after"]["macs"] < documents[0]["before"]["macs"]
    assert documents[-1]["details"]["mode"] == "static", "what learnt to be quantised is shipped so"
    assert documents[-1]["details"]["learned"] > 0
    model, quantized = load_model(run / "artefacts" / "low_rank-0.7" / "model"), documents[-2]["agreement"]
    assert sum(p.numel() for p in model.parameters()) == sizes[1] and 0 < quantized <= 100
    moved = tmp_path / "elsewhere"
    shutil.move(run.path, moved)
    for document in documents:
        folder = moved / "artefacts" / document["variant"]
        again = evaluate_artefact(runs.Run(moved), load_run(runs.Run(moved)), folder, "test")
        assert again["metrics"] == pytest.approx(document["after"]["metrics"], rel=1e-4)


@pytest.mark.usefixtures("quick")
def test_a_missed_gate_stops_the_stages_after_it(run: runs.Run) -> None:
    documents = extend(run, {"kind": "low_rank", "min_speedup": 1000.0}, {"kind": "quantize"})
    assert [d["variant"] for d in documents] == ["low_rank-0.5"] and check_gates(documents[0]) is not None
    assert [p.name for p in run.artefacts] == ["low_rank-0.5"]
    assert [s.name for s in load_run(run).products] == ["low_rank-0.5"] and run.info["status"] == "done"


@pytest.mark.usefixtures("quick")
def test_what_was_made_of_a_replaced_model_goes_with_it(
    run_it: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def recipe(ratio: float, **gates: float) -> list[dict[str, Any]]:
        first = {"kind": "low_rank", "name": "p", "keep_ratio": ratio, **gates}
        other = {"kind": "low_rank", "name": "own", "from": "student", "keep_ratio": ratio + 0.1}
        return [first, {"kind": "finetune", "name": "f", "epochs": 1}, other]

    run = run_it()[0]
    extend(run, *recipe(0.7))
    before = everything(run)
    with monkeypatch.context() as patch:
        patch.setattr(make, "gates", _Failing())
        with pytest.raises(KdctlError):
            extend(run, *recipe(0.4))
    assert everything(run) == before, "nothing was done"
    assert [d["variant"] for d in extend(run, *recipe(0.4, min_speedup=1000.0))] == ["p"]
    after = everything(run)
    assert not [name for name in after if name.startswith(("stages/f/", "artefacts/f/"))]
    assert set(run.info["stages"]) == {"teacher", "student", "p", "own"}
    own = {name for name in before if name.startswith(("stages/own/", "artefacts/own/"))}
    assert len(own) > 4 and all(after[name] == before[name] for name in own), "the student, which it is of, has stayed"
    again = with_stages(run.config, [], recipe_of_options(recipe(0.4)))
    assert again.waiting == ["f", "own"], "a finetune of the model before was taken for one of this"


@pytest.mark.usefixtures("quick")
def test_gates_hold_for_what_is_there_already(run: runs.Run) -> None:
    (first,) = extend(run, {"kind": "low_rank"})
    assert first["gates"] == []
    (again,) = extend(run, {"kind": "low_rank", "min_speedup": 1000.0})
    assert check_gates(again) is not None and first["after"] == again["after"], "not made again, and held against it"
    assert [d["variant"] for d in extend(run, {"kind": "low_rank", "min_speedup": 0.1}, {"kind": "quantize"})] == [
        "low_rank-0.5", "int8",
    ]  # fmt: skip


@pytest.mark.usefixtures("quick")
def test_resume_does_not_pass_a_missed_gate(run_it: Callable[..., Any]) -> None:
    stages = "compress=[{kind: low_rank, min_speedup: 1000.0}, {kind: quantize}]"
    gated, document = run_it(stages)
    assert [d["variant"] for d in document["artefacts"]] == ["low_rank-0.5"] and gated.info["status"] == "failed"
    assert [d["variant"] for d in resume(gated, Reporter())["artefacts"]] == ["low_rank-0.5"]
    assert [p.name for p in gated.artefacts] == ["low_rank-0.5"]


@pytest.mark.usefixtures("quick")
def test_a_finetune_that_replaces_one_of_its_name_trains_anew(run: runs.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = extend(run, {"kind": "finetune", "name": "tuned", "epochs": 1})
    kept = everything(run)
    with monkeypatch.context() as patch:
        patch.setattr(make, "gates", fails := _Failing())
        with pytest.raises(KdctlError, match="broken"):
            extend(run, {"kind": "finetune", "name": "tuned", "epochs": 2})
    assert fails.called and everything(run) == kept, "what was replaced is back where the new one fails"
    (second,) = extend(run, {"kind": "finetune", "name": "tuned", "epochs": 2})
    assert (first["details"]["training"]["epochs"], second["details"]["training"]["epochs"]) == (1, 2)


class _Failing:
    called = False

    def __call__(self, *_: Any) -> None:
        self.called = True
        raise KdctlError("broken")


class _Stop(Reporter):
    """Asks to stop at the first step of the finetune."""

    def step(self, stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
        if stage == "finetune" and step == 1:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.usefixtures("quick")
def test_a_stopped_pipeline_goes_on(run: runs.Run) -> None:
    with pytest.raises(Interrupted):
        extend(run, {"kind": "low_rank"}, {"kind": "finetune", "epochs": 2}, {"kind": "quantize"}, reporter=_Stop())
    assert run.info["status"] == "interrupted"
    document = resume(run, Reporter())
    assert [a["variant"] for a in document["artefacts"]] == ["low_rank-0.5", "finetune", "int8"]
    assert run.info["status"] == "done" and set(run.info["stages"].values()) == {"done"}


@pytest.mark.usefixtures("quick")
def test_weights_as_they_are(run: runs.Run, run_it: Callable[..., Any]) -> None:
    """`epochs: 0` makes a run of given weights, to compress them."""
    text = f"""
name: given
data: {{kind: digits}}
student: {{kind: digits_cnn, width: 4, weights: {run.path.resolve() / "student.safetensors"}}}
train: {{epochs: 0, device: cpu, threads: 1}}
compress: [{{kind: quantize, max_drop: 100.0}}]
"""
    given, document = run_it(text=text)
    assert document["epochs"] == 0 and document["teacher"] is None
    assert document["student"]["best"]["test"] == pytest.approx(evaluate_run(run, load_run(run))["metrics"])
    assert [a["variant"] for a in document["artefacts"]] == ["int8"] and given.info["status"] == "done"


def test_gates_compare_with_their_limits() -> None:
    column = {"metrics": {"top1": 90.0}, "cpu_ms": {"1": 2.0}}
    document = {"before": column, "same_runtime": column, "after": {"metrics": {"top1": 89.5}, "cpu_ms": {"1": 1.0}}}
    for drop, speed, expected in ((0.5, 2.0, [True, True]), (0.49, 2.01, [False, False])):
        stage = OutputStage(kind="quantize", max_drop=drop, min_speedup=speed)
        assert [g["passed"] for g in gates(document, stage, "top1")] == expected
    plain = {"max_abs_diff": 0.011, "largest_logit": 10.0, "details": {"quantization": "fp32"}}
    (parity,) = gates(document | plain, OutputStage(kind="export"), "top1")
    assert parity["name"] == "parity" and not parity["passed"]
