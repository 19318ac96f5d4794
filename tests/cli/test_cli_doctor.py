"""What `kdctl doctor` finds on machines that are not this one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from kdctl.cli import app, doctor, surroundings
from kdctl.export import one_layer
from kdctl.export.torchscript import TorchScriptPredictor


class Finished:
    """A process that has ended: its exit code and what it printed."""

    def __init__(self, code: int, output: str = "", errors: str = "") -> None:
        self.returncode, self.output, self.errors = code, output, errors

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        return self.output, self.errors


def ended(code: int, output: str = "", errors: str = "") -> doctor.Outcome:
    return doctor._finish(Finished(code, output, errors))


NMS = "Traceback\nRuntimeError: operator torchvision::nms does not exist"


@pytest.fixture
def versions(monkeypatch):
    """Sets the installed versions, what torchvision is made for, and the build of torch."""

    def install(build: str = "CPU build", pinned: str = "2.13.0", **found: str) -> None:
        monkeypatch.setattr(doctor, "_version", found.get)
        monkeypatch.setattr(doctor, "_pinned_torch", lambda: pinned)
        monkeypatch.setattr(doctor, "_torch_build", lambda: build)

    return install


def test_torchvision_that_works(versions):
    versions(torch="2.13.0+cpu", torchvision="0.28.0+cpu")
    assert doctor._torchvision(ended(0, "its operators run\n"))["status"] == "ok"


def test_torchvision_made_for_cuda_beside_a_cpu_torch(versions):
    versions(torch="2.13.0+cpu", torchvision="0.28.0")
    check = doctor._torchvision(ended(1, "", NMS))
    assert check["status"] == "warn" and "CUDA build beside a CPU torch" in check["detail"]


def test_torchvision_made_for_another_torch(versions):
    versions(torch="2.13.0+cpu", torchvision="0.26.0", pinned="2.11.0")
    check = doctor._torchvision(ended(1, "", NMS))
    assert check["status"] == "fail" and "made for torch 2.11.0" in check["detail"] and "torch==2.11.0" in check["fix"]


def test_torchvision_that_breaks_otherwise(versions):
    versions(build="CUDA 13.0 build", torch="2.13.0", torchvision="0.28.0")
    check = doctor._torchvision(ended(1, "", NMS))
    assert check["status"] == "fail" and "nms does not exist" in check["detail"]


def test_missing_packages(versions):
    versions()
    for check in (doctor._torch(None), doctor._torchvision(None), doctor._onnxruntime(None), doctor._library("onnx")):
        assert check["status"] == "fail" and check["fix"].startswith("pip install")
    assert doctor._optional("timm", "timm")["status"] == "absent"


def test_torch_that_crashes(versions):
    versions(torch="2.13.0")
    check = doctor._torch(ended(-11))
    assert check["status"] == "fail" and "ended by signal 11" in check["detail"]


def test_a_gpu_that_torch_does_not_see(versions, monkeypatch):
    versions(build="CUDA 13.0 build", torch="2.13.0")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert doctor._torch(ended(0, "no accelerator; 2 threads"))["status"] == "warn"
    assert doctor._torch(ended(0, "NVIDIA X; 2 threads"))["status"] == "ok"


def test_targets_that_are_not_there(versions, monkeypatch):
    versions(torch="2.13.0")
    monkeypatch.delenv("KDCTL_LITERT_PYTHON", raising=False)
    assert [doctor._installed(name) for name in ("onnx", "pt2", "openvino", "litert", "theirs")] == [
        False, True, False, False, True,
    ]  # fmt: skip
    check = doctor._target("openvino", None)
    assert check["status"] == "absent" and check["fix"] == "pip install 'kdctl[openvino]'"
    check = doctor._target("onnx", None)
    assert check["status"] == "fail" and check["fix"] == "pip install onnxruntime"
    monkeypatch.setenv("KDCTL_LITERT_PYTHON", "python")
    assert doctor._installed("litert")


def test_targets_that_break(versions):
    versions(torch="2.13.0", openvino="2026.4.1")
    check = doctor._target("openvino", ended(-6, "", "Assertion failed"))
    assert check["status"] == "broken" and "signal 6: Assertion failed" in check["detail"]
    assert check["fix"] == "pip install --force-reinstall openvino"
    assert doctor._target("pt2", ended(1, "", "off"))["status"] == "fail"
    assert doctor._target("pt2", ended(0, "runs"))["detail"] == "runs"
    assert "KDCTL_LITERT_PYTHON" in doctor._target("litert", ended(1, "", "off"))["fix"]


def test_one_layer_through_a_target(monkeypatch, capsys):
    assert one_layer.attempt("torchscript").endswith("runs a one-layer model")
    monkeypatch.setattr(TorchScriptPredictor, "__call__", lambda self, images: np.zeros((len(images), 4), np.float32))
    with pytest.raises(SystemExit) as ended:
        one_layer.main("torchscript")
    assert ended.value.code == 6 and "computes a linear layer wrongly" in capsys.readouterr().err


def test_a_process_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(doctor, "_TIMEOUT_S", 0.2)
    attempt = doctor._start("import threading; threading.Event().wait()")
    works, answer = doctor._finish(attempt)
    assert not works and "no answer" in answer
    assert attempt.returncode is not None


@pytest.mark.parametrize(
    ("line", "build"),
    [("cuda: Optional[str] = '13.0'", "CUDA 13.0 build"), ("cuda: Optional[str] = None", "CPU build")],
)
def test_the_build_of_torch_is_read_from_its_file(monkeypatch, tmp_path, line, build):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/version.py").write_text(f"__version__ = '2'\n{line}\nhip: Optional[str] = None\n")

    class Distribution:
        def locate_file(self, name: str) -> Path:
            return tmp_path / name

    monkeypatch.setattr(doctor.metadata, "distribution", lambda name: Distribution())
    assert doctor._torch_build() == build


def test_pinned_torch(monkeypatch):
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["numpy", "torch (==2.13.0)", "pillow"])
    assert doctor._pinned_torch() == "2.13.0"
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["torch==2.11.0"])
    assert doctor._pinned_torch() == "2.11.0"


def test_a_quota_of_a_container(monkeypatch):
    monkeypatch.setattr(doctor, "_first_line", lambda path: "50000 100000")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    check = doctor._cores()
    assert check["status"] == "warn" and "0.5" in check["detail"] and check["fix"] == "train.threads=1"
    monkeypatch.setattr(doctor, "_first_line", lambda path: "max 100000")
    assert doctor._cores()["status"] == "ok"


def test_a_disk_without_room(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**20})())
    assert doctor._disk()["status"] == "warn"


def test_no_write_access(monkeypatch):
    def refuse(dir: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    check = doctor._write_access()
    assert check["status"] == "fail" and "Permission denied" in check["detail"]


def test_exit_code_and_document(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_start", lambda code: Finished(0, "fine"))
    assert app.run(["doctor", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    names = [check["name"] for check in document["checks"]]
    assert document["ok"] and {
        "python",
        "torch",
        "onnxruntime",
        "export onnx",
        "export pt2",
        "processor",
        "disk",
    } <= set(names)
    assert all(set(check) == {"name", "status", "detail", "fix"} for check in document["checks"])
    monkeypatch.setattr(doctor, "_start", lambda code: Finished(1, "", "broken"))
    assert app.run(["doctor", "--json"]) == 4
    document = json.loads(capsys.readouterr().out)
    assert not document["ok"] and "onnxruntime" in document["errors"][0]["message"]
    assert app.run(["doctor"]) == 4
    text = capsys.readouterr().out
    assert "onnxruntime" in text and "pip install --force-reinstall" in text


def test_the_processor_of_this_machine():
    check = doctor._processor()
    assert check["status"] in ("ok", "warn") and check["detail"]
    assert sys.platform != "linux" or "flags are not readable" not in check["detail"]


# -------------------------------------------------------------------------------------------------------- surroundings


@pytest.fixture
def threads(monkeypatch):
    """The check of threads on so many cores, in an environment of these variables alone."""

    def look(cores: float = 4, **environment: str) -> dict[str, str]:
        for name in (*surroundings._COUNTS, *surroundings._PINNING, "OMP_WAIT_POLICY"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return surroundings.threads(cores)

    return look


def test_more_threads_than_cores(threads):
    assert threads()["status"] == "ok" and threads(OMP_NUM_THREADS="4")["status"] == "ok"
    check = threads(2.5, OMP_NUM_THREADS="3")
    assert check["status"] == "warn" and "more than the 2.5 cores" in check["detail"]
    assert "export OMP_NUM_THREADS=2" in check["fix"]
    assert threads(MKL_NUM_THREADS="64")["fix"].startswith("export MKL_NUM_THREADS=4")
    assert threads(OMP_NUM_THREADS="2,8")["status"] == "ok"


def test_settings_of_openmp_that_hurt(threads):
    assert threads(OMP_NUM_THREADS="many")["detail"] == "OMP_NUM_THREADS='many' is no number of threads"
    assert threads(OMP_WAIT_POLICY="ACTIVE")["fix"] == "unset OMP_WAIT_POLICY"
    assert threads(OMP_PROC_BIND="close")["fix"] == "unset OMP_PROC_BIND"
    assert threads(OMP_PROC_BIND="false")["status"] == "ok"


def test_a_clock_that_runs_behind(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert surroundings.clock()["status"] == "ok"
    run = tmp_path / "runs/small/001"
    run.mkdir(parents=True)
    (run / "run.json").write_text('{"created": "2999-01-01T00:00:00+00:00", "role": "main", "status": "done"}')
    check = surroundings.clock()
    assert check["status"] == "warn" and "before the newest run was made" in check["detail"]
    monkeypatch.setattr(surroundings.time, "time", lambda: 86_400.0)
    assert "before kdctl was installed" in surroundings.clock()["detail"]


def test_a_cache_that_cannot_hold_stores(monkeypatch, tmp_path):
    monkeypatch.setenv("KDCTL_CACHE", str(tmp_path / "not/yet"))
    assert surroundings.cache()["status"] == "ok" and not (tmp_path / "not").exists()
    monkeypatch.setattr(surroundings.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**20})())
    assert "make room" in surroundings.cache()["fix"]
    monkeypatch.setattr(surroundings.os, "access", lambda path, mode: False)
    assert "cannot be written" in surroundings.cache()["detail"]


def test_requirements_that_another_package_replaced(monkeypatch):
    listed = ["torch>=2.11", "typer>=0.16", "rich>=13.0", "absent>=1.0", "timm>=1.0; extra == 'timm'"]
    versions = {"torch": "2.13.0+cpu", "typer": "0.9.4", "rich": "13"}

    def version(name):
        if name not in versions:
            raise surroundings.metadata.PackageNotFoundError
        return versions[name]

    monkeypatch.setattr(surroundings.metadata, "requires", lambda name: listed)
    monkeypatch.setattr(surroundings.metadata, "version", version)
    check = surroundings.requirements()
    assert check["status"] == "warn" and check["fix"] == "pip install 'typer>=0.16' 'absent>=1.0'"
    assert (
        "typer 0.9.4" in check["detail"] and "absent is missing" in check["detail"] and "torch" not in check["detail"]
    )
    monkeypatch.setattr(surroundings.metadata, "requires", lambda name: listed[:1])
    assert surroundings.requirements()["status"] == "ok"


def test_two_builds_of_onnxruntime(versions):
    versions(onnxruntime="1.22", **{"onnxruntime-gpu": "1.21"})
    check = doctor._onnxruntime(ended(0, "runs a model on CPU"))
    assert check["status"] == "warn" and "share a folder" in check["detail"]
