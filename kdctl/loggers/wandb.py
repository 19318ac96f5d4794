"""Weights & Biases, online where there is a login, else kept here until it is synchronised."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any, ClassVar

from kdctl.config.dump import plain
from kdctl.config.schema import Experiment
from kdctl.loggers.base import Logger, numbers, of_epoch, role, title
from kdctl.runs import Run


class WandB(Logger):
    """Weights & Biases. Never asks for a login: without one the run is kept in the run directory, for `wandb sync`.

    WANDB_MODE is respected; --offline and a machine without a login mean `offline`. Metrics are called STAGE/loss,
    STAGE/terms/kd, STAGE/val/top1, ...; the step counts the epochs of the run over all stages. The configuration is the
    run's config, the summary its summary, the group of `--seeds` its group, and the job type says which control it is.

    project: where the run stands. entity: user or team; empty for the login's own. tags: of the run.
    """

    package: ClassVar[str] = "wandb"
    extra: ClassVar[str] = "wandb"

    def __init__(self, *, project: str = "kdctl", entity: str = "", tags: list[str] = []) -> None:  # noqa: B006 - read only
        self.project, self.entity, self.tags = project, entity, tags

    def start(self, run: Run, experiment: Experiment) -> str:
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")
        mode, why = _mode(wandb)
        info = run.info
        settings = {"silent": True, "console": "off", "disable_git": True, "disable_code": True}
        self._run = wandb.init(
            project=self.project,
            entity=self.entity or None,
            name=title(run),
            group=f"{info['name']} {info['group']}" if info.get("group") else None,
            job_type=role(run),
            tags=[*self.tags, role(run)],
            config=plain(experiment),
            id=hashlib.sha256(f"{info['name']} {info.get('number')} {info['created']}".encode()).hexdigest()[:16],
            resume="allow",
            dir=str(run.path),
            mode=mode,
            settings=wandb.Settings(**settings),
        )
        if mode == "offline":
            return f"logger wandb: offline{why}; `wandb sync {run}/wandb/offline-run-*` sends it"
        return f"logger wandb: {getattr(self._run, 'url', None) or mode or os.environ.get('WANDB_MODE')}"

    def epoch(self, line: Mapping[str, Any], number: int) -> None:
        self._run.log(of_epoch(line), step=number)

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            self._run.summary.update(numbers(summary, "summary"))
        self._run.finish(exit_code=0 if summary is not None else 1)


def _mode(wandb: Any) -> tuple[str | None, str]:
    """The mode that is passed on, None where WANDB_MODE has it, and why that is offline."""
    if os.environ.get("WANDB_MODE"):
        return None, ""
    if os.environ.get("KDCTL_OFFLINE"):
        return "offline", ", as --offline asks"
    if os.environ.get("WANDB_API_KEY") or wandb.login(prompt=False, verify=False):
        return "online", ""
    return "offline", ", for there is no login: `wandb login`"
