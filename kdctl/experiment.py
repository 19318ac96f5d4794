"""Whole experiments: a run, or a group of runs over seeds with and without the teacher, over one pipeline."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdctl import registry, runs, stats
from kdctl.build import build_task
from kdctl.config.dump import dump_yaml
from kdctl.config.expand import load_experiment
from kdctl.config.schema import Experiment, LossSpec, TeacherSpec, TrainStage
from kdctl.device import settle
from kdctl.errors import ConfigError, KdctlError, Problem
from kdctl.fit import Reporter
from kdctl.losses.base import Loss
from kdctl.pipeline import run_stages
from kdctl.runs import Run


@dataclass(frozen=True)
class Plan:
    """What `kdctl train` was asked for."""

    experiment: Experiment
    source: str
    """The text of the file that the user wrote."""
    seeds: int = 1
    with_baseline: bool = False
    run_dir: Path | None = None


def train(plan: Plan, reporter: Reporter) -> dict[str, Any]:
    """Trains what the plan names and returns the document of `kdctl train`: a run's summary, or a group's.

    With several seeds or a baseline it writes runs/<name>/groups/<NNN>.json before the first run, so that an
    interrupted group resumes where it stopped.
    """
    experiment = plan.experiment.model_copy(update={"train": settle(plan.experiment.train)})
    if plan.seeds == 1 and not plan.with_baseline:
        run = _create_run(experiment, plan.source, "main", None, plan.run_dir)
        reporter.say(f"run {run}")
        return run_stages(run, experiment, reporter)
    if plan.with_baseline:
        control(experiment)  # raises before anything is made where there can be no control
    first = experiment.train.seed
    roles = ["main", "control"] if plan.with_baseline else ["main"]
    members = [{"role": r, "seed": s, "run": None} for s in range(first, first + plan.seeds) for r in roles]
    document = {"format": runs.FORMAT, "name": experiment.name, "source": plan.source, "members": members}
    group = runs.create_group(experiment.name, document)
    runs.write_text(group.with_suffix(".yaml"), dump_yaml(experiment))
    reporter.say(f"group {group}: {len(members)} runs")
    return _run_group(group, experiment, reporter)


def resume(run: Run, reporter: Reporter) -> dict[str, Any]:
    """Continues an unfinished run, and the group it belongs to."""
    info = run.info
    if info["group"] is not None and Path(info["group"]).exists():
        group = Path(info["group"])
        return _run_group(group, load_experiment(group.with_suffix(".yaml"), require_files=False).experiment, reporter)
    if info["status"] == "done":
        raise KdctlError(f"{run} is done: there is nothing to resume", hint="`kdctl train` starts a new run")
    return run_stages(run, load_run(run), reporter)


def load_run(run: Run) -> Experiment:
    """The experiment of a run, whether or not the files it names are still where they were."""
    return load_experiment(run.config, require_files=False).experiment


def _create_run(experiment: Experiment, source: str, role: Any, group: str | None, run_dir: Path | None = None) -> Run:
    config, code = _with_local_code(dump_yaml(experiment))
    stages = [s.name for s in experiment.stages]
    return runs.create(
        experiment.name, config, source,
        stages=stages, seed=experiment.train.seed, role=role, group=group, run_dir=run_dir, code=code,
    )  # fmt: skip


def _with_local_code(config: str) -> tuple[str, list[Path]]:
    """The configuration with the user's own component files pointing into the run's `code/`, and those files."""
    files: list[Path] = []

    def local(match: re.Match[str]) -> str:
        path = Path(match["path"])
        if path not in files:
            files.append(path)
        return f"{match['key']}./code/{path.name}:{match['name']}"

    pattern = re.compile(r"(?P<key>kind: )(?P<path>\S+\.py):(?P<name>\w+)")
    return pattern.sub(local, config), files


# ------------------------------------------------------------------------------------------------------------ control


def control(experiment: Experiment) -> Experiment:
    """The same experiment without a teacher: teacher terms gone, supervised weights 1, all else equal.

    Raises ConfigError when nothing is left to learn from.
    """
    stages: list[Any] = []
    for stage in experiment.stages:
        if not isinstance(stage, TrainStage):
            continue
        losses = [_alone(loss) for loss in stage.losses if not _needs_teacher(loss)]
        if stage.role == "student" and losses:
            stages.append(stage.model_copy(update={"teacher": None, "losses": losses}))
    if not stages:
        hint = "the control needs a term without a teacher, for example {kind: ce, weight: 0.1}"
        raise ConfigError(Problem("no term is left without the teacher", key="losses", hint=hint))
    return experiment.model_copy(update={"stages": stages})


def _needs_teacher(spec: LossSpec) -> bool:
    loss: type[Loss] = registry.load(registry.find("losses", spec.kind))
    return loss.needs_teacher


def _alone(spec: LossSpec) -> LossSpec:
    """Supervised terms count in full without the teacher; leaving them at 0.1 would fake a gain."""
    return spec.model_copy(update={"weight": 1.0}) if spec.kind == "supervised" else spec


# ------------------------------------------------------------------------------------------------------------- groups


def _member(experiment: Experiment, role: str, seed: int, first: Run | None) -> Experiment:
    """The experiment of one member: its seed, its role, and the group's one teacher."""
    member = experiment.model_copy(update={"train": experiment.train.model_copy(update={"seed": seed})})
    if role == "control":
        return control(member)
    return member if first is None else _with_shared_teachers(member, first)


