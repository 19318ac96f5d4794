"""`kdctl cache`: the stores of teacher outputs of an experiment: build, show, verify, clear."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from kdctl.cli import console
from kdctl.cli.verb import Argument, ExperimentOptions, Reply
from kdctl.errors import UsageError, counted, did_you_mean

if TYPE_CHECKING:
    from kdctl.config.schema import Experiment

ACTIONS = ("build", "show", "verify", "clear")


def cache(
    options: ExperimentOptions,
    action: Annotated[str, Argument(help="build, show, verify or clear")],
    config: Annotated[str, Argument(help="an experiment file")],
) -> Reply:
    """The stores of teacher outputs of an experiment file.

    build asks the teacher for all that training will need and goes on where it was stopped; show says what is held,
    what building costs and when it pays off; verify checks every byte; clear deletes what kdctl made.
    """
    if action not in ACTIONS:
        hint = did_you_mean(action, ACTIONS)
        raise UsageError(f"the action is build, show, verify or clear, not '{action}'", hint=hint)
    from kdctl.config.expand import load_experiment
    from kdctl.config.overrides import locating

    loaded = load_experiment(Path(config), options.overrides)
    console.say("loading torch ...")
    with locating(loaded.document):
        document = {"action": action} | _act(action, loaded.experiment)
    return Reply(document, {"verify": _show_verified, "clear": _show_cleared}.get(action, _show_stores))


def _act(action: str, experiment: Experiment) -> dict[str, Any]:
    from kdctl import build
    from kdctl import cache as stores
    from kdctl.probe import choose

    stores.taught_stages(experiment)  # says at once where there is nothing to store
    if action == "clear" and experiment.teacher_cache and experiment.teacher_cache.dir:
        return stores.clear(experiment, lambda: build.build_data(experiment))
    data = build.build_data(experiment)
    settings = choose.settle(experiment, data, console.say)  # as training does: the precision is in the key
    experiment = experiment.model_copy(update={"train": settings})
    if action == "build":
        return stores.build_stores(experiment, data, console.say, console.bar)
    if action == "clear":
        return stores.clear(experiment, lambda: data)
    return stores.show(experiment, data) if action == "show" else stores.verify(experiment, data)


def _show_stores(document: dict[str, Any]) -> None:
    from kdctl.cache import bytes_text

    for store in document["stores"]:
        console.out(f"{store['teacher']} for stage {store['stage']}: {store['folder']}")
        rows = [
            [part["split"], "clean" if part["turn"] is None else part["turn"], part["rows"], part["expected"]]
            for part in store["parts"]
        ]
        console.print_table(["split", "view", "held", "of"], rows)
        console.out(f"held {store['rows']:,} of {counted(store['expected'], 'sample')}, {bytes_text(store['bytes'])}")
        if "bytes_complete" in store:
            console.out(
                f"complete: {bytes_text(store['bytes_complete'])}, {store['seconds_to_build']:.0f} s to build what is "
                f"missing, pays off after {store['pays_off_after_epochs']:.1f} epochs"
            )
        if store["nearest"]:
            console.out(f"nearest: {store['nearest']['folder']}: {'; '.join(store['nearest']['differs'])}")
    if "filled" in document:
        console.out(f"stored {counted(document['filled'], 'sample')} in {document['seconds']:.1f} s")
    _show_notes(document)


def _show_verified(document: dict[str, Any]) -> None:
    from kdctl.cache import bytes_text

    for store in document["stores"]:
        console.out(f"{store['folder']}: {counted(store['files'], 'file')}, {bytes_text(store['bytes'])}: sound")
    if not document["stores"]:
        console.out("nothing is stored")
    _show_notes(document)


def _show_cleared(document: dict[str, Any]) -> None:
    from kdctl.cache import bytes_text

    for store in document["stores"]:
        kept = "; the folder has other files, which stay" if store["kept"] else ""
        console.out(f"deleted {store['folder']}: {counted(store['files'], 'file')}, {bytes_text(store['bytes'])}{kept}")
    if not document["stores"]:
        console.out("nothing is stored")


def _show_notes(document: dict[str, Any]) -> None:
    for note in document["notes"]:
        console.out(f"note: {note}")
