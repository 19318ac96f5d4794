"""`kdctl eval`: student and teacher of a run, an artefact, or a file's student with weights, on the same samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from kdctl import runs
from kdctl.cli import console
from kdctl.cli.verb import Argument, ExperimentOptions, Option, Reply
from kdctl.errors import UsageError


def eval_(
    options: ExperimentOptions,
    what: Annotated[str, Argument(help="a run, an artefact of a run, an experiment file, or latest")] = "latest",
    split: Annotated[str, Option("--split", help="train, val or test")] = "test",
    checkpoint: Annotated[str, Option("--checkpoint", help="best or last")] = "best",
    against: Annotated[str | None, Option("--against", help="another run, measured beside it")] = None,
) -> Reply:
    """Measure student and teacher on the same samples, re-loaded from disk."""
    if checkpoint not in ("best", "last"):
        raise UsageError(f"--checkpoint is 'best' or 'last', not '{checkpoint}'")
    from kdctl.config.expand import load_experiment

    device = _device(options)
    path = Path(what)
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        experiment = load_experiment(path, options.overrides).experiment
        from kdctl.evaluate import evaluate_config

        document = evaluate_config(experiment, split, device) | {"run": None, "config": what}
    elif (path / "manifest.json").is_file():
        run = runs.Run(path.resolve().parent.parent)
        experiment = load_experiment(run.config, options.overrides, require_files=False).experiment
        from kdctl.artefacts.measure import evaluate_artefact

        document = evaluate_artefact(run, experiment, path, split) | {"run": str(run), "artefact": what}
    else:
        document = _run(runs.find(what), options, split, checkpoint)
    if against:
        document["against"] = _run(runs.find(against), options, split, checkpoint)
    return Reply(document, show)


def _run(run: runs.Run, options: ExperimentOptions, split: str, checkpoint: str) -> dict[str, Any]:
    from kdctl.config.expand import load_experiment

    experiment = load_experiment(run.config, options.overrides, require_files=False).experiment
    from kdctl.evaluate import evaluate_run

    document = evaluate_run(run, experiment, split=split, checkpoint=checkpoint, device=_device(options))
    return document | {"run": str(run)}


def _device(options: ExperimentOptions) -> str:
    """Where to measure: the CPU, so that numbers compare, unless --device names another."""
    if options.device is None:
        return "cpu"
    from kdctl.device import choose_device

    return str(choose_device(options.device))


def show(document: dict[str, Any]) -> None:
    """Metrics side by side, then what the two models share and the classes that suffer most."""
    others = {"teacher": document.get("teacher"), "against": (document.get("against") or {}).get("metrics")}
    columns = {"student": document["metrics"]} | {k: v for k, v in others.items() if v}
    rows = [[name, *(f"{metrics[name]:.4f}" for metrics in columns.values())] for name in document["metrics"]]
    console.print_table([f"{document['split']} ({document['samples']:,})", *columns], rows)
    if document.get("agreement") is not None:
        whom = "fp32 student" if document.get("artefact") else "teacher"
        console.out(f"agreement with the {whom} {document['agreement']:.2f} %")
    worst = sorted(document["per_class"], key=lambda row: row["top1"])[:3]
    console.out("worst classes: " + ", ".join(f"{row['name']} {row['top1']:.1f}" for row in worst))
    for note in document.get("notes", []):
        console.out(f"note: {note}")
