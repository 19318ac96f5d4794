"""`kdctl resume`: continues an unfinished run, and the group it belongs to."""

from __future__ import annotations

from typing import Annotated

from kdctl import runs
from kdctl.cli import console
from kdctl.cli.train import reply
from kdctl.cli.verb import Argument, ExperimentOptions, Reply


def resume(
    options: ExperimentOptions, run: Annotated[str, Argument(help="a run directory, or latest")] = "latest"
) -> Reply:
    """Continue an unfinished run exactly where it stopped."""
    found = runs.find(run)
    console.say("loading torch ...")
    from kdctl import experiment
    from kdctl.cli.progress import TextReporter

    return reply(lambda: experiment.resume(found, TextReporter(options.quiet), options.overrides))
