"""`kdctl doctor`: the environment, what is missing or mismatched in it, and how to mend it.

What could crash, hang or cost seconds (torch, torchvision, the runtimes of exported files) is tried in processes of its
own, a few at a time.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from kdctl import launch, registry
from kdctl.cli import console, surroundings
from kdctl.cli.surroundings import Check
from kdctl.cli.surroundings import check as _check
from kdctl.cli.verb import Options, Reply
from kdctl.errors import MissingError

_TRY_TORCH = """
import torch
x = torch.ones(4, 4, requires_grad=True)
(x @ x).sum().backward()
assert float(x.grad.sum()) == 128, x.grad
cuda = torch.cuda.is_available()
devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else []
devices += ["mps"] if torch.backends.mps.is_available() else []
threads = torch.get_num_threads()
print(", ".join(devices) or "no accelerator", f"{threads} thread" + "s" * (threads > 1), sep="; ")
"""

_TRY_TORCHVISION = """
import torch, torchvision
boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2]])
assert torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.5).tolist() == [0]
print("its operators run")
"""

_TRY_ONNXRUNTIME = """
import numpy as np, onnx, onnxruntime as ort
from onnx import TensorProto, helper
value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [2])
graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value("x")], [value("y")])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
assert session.run(None, {"x": np.array([-1, 2], np.float32)})[0].tolist() == [0, 2]
print("runs a model on", ", ".join(p.removesuffix("ExecutionProvider") for p in ort.get_available_providers()))
"""

_TRY_TARGET = "from kdctl.export.one_layer import main; main({!r})"
_LIBRARIES = {
    "onnx": "onnxruntime",
    "openvino": "openvino",
    "executorch": "executorch",
    "litert": "ai-edge-litert",
    "torchscript": "torch",
    "pt2": "torch",
}
"""The distribution that runs a target's files; one that is not listed is tried without knowing it."""
_EXTRAS = {
    "timm": "timm", "tokenizers": "text", "transformers": "huggingface", "datasets": "datasets",
    "tensorboard": "tensorboard", "wandb": "wandb", "mlflow-skinny": "mlflow",
}  # fmt: skip
"""Optional distributions, and the extra of kdctl that brings each."""
_ELSEWHERE = ("executorch", "litert")
"""Targets that may stand in an environment of their own."""
_NEEDED = ("onnx", "torchscript", "pt2")
"""Targets whose libraries kdctl stands on."""
_AT_A_TIME = 3
_TIMEOUT_S = 120
_CPU_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimddp", "i8mm")
_ROOM_BYTES = 2 * 2**30

Outcome = tuple[bool, str]
"""Whether an attempt worked, and the last line that it printed."""


def doctor(options: Options) -> Reply:
    """The environment: versions that must fit each other, what really runs, processor, memory, disk.

    Every installed runtime of exported files converts and runs a model of one layer. Exit code 4 when something that
    kdctl needs is missing, or anything is broken.
    """
    programs = {"torch": _TRY_TORCH, "torchvision": _TRY_TORCHVISION, "onnxruntime": _TRY_ONNXRUNTIME}
    programs = {name: code for name, code in programs.items() if _version(name)}
    targets = registry.catalogue("exporters")
    programs |= {f"export {target}": _TRY_TARGET.format(target) for target in targets if _installed(target)}
    console.say(f"trying {', '.join(programs)}, each in a process of its own ...")
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        attempts = {name: pool.submit(_attempt, code) for name, code in programs.items()}
        checks = [
            _python(),
            _torch(_result(attempts, "torch")),
            _torchvision(_result(attempts, "torchvision")),
            _onnxruntime(_result(attempts, "onnxruntime")),
            *(_library(name) for name in ("numpy", "onnx", "safetensors", "pydantic")),
            surroundings.requirements(),
            *(_optional(name, extra) for name, extra in _EXTRAS.items()),
            *(_target(target, _result(attempts, f"export {target}")) for target in targets),
            _processor(),
            _cores(),
            surroundings.threads(_usable_cores()),
            _memory(),
            _disk(),
            surroundings.cache(),
            _write_access(),
            surroundings.clock(),
        ]
    failed = [check["name"] for check in checks if check["status"] in ("fail", "broken")]
    error = MissingError(f"failed: {', '.join(failed)}", hint="the fix stands beside each check") if failed else None
    return Reply({"checks": checks}, _show, error)


def _show(document: dict[str, Any]) -> None:
    checks = document["checks"]
    console.print_table(["check", "status", "detail"], [[c["name"], c["status"], c["detail"]] for c in checks])
    for check in checks:
        if check["fix"]:
            console.out(f"{check['name']}: {check['fix']}")