def _with_shared_teachers(experiment: Experiment, first: Run) -> Experiment:
    """Takes the teachers that the group's first run trained, instead of training them again."""
    made = {s.name for s in experiment.train_stages if s.role != "student"}

    def shared(spec: TeacherSpec) -> TeacherSpec:
        if spec.stage not in made:
            return spec
        weights = str((first.stage_dir(spec.stage) / "model.safetensors").resolve())
        return spec.model_copy(update={"stage": None, "weights": weights})

    stages: list[Any] = []
    for stage in experiment.stages:
        if isinstance(stage, TrainStage) and stage.name in made:
            continue
        if isinstance(stage, TrainStage) and stage.teachers:
            teachers = [shared(t) for t in stage.teachers]
            stage = stage.model_copy(update={"teacher": teachers if isinstance(stage.teacher, list) else teachers[0]})
        stages.append(stage)
    return experiment.model_copy(update={"stages": stages})


def _run_group(group: Path, experiment: Experiment, reporter: Reporter) -> dict[str, Any]:
    """Runs every member that is not done, then sums the group up; the group file is rewritten after each step."""
    document = runs.read_json(group)
    first: Run | None = None
    for member in document["members"]:
        mine = _member(experiment, member["role"], member["seed"], first)
        if member["run"] is None:
            run = _create_run(mine, document["source"], member["role"], str(group.resolve()))
            member["run"] = str(run.path.resolve())
            runs.write_json(group, document)
        run = Run(Path(member["run"]))
        if member["role"] == "main" and first is None:
            first = run
        if run.info["status"] != "done":
            reporter.say(f"{member['role']} run {run}, seed {member['seed']}")
            run_stages(run, load_run(run), reporter)
    result = summarize_group(document["members"], group, experiment)
    document["result"] = result
    runs.write_json(group, document)
    return result


def summarize_group(members: list[dict[str, Any]], group: Path, experiment: Experiment) -> dict[str, Any]:
    """Seeds, means, the interval of the paired gain, and the verdict: the document of a group."""
    task = build_task(experiment)
    by_role: dict[str, dict[int, Run]] = {"main": {}, "control": {}}
    for member in members:
        by_role[member["role"]][member["seed"]] = Run(Path(member["run"]))
    seeds = []
    for seed, run in by_role["main"].items():
        baseline = by_role["control"].get(seed)
        row: dict[str, Any] = {"seed": seed, "run": str(run), "student": _measured(run, "student"), "baseline": None}
        if baseline is not None:
            row["baseline"] = _measured(baseline, "student") | {"run": str(baseline)}
            row["baseline"]["agreement"] = _agreement(baseline, run, task)
        seeds.append(row)
    lead = runs.read_json(Run(Path(members[0]["run"])) / "summary.json")
    values = [row["student"]["test"][task.primary] for row in seeds]
    summary: dict[str, Any] = {"metric": task.primary, "student": stats.interval(values).as_dict()}
    verdict = "no control was run: --with-baseline trains the same student without its teacher"
    baseline_document = None
    if by_role["control"]:
        controls = [row["baseline"]["test"][task.primary] for row in seeds]
        gain = stats.paired(values, controls)
        summary |= {"baseline": stats.interval(controls).as_dict(), "gain": gain.as_dict()}
        verdict = stats.verdict(gain)
        baseline_document = {"run": seeds[0]["baseline"]["run"], "test": seeds[0]["baseline"]["test"]}
    whole = {"group": str(group), "seeds": seeds, "summary": summary, "verdict": verdict}
    return lead | {"baseline": baseline_document} | whole


def _measured(run: Run, who: str) -> dict[str, Any]:
    summary = runs.read_json(run / "summary.json")
    best = summary[who]["best"]
    split = next(k for k in best if k not in ("epoch", "val"))
    return {"test": best[split], "last": summary[who]["last"][split], "agreement": summary["agreement"]}


def _agreement(baseline: Run, main: Run, task: Any) -> float | None:
    """How often the control chooses as the teacher does, from the predictions that both runs kept."""
    teacher = main / "eval" / "test.teacher.npz"
    if not teacher.exists():
        return None
    with np.load(baseline / "eval" / "test.npz") as a, np.load(teacher) as b:
        return float(task.agreement(a["logits"], b["logits"]))
