"""Whole experiments: a run, or a group of runs over seeds with and without the teacher, over one pipeline."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdctl import ranks, registry, runs
from kdctl.build import build_data
from kdctl.config.dump import dump_yaml, plain
from kdctl.config.expand import load_experiment
from kdctl.config.schema import Experiment
from kdctl.control import BASELINE, CONTROLS, Made, check_controls, with_shared_teachers
from kdctl.data.prepare import Data
from kdctl.errors import ConfigError, MissingError, Problem, counted
from kdctl.group import MAIN, role_of, summarize_group
from kdctl.pipeline import run_stages
from kdctl.probe import choose
from kdctl.report.card import write_card
from kdctl.runs import Run
from kdctl.watch import Reporter


@dataclass(frozen=True)
class Plan:
    """What `kdctl train` was asked for."""

    experiment: Experiment
    source: str
    """The text of the file that the user wrote."""
    seeds: int = 1
    controls: Sequence[str] = ()
    """Names of control.CONTROLS in their order; with any there is the baseline too."""
    run_dir: Path | None = None

    @property
    def agents(self) -> list[str]:
        """The torchruns that were asked for this; each with a hash of it, for a process may train several plans."""
        asked = dump_yaml(self.experiment) + f"{self.seeds} {list(self.controls)}"
        return [f"{agent} {hashlib.sha256(asked.encode()).hexdigest()[:16]}" for agent in ranks.current().agents]


def train(plan: Plan, reporter: Reporter) -> dict[str, Any]:
    """Trains what the plan names and returns the document of `kdctl train`: a run's summary, or a group's.

    With several seeds or controls it writes runs/<name>/groups/<NNN>.json before the first run, so that an
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
    if plan.seeds == 1 and not plan.controls:
        run = _create_run(experiment, plan.source, "main", None, plan.run_dir, agents=plan.agents)
        reporter.say(f"run {run}")
        return _run_new(run, experiment, reporter, data)
    if not data.split(data.measured).has_labels:
        message = "no sample has a label, and the runs of a group are compared by a metric"
        hint = "single runs, train.seed=1, need none: leave out --seeds and --controls"
        raise ConfigError(Problem(message, key="data", hint=hint))
    check_controls(experiment, plan.controls, data)
    members = _members(range(experiment.train.seed, experiment.train.seed + plan.seeds), plan.controls)
    document = {
        "format": runs.FORMAT, "name": experiment.name, "source": plan.source, "agents": plan.agents,
        "members": members,
    }  # fmt: skip
    group = runs.create_group(experiment.name, document)
    _keep_experiment(group, experiment)
    reporter.say(f"group {group}: {counted(len(members), 'run')}")
    del data  # each run reads its own
    return _run_group(group, _experiment_of(group), reporter)


def _members(seeds: Sequence[int], controls: Sequence[str]) -> list[dict[str, Any]]:
    """The members of a group, without runs yet: by seed, and at the end the controls that are made of all seeds."""
    names = sorted({BASELINE, *controls}, key=list(CONTROLS).index) if controls else []
    roles = [MAIN, *(name for name in names if not CONTROLS[name].last)]
    order = [(role, seed) for seed in seeds for role in roles]
    order += [(name, seed) for name in names if CONTROLS[name].last for seed in seeds]
    return [
        {
            "role": "main" if role == MAIN else "control", "control": None if role == MAIN else role,
            "seed": seed, "run": None,
        }
        for role, seed in order
    ]  # fmt: skip


