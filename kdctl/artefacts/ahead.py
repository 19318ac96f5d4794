"""What can be told of stages of compression and export before hours of training: that one of them will fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from kdctl import registry
from kdctl.config.schema import Experiment, OutputStage
from kdctl.errors import ConfigError, KdctlError
from kdctl.models.record import Model


def check_ahead(experiment: Experiment, student: Callable[[], Model]) -> None:
    """Raises MissingError where a runtime that is to be exported to is not installed, and ConfigError where a stage
    that starts from the student can make nothing of a net of its kind.

    student: the net with any weights, on the CPU; asked for where a stage has to see it.
    """
    net: Model | None = None
    for stage in experiment.products:
        if not isinstance(stage, OutputStage):
            continue
        tool: Any = _tool(stage)
        tool.require()
        if stage.start != experiment.student_stage.name:
            continue
        net = net or student().eval()
        try:
            if stage.kind != "export":
                tool.check(net)
            elif net.record.tokens is not None:
                tool.check_texts("fp32")
        except KdctlError as error:
            raise ConfigError(*(replace(p, key=_key(stage, p.key)) for p in error.problems)) from error


def _tool(stage: OutputStage) -> Any:
    """The Compression or Exporter of a stage."""
    if stage.kind != "export":
        return registry.create("compressors", stage.kind, stage.arguments)
    own = {name: value for name, value in stage.arguments.items() if name != "target"}
    return registry.create("exporters", stage.arguments["target"], own)


def _key(stage: OutputStage, key: str | None) -> str:
    return ".".join(filter(None, ("stages", stage.name, key)))
