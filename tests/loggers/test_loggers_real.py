"""The loggers with the packages themselves, where they are installed: what was written is read back."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdctl import runs
from kdctl.config.dump import dump_yaml
from kdctl.config.expand import load_experiment
from kdctl.loggers.base import Listeners
from kdctl.runs import Run

FILE = "name: small\ndata: {kind: digits}\nstudent: {kind: digits_cnn, width: 4}\n"


@pytest.fixture
def logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Run]:
    """A run of three epochs, killed after the second was told and before its checkpoint, then resumed to its end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("KDCTL_OFFLINE", "1")

    def log(kind: str) -> Run:
        Path("small.yaml").write_text(f"{FILE}loggers: [{{kind: {kind}}}]\n")
        experiment = load_experiment(Path("small.yaml")).experiment
        run = runs.create("small", dump_yaml(experiment), "", stages=["student"], seed=0, role="control")
        said: list[str] = []
        with Listeners(run, experiment, said.append) as listeners:
            tell(run, listeners, 1, 1.0)
            size = run.metrics_size()
            tell(run, listeners, 2, 9.0)
        run.cut_metrics(size)
        with Listeners(run, experiment, said.append) as listeners:
            tell(run, listeners, 2, 0.5)
            tell(run, listeners, 3, 0.25)
            listeners.finish({"student": {"best": {"test": {"top1": 90.0}}}})
        assert not any("failed" in text for text in said), said
        return run

    return log


def tell(run: Run, listeners: Listeners, epoch: int, loss: float) -> None:
    line: dict[str, Any] = {"stage": "student", "epoch": epoch, "loss": loss, "terms": {"kd": loss}, "best": True}
    run.append_metrics(line)
    listeners.epoch(line)


def test_tensorboard_reads_its_events(logged: Callable[[str], Run]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(logged("tensorboard") / "tensorboard" / "control-baseline")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("student/terms/kd")] == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert [(e.step, e.value) for e in events.Scalars("summary/student/best/test/top1")] == [(4, 90.0)]
    text = events.Tensors("config/text")[0].tensor_proto.string_val[0].decode()
    assert "kind: digits_cnn" in text
    assert "small/001 control baseline" in events.Tensors("run/text")[0].tensor_proto.string_val[0].decode()


def test_mlflow_reads_its_store(logged: Callable[[str], Run]) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(logged("mlflow") / "mlflow").resolve().as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    history = client.get_metric_history(run.info.run_id, "student/loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 9.0), (3, 0.25)]  # what was told is not told again
    assert run.data.tags["role"] == "control baseline" and run.data.params["student.kind"] == "digits_cnn"
    assert run.info.status == "FINISHED" and run.data.metrics["summary/student/best/test/top1"] == 90.0
    assert {f.path for f in client.list_artifacts(run.info.run_id)} == {"config.yaml", "summary.json"}


def test_wandb_keeps_an_offline_run(logged: Callable[[str], Run]) -> None:
    pytest.importorskip("wandb")
    run = logged("wandb")
    files = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"), key=os.path.getmtime)
    assert files and len({file.name for file in files}) == 1  # one id, so the parts are one run
    assert b"student/terms/kd" in b"".join(file.read_bytes() for file in files)
