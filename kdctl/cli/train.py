"""`kdctl train`: every stage of an experiment, with seeds and the control where they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from kdctl import launch
from kdctl.cli import console, processes
from kdctl.cli.verb import Argument, ExperimentOptions, Option, Reply
from kdctl.errors import Interrupted, UsageError


def train(
    options: ExperimentOptions,
    config: Annotated[str, Argument(help="an experiment file")],
    run_dir: Annotated[str | None, Option("--run-dir", help="write the run here, not under runs/")] = None,
    nproc: processes.Nproc = None,
    seeds: Annotated[int, Option("--seeds", min=1, help="repeat with this many seeds, as one group")] = 1,
    with_baseline: Annotated[bool, Option("--with-baseline", help="also train the control: no teacher")] = False,
    controls: Annotated[str, Option("--controls", help="the baseline and these controls, with commas between")] = "",
    smoke: Annotated[bool, Option("--smoke", help="two steps of each stage on a slice; keeps nothing")] = False,
) -> Reply:
    """Run every stage of an experiment file.

    Controls: baseline (no teacher), equal_time (no teacher, as long as the distillation took), label_smoothing,
    random_teacher and shuffled_labels (placebos: nothing to learn from them), self (the baseline as teacher).
    """
    processes.check(nproc)
    if smoke and max(nproc or 1, launch.world_size()) > 1:
        raise UsageError("--smoke takes a single process", hint="leave --nproc out")
    if launch.rank() > 0:
        return processes.follow(options)
    if run_dir and (seeds > 1 or with_baseline or controls):
        raise UsageError("--run-dir names one run, and a group has several", hint="leave --run-dir out")
    from kdctl.config.expand import load_experiment

    loaded = load_experiment(Path(config), options.overrides, require_files=not smoke)
    if processes.starts_others(nproc):
        return processes.start(nproc)
    console.say("loading torch ...")
    from kdctl import experiment
    from kdctl.cli.progress import TextReporter
    from kdctl.config.overrides import locating
    from kdctl.control import BASELINE, parse_controls

    reporter = TextReporter(options.quiet)
    if smoke:
        from kdctl.smoke import smoke as run_smoke

        with locating(loaded.document):
            return Reply(run_smoke(loaded.experiment, reporter), show)
    source = Path(config).read_text(encoding="utf-8")
    asked = parse_controls(",".join([BASELINE, controls] if controls or with_baseline else []))
    plan = experiment.Plan(loaded.experiment, source, seeds, asked, Path(run_dir) if run_dir else None)
    with locating(loaded.document):
        return processes.lead(lambda: reply(lambda: experiment.train(plan, reporter)))


_METRICS = 4
"""So many metrics of a model are shown."""


def reply(work: Callable[[], dict[str, Any]]) -> Reply:
    """The reply of a training command. Exits with 6 where an artefact misses a gate of its stage; where the work was
    interrupted, says which run was saved and exits with the signal's code."""
    try:
        document = work()
        from kdctl.artefacts.measure import check_gates

        missed = [error for error in map(check_gates, document["artefacts"]) if error is not None]
        return Reply(document, show, missed[0] if missed else None)
    except Interrupted as stopped:
        return Reply({"run": stopped.run, "status": "interrupted"}, show, stopped)


def show(document: dict[str, Any]) -> None:
    """The result for people: student, teacher, control, and the verdict of a group."""
    if document["status"] == "interrupted":
        return
    if document["status"] == "smoke":
        console.out(f"smoke test passed: {', '.join(document['stages'])}")
    elif "seeds" in document:
        _show_group(document)
    else:
        _show_run(document)
    for artefact in document.get("artefacts", []):
        after, metric = artefact["after"], next(iter(artefact["after"]["metrics"]))
        value = after["metrics"][metric]
        console.out(f"artefact {artefact['artefact']}: {metric} {value:.2f}, {after['bytes']:,} bytes")
    for note in document["notes"]:
        console.out(f"note: {note}")


def _show_run(document: dict[str, Any]) -> None:
    student, teacher = document["student"], document["teacher"]
    split = next(k for k in student["last"])
    names = list(student["last"][split])[:_METRICS]
    shipped = "student, best" if student["kept"] == "best" else "student, shipped"
    rows = [[shipped, *_row(student["best"][split], names)]]
    rows.append(["student, last epoch", *_row(student["last"][split], names)])
    if teacher:
        rows.append([f"teacher {teacher['kind']}", *_row(teacher[split], names)])
    console.print_table([split, *names], rows)
    epoch = student["best"]["epoch"]
    console.out(f"student {student['kind']}: {student['parameters']:,} parameters, best epoch {epoch}")
    if document["agreement"] is not None:
        from kdctl.report.numbers import agreement_text

        console.out(f"agreement with the teacher {agreement_text(document['agreement'], student['last'][split])}")
    console.out(f"run {document['run']}")
    run = document["run"]
    console.say(f"next: kdctl report {run}   kdctl eval {run}   kdctl compress {run} --quantize int8")


def _row(metrics: dict[str, float], names: list[str]) -> list[str]:
    from kdctl.report.numbers import FRACTIONS

    return [_number(metrics[name], 4 if name in FRACTIONS else 2) for name in names]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _show_group(document: dict[str, Any]) -> None:
    summary = document["summary"]
    metric, others = summary["metric"], list(summary["controls"])
    rows = []
    for row in document["seeds"]:
        value = row["student"]["test"][metric]
        base = row["baseline"]["test"][metric] if row["baseline"] else None
        gain = None if None in (value, base) else f"{value - base:+.2f}"
        more = [_number(row["controls"][name]["test"][metric], 2) for name in others]
        rows.append([str(row["seed"]), _number(value, 2), _number(base, 2), gain, *more, row["run"]])
    console.print_table(["seed", f"student {metric}", "baseline", "gain", *others, "run"], rows)
    for who in ("student", "baseline", "gain"):
        if summary.get(who):
            console.out(f"{who:<8} {_interval(summary[who])}")
    teacher = document["teacher"]
    if teacher:
        measured = next(v for k, v in teacher.items() if k not in ("kind", "parameters"))
        console.out(f"teacher  {_number(measured[metric], 2)}")
    console.out(f"verdict: {document['verdict']}")
    for statement in document["statements"][1:]:
        console.out(statement)
    console.out(f"group {document['group']}")
    console.say(f"next: kdctl report {document['group']}   kdctl compare {document['group']} OTHER...")


def _interval(value: dict[str, Any]) -> str:
    text = f"mean {value['mean']:.2f}"
    if value["ci95"]:
        text += f"  std {value['std']:.2f}  95 % interval {value['ci95'][0]:.2f} to {value['ci95'][1]:.2f}"
    return f"{text}  n {value['n']}"
