"""What the scripts of results share: kdctl as a command whose JSON is read, groups that go on where they stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"


def kdctl(*arguments: str) -> dict[str, Any]:
    """One command's JSON document; a missed gate (exit 6) still has one. Any other failure ends the script."""
    print("$ kdctl " + " ".join(arguments), file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "kdctl", *arguments, "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 6):
        print(done.stdout, file=sys.stderr)
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def group_of(name: str, config: Path, *arguments: str) -> dict[str, Any]:
    """The result of the group of this name in the current directory: read, resumed, or trained where there is none."""
    for path in sorted(Path("runs", name, "groups").glob("*.json")):
        document = json.loads(path.read_text())
        if "result" in document:
            return document["result"]
        started = [member["run"] for member in document["members"] if member["run"]]
        if started:
            return kdctl("resume", str(Path("runs", name, started[0])))
    return kdctl("train", str(config), f"name={name}", *arguments)


def read(path: Path, empty: Any) -> Any:
    """The document of an earlier run, or `empty`."""
    return json.loads(path.read_text()) if path.exists() else empty


def write(path: Path, document: Any) -> None:
    """Written aside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(document, indent=1) + "\n")
    aside.replace(path)
