"""Whole experiments: a run, or a group of runs over seeds with and without the teacher, over one pipeline."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdctl import ranks, registry, runs, stats
from kdctl.build import build_data, build_task
from kdctl.config.dump import dump_yaml, plain
from kdctl.config.expand import load_experiment
from kdctl.config.schema import Experiment
from kdctl.control import control, with_shared_teachers
from kdctl.data.prepare import Data
from kdctl.errors import ConfigError, KdctlError, MissingError
from kdctl.pipeline import run_stages
from kdctl.probe import choose
from kdctl.runs import Run
from kdctl.watch import Reporter


@dataclass(frozen=True)
class Plan:
    """What `kdctl train` was asked for."""

    experiment: Experiment
    source: str
    """The text of the file that the user wrote."""
    seeds: int = 1
    with_baseline: bool = False
    run_dir: Path | None = None

    @property
    def agents(self) -> list[str]:
        """The torchruns that were asked for this; each with a hash of it, for a process may train several plans."""
        asked = dump_yaml(self.experiment) + f"{self.seeds} {self.with_baseline}"
        return [f"{agent} {hashlib.sha256(asked.encode()).hexdigest()[:16]}" for agent in ranks.current().agents]


def train(plan: Plan, reporter: Reporter) -> dict[str, Any]:
    """Trains what the plan names and returns the document of `kdctl train`: a run's summary, or a group's.

    With several seeds or a baseline it writes runs/<name>/groups/<NNN>.json before the first run, so that an
    interrupted group resumes where it stopped. Where torchrun has restarted the processes, what they had begun goes on.
    """
    begun = _begun(plan)
    if begun is not None:
        reporter.say(f"the processes were restarted: {begun} goes on")
        return _continue(begun, reporter)
    data = build_data(plan.experiment)
    settled = choose.settle(plan.experiment, data, reporter.say)
    experiment = plan.experiment.model_copy(update={"train": settled})
    reporter.say(f"experiment {experiment.name}: the student is that of stage {experiment.student_stage.name}")
    if plan.seeds == 1 and not plan.with_baseline:
        run = _create_run(experiment, plan.source, "main", None, plan.run_dir, agents=plan.agents)
        reporter.say(f"run {run}")
        return _run_new(run, experiment, reporter, data)
    if plan.with_baseline:
        control(experiment)  # raises before anything is made where there can be no control
    first = experiment.train.seed
    roles = ["main", "control"] if plan.with_baseline else ["main"]
    members = [{"role": r, "seed": s, "run": None} for s in range(first, first + plan.seeds) for r in roles]
    document = {
        "format": runs.FORMAT, "name": experiment.name, "source": plan.source, "agents": plan.agents,
        "members": members,
    }  # fmt: skip
    group = runs.create_group(experiment.name, document)
    runs.write_text(group.with_suffix(".yaml"), dump_yaml(experiment))
    reporter.say(f"group {group}: {len(members)} runs")
    del data  # each run reads its own
    return _run_group(group, experiment, reporter)


def resume(run: Run, reporter: Reporter, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Continues an unfinished run, and the group it belongs to; overrides such as data.root=... hold for this time."""
    if run.info["status"] == "done" and not _group_of(run).is_file():
        raise KdctlError(f"{run} is done: there is nothing to resume", hint="`kdctl train` starts a new run")
    return _continue(run, reporter, overrides)


def _group_of(run: Run) -> Path:
    """The file of a run's group; no file where it has none."""
    return run.path.parent / (run.info.get("group") or "")


def _continue(run: Run, reporter: Reporter, overrides: Sequence[str] = ()) -> dict[str, Any]:
    group = _group_of(run)
    if group.is_file():
        experiment = load_experiment(group.with_suffix(".yaml"), require_files=False).experiment
        return _run_group(group, experiment, reporter, overrides)
    return run_stages(run, load_run(run, overrides), reporter)


def _begun(plan: Plan) -> Run | None:
    """The run that the torchrun of these processes had begun before it restarted them, the latest of a group."""
    agents, place = set(plan.agents), plan.run_dir
    if not agents:
        return None
    known = runs.all_runs() if place is None else [Run(place)] if runs.is_run(place) else []
    return next((run for run in reversed(known) if agents & set(run.info.get("agents", []))), None)


