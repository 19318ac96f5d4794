"""Runs an experiment's stages in order inside one run directory, and measures what they made."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdctl import build, cache, checkpoint, ranks, registry, runs, sharding
from kdctl.artefacts.ahead import check_ahead
from kdctl.artefacts.make import make
from kdctl.artefacts.measure import check_gates, gated
from kdctl.artefacts.yardstick import Yardstick
from kdctl.bench.meter import Meter
from kdctl.build import Built
from kdctl.config.dump import plain
from kdctl.config.schema import Experiment, TrainStage
from kdctl.data.prepare import Data, stratified
from kdctl.data.tokenizer import FILE as TOKENIZER
from kdctl.device import apply_settings
from kdctl.errors import Interrupted, MissingError, Problem, counted
from kdctl.evaluate import ask, metrics
from kdctl.fit import Progress, fit
from kdctl.loggers.base import Listeners
from kdctl.models.record import build_model, load_model, save_model
from kdctl.provenance import write_provenance
from kdctl.report.card import write_card
from kdctl.runs import Run
from kdctl.signals import IGNORE
from kdctl.summary import summarize
from kdctl.watch import Reporter, StopSignal

_TEACHER_CHECK_SAMPLES = 2000


def run_stages(
    run: Run, experiment: Experiment, reporter: Reporter, data: Data | None = None, timed: bool = True
) -> dict[str, Any]:
    """Runs every stage that is not done yet and returns the run's summary, which is also summary.json.

    data: the experiment's own when left out. timed: whether the latencies of artefacts are measured.
    Raises what a stage raises; the run's status then says `interrupted` or `failed`, and resume takes it up again.
    """
    with run.locked(), StopSignal() as stop:
        run.update(status="running")
        try:
            apply_settings(experiment.train)
            with Listeners(run, experiment, Logged(run, reporter).say) as listeners:
                told = Logged(run, reporter, listeners)
                result = _run_stages(run, experiment, told, stop, data or build.build_data(experiment), timed)
                listeners.finish(result)
        except (Interrupted, KeyboardInterrupt) as stopped:
            run.update(status="interrupted")
            if isinstance(stopped, Interrupted):
                stopped.run = str(run)
            raise
        except BaseException:
            run.update(status="failed")
            raise
        # A stage that misses a gate keeps those after it from running.
        run.update(status="done" if all(s == "done" for s in run.info["stages"].values()) else "failed")
        return result


class Logged(Reporter):
    """Keeps in log.txt what a run tells, and tells the loggers of each epoch, whoever else hears it."""

    def __init__(self, run: Run, reporter: Reporter, listeners: Listeners | None = None) -> None:
        self.run, self.reporter, self.listeners = run, reporter, listeners
        self.begin, self.step = reporter.begin, reporter.step  # type: ignore[method-assign]

    def say(self, text: str) -> None:
        self.run.log(text)
        self.reporter.say(text)

    def epoch(self, line: dict[str, Any], epochs: int) -> None:
        terms = ", ".join(f"{name} {value:.4f}" for name, value in line["terms"].items())
        self.run.log(f"{line['stage']} epoch {line['epoch']}/{epochs}: loss {line['loss']:.4f} ({terms})")
        if self.listeners is not None:
            self.listeners.epoch(line)
        self.reporter.epoch(line, epochs)


def _run_stages(
    run: Run, experiment: Experiment, reporter: Reporter, stop: StopSignal, data: Data, timed: bool
) -> dict[str, Any]:
    if data.tokenizer is not None:
        runs.write_text(run / TOKENIZER, data.tokenizer)
    if not (run / "summary.json").exists():
        check_ahead(experiment, data)
    for stage in experiment.train_stages:
        if stage.role != "compressed" and run.info["stages"].get(stage.name) != "done":
            _train(run, experiment, stage, data, reporter, stop)
    if not (run / "summary.json").exists():
        write_provenance(run, experiment, data)
        runs.write_json(run / "summary.json", summarize(run, experiment, data))
    stop.check(f"after measuring; `kdctl resume {run}` continues")
    with Yardstick(run, experiment, data, reporter.say, timed) as yardstick:
        made = run_products(yardstick, [stage.name for stage in experiment.products], reporter, stop)
    write_card(run)
    return runs.read_json(run / "summary.json") | {"artefacts": made}


def run_products(
    yardstick: Yardstick, names: Sequence[str], reporter: Reporter, stop: StopSignal
) -> list[dict[str, Any]]:
    """Runs the stages of these names that leave an artefact, in order, until one misses a gate; the documents of all.

    One that is done already is not run again, but its gates have to hold.
    """
    run, experiment, documents = yardstick.run, yardstick.experiment, []
    for stage in experiment.products:
        if stage.name not in names:
            continue
        if run.info["stages"].get(stage.name) == "done":
            document = gated(run, stage, yardstick.task.primary)
        else:
            if isinstance(stage, TrainStage):
                _train(run, experiment, stage, yardstick.data, reporter, stop, done=False)
            else:
                reporter.say(f"stage {stage.name}")
            document = make(yardstick, stage)
            run.set_stage(stage.name, "done")
        documents.append(document)
        if check_gates(document) is not None:
            reporter.say(f"stage {stage.name} misses a gate: no stage after it runs")
            break
        stop.check(f"after stage {stage.name}; `kdctl resume {run}` continues")
    return documents


def _train(
    run: Run, experiment: Experiment, stage: TrainStage, data: Data, reporter: Reporter, stop: StopSignal,
    done: bool = True,
) -> None:  # fmt: skip
    """Runs a training stage, all processes together, and says that it is done unless more of it follows."""
    if stage.epochs == 0:
        _keep_untrained(run, experiment, stage, data)
        return
    order = {
        "run": str(run.path.resolve()), "created": run.info["created"], "experiment": plain(experiment),
        "stage": stage.name,
    }  # fmt: skip
    ranks.current().told(order)
    _run_train_stage(run, experiment, stage, data, reporter, stop, done)
    stop.check(f"after stage {stage.name}; `kdctl resume {run}` continues")


# ----------------------------------------------------------------------------------------------------- a train stage


def _run_train_stage(
    run: Run, experiment: Experiment, stage: TrainStage, data: Data, reporter: Reporter, stop: StopSignal,
    done: bool,
) -> None:  # fmt: skip
    run.set_stage(stage.name, "running")
    built = _built(run, experiment, stage, data)
    _check_teachers(built, stage, experiment)
    reporter.say(_describe(stage, built))
    if built.inherited:
        reporter.say(f"stage {stage.name}: {built.inherited}")
    if ranks.current().size > 1:
        reporter.say(_describe_processes(built))
    with _filling(run, experiment, stage):
        _open_stores(built, stage, experiment, reporter, stop)
    with Meter(built.device) as meter:
        state = _fit(built, run, experiment, stage, stop, reporter)
    _keep(run, experiment, stage, built, state, meter.describe(state.seconds))
    whole = state.seconds + run.info.get("filling", {}).get(stage.name, 0.0)
    seconds = run.info.get("seconds", {}) | {stage.name: round(whole, 3)}
    run.update(seconds=seconds, stages=run.info["stages"] | {stage.name: "done" if done else "running"})
    reporter.say(_time_spent(stage, state))
    if state.finished != "all epochs done":
        reporter.say(f"stage {stage.name}: {state.finished}")


@contextlib.contextmanager
def _filling(run: Run, experiment: Experiment, stage: TrainStage) -> Iterator[None]:
    """Counts the seconds of a store that is filled before the first step as the stage's own, over resumes too."""
    began = time.monotonic()
    try:
        yield
    finally:
        if experiment.teacher_cache is not None and experiment.teacher_cache.fill == "before" and stage.teachers:
            before = run.info.get("filling", {})
            spent = before.get(stage.name, 0.0) + time.monotonic() - began
            run.update(filling=before | {stage.name: round(spent, 3)})


