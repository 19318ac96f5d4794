"""`kdctl show`: the experiment as it is run, with its shorthands expanded, and where each value came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from kdctl.cli import console
from kdctl.cli.console import near, yaml_text
from kdctl.cli.verb import Argument, ExperimentOptions, Option, Reply

if TYPE_CHECKING:
    from kdctl.config.expand import Loaded


def show(
    options: ExperimentOptions,
    experiment: Annotated[str, Argument(metavar="CONFIG|RUN", help="An experiment file, a run, or latest.")],
    origin: Annotated[bool, Option("--origin", help="Where each value of the file came from.")] = False,
    diff: Annotated[str | None, Option("--diff", metavar="CONFIG|RUN", help="Only what differs from this one.")] = None,
) -> Reply:
    """The resolved experiment: shorthands expanded into stages, defaults filled in, overrides applied."""
    from kdctl.config.dump import dump_yaml, origin_rows

    loaded = _load(experiment, options.overrides)
    document: dict[str, Any] = {"experiment": _values(loaded)}
    if diff is not None:
        document["diff"] = _differences(document["experiment"], _values(_load(diff, [])))
        return Reply(document, lambda d: _show_diff(d["diff"], experiment, diff))
    if origin:
        rows = origin_rows(loaded)
        document["origin"] = [{"key": key, "value": value, "from": place} for key, value, place in rows]
        return Reply(document, _show_origin)
    return Reply(document, lambda _: console.out(dump_yaml(loaded.experiment).rstrip("\n")))


def _load(place: str, overrides: list[str]) -> Loaded:
    from kdctl import runs
    from kdctl.config.expand import load_experiment

    path = Path(place)
    if not path.is_file() and path.suffix not in (".yaml", ".yml"):
        path = runs.find(place).config
    return load_experiment(path, overrides)


def _values(loaded: Loaded) -> dict[str, Any]:
    from kdctl.config.dump import plain

    return plain(loaded.experiment)


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[dict[str, Any]]:
    from kdctl.config.dump import flat

    left, right = flat(ours), flat(theirs)
    return [
        {"key": key, "this": left.get(key), "other": right.get(key)}
        for key in dict.fromkeys([*left, *right])
        if left.get(key) != right.get(key)
    ]


def _show_diff(rows: list[dict[str, Any]], this: str, other: str) -> None:
    if rows:
        cells = [[row["key"], yaml_text(row["this"]), yaml_text(row["other"])] for row in rows]
        console.print_table(["key", this, other], cells)
    else:
        console.say("nothing differs")


def _show_origin(document: dict[str, Any]) -> None:
    rows = [[row["key"], yaml_text(row["value"]), near(row["from"])] for row in document["origin"]]
    console.print_table(["key", "value", "from"], rows)
