"""`python -m kdctl` and the `kdctl` command. `--version` answers before anything heavier than this file is imported."""

from __future__ import annotations

import os
import sys

from kdctl import __version__

_SPIN = "30000"
"""Turns that an idle OpenMP thread waits before it sleeps. The library's own number, some milliseconds, makes several
threads many times slower as soon as anything else wants a core: a decoding process, or another program."""


def main() -> int:
    """Run the command line in sys.argv; returns the exit code."""
    if sys.argv[1:] == ["--version"]:
        print(f"kdctl {__version__}")
        return 0
    if "OMP_WAIT_POLICY" not in os.environ:  # read when torch is loaded, which is later
        os.environ.setdefault("GOMP_SPINCOUNT", _SPIN)
    from kdctl.cli.app import run

    code = run(sys.argv[1:])
    # A thread of torch.distributed that is still at work would abort the interpreter's end.
    if "WORLD_SIZE" in os.environ and _several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _several() -> bool:
    from kdctl import launch

    return launch.world_size() > 1


if __name__ == "__main__":
    sys.exit(main())
