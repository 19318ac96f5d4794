"""Runs further stages of a finished run, as `kdctl compress` and `kdctl export` ask for them."""

from __future__ import annotations

import contextlib
import shutil
from typing import Any

from kdctl import build, runs
from kdctl.artefacts.yardstick import Yardstick
from kdctl.config.recipe import Extended
from kdctl.config.schema import Experiment
from kdctl.device import apply_settings
from kdctl.errors import Interrupted
from kdctl.pipeline import Logged, run_products
from kdctl.runs import Run
from kdctl.watch import Reporter, StopSignal


def yardstick(run: Run, experiment: Experiment, reporter: Reporter) -> Yardstick:
    """What several extensions of a run are measured against."""
    return Yardstick(run, experiment, build.build_data(experiment), Logged(run, reporter).say)


def extend(run: Run, more: Extended, reporter: Reporter, measured: Yardstick | None = None) -> list[dict[str, Any]]:
    """Runs further stages of a finished run and returns the document of each artefact that was asked for.

    measured: shared with other extensions of the run; one of its own when left out.

    The run's config.yaml names them from the start, so that `kdctl resume` takes up what a signal stops. Where anything
    else goes wrong, the run forgets the stages that are not done, with all that they have left.
    """
    with run.locked(), StopSignal() as stop:
        config, info = run.config.read_text(encoding="utf-8"), run.info
        kept = {name: status for name, status in info["stages"].items() if name in more.known}
        try:
            runs.write_text(run.config, more.config)
            run.update(status="running", stages=kept | dict.fromkeys(more.waiting, "waiting"))
            apply_settings(more.experiment.train)
            own = yardstick(run, more.experiment, reporter) if measured is None else contextlib.nullcontext(measured)
            with own as against:
                against.experiment = more.experiment
                run_products(against, Logged(run, reporter), stop)
        except (Interrupted, KeyboardInterrupt) as stopped:
            run.update(status="interrupted")
            if isinstance(stopped, Interrupted):
                stopped.run = str(run)
            raise
        except BaseException:
            _take_back(run, more, config, info)
            raise
        if all(run.info["stages"].get(name) == "done" for name in more.waiting):
            run.update(status=info["status"])
        else:
            _take_back(run, more, config, info)  # a gate was missed, and what would come after it is not asked for
        names = [name for name in more.names if run.info["stages"].get(name) == "done"]
    return [runs.read_json(run / "artefacts" / name / "result.json") for name in names]


def _take_back(run: Run, more: Extended, config: str, info: dict[str, Any]) -> None:
    """Forgets the stages of a failed extension that are not done; nothing at all is left where none is."""
    done = [name for name in more.waiting if run.info["stages"].get(name) == "done"]
    for name in more.waiting:
        if name not in done and name not in info["stages"]:
            shutil.rmtree(run.stage_dir(name), ignore_errors=True)
    if done:
        runs.write_text(run.config, more.config_of(done))
        run.update(status=info["status"], stages=info["stages"] | dict.fromkeys(done, "done"))
    else:
        runs.write_text(run.config, config)
        runs.write_json(run / "run.json", info)
