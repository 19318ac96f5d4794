"""`python -m kdctl` and the `kdctl` command. `--version` answers before anything heavier than this file is imported."""

from __future__ import annotations

import sys

from kdctl import __version__


def main() -> int:
    """Run the command line in sys.argv; returns the exit code."""
    if sys.argv[1:] == ["--version"]:
        print(f"kdctl {__version__}")
        return 0
    from kdctl.cli.app import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
