"""`kdctl init`: an experiment file to start from."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Annotated, Any

from kdctl import registry
from kdctl.cli import console, templates
from kdctl.cli.verb import Argument, Option, Options, Reply
from kdctl.errors import UsageError

DEFAULT = "quickstart"


def init(
    options: Options,
    template: Annotated[str, Argument(help="`kdctl list templates` shows them.")] = DEFAULT,
    output: Annotated[str | None, Option("-o", "--output", metavar="FILE", help="[default: TEMPLATE.yaml]")] = None,
    interactive: Annotated[bool, Option("-i", "--interactive", help="Ask, and write what the answers make.")] = False,
) -> Reply:
    """Write an experiment file to start from, never over a file that exists.

    -i asks for data, teacher, student, method and epochs on the terminal, checks each answer, and writes
    experiment.yaml.
    """
    if interactive:
        return _asked(template, Path(output or "experiment.yaml"))
    source = templates.find(template)
    target = Path(output or source.name)
    if target.is_dir():
        target /= source.name
    _write_new(target, _at_home(_text_of(source), source, target))
    return Reply({"template": template, "path": str(target)}, _show)


def _asked(template: str, target: Path) -> Reply:
    """The reply of an interview, whose file has to be free before anything is asked."""
    from kdctl.cli.interview import interview

    if template != DEFAULT:
        raise UsageError("-i asks questions and copies no template", hint=f"leave -i or {template} out")
    if target.is_dir():
        target /= "experiment.yaml"
    if os.path.lexists(target):
        raise _taken(target)
    _write_new(target, interview(target))
    return Reply({"template": None, "path": str(target)}, _show)


def _taken(target: Path) -> UsageError:
    return UsageError(f"{target} is there already and is not overwritten", hint="name another file with -o FILE")


def _show(document: dict[str, Any]) -> None:
    path = document["path"]
    console.out(f"wrote {path}")
    console.say(f"next: kdctl check {path}    kdctl train {path}")


def _at_home(text: str, source: Path, target: Path) -> str:
    """A template's text for the place it is written to: its own name in commands, and `data`, `weights` and `runs`
    beside it, which templates look for beside the folder that they all lie in."""
    name = source.relative_to(templates.directory()).as_posix()
    text = re.sub(rf"configs/{re.escape(name)}\b", target.as_posix(), text)
    return re.sub(r"(?<![\w./])(?:\.\./)+(?=(?:data|weights|runs)\b)", "", text)


def _text_of(source: Path) -> str:
    """The template as a file that stands by itself: with what it extends merged in, if it extends something."""
    text = source.read_text(encoding="utf-8")
    if not re.search(r"^extends:", text, re.MULTILINE):
        return text
    heading = re.match(r"(#[^\n]*\n)*", text)
    return (heading[0] if heading else "") + _merged(source)


def _merged(source: Path) -> str:
    """The content of a file and of those that it extends, as one; paths are read against the file, as its own are."""
    import yaml

    from kdctl.config.check import walk
    from kdctl.config.overrides import load_document
    from kdctl.config.schema import Component, ExperimentFile
    from kdctl.config.yaml_io import KeyPath

    document = load_document(source)
    for site in list(walk(ExperimentFile, document.data)):
        if issubclass(site.model, Component) and (*site.path, "kind") in document.replaced:
            signature = registry.signature(registry.find(site.group, str(site.value["kind"])))
            known = {*site.keys, *signature.arguments, *signature.aliases}
            for key in [k for k in site.value if k not in known and not signature.accepts_any]:
                del site.value[key]  # an argument of the kind that was replaced

    def moved(value: Any, path: KeyPath) -> Any:
        if isinstance(value, dict):
            return {key: moved(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [moved(item, (*path, number)) for number, item in enumerate(value)]
        origin = document.origin(path)
        if isinstance(value, str) and value.startswith(("./", "../")) and origin is not None:
            return Path(os.path.relpath(origin.base / value, source.parent)).as_posix()
        return value

    return yaml.safe_dump(moved(document.data, ()), sort_keys=False, default_flow_style=None, width=100)


def _write_new(target: Path, text: str) -> None:
    """Writes the whole file aside and gives it its name, which must be free: also when two processes race for it."""
    if os.path.lexists(target):
        raise _taken(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(aside, 0o644)
        try:
            os.link(aside, target)  # unlike a rename, a link never replaces a file
        except FileExistsError:
            raise _taken(target) from None
        except OSError:  # a file system without links
            os.rename(aside, target)
    finally:
        Path(aside).unlink(missing_ok=True)