def resume(run: Run, reporter: Reporter, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Continues an unfinished run, and the group it belongs to; overrides such as data.root=... hold for this time."""
    runs.check_unfinished(run)
    return _continue(run, reporter, overrides)


def _continue(run: Run, reporter: Reporter, overrides: Sequence[str] = ()) -> dict[str, Any]:
    group = runs.group_of(run)
    if group.is_file():
        return _run_group(group, _experiment_of(group), reporter, overrides)
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
    role: str,
    group: str | None,
    run_dir: Path | None = None,
    files: dict[str, Path] | None = None,
    agents: Sequence[str] = (),
    root: Path = runs.ROOT,
) -> Run:
    local, code = _with_local_code(experiment)
    return runs.create(
        experiment.name, dump_yaml(local), source,
        stages=[s.name for s in experiment.stages], seed=experiment.train.seed,
        role="main" if role == MAIN else "control", control=None if role == MAIN else role, group=group,
        run_dir=run_dir, files=code | (files or {}), agents=agents, root=root,
    )  # fmt: skip


def _with_local_code(experiment: Experiment, folder: str = "code") -> tuple[Experiment, dict[str, Path]]:
    """The experiment with the user's own component files named in a folder of the run or group, and those files."""
    files: dict[str, Path] = {}

    def local(value: Any) -> Any:
        if isinstance(value, list):
            return [local(item) for item in value]
        if not isinstance(value, dict):
            return value
        return {k: _local_kind(v, files, folder) if k == "kind" else local(v) for k, v in value.items()}

    return Experiment.model_validate(local(plain(experiment))), files


def _local_kind(kind: Any, files: dict[str, Path], folder: str) -> Any:
    """The kind as the run names it; a second file of the same name gets a name of its own."""
    if not isinstance(kind, str) or not registry.is_file_kind(kind):
        return kind
    place, _, name = kind.rpartition(":")
    path = Path(place)
    numbered = (path.name if n == 1 else f"{path.stem}_{n}{path.suffix}" for n in itertools.count(1))
    copy = next(f"{folder}/{c}" for c in numbered if files.get(f"{folder}/{c}", path) == path)
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


def _keep_experiment(group: Path, experiment: Experiment) -> None:
    """Writes the group's experiment beside its file, with copies of the user's own component files: all members have
    the same code, whatever becomes of the originals, and the group goes on where it is moved to."""
    local, files = _with_local_code(experiment, group.with_suffix(".code").name)
    for place, file in files.items():
        (group.parent / place).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, group.parent / place)
    runs.write_text(group.with_suffix(".yaml"), dump_yaml(local))


def _experiment_of(group: Path) -> Experiment:
    return load_experiment(group.with_suffix(".yaml"), require_files=False).experiment


def _member(experiment: Experiment, role: str, seed: int, made: Made | None) -> tuple[Experiment, dict[str, Path]]:
    """The experiment of one member (its seed, its role, the group's one teacher) and the files its run is given.

    made: the runs that it may be made from; None for the group's first.
    """
    member = experiment.model_copy(update={"train": experiment.train.model_copy(update={"seed": seed})})
    if made is None:
        return member, {}
    return with_shared_teachers(member, made.first) if role == MAIN else CONTROLS[role].make(member, made)


def _run_group(
    group: Path, experiment: Experiment, reporter: Reporter, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Runs every member that is not done, then sums the group up; the group file is rewritten after each step."""
    with runs.locked(group.with_suffix(".lock"), f"group {group}"):
        document, root = runs.read_json(group), group.parent.parent.parent
        done: dict[int, dict[str, Run]] = {}  # by seed and role
        first: Run | None = None
        for member in document["members"]:
            role, seed = role_of(member), member["seed"]
            same_seed = done.setdefault(seed, {})
            if member["run"] is None:
                run = _made_before(group, member)
                if run is None:
                    made = None if first is None else Made(first, same_seed, list(done.values()))
                    mine, files = _member(experiment, role, seed, made)
                    run = _create_run(
                        mine, document["source"], role, f"groups/{group.name}",
                        files=files, agents=document.get("agents", []), root=root,
                    )  # fmt: skip
                member["run"] = run.path.name
                runs.write_json(group, document)
            run = Run(group.parent.parent / member["run"])
            if run.info["status"] != "done":
                reporter.say(f"{role} run {run}, seed {seed}")
                _run_member(run, group, member, document, reporter, overrides)
            same_seed[role] = run
            first = first or (run if role == MAIN else None)
        document["result"] = summarize_group(document["members"], group, experiment)
        runs.write_json(group, document)
        for member in document["members"]:
            write_card(Run(group.parent.parent / member["run"]))  # which can now tell what the group shows
    return document["result"]


def _made_before(group: Path, member: dict[str, Any]) -> Run | None:
    """The run of a member that was made just before this process's forerunner died."""
    for run in map(Run, sorted(p for p in group.parent.parent.glob("[0-9]*") if runs.is_run(p))):
        info = run.info
        if (info["group"], role_of(info), info["seed"]) == (f"groups/{group.name}", role_of(member), member["seed"]):
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
                shutil.rmtree(group.with_suffix(".code"), ignore_errors=True)
        raise
