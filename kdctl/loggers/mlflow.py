"""MLflow: a store in the run directory, or the server that the environment names."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from kdctl.config.dump import plain
from kdctl.config.schema import Experiment
from kdctl.loggers.base import Logger, numbers, of_epoch, role, title
from kdctl.runs import Run

_SERVER = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""How long a server that does not answer may hold up an epoch, where the environment does not say."""
_BATCH = 1000
"""Metrics that a server takes at once."""
_VALUE = 500
"""Characters of a parameter that every store takes."""
_NAME = 250


class MLflow(Logger):
    """MLflow, by its small client (mlflow-skinny): a file store in the run directory, or MLFLOW_TRACKING_URI.

    Metrics are called STAGE/loss, STAGE/terms/kd, STAGE/val/top1, ...; their step counts the epochs of the run over all
    stages. Parameters are the values of the resolved configuration, tags say which control and which group a run is.

    experiment: the MLflow experiment; empty for the name of kdctl's own.
    """

    package: ClassVar[str] = "mlflow"
    extra: ClassVar[str] = "mlflow"

    def __init__(self, *, experiment: str = "") -> None:
        self.experiment = experiment

    def start(self, run: Run, experiment: Experiment) -> str:
        for name, value in _SERVER.items():
            os.environ.setdefault(name, value)
        given = os.environ.get("MLFLOW_TRACKING_URI")
        if given is None:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # without a database MLflow >= 3 wants to be asked
        uri = given or (run.path / "mlflow").resolve().as_uri()
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        self._client = MlflowClient(tracking_uri=uri)
        self._number = int(self.kept["epochs"])
        if self.kept.get("uri") != uri or not self._goes_on():
            self._create(run, experiment)
            values = [(key, str(value)[:_VALUE]) for key, value in _leaves(plain(experiment))]
            for first in range(0, len(values), 100):
                found = [Param(_allowed(key), value) for key, value in values[first : first + 100]]
                self._client.log_batch(self.kept["run_id"], params=found)
            self._client.log_text(self.kept["run_id"], run.config.read_text(encoding="utf-8"), "config.yaml")
            self.kept["uri"] = uri
        prefix = "" if given else "MLFLOW_ALLOW_FILE_STORE=true "
        return f"logger mlflow: {prefix}mlflow ui --backend-store-uri {given or run.path / 'mlflow'}"

    def epoch(self, line: Mapping[str, Any], number: int) -> None:
        self._number = number
        self._log(of_epoch(line), number)

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            self._log(numbers(summary, "summary"), self._number)
            self._client.log_dict(self.kept["run_id"], dict(summary), "summary.json")
        self._client.set_terminated(self.kept["run_id"], "FINISHED" if summary is not None else "KILLED")

    def _goes_on(self) -> bool:
        """Whether the run that was begun there is still known; then it runs again."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.update_run(self.kept["run_id"], status="RUNNING")
        except (MlflowException, KeyError):
            return False
        return True

    def _create(self, run: Run, experiment: Experiment) -> None:
        name = self.experiment or experiment.name
        known = self._client.get_experiment_by_name(name)
        number = known.experiment_id if known is not None else self._client.create_experiment(name)
        info = run.info
        tags = {"role": role(run), "seed": str(info["seed"]), "group": str(info.get("group") or ""), "run": str(run)}
        created = self._client.create_run(number, run_name=title(run), tags=tags)
        self.kept |= {"run_id": created.info.run_id, "epochs": 0}

    def _log(self, values: Mapping[str, float], step: int) -> None:
        import time

        now = int(1000 * time.time())
        found = [self._metric(_allowed(name), value, now, step) for name, value in values.items()]
        for first in range(0, len(found), _BATCH):
            self._client.log_batch(self.kept["run_id"], metrics=found[first : first + _BATCH])


def _allowed(name: str) -> str:
    """The name with what MLflow takes in names; another sign by its number, so that no two names become one."""
    return re.sub(r"[^\w\-. :/]", lambda sign: f"_{ord(sign[0]):x}", name, flags=re.ASCII)[:_NAME]


def _leaves(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Every plain value of nested maps and lists, by its path."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in _leaves(item, f"{prefix}.{key}".lstrip("."))]
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return [leaf for number, item in enumerate(value) for leaf in _leaves(item, f"{prefix}.{number}")]
    return [(prefix, value)]
