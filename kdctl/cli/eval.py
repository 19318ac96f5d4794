"""`kdctl eval`: student and teacher of a run, an artefact, or a file's student with weights, on the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from kdctl import runs
from kdctl.cli import console
from kdctl.cli.verb import Argument, ExperimentOptions, Option, Reply, check_no_device
from kdctl.errors import ConfigError, MissingError, Problem, UsageError, did_you_mean

if TYPE_CHECKING:
    from kdctl.config.schema import Experiment

_SPLITS = ("train", "val", "test")
_QUALITY = {
    "brier": "Brier", "adaptive_ece": "adaptive ece", "balanced_accuracy": "balanced", "macro_f1": "macro F1",
    "entity_f1": "entity F1",
}  # fmt: skip
"""What is shown of a model's quality beside its metrics, and how it is called."""
_OF_TRAINING = ("batch_size", "augment", "strong_augment", "views", "augment_seed", "workers")
"""The keys of `data` that are about training batches: a split is measured clean, and decoded in this process."""


def eval_(
    options: ExperimentOptions,
    what: Annotated[str, Argument(help="a run, an artefact of a run, an experiment file, or latest")] = "latest",
    split: Annotated[str, Option("--split", help="train, val or test")] = "test",
    checkpoint: Annotated[str, Option("--checkpoint", help="best or last")] = "best",
    against: Annotated[str | None, Option("--against", help="another run, measured beside it")] = None,
) -> Reply:
    """Measure student and teacher on the same samples, re-loaded from disk."""
    if split not in _SPLITS:
        hint = did_you_mean(split, _SPLITS)
        raise MissingError(f"the data have no split '{split}'; there can be: {', '.join(_SPLITS)}", hint=hint)
    if checkpoint not in ("best", "last"):
        raise UsageError(f"--checkpoint: got '{checkpoint}'; allowed: best, last")
    from kdctl.config.expand import load_experiment

    path, other = Path(what), runs.find(against) if against else None
    is_file, is_artefact = path.suffix in (".yaml", ".yml"), (path / "manifest.json").is_file()
    if checkpoint != "best" and (is_file or is_artefact) and other is None:
        thing = "an artefact was made of one of its checkpoints" if is_artefact else "a file's student has one"
        raise UsageError(f"--checkpoint is for a run: {thing}", hint="leave --checkpoint out")
    if is_file:
        loaded = load_experiment(path, options.overrides)
        _check_overrides(options, ("data", "task", "student"))
        console.say("loading torch ...")
        from kdctl.config.overrides import locating
        from kdctl.evaluate import evaluate_config

        with locating(loaded.document):
            document = evaluate_config(loaded.experiment, split, _device(options), console.bar)
        document |= {"run": None, "config": what}
    elif is_artefact:
        check_no_device(options.device)
        run = runs.Run(path.resolve().parent.parent)
        experiment = load_experiment(run.config, options.overrides, require_files=False).experiment
        _check_overrides(options, ("data", "task"))
        console.say("loading torch ...")
        from kdctl.artefacts.measure import evaluate_artefact

        document = evaluate_artefact(run, experiment, path, split, console.bar) | {"run": str(run), "artefact": what}
    else:
        run = runs.find(what)
        console.say("loading torch ...")
        document = _run(run, options, split, checkpoint)
    if other:
        document["against"] = _run(other, options, split, checkpoint)
    return Reply(document, show)


def _run(run: runs.Run, options: ExperimentOptions, split: str, checkpoint: str) -> dict[str, Any]:
    from kdctl.config.expand import load_experiment

    experiment = load_experiment(run.config, options.overrides, require_files=False).experiment
    _check_overrides(options, ("data", "task", "teacher_cache", *_teacher_keys(experiment)))
    from kdctl.evaluate import evaluate_run

    document = evaluate_run(
        run, experiment, split=split, checkpoint=checkpoint, device=_device(options), bar=console.bar
    )
    return document | {"run": str(run)}


