"""Device, precision and threads: chosen once, before the run, and then stated."""

from __future__ import annotations

import contextlib
import os
from typing import Literal

import torch

from kdctl.config.schema import RunSettings
from kdctl.errors import ConfigError, MissingError, Problem

PrecisionName = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


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


def settle(settings: RunSettings) -> RunSettings:
    """The settings with every `auto` replaced by what this machine gives, so that a resumed run uses the same."""
    device = choose_device(settings.device)
    precision, layout, threads = settings.precision, settings.layout, settings.threads
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if precision == "fp16" and device.type == "cpu":
        hint = "bf16 keeps the range of fp32 and needs no loss scaling"
        raise ConfigError(Problem("fp16 does not train on a CPU", key="train.precision", hint=hint))
    if layout == "auto":
        layout = "channels_last" if device.type == "cuda" else "contiguous"
    if threads == "auto":
        threads = torch.get_num_threads()
    return settings.model_copy(
        update={"device": str(device), "precision": precision, "layout": layout, "threads": threads}
    )


def apply_threads(settings: RunSettings) -> None:
    """Sets torch's threads, and makes operations deterministic where they can be."""
    if isinstance(settings.threads, int):
        torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 - a debugging aid that costs a tenth of the time
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """The autocast context of a precision; nothing for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_DTYPES[precision])