def _open_stores(built: Built, stage: TrainStage, experiment: Experiment, reporter: Reporter, stop: StopSignal) -> None:
    """Says what the stores of the stage's teachers hold and will cost; fills them where that is to be done before."""
    if experiment.teacher_cache is None or not built.teachers:
        return
    members = cache.members_of(experiment, stage, built)
    if experiment.teacher_cache.fill == "before":
        cache.fill_before(members, reporter.say, lambda: stop.check(f"while asking the teacher of {stage.name}"))
        return
    for member in members:
        reporter.say(cache.announce(member, cache.cost(member)))


def follow() -> None:
    """What every process but the first does: trains along in each stage that the first one starts, until it ends.

    It reads the run directory (weights of earlier stages, checkpoints) and writes nothing in it. Raises MissingError
    where this machine does not see that directory.
    """
    data, known = None, None
    with StopSignal() as stop:
        while (order := ranks.current().told()) is not None:
            experiment = Experiment.model_validate(order["experiment"])
            stage = next(s for s in experiment.train_stages if s.name == order["stage"])
            run = Run(Path(order["run"]))
            _check_seen(run, order["created"])
            apply_settings(experiment.train)
            if data is None or known != experiment.data:  # the runs of a group share theirs
                data, known = build.build_data(experiment), experiment.data
            built = _built(run, experiment, stage, data)
            with contextlib.suppress(Interrupted):  # whether that ends the run is the first one's to say
                _fit(built, run, experiment, stage, stop, Reporter())


def _check_seen(run: Run, created: str) -> None:
    """Refuses to train along in a run that this machine does not see, or of which it sees another of that name."""
    if not (run / "run.json").is_file() or run.info["created"] != created:
        hint = "on several machines the run directory must be on a file system that all of them share: see --run-dir"
        raise MissingError(Problem("this machine does not see the run directory", file=str(run), hint=hint))


def _built(run: Run, experiment: Experiment, stage: TrainStage, data: Data) -> Built:
    return build.build_stage(experiment, stage, data, lambda name: run.stage_dir(name) / "model", _start_of(run, stage))


def _start_of(run: Run, stage: TrainStage) -> Path | None:
    """The stem of the weights that a stage starts from, None for those that its student has."""
    return None if stage.start == "fresh" else run.stage_dir(stage.start) / "model"