# ----------------------------------------------------------------------------------------------------------- software


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _start(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=launch.child_environment(),
    )  # fmt: skip


def _attempt(code: str) -> Outcome:
    return _finish(_start(code))


def _result(attempts: Mapping[str, Future[Outcome]], name: str) -> Outcome | None:
    """What came of an attempt; None where there was none."""
    return attempts[name].result() if name in attempts else None


def _finish(attempt: subprocess.Popen[str]) -> Outcome:
    """Whether the attempt worked, and the last line that it printed."""
    try:
        output, errors = attempt.communicate(timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        attempt.kill()
        attempt.communicate()
        return False, f"no answer in {_TIMEOUT_S} s"
    if attempt.returncode == 0:
        return True, output.strip().rpartition("\n")[2]
    last = errors.strip().rpartition("\n")[2]
    if attempt.returncode < 0:
        last = f"the process was ended by signal {-attempt.returncode}" + (f": {last}" if last else "")
    return False, last or f"the process ended with code {attempt.returncode}"


def _python() -> Check:
    version = platform.python_version()
    if sys.maxsize <= 2**32:
        return _check("python", "fail", f"{version}, a 32-bit build", "torch needs a 64-bit Python: install one")
    return _check("python", "ok", f"{version}, {platform.system()} {platform.machine()}")


def _library(name: str) -> Check:
    version = _version(name)
    if version is None:
        return _check(name, "fail", "not installed", f"pip install {name}")
    return _check(name, "ok", version)


def _optional(name: str, extra: str) -> Check:
    version = _version(name)
    if version is None:
        return _check(name, "absent", "optional, not installed", f"pip install 'kdctl[{extra}]'")
    return _check(name, "ok", version)


def _torch(attempt: Outcome | None) -> Check:
    if attempt is None:
        return _check("torch", "fail", "not installed", "pip install torch -c constraints-cpu.txt, or a CUDA build")
    works, answer = attempt
    detail = f"{_version('torch')} ({_torch_build()}), {answer}"
    if not works:
        return _check("torch", "fail", detail, "install torch again; its own message stands above")
    if "CUDA" in detail and answer.startswith("no accelerator") and shutil.which("nvidia-smi"):
        return _check("torch", "warn", detail, "the GPU's driver does not fit this build: update one of them")
    return _check("torch", "ok", detail)


def _torch_build() -> str:
    """`CPU build` or `CUDA 13.0 build`, read from torch/version.py without importing it."""
    try:
        text = metadata.distribution("torch").locate_file("torch/version.py").read_text()
    except OSError:
        return "unknown build"
    for name in ("cuda", "hip", "xpu"):
        found = re.search(rf"^{name}\b[^=\n]*= '([^']+)'", text, re.MULTILINE)
        if found:
            return f"{name.upper()} {found[1]} build"
    return "CPU build"


def _torchvision(attempt: Outcome | None) -> Check:
    version = _version("torchvision")
    if attempt is None:
        return _check("torchvision", "fail", "not installed", "pip install torchvision -c constraints-cpu.txt")
    works, answer = attempt
    wanted, torch = _pinned_torch(), _version("torch")
    if wanted and torch and torch.split("+")[0] != wanted:
        fix = f"pip install 'torch=={wanted}', or the torchvision that was made for torch {torch}"
        return _check("torchvision", "fail", f"{version} is made for torch {wanted}, and torch is {torch}", fix)
    if works:
        return _check("torchvision", "ok", f"{version}, {answer}")
    if "nms does not exist" in answer and _torch_build() == "CPU build":
        detail = f"{version} is a CUDA build beside a CPU torch: its own operators do not load"
        fix = "torchvision models work all the same (kdctl replaces nms and roi_align); a CPU build mends it elsewhere"
        return _check("torchvision", "warn", detail, fix)
    return _check("torchvision", "fail", f"{version}: {answer}", "install torch and torchvision together, again")


def _pinned_torch() -> str | None:
    """The version of torch that the installed torchvision names as its own."""
    for requirement in metadata.requires("torchvision") or []:
        found = re.match(r"torch\s*\(?==\s*([\w.]+)", requirement)
        if found:
            return found[1]
    return None


def _onnxruntime(attempt: Outcome | None) -> Check:
    if attempt is None:
        return _check("onnxruntime", "fail", "not installed", "pip install onnxruntime")
    works, answer = attempt
    if works and _version("onnxruntime-gpu"):
        detail = (
            f"onnxruntime {_version('onnxruntime')} and onnxruntime-gpu {_version('onnxruntime-gpu')} share a folder"
        )
        return _check("onnxruntime", "warn", detail, "uninstall both, then install the one that is wanted")
    fix = None if works else "pip install --force-reinstall onnx onnxruntime"
    return _check("onnxruntime", "ok" if works else "fail", f"{_version('onnxruntime')}, {answer}", fix)


def _installed(target: str) -> bool:
    """Whether a target's library is there, or in an environment that a variable names."""
    library = _LIBRARIES.get(target)
    named = target in _ELSEWHERE and _elsewhere(target) in os.environ
    return library is None or _version(library) is not None or named


def _elsewhere(target: str) -> str:
    """The variable that names another Python for a target (kdctl.export.elsewhere)."""
    return f"KDCTL_{target.upper()}_PYTHON"


def _target(target: str, attempt: Outcome | None) -> Check:
    name, library = f"export {target}", _LIBRARIES.get(target)
    again = f"pip install --force-reinstall {library}" if library else "install its plug-in again"
    if attempt is None:
        if target in _NEEDED:
            return _check(name, "fail", f"{library} is not installed", f"pip install {library}")
        return _check(name, "absent", "optional, not installed", f"pip install 'kdctl[{target}]'")
    works, answer = attempt
    if works:
        return _check(name, "ok", answer)
    if library is not None and _version(library) is None:
        again = f"{_elsewhere(target)} names a Python that cannot run it: mend its environment or unset the variable"
    return _check(name, "fail" if target in _NEEDED else "broken", answer, again)


def try_target(target: str) -> Check:
    """Whether files of one target can be made and run here: converts and runs a model of one layer."""
    attempt = _attempt(_TRY_TARGET.format(target)) if _installed(target) else None
    return _target(target, attempt)


# ------------------------------------------------------------------------------------------------------------ machine


def _processor() -> Check:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return _check("processor", "ok", f"{platform.processor() or platform.machine()}; its flags are not readable")
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    listed = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    has = set(listed[1].split()) if listed else set()
    flags = [flag for flag in _CPU_FLAGS if flag in has]
    detail = f"{model[1] if model else platform.machine()}: {' '.join(flags) or 'no vector flags that matter here'}"
    if has & {"avx_vnni", "avx512_vnni", "i8mm", "asimddp"}:
        return _check("processor", "ok", detail)
    return _check("processor", "warn", detail, "no int8 dot product here: int8 files are smaller but may not be faster")


def _usable_cores() -> float:
    """The cores of this process's affinity, within the quota of its container."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(float(usable), _cgroup_cores() or usable)


def _cores() -> Check:
    count = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else count
    quota = _cgroup_cores()
    if quota is not None and quota < usable:
        fix = None if os.environ.get("OMP_NUM_THREADS") else f"train.threads={max(1, int(quota))}"
        return _check("cores", "warn" if fix else "ok", f"{usable}, of which the container may use {quota:g}", fix)
    return _check("cores", "ok", f"{usable} of {count}")


def _cgroup_cores() -> float | None:
    words = _first_line("/sys/fs/cgroup/cpu.max").split()
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0].isdigit() else None


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").partition("\n")[0]
    except OSError:
        return ""


def _memory() -> Check:
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return _check("memory", "ok", "not readable on this system")
    total, free = (int(re.search(rf"{key}:\s+(\d+) kB", text)[1]) * 1024 for key in ("MemTotal", "MemAvailable"))  # type: ignore[index]
    limit = _first_line("/sys/fs/cgroup/memory.max")
    if limit.isdigit() and int(limit) < total:
        total, free = int(limit), min(free, int(limit))
    detail = f"{_gib(free)} of {_gib(total)} free"
    if free < _ROOM_BYTES:
        return _check("memory", "warn", detail, "close other programs, or use a smaller data.batch_size")
    return _check("memory", "ok", detail)


def _disk() -> Check:
    free = shutil.disk_usage("runs" if os.path.isdir("runs") else ".").free
    if free < _ROOM_BYTES:
        return _check("disk", "warn", f"{_gib(free)} free here", "runs keep two checkpoints a stage: make room")
    return _check("disk", "ok", f"{_gib(free)} free here")


def _write_access() -> Check:
    try:
        with tempfile.TemporaryFile(dir="."):
            return _check("write access", "ok", str(Path.cwd()))
    except OSError as error:
        fix = "change to a directory of your own: runs are written below it"
        return _check("write access", "fail", f"{Path.cwd()}: {error.strerror}", fix)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