def _teacher_keys(experiment: Experiment) -> list[str]:
    """The addresses of the teachers that a run's student is measured beside, which an override may re-point."""
    stage = experiment.student_stage
    return [f"stages.{name}.teacher" for name in (stage.name, experiment.stages.index(stage)) if stage.teachers]


def _check_overrides(options: ExperimentOptions, honoured: Sequence[str]) -> None:
    """Raises ConfigError with every override that measuring has no use for. honoured: the addresses that it has.

    What is measured has its architecture from its own record, and how it was trained is past: an override of either
    would be taken for what the numbers are of.
    """
    own = options.overrides[:-1] if options.device else options.overrides  # the last one is --device itself
    problems = []
    for number, text in enumerate(own, start=1):
        address = text.partition("=")[0].strip()
        root, _, key = address.partition(".")
        if root == "data" and key.partition(".")[0] in _OF_TRAINING:
            hint = "data.eval_batch_size" if key == "batch_size" else f"allowed: other keys of {', '.join(honoured)}"
        elif not any(f"{address}.".startswith(f"{each}.") for each in honoured):
            hint = "--device" if address == "train.device" else f"allowed: keys of {', '.join(honoured)}"
        else:
            continue
        message = "measuring takes no notice of this key, and the numbers would be those without it"
        problems.append(Problem(message, f"override {number}", key=address, hint=hint))
    if problems:
        raise ConfigError(*problems)


def _device(options: ExperimentOptions) -> str:
    """Where to measure: the CPU, so that numbers compare, unless --device names another."""
    if options.device is None:
        return "cpu"
    from kdctl.device import choose_device

    return str(choose_device(options.device))


def show(document: dict[str, Any]) -> None:
    """Metrics side by side, then what the two models share and the classes that suffer most."""
    from kdctl.report.numbers import agreement_text

    others = {"teacher": document.get("teacher"), "against": (document.get("against") or {}).get("metrics")}
    columns = {"student": document["metrics"]} | {k: v for k, v in others.items() if v}
    rows = [[name, *(f"{metrics[name]:.4f}" for metrics in columns.values())] for name in document["metrics"]]
    console.print_table([f"{document['split']} ({document['samples']:,})", *columns], rows)
    if document.get("agreement") is not None:
        whom = "fp32 student" if document.get("artefact") else "teacher"
        console.out(f"agreement with the {whom} {agreement_text(document['agreement'], document['metrics'])}")
    for line in _lines(document):
        console.out(line)
    metric = next((key for row in document["per_class"] for key in row if key not in ("name", "samples")), None)
    measured = [row for row in document["per_class"] if row[metric] is not None]
    worst = sorted(measured, key=lambda row: row[metric])[:3]
    if worst:
        console.out("worst classes: " + ", ".join(f"{row['name']} {row[metric]:.1f}" for row in worst))
    for note in document.get("notes", []):
        console.out(f"note: {note}")


def _lines(document: dict[str, Any]) -> list[str]:
    """Calibration and the spread over classes of each model, and how faithful the student is to its teacher."""
    lines = []
    for who, quality in (document.get("quality") or {}).items():
        if quality is not None:
            text = ", ".join(f"{name} {_number(quality[key])}" for key, name in _QUALITY.items() if key in quality)
            scaled = quality["scaled"]
            if scaled is not None:
                text += f"; at temperature {_number(quality['temperature'])} ece {_number(scaled['ece'])}, "
                text += f"nll {_number(scaled['nll'])}"
            lines.append(f"{who}: {text}")
    fidelity = document.get("fidelity")
    if fidelity is not None:
        line = (
            f"fidelity: KL(teacher || student) {_number(fidelity['kl'])}, right: both {_number(fidelity['both_right'])}"
            f" %, student alone {_number(fidelity['student_only'])} %, "
            f"teacher alone {_number(fidelity['teacher_only'])} %"
        )
        if fidelity["inherited_errors"] is not None:
            line += f"; of the teacher's errors {_number(fidelity['inherited_errors'])} % are the student's too"
        lines.append(line)
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