def _fit(
    built: Built, run: Run, experiment: Experiment, stage: TrainStage, stop: StopSignal, reporter: Reporter
) -> Progress:
    return fit(
        built, stage, run,
        seed=experiment.train.seed,
        eval_batch_size=experiment.data.eval_batch_size,
        budget=_budget(run, experiment, stage),
        stop=stop,
        reporter=reporter,
    )  # fmt: skip


def _time_spent(stage: TrainStage, state: Progress) -> str:
    """Where the time of a stage went, the largest share first."""
    whole = sum(state.times.values()) or 1.0
    shares = sorted(state.times.items(), key=lambda item: -item[1])
    listed = ", ".join(f"{name} {100 * seconds / whole:.0f} %" for name, seconds in shares if seconds >= 0.005 * whole)
    return f"stage {stage.name}: {whole:.1f} s: {listed}"


def _check_teachers(built: Built, stage: TrainStage, experiment: Experiment) -> None:
    name = "train" if built.data.val is None else "val"
    split = built.data.split(name)
    rows = stratified(split.strata, 0)
    rows = rows[split.strata[rows] != IGNORE][:_TEACHER_CHECK_SAMPLES]
    if len(rows) == 0:
        return
    some, size = split.subset(rows), experiment.data.eval_batch_size
    for member, spec in zip(built.members, stage.teachers, strict=True):
        said = ask(member, some, built.task, name, built.device, size, built.precision)
        got, chance = metrics(said, built.task)[built.task.primary], built.task.chance(said.targets)
        build.check_teacher(got, chance, spec)


def _describe(stage: TrainStage, built: Built) -> str:
    student = built.method.student
    size = sum(p.numel() for p in student.net.parameters())
    terms = " + ".join(f"{loss.label} x {loss.weight}" for loss in stage.losses)
    teachers = ", ".join(registry.shown_kind(t.record.kind) for t in built.teachers)
    taught = f", teacher {teachers}" if teachers else ""
    labelled = int((built.data.train.strata != IGNORE).sum())
    return (
        f"stage {stage.name}: {registry.shown_kind(student.record.kind)} ({size:,} parameters){taught}; {terms}; "
        f"{counted(len(built.data.train), 'sample')}, {labelled:,} labelled; {counted(stage.epochs, 'epoch')} of "
        f"{counted(len(built.loader), 'step')}; {built.device}, {built.precision}, "
        f"{counted(torch.get_num_threads(), 'thread')}"
    )


def _describe_processes(built: Built) -> str:
    """How many processes there are, and what that means for the statistics of a batch."""
    text = f"{ranks.current().size} processes, each with its part of every batch"
    batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in built.method.trained.modules())
    if batch_norm and built.device.type == "cuda":
        text += "; BatchNorm takes its statistics from the whole batch"
    elif batch_norm:
        text += "; BatchNorm, on a CPU, takes its statistics from each process's part: the losses are not those of one"
    return text


def _budget(run: Run, experiment: Experiment, stage: TrainStage) -> float:
    """Seconds that a stage may take: a budget is the student's, so that runs with and without a teacher share it."""
    if experiment.train.max_minutes is None or stage.role != "student":
        return math.inf
    mine = {s.name for s in experiment.train_stages if s.role == "student"}
    return 60 * experiment.train.max_minutes - sum(s for name, s in run.info.get("seconds", {}).items() if name in mine)


def _keep(
    run: Run, experiment: Experiment, stage: TrainStage, built: Built, state: Progress, spent: dict[str, Any]
) -> None:
    """Saves the weights that the stage keeps, and ships them where the stage's role says so; spent: memory, energy."""
    folder = run.stage_dir(stage.name)
    which = "best" if stage.keep == "best" and (folder / "checkpoints" / "best.pt").exists() else "last"
    model = built.method.finalize()
    if sharding.is_sharded(model):
        model = build_model(model.record, model.base)
    model.net.load_state_dict(checkpoint.student_weights(folder / "checkpoints", which))
    save_model(model, folder / "model")
    if stage.role == "teacher" or stage == experiment.student_stage:
        save_model(model, run / stage.role)
    runs.write_json(
        folder / "result.json",
        {"kept": which, "best_epoch": state.best_epoch, "epochs": state.epoch, "finished": state.finished} | spent,
    )


def _keep_untrained(run: Run, experiment: Experiment, stage: TrainStage, data: Data) -> None:
    """Ships the weights that a stage of no epochs is given, as if it had trained them."""
    start = _start_of(run, stage)
    spec = stage.student or experiment.student
    build.seed_everything(experiment.train.seed, stage.name, "student")
    model = load_model(start) if start else build.build_model(spec, data, "student")
    folder = run.stage_dir(stage.name)
    save_model(model, folder / "model")
    if stage.role == "teacher" or stage == experiment.student_stage:
        save_model(model, run / stage.role)
    result = {"kept": "last", "best_epoch": 0, "epochs": 0, "finished": "all epochs done"}
    runs.write_json(folder / "result.json", result)
    run.set_stage(stage.name, "done")
