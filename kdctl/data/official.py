"""Official data files under a root: found, checked against published sums, or downloaded through torchvision."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NoReturn

from kdctl.errors import MissingError, Problem

_TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "mnist": "MNIST", "fashion_mnist": "FashionMNIST"}


def find(root: Path, folders: tuple[str, ...], names: tuple[str, ...]) -> Path | None:
    """The first of folder x name that is a file under root."""
    return next((p for folder in folders for name in names if (p := root / folder / name).is_file()), None)


def read_checked(path: Path, md5: str | None) -> bytes:
    """The bytes of a file; MissingError where its MD5 is not the published one."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MissingError(Problem(f"cannot be read: {error.strerror}", file=str(path))) from None
    if md5 is not None:
        got = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if got != md5:
            damaged(path, f"not the official file: its MD5 is {got}, published is {md5}")
    return content


def damaged(path: Path, message: str) -> NoReturn:
    """Raises MissingError for a file that is not what it should be."""
    raise MissingError(Problem(message, file=str(path), hint="delete it and get it again, or read your own with `npz`"))


def absent(name: str, root: Path, files: str) -> MissingError:
    """The error for a data set that is not under its root."""
    message = f"{name} is not in {root}: found no {files}"
    hint = "`kdctl train CONFIG data.download=true` gets it, `data.root=...` names another place"
    return MissingError(Problem(message, key="data.root", hint=hint))


def download(name: str, root: Path) -> None:
    """Gets the official files into root through torchvision; MissingError where the network is off or fails."""
    if os.environ.get("KDCTL_OFFLINE", "0") not in ("", "0"):
        message = f"{name} is not in {root} and KDCTL_OFFLINE forbids the network"
        raise MissingError(Problem(message, key="data.download", hint="set data.root to where its files are"))
    from kdctl.torchvision_guard import ensure_torchvision

    ensure_torchvision()
    import torchvision

    try:
        getattr(torchvision.datasets, _TORCHVISION[name])(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise MissingError(Problem(f"downloading {name} failed: {error}", key="data.download")) from error
