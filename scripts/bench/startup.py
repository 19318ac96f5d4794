"""CPU time of kdctl's start-up: user + system time of whole processes, children included, as the kernel counts it.

    python scripts/bench/startup.py [--runs N] [--json]

Prints the least and the median of N runs of each command. Other load on the machine moves the median, hardly the least.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

WRONG = "data: {kind: digits, batch_sise: 8}\nstudent: {kind: resnet21}\nlosses: [{kind: kd, temprature: 4}]\n"
BUDGET_MS = {"--help": 100.0, "list losses": 150.0, "check wrong.yaml": 500.0}
COMMANDS = {"--version": 0, "--help": 0, "list losses": 0, "check wrong.yaml": 3}
"""Command -> the exit code it must have."""


def cpu_ms(arguments: list[str], expected_code: int, directory: str) -> float:
    """CPU milliseconds of one process of kdctl."""
    command = [sys.executable, "-m", "kdctl", *arguments]
    process = subprocess.Popen(command, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != expected_code:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}, not {expected_code}")
    return (usage.ru_utime + usage.ru_stime) * 1000


def measure(runs: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "wrong.yaml").write_text(WRONG)
        for command, code in COMMANDS.items():
            cpu_ms(command.split(), code, directory)  # fills the cache of compiled files
            times = [cpu_ms(command.split(), code, directory) for _ in range(runs)]
            rows.append({
                "command": f"kdctl {command}", "cpu_ms_min": min(times), "cpu_ms_median": statistics.median(times),
                "budget_ms": BUDGET_MS.get(command), "runs": runs,
            })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="one JSON document")
    arguments = parser.parse_args()
    rows = measure(arguments.runs)
    if arguments.json:
        print(json.dumps({"schema_version": 1, "ok": True, "python": sys.version.split()[0], "rows": rows}, indent=2))
        return
    print(f"{'command':<24}{'CPU ms, least':>14}{'median':>9}{'budget':>9}")
    for row in rows:
        budget = "-" if row["budget_ms"] is None else f"{row['budget_ms']:.0f}"
        print(f"{row['command']:<24}{row['cpu_ms_min']:>14.0f}{row['cpu_ms_median']:>9.0f}{budget:>9}")


if __name__ == "__main__":
    main()
