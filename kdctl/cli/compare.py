"""`kdctl compare`: runs, groups and artefacts side by side, what differs between them, and which are on the front."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from kdctl import runs
from kdctl.cli import console
from kdctl.cli.verb import SCHEMA_VERSION, Argument, Option, Options, Reply
from kdctl.errors import UsageError, did_you_mean

_FORMATS = ("table", "md", "csv", "json", "html")


def compare(
    options: Options,
    what: Annotated[list[str], Argument(metavar="RUN", help="runs, artefacts, or files runs/NAME/groups/NNN.json")],
    baseline: Annotated[str | None, Option("--baseline", help="what the others are held against")] = None,
    form: Annotated[str | None, Option("--format", help="table, md, csv, json or html; else by -o's ending")] = None,
    output: Annotated[str | None, Option("-o", "--output", metavar="FILE", help="Write it here.")] = None,
) -> Reply:
    """Runs, groups of seeds and artefacts side by side, the configuration keys that differ, and the Pareto front.

    A run of a group of several seeds stands for all of them: mean and 95 % interval. A group's file also shows its
    controls. A run's artefacts are rows of their own. Reads run directories alone, without torch.
    """
    form = _format(form, output)
    from kdctl.report.compare import compare as compare_runs

    document = compare_runs(what, baseline)
    if output is None:
        return Reply(document, lambda d: _print(d, form))
    runs.write_text(Path(output), _text(document, form))
    return Reply(document | {"written": output}, lambda d: console.out(f"wrote {output}"))


def _format(form: str | None, output: str | None) -> str:
    if form is None:
        ending = Path(output).suffix.lower().lstrip(".") if output else ""
        return ending if ending in _FORMATS else "md" if ending == "markdown" else "table"
    if form not in _FORMATS:
        message = f"--format is one of {', '.join(_FORMATS)}, not '{form}'"
        raise UsageError(message, hint=did_you_mean(form, _FORMATS))
    return form


def _print(document: dict[str, Any], form: str) -> None:
    if form != "table":
        console.out(_text(document, form).rstrip("\n"))
        return
    from kdctl.report import compare_text

    console.print_table(*compare_text.table(document))
    for line in compare_text.explained(document):
        console.out(line)
    head, body = compare_text.differences(document)
    if body:
        console.out()
        console.print_table(head, body)
    console.out(compare_text.same(document))


def _text(document: dict[str, Any], form: str) -> str:
    """The document in a format, whole."""
    from kdctl.report import compare_text

    if form == "json":
        return console.json_text({"schema_version": SCHEMA_VERSION, "ok": True} | document) + "\n"
    if form == "table":
        parts = [console.table_lines(*compare_text.table(document)), compare_text.explained(document)]
        head, body = compare_text.differences(document)
        parts += [["", *console.table_lines(head, body)]] if body else []
        return "\n".join([line for part in parts for line in part] + [compare_text.same(document)]) + "\n"
    write = {"md": compare_text.markdown, "csv": compare_text.comma_separated, "html": compare_text.page}
    return write[form](document)
