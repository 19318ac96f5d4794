"""`kdctl init`: an experiment file to start from."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

from kdctl.cli import console, templates
from kdctl.cli.verb import Argument, Option, Options, Reply
from kdctl.errors import UsageError


def init(
    options: Options,
    template: Annotated[str, Argument(help="`kdctl list templates` shows them.")] = "quickstart",
    output: Annotated[str | None, Option("-o", "--output", metavar="FILE", help="[default: TEMPLATE.yaml]")] = None,
) -> Reply:
    """Write an experiment file to start from, never over a file that exists."""
    source = templates.find(template)
    target = Path(output or source.name)
    if target.is_dir():
        target /= source.name
    _write_new(target, source.read_text(encoding="utf-8"))
    return Reply({"template": template, "path": str(target)}, _show)


def _show(document: dict[str, Any]) -> None:
    path = document["path"]
    console.out(f"wrote {path}")
    console.say(f"next: kdctl check {path}    kdctl train {path}")


def _write_new(target: Path, text: str) -> None:
    """Writes the whole file aside and gives it its name, which must be free: also when two processes race for it."""
    taken = UsageError(f"{target} is there already and is not overwritten", hint="name another file with -o FILE")
    if os.path.lexists(target):
        raise taken
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(aside, 0o644)
        try:
            os.link(aside, target)  # unlike a rename, a link never replaces a file
        except FileExistsError:
            raise taken from None
        except OSError:  # a file system without links
            os.rename(aside, target)
    finally:
        Path(aside).unlink(missing_ok=True)
