"""`kdctl resume`: continues an unfinished run, and the group it belongs to."""

from __future__ import annotations

from typing import Annotated

from kdctl import launch, runs
from kdctl.cli import console, processes
from kdctl.cli.train import reply
from kdctl.cli.verb import Argument, ExperimentOptions, Reply


def resume(
    options: ExperimentOptions,
    run: Annotated[str, Argument(help="a run directory, or latest")] = "latest",
    nproc: processes.Nproc = None,
) -> Reply:
    """Continue an unfinished run exactly where it stopped."""
    processes.check(nproc)
    if launch.rank() > 0:
        return processes.follow(options)
    found = runs.find(run)
    if processes.starts_others(nproc):
        return processes.start(nproc)
    runs.check_unfinished(found)
    console.say("loading torch ...")
    from kdctl import experiment
    from kdctl.cli.progress import TextReporter

    reporter = TextReporter(options.quiet)
    return processes.lead(lambda: reply(lambda: experiment.resume(found, reporter, options.overrides)))
