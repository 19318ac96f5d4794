"""The experiment files that come with kdctl: configs/ of the repository, kdctl/templates in an installed package."""

from __future__ import annotations

from pathlib import Path

import kdctl
from kdctl.errors import MissingError, UsageError, did_you_mean


def directory() -> Path:
    """Where the templates lie."""
    package = Path(kdctl.__file__).parent
    for candidate in (package / "templates", package.parent / "configs"):
        if candidate.is_dir():
            return candidate
    raise MissingError("the templates are not installed", hint="install kdctl again")


def templates() -> dict[str, Path]:
    """name -> file; a name is the path below the directory without `.yaml`."""
    home = directory()
    return {str(path.relative_to(home).with_suffix("").as_posix()): path for path in sorted(home.rglob("*.yaml"))}


def find(name: str) -> Path:
    """The file of a template, by its name or, where that is unique, by the last part of it."""
    known = templates()
    wanted = name.removesuffix(".yaml")
    matches = [wanted] if wanted in known else [n for n in known if n.rsplit("/", 1)[-1] == wanted]
    if len(matches) == 1:
        return known[matches[0]]
    if matches:
        raise UsageError(f"several templates are called '{name}': {', '.join(matches)}", hint="give the whole name")
    hint = did_you_mean(wanted, known) or "`kdctl list templates` shows them all"
    raise UsageError(f"there is no template '{name}'", hint=hint)


def summary(path: Path) -> str:
    """The first comment line of the file."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            text = line.lstrip("#").strip()
            if line.startswith("#") and text and not text.startswith("yaml-language-server"):
                return text
    return ""
