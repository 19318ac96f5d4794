"""The loggers of a run together, with recorders in their place; each service's own calls, on a module that records."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kdctl import runs
from kdctl.config.dump import dump_yaml
from kdctl.config.expand import load_experiment
from kdctl.config.schema import Experiment
from kdctl.errors import ConfigError, MissingError
from kdctl.loggers.base import Listeners, numbers, of_epoch, role, title
from kdctl.runs import Run

FILE = "name: small\ndata: {kind: digits}\nstudent: {kind: digits_cnn, width: 4}\n"
RECORDER = """
from kdctl.loggers.base import Logger

class Recorder(Logger):
    \"\"\"Keeps what it is told.\"\"\"

    told = []

    def __init__(self, *, fails: str = "", name: str = "r") -> None:
        self.fails, self.name = fails, name

    def start(self, run, experiment):
        self._do("start", str(run), experiment.name)
        return f"recorder {self.name}"

    def epoch(self, line, number):
        self._do("epoch", line["stage"], line["epoch"], number)

    def finish(self, summary):
        self._do("finish", summary)

    def _do(self, what, *values):
        if what == self.fails:
            raise OSError("no route\\nto host")
        self.told.append((self.name, what, *values))
"""

Made = Callable[..., tuple[Run, Experiment]]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    """A run directory, and its experiment with these loggers."""
    monkeypatch.chdir(tmp_path)
    for variable in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI", "KDCTL_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    Path("recorder.py").write_text(RECORDER)

    def make(loggers: str, **changes: Any) -> tuple[Run, Experiment]:
        Path("small.yaml").write_text(f"{FILE}loggers: {loggers}\n")
        experiment = load_experiment(Path("small.yaml")).experiment
        run = runs.create("small", dump_yaml(experiment), "", stages=["student"], seed=0)
        run.update(**changes)
        return run, experiment

    return make


def line(epoch: int, stage: str = "student") -> dict[str, Any]:
    return {
        "stage": stage, "epoch": epoch, "lr": 0.1, "loss": 1.0 / epoch, "terms": {"ce": 2.0, "kd": float("nan")},
        "gradient_shares": {"ce": 0.25}, "val": {"top1": 50.0}, "best": True, "seconds": 1.0, "eval_seconds": 0.5,
        "samples_per_second": 100.0, "times": {"data": 0.1},
    }  # fmt: skip


def tell(run: Run, listeners: Listeners, *lines: dict[str, Any]) -> None:
    for one in lines:
        run.append_metrics(one)
        listeners.epoch(one)


def recorded() -> list[Any]:
    module = next(m for name, m in sys.modules.items() if name.startswith("kdctl_user_recorder"))
    told, module.Recorder.told = module.Recorder.told, []
    return told


def forget() -> None:
    for name in [name for name in sys.modules if name.startswith("kdctl_user_recorder")]:
        del sys.modules[name]


def test_the_numbers_of_a_line() -> None:
    found = of_epoch(line(2))
    assert found["student/loss"] == 0.5 and found["student/terms/ce"] == 2.0 and found["student/epoch"] == 2
    assert found["student/gradient_shares/ce"] == 0.25 and found["student/val/top1"] == 50.0
    assert {"student/lr", "student/samples_per_second", "student/times/data"} <= set(found)
    assert "student/terms/kd" not in found and "student/best" not in found and "student/stage" not in found
    assert numbers({"a": {"b": 1}, "c": "x", "d": [1], "e": None, "f": float("inf")}) == {"a/b": 1.0}


def test_what_a_run_is_called(made: Made) -> None:
    assert title(made("[]")[0]) == "small/001" and role(made("[]")[0]) == "main"
    control = made("[]", role="control", control="random_teacher")[0]
    assert (title(control), role(control)) == ("small/003 control random_teacher", "control random_teacher")
    assert role(made("[]", role="control")[0]) == "control baseline"


def test_each_logger_is_told_in_order(made: Made) -> None:
    forget()
    run, experiment = made("[{kind: './recorder.py:Recorder'}, {kind: './recorder.py:Recorder', name: s}]")
    said: list[str] = []
    with Listeners(run, experiment, said.append) as listeners:
        tell(run, listeners, line(1, "teacher"), line(1), line(2))
        listeners.finish({"epochs": 2})
    assert said == ["recorder r", "recorder s"]
    expected = [("start", "runs/small/001", "small"), ("epoch", "teacher", 1, 1), ("epoch", "student", 1, 2)]
    expected += [("epoch", "student", 2, 3), ("finish", {"epochs": 2})]
    told = recorded()
    assert [t[1:] for t in told if t[0] == "r"] == expected == [t[1:] for t in told if t[0] == "s"]


def test_a_resumed_run_tells_nothing_twice(made: Made) -> None:
    forget()
    run, experiment = made("[{kind: './recorder.py:Recorder'}]")
    with Listeners(run, experiment, print) as listeners:
        tell(run, listeners, line(1))
        size = run.metrics_size()
        tell(run, listeners, line(2))
    assert recorded()[-1] == ("r", "finish", None)  # it was stopped
    run.cut_metrics(size)  # killed before the checkpoint of epoch 2
    with Listeners(run, experiment, print) as listeners:
        tell(run, listeners, line(2), line(3))
        listeners.finish({})
    assert [t[1:] for t in recorded() if t[1] == "epoch"] == [("epoch", "student", 3, 3)]


@pytest.mark.parametrize("fails", ["start", "epoch", "finish"])
def test_one_that_fails_warns_once_and_stops_nothing(made: Made, fails: str) -> None:
    forget()
    run, experiment = made(
        f"[{{kind: './recorder.py:Recorder', fails: {fails}}}, {{kind: './recorder.py:Recorder', name: s}}]"
    )
    said: list[str] = []
    with Listeners(run, experiment, said.append) as listeners:
        tell(run, listeners, line(1), line(2))
        listeners.finish({})
    warned = [text for text in said if "failed" in text]
    assert len(warned) == 1 and "OSError: no route;" in warned[0] and "the run goes on" in warned[0]
    told = recorded()
    assert [t[1] for t in told if t[0] == "s"] == ["start", "epoch", "epoch", "finish"]
    own = {"start": [], "epoch": ["start", "finish"], "finish": ["start", "epoch", "epoch"]}[fails]
    assert [t[1] for t in told if t[0] == "r"] == own


def test_a_missing_package_names_its_extra(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdctl.loggers.base.util", SimpleNamespace(find_spec=lambda name: None))
    for kind in ("tensorboard", "wandb", "mlflow"):
        run, experiment = made(f"[{{kind: {kind}}}]")
        with pytest.raises(MissingError, match=kind) as caught:
            Listeners(run, experiment, print)
        assert caught.value.problems[0].hint == f"pip install 'kdctl[{kind}]'"
        assert not (run / "loggers.json").exists()


def test_a_folder_of_that_name_is_no_package(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    run, experiment = made("[{kind: wandb}]")
    found = ModuleSpec("wandb", None)  # what Python finds of the folder that wandb leaves in a working directory
    monkeypatch.setattr("kdctl.loggers.base.util", SimpleNamespace(find_spec=lambda name: found))
    with pytest.raises(MissingError, match="not installed"):
        Listeners(run, experiment, print)


def test_off_unless_asked_and_checked(made: Made) -> None:
    assert made("[]")[1].loggers == []
    with pytest.raises(ConfigError, match="no logger 'tensorbord'"):
        made("[{kind: tensorbord}]")
    with pytest.raises(ConfigError, match="projct"):
        made("[{kind: wandb, projct: x}]")
    assert made("[{kind: wandb}]")[1].loggers[0].arguments["project"] == "kdctl"


# ----------------------------------------------------------------------------------------- the services' own protocols


def module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None, origin="made up")
    vars(made).update(contents)
    monkeypatch.setitem(sys.modules, name, made)
    return made


class FakeWandB:
    """Records init, log and finish."""

    def __init__(self, login: bool) -> None:
        self.given: dict[str, Any] = {}
        self.logged: list[Any] = []
        self.summary: dict[str, Any] = {}
        self.has_login, self.code, self.url = login, None, "https://wandb.example/run"

    def login(self, **given: Any) -> bool:
        assert given == {"prompt": False, "verify": False}
        return self.has_login

    def init(self, **given: Any) -> FakeWandB:
        self.given = given
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.code = exit_code


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], FakeWandB]:
    def install(login: bool) -> FakeWandB:
        fake = FakeWandB(login)
        module(monkeypatch, "wandb", init=fake.init, login=fake.login, Settings=lambda **given: given)
        return fake

    return install


def test_wandb_with_a_login(made: Made, wandb: Callable[[bool], FakeWandB]) -> None:
    fake = wandb(True)
    run, experiment = made("[{kind: wandb, project: p}]", role="control", control="self", group="groups/001.json")
    said: list[str] = []
    with Listeners(run, experiment, said.append) as listeners:
        tell(run, listeners, line(1), line(2))
        listeners.finish({"student": {"best": 1.5}})
    given = fake.given
    assert (given["project"], given["mode"], given["resume"]) == ("p", "online", "allow")
    assert (given["name"], given["job_type"], given["group"]) == (
        "small/001 control self",
        "control self",
        "small groups/001.json",
    )
    assert given["config"]["student"]["width"] == 4 and given["dir"] == str(run.path)
    assert [step for step, _ in fake.logged] == [1, 2] and fake.logged[1][1]["student/loss"] == 0.5
    assert fake.summary == {"summary/student/best": 1.5} and fake.code == 0
    assert said == ["logger wandb: https://wandb.example/run"]
    before = given["id"]
    with Listeners(run, experiment, print):
        pass
    assert fake.given["id"] == before and fake.code == 1  # the same run goes on; not finished


@pytest.mark.parametrize(
    ("login", "environment", "mode", "why"),
    [
        (False, {}, "offline", "no login"),
        (True, {"KDCTL_OFFLINE": "1"}, "offline", "--offline"),
        (False, {"WANDB_API_KEY": "k"}, "online", "https"),
        (False, {"WANDB_MODE": "disabled", "KDCTL_OFFLINE": "1"}, None, "https"),
    ],
)
def test_wandb_never_asks(
    made: Made, wandb: Callable[[bool], FakeWandB], monkeypatch: pytest.MonkeyPatch,
    login: bool, environment: dict[str, str], mode: str | None, why: str,
) -> None:  # fmt: skip
    fake = wandb(login)
    run, experiment = made("[{kind: wandb}]")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    said: list[str] = []
    with Listeners(run, experiment, said.append):
        assert fake.given["mode"] == mode
    assert why in said[0]


class FakeMLflow:
    """Records a client's calls; runs are kept over clients, as a server keeps them."""

    def __init__(self) -> None:
        self.uris: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.metrics: list[Any] = []
        self.params: dict[str, str] = {}
        self.files: list[str] = []
        self.status = ""

    def __call__(self, tracking_uri: str) -> FakeMLflow:
        self.uris.append(tracking_uri)
        return self

    def get_experiment_by_name(self, name: str) -> None:
        return None

    def create_experiment(self, name: str) -> str:
        return f"of {name}"

    def create_run(self, number: str, run_name: str, tags: dict[str, str]) -> Any:
        self.created.append({"experiment": number, "name": run_name, "tags": tags})
        return SimpleNamespace(info=SimpleNamespace(run_id="id"))

    def update_run(self, run_id: str, status: str) -> None:
        assert (run_id, status) == ("id", "RUNNING")

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        assert run_id == "id" and len(params) <= 100
        self.metrics += metrics
        self.params |= dict(params)

    def log_text(self, run_id: str, text: str, name: str) -> None:
        self.files.append(name)

    def log_dict(self, run_id: str, document: Any, name: str) -> None:
        self.files.append(name)

    def set_terminated(self, run_id: str, status: str) -> None:
        self.status = status