def load_run(run: Run, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a run, whether or not the files it names are still where they were."""
    return load_experiment(run.config, overrides, require_files=False).experiment


def _create_run(
    experiment: Experiment,
    source: str,
    role: Any,
    group: str | None,
    run_dir: Path | None = None,
    files: dict[str, Path] | None = None,
    agents: Sequence[str] = (),
    root: Path = runs.ROOT,
) -> Run:
    local, code = _with_local_code(experiment)
    return runs.create(
        experiment.name, dump_yaml(local), source,
        stages=[s.name for s in experiment.stages], seed=experiment.train.seed, role=role, group=group,
        run_dir=run_dir, files=code | (files or {}), agents=agents, root=root,
    )  # fmt: skip


def _with_local_code(experiment: Experiment) -> tuple[Experiment, dict[str, Path]]:
    """The experiment with the user's own component files named in the run's `code/`, and those files."""
    files: dict[str, Path] = {}

    def local(value: Any) -> Any:
        if isinstance(value, list):
            return [local(item) for item in value]
        if not isinstance(value, dict):
            return value
        return {k: _local_kind(v, files) if k == "kind" else local(v) for k, v in value.items()}

    return Experiment.model_validate(local(plain(experiment))), files


def _local_kind(kind: Any, files: dict[str, Path]) -> Any:
    """The kind as the run names it; a second file of the same name gets a name of its own."""
    if not isinstance(kind, str) or not registry.is_file_kind(kind):
        return kind
    place, _, name = kind.rpartition(":")
    path = Path(place)
    numbered = (path.name if n == 1 else f"{path.stem}_{n}{path.suffix}" for n in itertools.count(1))
    copy = next(f"code/{c}" for c in numbered if files.get(f"code/{c}", path) == path)
    files[copy] = path
    return f"./{copy}:{name}"


def _run_new(run: Run, experiment: Experiment, reporter: Reporter, data: Data | None = None) -> dict[str, Any]:
    """Runs a run that was just made; one that a mistake of the user's stops before its first step is taken back."""
    try:
        return run_stages(run, experiment, reporter, data)
    except (ConfigError, MissingError):
        begun = list(run.path.glob("stages/*/checkpoints/last.pt"))
        if not begun and not (run / "student.safetensors").exists():
            shutil.rmtree(run.path, ignore_errors=True)
        raise


# ------------------------------------------------------------------------------------------------------------- groups


def _member(experiment: Experiment, role: str, seed: int, first: Run | None) -> tuple[Experiment, dict[str, Path]]:
    """The experiment of one member (its seed, its role, the group's one teacher) and the files its run is given."""
    member = experiment.model_copy(update={"train": experiment.train.model_copy(update={"seed": seed})})
    if role == "control":
        return control(member), {}
    return (member, {}) if first is None else with_shared_teachers(member, first)


def _run_group(
    group: Path, experiment: Experiment, reporter: Reporter, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Runs every member that is not done, then sums the group up; the group file is rewritten after each step."""
    with runs.locked(group.with_suffix(".lock"), f"group {group}"):
        document, root = runs.read_json(group), group.parent.parent.parent
        first: Run | None = None
        for member in document["members"]:
            if member["run"] is None:
                run = _made_before(group, member)
                if run is None:
                    mine, files = _member(experiment, member["role"], member["seed"], first)
                    run = _create_run(
                        mine, document["source"], member["role"], f"groups/{group.name}",
                        files=files, agents=document.get("agents", []), root=root,
                    )  # fmt: skip
                member["run"] = run.path.name
                runs.write_json(group, document)
            run = Run(group.parent.parent / member["run"])
            if run.info["status"] != "done":
                reporter.say(f"{member['role']} run {run}, seed {member['seed']}")
                _run_member(run, group, member, document, reporter, overrides)
            first = first or (run if member["role"] == "main" else None)
        document["result"] = summarize_group(document["members"], group, experiment)
        runs.write_json(group, document)
    return document["result"]


def _made_before(group: Path, member: dict[str, Any]) -> Run | None:
    """The run of a member that was made just before this process's forerunner died."""
    for run in map(Run, sorted(p for p in group.parent.parent.glob("[0-9]*") if runs.is_run(p))):
        info = run.info
        if (info["group"], info["role"], info["seed"]) == (f"groups/{group.name}", member["role"], member["seed"]):
            return run
    return None


def _run_member(
    run: Run,
    group: Path,
    member: dict[str, Any],
    document: dict[str, Any],
    reporter: Reporter,
    overrides: Sequence[str],
) -> None:
    """Runs one member; where it is taken back, the group forgets it, and a group without any run goes too."""
    try:
        _run_new(run, load_run(run, overrides), reporter)
    except (ConfigError, MissingError):
        if not run.path.exists():
            member["run"] = None
            runs.write_json(group, document)
            if all(m["run"] is None for m in document["members"]):
                for path in (group, group.with_suffix(".yaml")):
                    path.unlink()
        raise


def summarize_group(members: list[dict[str, Any]], group: Path, experiment: Experiment) -> dict[str, Any]:
    """Seeds, means, the interval of the paired gain, and the verdict: the document of a group."""
    task = build_task(experiment)
    by_role: dict[str, dict[int, Run]] = {"main": {}, "control": {}}
    for member in members:
        by_role[member["role"]][member["seed"]] = Run(group.parent.parent / member["run"])
    seeds = []
    for seed, run in by_role["main"].items():
        baseline = by_role["control"].get(seed)
        row: dict[str, Any] = {"seed": seed, "run": str(run), "student": _measured(run, "student"), "baseline": None}
        if baseline is not None:
            row["baseline"] = _measured(baseline, "student") | {"run": str(baseline)}
            row["baseline"]["agreement"] = _agreement(baseline, run, task)
        seeds.append(row)
    lead = runs.read_json(by_role["main"][members[0]["seed"]] / "summary.json")
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
    made = [runs.read_json(path / "result.json") for run in by_role["main"].values() for path in run.artefacts]
    whole = {"group": str(group), "seeds": seeds, "summary": summary, "verdict": verdict, "artefacts": made}
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
