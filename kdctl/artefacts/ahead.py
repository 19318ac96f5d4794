"""What can be told of stages of compression and export before hours of training: that one of them will fail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from kdctl import build, registry
from kdctl.config.schema import Experiment, OutputStage
from kdctl.data.prepare import Data
from kdctl.errors import ConfigError, KdctlError
from kdctl.methods.base import Method
from kdctl.models.record import Model


def check_ahead(experiment: Experiment, data: Data) -> None:
    """Raises MissingError where a runtime that is to be exported to is not installed, ConfigError where a target takes
    no models of texts, and where a stage that starts from the student can make nothing of its net."""
    stages = [stage for stage in experiment.products if isinstance(stage, OutputStage)]
    tools = {stage.name: _tool(stage) for stage in stages}
    for tool in tools.values():
        tool.require()
    first = [stage for stage in stages if stage.kind != "export" and stage.start == experiment.student_stage.name]
    net = _as_it_begins(experiment, data) if first else None
    for stage in stages:
        try:
            if stage.kind == "export" and data.tokens is not None:
                tools[stage.name].check_texts("fp32")
            elif stage in first and net is not None:
                tools[stage.name].check(net)
        except KdctlError as error:
            raise ConfigError(*(replace(p, key=_key(stage, p.key)) for p in error.problems)) from error


def _tool(stage: OutputStage) -> Any:
    """The Compression or Exporter of a stage."""
    if stage.kind != "export":
        return registry.create("compressors", stage.kind, stage.arguments)
    own = {name: value for name, value in stage.arguments.items() if name != "target"}
    return registry.create("exporters", stage.arguments["target"], own)


def _as_it_begins(experiment: Experiment, data: Data) -> Model | None:
    """The student before it trains, on the CPU, in eval mode; None where another net may be shipped: one that goes on
    from another stage's, or that the method makes of it."""
    stage = experiment.student_stage
    spec = stage.student or experiment.student
    method: type[Method] = registry.load(registry.find("methods", stage.method.kind))
    if stage.start != "fresh" or spec.stage is not None or method.prepare is not Method.prepare:
        return None
    with torch.random.fork_rng([]):
        return build.build_model(spec, data, "student").eval()


def _key(stage: OutputStage, key: str | None) -> str:
    return ".".join(filter(None, ("stages", stage.name, key)))
