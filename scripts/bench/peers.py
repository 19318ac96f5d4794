"""Makes the virtual environment of the peer: torchdistill from the package index, beside kdctl's torch.

    python scripts/bench/peers.py --env FOLDER

The peers get the torch and torchvision that this Python has, so that a difference in speed is the programs' own, and
the few packages that kdctl's nets are built with. Prints the path of their Python.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

PEERS = ["torchdistill==1.1.5"]
SAME = ["torch", "torchvision", "numpy", "pillow", "pydantic", "safetensors"]
"""Packages taken in the version that is installed here."""


def install(folder: Path, peers: list[str]) -> Path:
    """The Python of the environment; one that is already there is completed."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    pinned = [f"{name}=={version(name).partition('+')[0]}" for name in SAME]
    command = [str(python), "-m", "pip", "install", "--quiet", *pinned, *peers]
    if subprocess.run(command).returncode:
        sys.exit("pip could not install the peers: its message stands above")
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--env", type=Path, required=True, help="the folder to make")
    parser.add_argument("--peers", nargs="*", default=PEERS, help="what to install, by default: " + " ".join(PEERS))
    options = parser.parse_args()
    print(install(options.env, options.peers))


if __name__ == "__main__":
    main()
