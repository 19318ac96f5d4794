"""What the artefacts of a run are measured against, each thing asked once: the fp32 student, its teacher, a runtime's
own fp32 file of the student."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from kdctl import build, evaluate, registry
from kdctl.compress.base import Floats, Workbench
from kdctl.config.schema import Experiment, OutputStage, TrainStage
from kdctl.data.loader import as_inputs, clean_batches
from kdctl.data.prepare import Data, stratified
from kdctl.evaluate import Predictions, TorchPredictor, metrics, open_torch, predict, quick
from kdctl.export import files
from kdctl.export.onnx import record_metadata
from kdctl.models.record import load_model, released
from kdctl.quant import fake
from kdctl.runs import Run
from kdctl.signals import CLEAN, IGNORE, Batch

TORCH = "torch"
"""The target of artefacts that are models of this package: weights and their record."""
_QUALITY_SAMPLES = 5000


class Yardstick:
    """What artefacts of one run are measured with. Use it in a `with`: it holds files in a temporary folder.

    timed: whether latencies are measured; a smoke test does without.
    """

    def __init__(
        self, run: Run, experiment: Experiment, data: Data, say: Callable[[str], None] = print, timed: bool = True
    ) -> None:
        self.run, self.experiment, self.data, self.say, self.timed = run, experiment, data, say, timed
        self.task = build.build_task(experiment)
        self.split = next(name for name in ("test", "val", "train") if getattr(data, name) is not None)
        self.samples = data.split(self.split)
        self._folder = tempfile.TemporaryDirectory()
        self._models: dict[Path, Predictions] = {}
        self._plain: dict[tuple[str, Path], tuple[Path, Predictions]] = {}
        self._teacher: list[Predictions | None] = []

    def __enter__(self) -> Yardstick:
        return self

    def __exit__(self, *exception: object) -> None:
        self._folder.cleanup()

    # ------------------------------------------------------------------------------------------------------- measured

    def of_model(self, stem: Path) -> Predictions:
        """What a saved model says of the split, in fp32 in PyTorch."""
        if stem not in self._models:
            self._models[stem] = self.predictions(TorchPredictor(quick(load_model(stem))))
        return self._models[stem]

    def of_teacher(self) -> Predictions | None:
        if not self._teacher:
            self._teacher.append(evaluate.predict_teacher(self.run, self.experiment, self.data, self.split)[0])
        return self._teacher[0]

    def plain(self, target: str, stem: Path) -> tuple[Path, Predictions]:
        """The fp32 file of a saved model for a target's runtime, and what that file says of the split."""
        if (target, stem) not in self._plain:
            folder, model = Path(tempfile.mkdtemp(dir=self._folder.name)), load_model(stem)
            model = released(model)[0] if fake.is_quantized(model.net) else model
            path = folder / registry.load(registry.find("exporters", target)).file_name  # type: ignore[attr-defined]
            files.write(target, model, path, record_metadata(model.record.to_dict()))
            self._plain[target, stem] = path, self.predictions(open_file(target, path))
        return self._plain[target, stem]

    def keep_plain(self, target: str, stem: Path, path: Path, said: Predictions) -> None:
        """Keeps an fp32 file of a saved model that was made already, so that it is neither made nor asked again."""
        folder = Path(tempfile.mkdtemp(dir=self._folder.name))
        for file in registry.create("exporters", target, {}).files(path):
            shutil.copyfile(file, folder / file.name)
        self._plain[target, stem] = folder / path.name, said

    def predictions(self, predictor: Any) -> Predictions:
        return predict(predictor, self.samples, self.task, self.experiment.data.eval_batch_size)

    def metrics(self, predictions: Predictions) -> dict[str, float]:
        return metrics(predictions, self.task)

    # ---------------------------------------------------------------------------------------------------- to work with

    def workbench(self, stage: OutputStage | TrainStage) -> Workbench:
        """Training samples in fixed orders, and the quality of a predictor on what is no test sample."""
        student = self.run.stage_dir(self.experiment.origin(stage).name) / "model"
        held_out = self.data.val if self.data.val is not None else self.data.train
        rows = stratified(held_out.strata, 0)
        some = held_out.subset(rows[held_out.strata[rows] != IGNORE][:_QUALITY_SAMPLES])
        size, primary = self.experiment.data.eval_batch_size, self.task.primary

        def quality(predictor: Callable[[Floats], Floats]) -> float:
            if len(some) == 0:
                return math.nan
            pairs = [
                self.task.outcome(torch.from_numpy(predictor(batch.inputs.numpy())), batch)
                for batch in clean_batches(some, batch_size=size)
            ]
            logits, targets = (torch.cat(part).numpy() for part in zip(*pairs, strict=True))
            return float(self.task.metrics()[primary](logits, targets))

        def of_student() -> float:
            return quality(TorchPredictor(quick(load_model(student))))

        return Workbench(self.task, self._images, self._labelled_first, quality, of_student, self.say)

    def _images(self) -> Iterator[Floats]:
        for batch in self._batches(self._order()):
            yield batch.inputs.numpy()

    def _labelled_first(self) -> Iterator[Batch]:
        order = self._order()
        unlabelled = self.data.train.strata[order] == IGNORE
        return self._batches(order[torch.argsort(unlabelled.to(torch.int8), stable=True)])

    def _order(self) -> torch.Tensor:
        return torch.randperm(len(self.data.train), generator=torch.Generator().manual_seed(0))

    def _batches(self, order: torch.Tensor) -> Iterator[Batch]:
        train = self.data.train
        for rows in order.split(128):
            view = torch.full((len(rows),), CLEAN)
            posed = train.posed(rows, train.fetch(rows), view)
            inputs = as_inputs(posed.inputs)
            yield Batch(inputs, posed.targets, train.index[rows], view, posed.keep, extra=train.extra(inputs))


def opener(target: str) -> str:
    """The function that opens an artefact's file, as text, for a process that measures."""
    return "kdctl.evaluate:open_torch" if target == TORCH else files.opener(target)


def open_file(target: str, path: Path) -> Any:
    """The predictor of an artefact's file."""
    return open_torch(str(path)) if target == TORCH else files.open_file(target, path)
