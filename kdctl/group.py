"""What the runs of a group say together: means, paired differences with their intervals, and statements that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdctl import runs, stats
from kdctl.build import build_task
from kdctl.config.schema import Experiment
from kdctl.control import BASELINE, CONTROLS
from kdctl.errors import counted
from kdctl.runs import Run
from kdctl.tasks.base import Task

MAIN = "main"
_OTHER_SPLITS = {
    "val": "the best checkpoint of each run was picked on it, so values are too high",
    "train": "values say nothing about other samples",
}
LITTLE = 20.0
"""A share of the gradient, in percent, below which a teacher hardly moves its student."""
Members = Mapping[str, Mapping[int, Run]]
"""The finished runs by role, `main` or a control's name, and by seed."""


def role_of(member: Mapping[str, Any]) -> str:
    """`main`, or the name of the control that a member of a group is."""
    return MAIN if member["role"] == MAIN else member.get("control") or BASELINE


def summarize_group(members: Sequence[Mapping[str, Any]], group: Path, experiment: Experiment) -> dict[str, Any]:
    """Seeds, means, the intervals of the paired differences, and what follows: the document of a group."""
    task = build_task(experiment)
    by_role: dict[str, dict[int, Run]] = {}
    for member in members:
        run = Run(group.parent.parent / member["run"])
        by_role.setdefault(role_of(member), {})[member["seed"]] = run
    by_role = {role: by_role[role] for role in (MAIN, *CONTROLS) if role in by_role}
    seeds = [_seed(seed, by_role, task) for seed in by_role[MAIN]]
    lead = runs.read_json(next(iter(by_role[MAIN].values())) / "summary.json")
    summary = _summary(seeds, by_role, task.primary)
    split = _split(next(iter(by_role[MAIN].values())))
    statements = state(summary, split)
    teacher = None if lead["teacher"] is None else lead["teacher"][split][task.primary]
    reasons = why_no_gain(summary, teacher, _teachers_share(by_role, experiment.student_stage.name))
    made = [runs.read_json(path / "result.json") for run in by_role[MAIN].values() for path in run.artefacts]
    first = seeds[0]["baseline"]
    return lead | {
        "baseline": None if first is None else {"run": first["run"], "test": first["test"]},
        "group": str(group),
        "seeds": seeds,
        "summary": summary,
        "verdict": statements[0],
        "statements": statements,
        "artefacts": made,
        "notes": [*lead["notes"], *_ended_early(by_role), *reasons],
    }


def _ended_early(by_role: Members) -> list[str]:
    """Which roles have runs that did not train all of their epochs, and why: budgets are no longer equal then."""
    notes = []
    for role, found in by_role.items():
        ends = [
            [runs.read_json(path)["finished"] for path in run.path.glob("stages/*/result.json")]
            for run in found.values()
        ]
        cut = [end.partition(":")[0] for of_run in ends for end in of_run if end != "all epochs done"]
        if cut:
            number = sum(any(end != "all epochs done" for end in of_run) for of_run in ends)
            why = ", ".join(dict.fromkeys(cut))
            notes.append(f"{role}: {number} of {counted(len(found), 'run')} ended before their last epoch: {why}")
    return notes


def _teachers_share(by_role: Members, stage: str) -> float | None:
    """The share of the gradient, in percent, of the terms that the baseline does without: the mean over epochs and
    runs. None where it was not measured."""
    if BASELINE not in by_role:
        return None
    plain = {name for run in by_role[BASELINE].values() for line in run.metrics() for name in line["terms"]}
    lines = [line for run in by_role[MAIN].values() for line in run.metrics() if line["stage"] == stage]
    shares = [line["gradient_shares"] for line in lines if line.get("gradient_shares")]
    if not shares:
        return None
    return 100 * float(np.mean([sum(v for name, v in epoch.items() if name not in plain) for epoch in shares]))


def _seed(seed: int, by_role: Members, task: Task) -> dict[str, Any]:
    """What the runs of one seed measured."""
    main = by_role[MAIN][seed]
    controls = {role: found[seed] for role, found in by_role.items() if role != MAIN and seed in found}
    measured = {
        role: _measured(run) | {"run": str(run), "agreement": _agreement(run, main, task)}
        for role, run in controls.items()
    }
    baseline = measured.pop(BASELINE, None)
    return {
        "seed": seed, "run": str(main), "student": _measured(main), "baseline": baseline, "controls": measured,
    }  # fmt: skip


def _measured(run: Run) -> dict[str, Any]:
    """What a run measured. `test`: on the split that is its headline, which without a test split is another."""
    summary, split = runs.read_json(run / "summary.json"), _split(run)
    best, last = summary["student"]["best"], summary["student"]["last"]
    return {
        "test": best[split], "last": last[split], "agreement": summary["agreement"], "epochs": summary["epochs"],
        "seconds": summary["seconds"],
    }  # fmt: skip


def _split(run: Run) -> str:
    """The split that a run's summary is about: test, or what stands in for it."""
    return str(next(iter(runs.read_json(run / "summary.json")["student"]["last"])))


def _agreement(control: Run, main: Run, task: Task) -> float | None:
    """How often a control chooses as the group's teacher does, from the predictions that both runs kept."""
    split = _split(main)
    said = [run / "eval" / name for run, name in ((control, f"{split}.npz"), (main, f"{split}.teacher.npz"))]
    if not all(path.exists() for path in said):
        return None
    with np.load(said[0]) as own, np.load(said[1]) as teacher:
        return float(task.agreement(own["logits"], teacher["logits"]))


