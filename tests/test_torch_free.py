"""Every command that needs no torch, run where torch, torchvision and numpy cannot be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

_HARNESS = """
import json, sys
blocked, tried = set({blocked!r}), []
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            tried.append(name)
            raise ModuleNotFoundError("blocked by the test: " + name, name=name)
sys.meta_path.insert(0, Blocker())
sys.argv = ["kdctl", *{arguments!r}]
from kdctl.__main__ import main
try:
    code = main()
finally:
    with open({report!r}, "w") as file:
        json.dump({{"tried": tried, "modules": sorted(sys.modules)}}, file)
sys.exit(code)
"""
HEAVY = ["torch", "torchvision", "numpy"]


@dataclass
class Outcome:
    code: int
    out: str
    err: str
    tried: list[str]
    modules: list[str]

    def packages(self) -> set[str]:
        return {name.split(".")[0] for name in self.modules}


@pytest.fixture
def kdctl(tmp_path):
    """Runs kdctl in a fresh process in an empty directory, with the heavy libraries made unimportable."""
    home = tmp_path / "home"
    home.mkdir()

    def call(*arguments: str, blocked: list[str] = HEAVY) -> Outcome:
        report = tmp_path / "report.json"
        code = _HARNESS.format(blocked=blocked, arguments=list(arguments), report=str(report))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=home, timeout=600)
        seen = json.loads(report.read_text()) if report.exists() else {"tried": [], "modules": []}
        return Outcome(done.returncode, done.stdout, done.stderr, seen["tried"], seen["modules"])

    call.home = home
    return call


def test_the_harness_blocks(kdctl):
    outcome = kdctl("--help", blocked=["typer"])
    assert outcome.code == 1 and "blocked by the test: typer" in outcome.err


def test_version_imports_nothing(kdctl):
    outcome = kdctl("--version")
    assert outcome.code == 0 and outcome.out.startswith("kdctl 0.")
    assert not outcome.packages() & {"typer", "click", "yaml", "pydantic", "rich", "torch", "numpy"}


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["train", "--help"], ["list", "losses"], ["list", "runs"]])
def test_help_and_list_stay_light(kdctl, arguments):
    outcome = kdctl(*arguments)
    assert outcome.code == 0, outcome.err
    assert not outcome.packages() & {"pydantic", "rich", "yaml", "torch", "numpy", "torchvision"}


def test_group_help_imports_no_verb(kdctl):
    outcome = kdctl("--help")
    verbs = {f"kdctl.cli.{name}" for name in ("init", "list", "check", "show", "train", "doctor", "eval")}
    assert not verbs & set(outcome.modules)
    for verb in ("init", "list", "explain", "schema", "check", "show", "train", "resume", "eval", "compress", "doctor"):
        assert f"\n  {verb} " in outcome.out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["list", "models"], "resnet20"),
        (["list", "losses"], "attention_transfer"),
        (["list", "methods"], "distill"),
        (["list", "data"], "digits"),
        (["list", "augment"], "random_crop"),
        (["list", "tasks"], "classification"),
        (["list", "optimizers"], "adamw"),
        (["list", "schedules"], "cosine"),
        (["list", "compressors"], "quantize"),
        (["list", "exporters"], "onnx"),
        (["list", "templates"], "quickstart"),
        (["explain", "kd"], "temperature"),
        (["explain", "resnet20"], "CVPR 2016"),
        (["explain", "data.views"], "fresh"),
        (["schema"], '"batch_size"'),
    ],
)
def test_command(kdctl, arguments, expected):
    outcome = kdctl(*arguments)
    assert outcome.code == 0, outcome.err
    assert expected in outcome.out
    assert outcome.tried == []


def test_from_template_to_plan(kdctl):
    assert kdctl("init").code == 0
    checked = kdctl("check", "quickstart.yaml")
    assert (checked.code, checked.tried) == (0, []), checked.err
    assert "digits_cnn" in checked.out
    shown = kdctl("show", "quickstart.yaml", "--origin", "train.seed=3")
    assert (shown.code, shown.tried) == (0, []), shown.err
    assert [p.name for p in kdctl.home.iterdir()] == ["quickstart.yaml"]


def test_wrong_config(kdctl):
    Path(kdctl.home / "wrong.yaml").write_text("data: {kind: digits, batch_sise: 8}\nstudent: {kind: resnet21}\n")
    outcome = kdctl("check", "wrong.yaml")
    assert (outcome.code, outcome.tried) == (3, [])
    assert "wrong.yaml:1" in outcome.err and "batch_size" in outcome.err
    assert "wrong.yaml:2" in outcome.err and "did you mean 'resnet" in outcome.err
    assert "Traceback" not in outcome.err


def test_train_finds_a_wrong_config_before_torch(kdctl):
    Path(kdctl.home / "wrong.yaml").write_text("data: {kind: digits}\nstudent: {kind: resnet21}\n")
    outcome = kdctl("train", "wrong.yaml")
    assert (outcome.code, outcome.tried) == (3, [])
    assert not (kdctl.home / "runs").exists()


def test_doctor_asks_other_processes(kdctl):
    outcome = kdctl("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(outcome.out)["checks"]}
    assert outcome.tried == []
    assert checks["torch"]["status"] == "ok"
