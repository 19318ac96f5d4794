"""Checkpoints of a training stage: everything that the next step depends on, written aside and renamed."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from kdctl import runs
from kdctl.errors import MissingError, Problem


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a state of tensors and plain values; a reader sees the old file or the new one, never a part."""
    with runs.writing(path) as file:
        torch.save(state, file)


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads a checkpoint without executing anything in it. Raises MissingError when it is damaged or not there."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise MissingError(Problem("there is no such checkpoint", file=str(path))) from None
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise MissingError(Problem(f"the checkpoint is damaged: {error}", file=str(path))) from None


def random_state(device: torch.device) -> dict[str, Any]:
    """The generators that dropout and the like draw from."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def student_weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The student's weights in a stage's checkpoints: `best` by validation, or `last` (averaged where EMA is on)."""
    saved = load(folder / f"{name}.pt")
    if name == "best":
        return saved["student"]
    if saved["ema"]:
        return saved["ema"]["average"]
    prefix = "student."
    return {k.removeprefix(prefix): v for k, v in saved["trained"].items() if k.startswith(prefix)}
