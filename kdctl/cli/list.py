"""`kdctl list`: the catalogue, read from tables and file names; nothing is imported for it."""

from __future__ import annotations

import fnmatch
from typing import Annotated, Any

from kdctl import registry
from kdctl.cli import console
from kdctl.cli.verb import Argument, Options, Reply
from kdctl.errors import UsageError, did_you_mean

WHAT = (*registry.GROUPS, "templates", "runs")
_ALSO = {
    "models": "torchvision:NAME, timm:NAME, huggingface:NAME, and a class of your own as ./file.py:Class",
    "losses": "a class of your own as ./file.py:Class",
    "data": "a class of your own as ./file.py:Class",
    "templates": "`kdctl init -i` asks for your own data and models, and writes the file",
}
"""What a list cannot hold."""


def list_(
    options: Options,
    what: Annotated[str, Argument(help=", ".join(WHAT))],
    pattern: Annotated[str | None, Argument(metavar="GLOB", help="Names like resnet*, or a part of one.")] = None,
) -> Reply:
    """The catalogue: components by group, the templates of `kdctl init`, and the runs of this directory."""
    if what not in WHAT:
        hint = did_you_mean(what, WHAT)
        raise UsageError(f"there is no list of '{what}'; allowed: {', '.join(WHAT)}", hint=hint)
    rows = {"templates": _templates, "runs": _runs}[what]() if what not in registry.GROUPS else _components(what)
    items = [row for row in rows if _matches(row, pattern)]
    if not items:
        console.say(f"no {what}" + (f" like '{pattern}'" if pattern else ""))
    return Reply({"what": what, "items": items}, _show)


def _components(group: str) -> list[dict[str, Any]]:
    other_names: dict[str, list[str]] = {}
    for alias, name in registry.aliases(group).items():
        other_names.setdefault(name, []).append(alias)
    return [
        {"name": c.name, "summary": c.summary, "source": c.source, "aliases": other_names.get(c.name, [])}
        for c in registry.catalogue(group).values()
    ]


def _templates() -> list[dict[str, Any]]:
    from kdctl.cli import templates

    return [
        {"name": name, "summary": templates.summary(path), "source": str(path)}
        for name, path in templates.templates().items()
    ]


def _runs() -> list[dict[str, Any]]:
    from kdctl import runs

    rows = []
    for run in runs.all_runs():
        info = {key: run.info[key] for key in ("status", "role", "seed", "created")}
        summary = f"{info['status']}, {info['role']}, seed {info['seed']}, {info['created'][:16].replace('T', ' ')} UTC"
        rows.append({"name": str(run), "summary": summary, "source": str(run.path), **info})
    return rows


def _matches(row: dict[str, Any], pattern: str | None) -> bool:
    if pattern is None:
        return True
    glob = pattern.lower() if any(c in pattern for c in "*?[") else f"*{pattern.lower()}*"
    return any(fnmatch.fnmatchcase(name.lower(), glob) for name in (row["name"], *row.get("aliases", [])))


def _show(document: dict[str, Any]) -> None:
    items = document["items"]
    if not items:
        return
    with_aliases = any(item.get("aliases") for item in items)
    with_source = any(item["source"] != "built-in" for item in items) and document["what"] not in ("templates", "runs")
    headers = ["name", *["alias"] * with_aliases, "summary", *["source"] * with_source]
    rows = [
        [
            item["name"],
            *[", ".join(item.get("aliases", []))] * with_aliases,
            item["summary"],
            *[item["source"]] * with_source,
        ]
        for item in items
    ]
    console.print_table(headers, rows)
    if document["what"] in _ALSO:
        console.say(f"also: {_ALSO[document['what']]}")
