"""Event files of TensorBoard, written without torch."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any, ClassVar

from kdctl.config.schema import Experiment
from kdctl.loggers.base import Logger, numbers, of_epoch, role, title
from kdctl.runs import Run

FOLDER = "tensorboard"


class TensorBoard(Logger):
    """Event files of TensorBoard in the run directory; `tensorboard --logdir runs` shows all runs side by side.

    Scalars are called STAGE/loss, STAGE/terms/kd, STAGE/val/top1, ...; their step counts the epochs of the run over all
    stages, and STAGE/epoch those of the stage. The resolved configuration and the summary are texts. A run that is a
    control stands in a folder of that name. After a resume, what was logged beyond the checkpoint is purged.
    """

    package: ClassVar[str] = "tensorboard"
    extra: ClassVar[str] = "tensorboard"
    replaces: ClassVar[bool] = True

    def __init__(self) -> None:
        self._number = 0

    def start(self, run: Run, experiment: Experiment) -> str:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = run / FOLDER / role(run).replace(" ", "-")
        self._resumed = folder.is_dir() and any(folder.iterdir())
        self._number = int(self.kept["epochs"])
        self._writer = EventFileWriter(str(folder))
        if not self._resumed:
            self._text("run", title(run), 0)
            self._text("config", "    " + run.config.read_text(encoding="utf-8").replace("\n", "\n    "), 0)
        return f"logger tensorboard: tensorboard --logdir {run / FOLDER}"

    def epoch(self, line: Mapping[str, Any], number: int) -> None:
        self._purge(number)
        self._number = number
        self._scalars(of_epoch(line), number)
        self._writer.flush()

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            self._purge(self._number + 1)
            self._scalars(numbers(summary, "summary"), self._number + 1)
            text = json.dumps(summary, indent=1, default=str)
            self._text("summary", "    " + text.replace("\n", "\n    "), self._number + 1)
        self._writer.close()

    def _purge(self, step: int) -> None:
        """Once after a resume: TensorBoard forgets what earlier files say of this step and later ones."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        if self._resumed:
            self._resumed = False
            started = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=time.time(), step=step, session_log=started))

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        found = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=found)))

    def _text(self, name: str, text: str, step: int) -> None:
        """A text, which TensorBoard reads as Markdown."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

        plugin = SummaryMetadata.PluginData(plugin_name="text")
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype="DT_STRING", string_val=[text.encode("utf-8")], tensor_shape=shape)
        value = Summary.Value(tag=f"{name}/text", metadata=SummaryMetadata(plugin_data=plugin), tensor=tensor)
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=[value])))
