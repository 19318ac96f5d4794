"""Runs further stages of a finished run, as `kdctl compress` and `kdctl export` ask for them."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdctl import build, runs
from kdctl.artefacts.yardstick import Yardstick
from kdctl.config.recipe import Extended
from kdctl.config.schema import Experiment
from kdctl.device import apply_settings
from kdctl.errors import Interrupted
from kdctl.loggers.base import Listeners
from kdctl.pipeline import Logged, run_products
from kdctl.provenance import renew_config_hash
from kdctl.report.card import write_card
from kdctl.runs import Run
from kdctl.watch import Reporter, StopSignal


def yardstick(run: Run, experiment: Experiment, reporter: Reporter) -> Yardstick:
    """What several extensions of a run are measured against."""
    return Yardstick(run, experiment, build.build_data(experiment), Logged(run, reporter).say)


def extend(run: Run, more: Extended, reporter: Reporter, measured: Yardstick | None = None) -> list[dict[str, Any]]:
    """Runs further stages of a finished run and returns the document of each artefact that was asked for.

    measured: shared with other extensions of the run; one of its own when left out.

    The run's config.yaml names them from the start, so that `kdctl resume` takes up what a signal stops. Where anything
    else goes wrong, the run forgets the stages that are not done, with all that they have left; finished ones stay.
    What the others were to replace is back, unless it was made of a model that a finished one has replaced.
    """
    with run.locked(), StopSignal() as stop, _set_aside(run, more.waiting) as aside:
        before = _Before(run.config.read_text(encoding="utf-8"), run.info, run.metrics_size())
        kept = {name: status for name, status in before.info["stages"].items() if name in more.known}
        try:
            runs.write_text(run.config, more.config)
            run.update(status="running", stages=kept | dict.fromkeys(more.waiting, "waiting"))
            apply_settings(more.experiment.train)
            own = yardstick(run, more.experiment, reporter) if measured is None else contextlib.nullcontext(measured)
            with _listeners(run, more, reporter) as listeners, own as against:
                against.experiment = more.experiment
                documents = run_products(against, more.names, Logged(run, reporter, listeners), stop)
                if listeners is not None:
                    listeners.finish(runs.read_json(run / "summary.json") | {"artefacts": documents})
        except (Interrupted, KeyboardInterrupt) as stopped:
            run.update(status="interrupted")
            _remove_gone(run, before)
            if isinstance(stopped, Interrupted):
                stopped.run = str(run)
            raise
        except BaseException:
            if _take_back(run, more, before, aside):
                _describe(run)
            raise
        if all(run.info["stages"].get(name) == "done" for name in more.waiting):
            run.update(status=before.info["status"])
            _remove_gone(run, before)
        else:
            _take_back(run, more, before, aside)  # a gate was missed, and what would come after it is not asked for
        _describe(run)
    return documents


def _describe(run: Run) -> None:
    """Says anew what the run is, where its stages have changed."""
    renew_config_hash(run)
    write_card(run)


def _listeners(run: Run, more: Extended, reporter: Reporter) -> contextlib.AbstractContextManager[Listeners | None]:
    """The run's loggers where a stage trains; the others have nothing to tell them."""
    trains = any(stage.name in more.waiting for stage in more.experiment.train_stages)
    return Listeners(run, more.experiment, Logged(run, reporter).say) if trains else contextlib.nullcontext()


@dataclass(frozen=True)
class _Before:
    """What a run was before its extension."""

    config: str
    info: dict[str, Any]
    metrics_bytes: int


@contextlib.contextmanager
def _set_aside(run: Run, names: Sequence[str]) -> Iterator[dict[str, Path]]:
    """Puts what stages of these names have left out of the way: where each is now.

    What is still there when the work in between fails is put back, and is gone once it has not failed.
    """
    moved: dict[str, Path] = {}
    for name in names:
        if run.stage_dir(name).exists():
            moved[name] = run.stage_dir(name).with_name(f".old-{name}")
            shutil.rmtree(moved[name], ignore_errors=True)
            os.replace(run.stage_dir(name), moved[name])
    try:
        yield moved
    except (Interrupted, KeyboardInterrupt):
        raise
    except BaseException:
        for name, place in moved.items():
            if not run.stage_dir(name).exists():
                os.replace(place, run.stage_dir(name))
        raise
    finally:
        for place in moved.values():
            shutil.rmtree(place, ignore_errors=True)


def _take_back(run: Run, more: Extended, before: _Before, aside: dict[str, Path]) -> list[str]:
    """Forgets the stages of a failed extension that are not done: the names of those that are. Nothing at all is left
    where none is.

    aside: what they were to replace; it is back in its place but for what was made of a model that is gone.
    """
    stages = run.info["stages"] if run.info != before.info else {}  # what could not even begin
    done = [name for name in more.waiting if stages.get(name) == "done"]
    left = more.untouched(done)
    for name in set(more.waiting) - set(done):
        shutil.rmtree(run.stage_dir(name), ignore_errors=True)
    for name in list(aside):
        place = aside.pop(name)
        if name in left:
            os.replace(place, run.stage_dir(name))
        else:
            shutil.rmtree(place, ignore_errors=True)
    if done:
        stages = {name: status for name, status in before.info["stages"].items() if name in left}
        runs.write_text(run.config, more.config_of(done))
        run.update(status=before.info["status"], stages=stages | dict.fromkeys(done, "done"))
        _remove_gone(run, before)
    else:
        run.cut_metrics(before.metrics_bytes)
        runs.write_text(run.config, before.config)
        runs.write_json(run / "run.json", before.info)
    return done


def _remove_gone(run: Run, before: _Before) -> None:
    """Removes what was made of a model that another has replaced."""
    for name in set(before.info["stages"]) - set(run.info["stages"]):
        shutil.rmtree(run.stage_dir(name), ignore_errors=True)
        shutil.rmtree(run / "artefacts" / name, ignore_errors=True)