# --------------------------------------------------------------------------------------------------------- statistics


def _summary(seeds: Sequence[dict[str, Any]], by_role: Members, primary: str) -> dict[str, Any]:
    """The primary metric of student, baseline and every other control; then each metric with its gain."""
    students = [row["student"]["test"] for row in seeds]
    baselines = [row["baseline"]["test"] for row in seeds] if BASELINE in by_role else None
    metrics: dict[str, dict[str, Any]] = {
        name: _against([s[name] for s in students], None if baselines is None else [b[name] for b in baselines])
        for name in students[0]
    }
    summary: dict[str, Any] = {"metric": primary, "student": metrics[primary]["student"]}
    if baselines is not None:
        summary |= {name: metrics[primary][name] for name in ("baseline", "gain")}
    summary["metrics"] = metrics
    summary["controls"] = {role: _control(role, seeds, primary) for role in by_role if role not in (MAIN, BASELINE)}
    return summary


def _against(student: Sequence[float | None], baseline: Sequence[float | None] | None) -> dict[str, Any]:
    """Intervals of one metric; nothing where a run has no number."""
    known = [value for value in student if value is not None]
    complete = len(known) == len(student)
    result: dict[str, Any] = {"student": stats.interval(known).as_dict() if complete else None}
    others = [value for value in baseline or [] if value is not None]
    both = complete and len(others) == len(known)
    result["baseline"] = stats.interval(others).as_dict() if both else None
    result["gain"] = stats.paired(known, others).as_dict() if both else None
    return result


def _control(role: str, seeds: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    """A control beside the student and the baseline, by the task's metric; nothing where a run has no number."""
    values = [row["controls"][role]["test"][metric] for row in seeds]
    students, baselines = ([row[who]["test"][metric] for row in seeds] for who in ("student", "baseline"))
    about = {"what": CONTROLS[role].what, "placebo": CONTROLS[role].placebo}
    if None in (*values, *students, *baselines):
        return about | {"values": None, "gain": None, "against_baseline": None, "verdict": _no_number(metric)}
    gain, against = stats.paired(students, values), stats.paired(values, baselines)
    return about | {
        "values": stats.interval(values).as_dict(),
        "gain": gain.as_dict(),
        "against_baseline": against.as_dict(),
        "verdict": stats.verdict(gain),
    }


# --------------------------------------------------------------------------------------------------------- statements


def state(summary: Mapping[str, Any], split: str = "test") -> list[str]:
    """What the numbers of a group say, in sentences; the first is the claim, which the others can only weaken.

    A gain over the baseline counts as the teacher's only where every placebo lacks it: a placebo that gains as well, or
    that the student does not beat, is named in the claim itself. split: what was measured; that it is not the test
    split is said last.
    """
    if "gain" not in summary:
        return ["no control was run: --with-baseline trains the same student without its teacher"]
    if summary["gain"] is None:
        return [_no_number(summary["metric"])]
    gain = _result(summary["gain"])
    claim, others = stats.verdict(gain), []
    doubts = []
    for role, control in summary["controls"].items():
        if control["gain"] is None:
            others.append(f"against {role}: {control['verdict']}")
            doubts += [role] if stats.is_gain(gain) else []
            continue
        over, against = _result(control["gain"]), _result(control["against_baseline"])
        if control["placebo"]:
            others.append(f"placebo {role} against the baseline: {stats.verdict(against)}")
            alike = against.ci95 is None and against.mean > 0  # in every seed: no interval says that it is luck
            doubts += [role] if stats.is_gain(against) or alike else []
        others.append(f"against {role}: {stats.verdict(over)}")
        doubts += [role] if stats.is_gain(gain) and not stats.is_gain(over) else []
    named = [role for role in dict.fromkeys(doubts) if role != "equal_time"]
    if stats.is_gain(gain) and named:
        claim += f"; but it is not shown to come from the teacher: see {', '.join(named)}"
    if stats.is_gain(gain) and "equal_time" in doubts:
        claim += "; but it is not shown to be worth its time: see equal_time"
    if split != "test":
        others.append(f"measured on the {split} split, for there is no test split with labels: {_OTHER_SPLITS[split]}")
    return [claim, *others]


def _no_number(metric: str) -> str:
    return f"nothing is shown: {metric} has no value in some run"


def why_no_gain(summary: Mapping[str, Any], teacher: float | None, share: float | None) -> list[str]:
    """Where no gain was shown, what the runs themselves say of why, each with what to try.

    teacher: its metric, in the units of the summary; share: of the gradient, in percent, that came from it.
    """
    if summary.get("gain") is None or stats.is_gain(_result(summary["gain"])):
        return []
    reasons, metric, alone = [], summary["metric"], summary["baseline"]["mean"]
    if teacher is not None and teacher <= alone:
        reasons.append(
            f"no gain: the teacher has {metric} {teacher:.2f} and the student alone {alone:.2f}: "
            "it has little to teach; train it longer, or take a better one"
        )
    if share is not None and share < LITTLE:
        reasons.append(
            f"no gain: {share:.0f} % of the gradient came from the teacher: "
            "give its terms more weight (distill.alpha, or weight in losses)"
        )
    return reasons


def _result(document: Mapping[str, Any]) -> stats.PairedResult:
    low_high = document["ci95"]
    ci95 = None if low_high is None else (low_high[0], low_high[1])
    return stats.PairedResult(document["mean"], document["std"], ci95, document["n"], document["p_value"])