@pytest.mark.parametrize("uri", [None, "http://tracker:5000"])
def test_mlflow(made: Made, monkeypatch: pytest.MonkeyPatch, uri: str | None) -> None:
    fake = FakeMLflow()
    for name in ("mlflow", "mlflow.tracking", "mlflow.entities", "mlflow.exceptions"):
        module(monkeypatch, name)
    vars(sys.modules["mlflow.tracking"])["MlflowClient"] = fake
    vars(sys.modules["mlflow.entities"]).update(Metric=lambda *given: given, Param=lambda *given: given)
    vars(sys.modules["mlflow.exceptions"])["MlflowException"] = RuntimeError
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "")
    run, experiment = made("[{kind: mlflow}]", role="control", control="self")
    if uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with Listeners(run, experiment, print) as listeners:
        tell(run, listeners, line(1))
    assert fake.status == "KILLED"
    with Listeners(run, experiment, print) as listeners:
        tell(run, listeners, line(2))
        listeners.finish({"epochs": 2})
    assert fake.uris == [uri or (run.path / "mlflow").resolve().as_uri()] * 2
    assert len(fake.created) == 1  # the second time it went on
    assert fake.created[0]["name"] == "small/001 control self" and fake.created[0]["tags"]["role"] == "control self"
    assert fake.params["student.width"] == "4" and fake.params["stages.0.losses.0.kind"] == "supervised"
    losses = [(value, step) for name, value, _, step in fake.metrics if name == "student/loss"]
    assert losses == [(1.0, 1), (0.5, 2)]
    assert fake.files == ["config.yaml", "summary.json"] and fake.status == "FINISHED"
