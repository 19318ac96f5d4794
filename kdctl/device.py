"""Device, precision and threads: what this machine has, and how a run's settings are put into force."""

from __future__ import annotations

import contextlib
import importlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdctl import launch
from kdctl.config.schema import RunSettings
from kdctl.errors import ConfigError, MissingError, Problem

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def choose_device(name: str) -> torch.device:
    """The device that `train.device` names; `auto` takes CUDA, then Apple's MPS, then the CPU.

    Raises ConfigError for a name that is none, MissingError for a device that is not there: a device that was asked
    for is never replaced silently.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(Problem(f"got '{name}'; allowed: auto, cpu, cuda, cuda:N, mps", key="train.device")) from None
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type, False) or (device.index or 0) >= max(torch.cuda.device_count(), 1):
        raise MissingError(f"this machine has no device '{name}'", hint="train.device=auto takes the best there is")
    return device


def check_precision(precision: str, device: torch.device) -> None:
    """Raises ConfigError for fp16 on a CPU."""
    if precision == "fp16" and device.type == "cpu":
        hint = "bf16 keeps the range of fp32 and needs no loss scaling"
        raise ConfigError(Problem("fp16 does not train on a CPU", key="train.precision", hint=hint))


def settle_by_rule(settings: RunSettings) -> RunSettings:
    """The settings with every `auto` replaced by a rule of thumb: what holds where nothing is measured."""
    device = choose_device(settings.device)
    check_precision(settings.precision, device)
    on_cuda = device.type == "cuda"
    rule = {
        "precision": "bf16" if on_cuda and torch.cuda.is_bf16_supported() else "fp32",
        "layout": "channels_last" if on_cuda else "contiguous",
        "threads": wished_threads() or max(1, usable_cores() // launch.local_world_size()),
        "compile": False,
    }
    undecided = {name: value for name, value in rule.items() if getattr(settings, name) == "auto"}
    return settings.model_copy(update={"device": str(device), **undecided})


# ------------------------------------------------------------------------------------------------------------ hardware


def usable_cores(root: Path = Path("/")) -> int:
    """How many cores this process may use: those of its affinity, within the CPU quota of its control group.

    root: where the system's files are.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cores, _quota(root))))


def _quota(root: Path) -> float:
    """The cores' worth of time that the control groups around this process allow; infinite without a limit."""
    found = [float("inf")]
    for folder in _control_groups(root):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            if (folder / "cpu.max").is_file():  # version 2
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if float(quota) > 0:  # `max` is no number, -1 means none
                found.append(float(quota) / float(period))
    return min(found)


def _control_groups(root: Path) -> Iterator[Path]:
    """The folders of this process's control groups for CPU time, and of those around them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / controllers
        group = top / place.lstrip("/")
        yield from (folder for folder in (group, *group.parents) if folder == top or top in folder.parents)


def wished_threads() -> int | None:
    """How many threads the environment asks for by OMP_NUM_THREADS or MKL_NUM_THREADS; None where it does not."""
    for name in _THREAD_VARIABLES:
        first = os.environ.get(name, "").split(",")[0].strip()
        if first.isdecimal() and int(first) > 0:
            return int(first)
    return None


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16 itself, rather than by way of float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    if platform.machine().lower() in ("aarch64", "arm64"):
        check = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
        return bool(check and check())
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check is not None and check() for check in checks)


def processor(device: torch.device) -> str:
    """What computes: the name of the GPU, or the model of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "CPU part")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# -------------------------------------------------------------------------------------------------------- into force


def apply_settings(settings: RunSettings) -> None:
    """Sets torch's threads, makes operations deterministic on a CPU, and lets CUDA multiply fp32 as TF32."""
    if isinstance(settings.threads, int):
        torch.set_num_threads(settings.threads)
    on_cuda = torch.device("cpu" if settings.device == "auto" else settings.device).type == "cuda"
    # On CUDA they are slower, and not all there. (use_deterministic_algorithms would import the compiler: two seconds.)
    torch.set_deterministic_debug_mode("default" if on_cuda else "warn")
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 - a debugging aid that costs a tenth of the time
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if on_cuda:
        if torch.device(settings.device).index is not None:
            torch.cuda.set_device(settings.device)  # events and waiting are of the current device
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True


@contextlib.contextmanager
def restored(device: torch.device) -> Iterator[None]:
    """Puts back what a block changes of torch: random generators, threads, and what apply_settings sets."""
    threads, matmul = torch.get_num_threads(), torch.get_float32_matmul_precision()
    mode, tf32 = torch.get_deterministic_debug_mode(), torch.backends.cudnn.allow_tf32
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_deterministic_debug_mode(mode)
            torch.set_float32_matmul_precision(matmul)
            torch.backends.cudnn.allow_tf32 = tf32
            setattr(torch.utils.deterministic, "fill_uninitialized_memory", fill)  # noqa: B010


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """The autocast context of a precision; nothing for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_DTYPES[precision])


def compiled(model: nn.Module) -> nn.Module:
    """The model compiled as training compiles it; it shares the parameters.

    One forward pass may have several backward passes (shares of the gradient, two momenta): no buffer is given away in
    the first.
    """
    functorch: Any = importlib.import_module("torch._functorch.config")
    functorch.donated_buffer = False
    warns = torch.is_deterministic_algorithms_warn_only_enabled()  # apply_settings does not tell the compiler
    torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled(), warn_only=warns)
    return torch.compile(model)  # type: ignore[return-value]
