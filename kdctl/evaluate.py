"""Measuring anything that predicts: one code for students, teachers, ensembles and exported files."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdctl import build, ranks, runs
from kdctl import checkpoint as checkpoints
from kdctl import device as devices
from kdctl.cache import clean_logits
from kdctl.config.schema import Experiment
from kdctl.data.base import Split, has_label
from kdctl.data.loader import clean_batches
from kdctl.data.prepare import Data
from kdctl.errors import MissingError, Problem
from kdctl.models.fold import folded
from kdctl.models.record import Model, load_model
from kdctl.quality import describe as quality
from kdctl.quality.classes import confused
from kdctl.quality.entities import describe_entities
from kdctl.ranks import Ranks
from kdctl.runs import Run
from kdctl.signals import Batch, find_logits
from kdctl.tasks.base import Task
from kdctl.tasks.classification import Classification
from kdctl.teachers.base import Teacher
from kdctl.watch import Bar, no_bar

Floats = NDArray[np.float32]


class Predictor(Protocol):
    """Maps images to logits, and says what it takes and where it runs.

    runtime: name and version. image_shape: (C, H, W), of texts (L,). fixed_batch: the only batch size it takes, None
    for any.
    Called with float32 images (N, C, H, W) in [0, 1], or token numbers, int64 (N, L); returns float32 logits (N, C).
    Preprocessing is its own.
    """

    runtime: str
    image_shape: tuple[int, ...]
    num_classes: int
    fixed_batch: int | None

    def __call__(self, images: NDArray[Any]) -> Floats: ...


class TorchPredictor:
    """A torch model in eval mode, in fp32 unless another precision is named."""

    fixed_batch: int | None = None
    input, output = "images", "logits"

    def __init__(self, model: Model, device: torch.device | str = "cpu", precision: str = "fp32") -> None:
        self.model = model.eval()
        self.device = torch.device(device)
        self.precision = precision
        self.runtime = f"torch {torch.__version__}"
        self.image_shape = model.record.input_shape
        self.tokens = model.record.tokens
        self.num_classes = model.record.num_logits or len(self(model.record.example().numpy())[0])
        self.class_names = model.record.answers
        self.link, self.head = model.record.link, model.record.head

    @torch.inference_mode()
    def __call__(self, images: NDArray[Any]) -> Floats:
        with devices.autocast(self.device, self.precision):
            logits = find_logits(self.model(torch.from_numpy(images).to(self.device)))
        return logits.float().cpu().numpy()


def open_torch(path: str, threads: int | None = None) -> TorchPredictor:
    """The predictor of a model on disk, for a measuring process: fp32 on the CPU with its own thread count."""
    if threads:
        torch.set_num_threads(threads)
    return TorchPredictor(load_model(Path(path)))


@dataclass
class Predictions:
    """What a predictor said about a split, R rows of what its task keeps: of a classifier the samples themselves.

    logits: float32 (R, K). targets: (R, ...). index: (R,), the number of each row's sample.
    """

    logits: Floats
    targets: NDArray[Any]
    index: NDArray[np.int64]

    def save(self, path: Path) -> None:
        with runs.writing(path) as file:
            np.savez_compressed(file, logits=self.logits, targets=self.targets, index=self.index)


class _Rows:
    """What is kept of the logits of a split's batches, in the order of its samples."""

    def __init__(self, split: Split, task: Task) -> None:
        self._split, self._task = split, task
        self._logits: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._counts: list[Tensor] = []

    def add(self, logits: Tensor, batch: Batch) -> None:
        kept, targets = self._task.outcome(logits, batch)
        for values, found in ((self._logits, kept), (self._targets, targets)):
            values.append(found.cpu())
        self._counts.append(self._task.rows_of(batch).cpu())

    def predictions(self) -> Predictions:
        """All of them, those of a sample together and in its order."""
        sample = self._split.clean_order().repeat_interleave(torch.cat(self._counts))
        order = torch.argsort(sample, stable=True)
        logits, targets = (torch.cat(values)[order].numpy() for values in (self._logits, self._targets))
        return Predictions(logits, targets, self._split.index[sample[order]].numpy())


def predict(
    predictor: Predictor, split: Split, task: Task, batch_size: int, bar: Bar = no_bar, what: str = "evaluating"
) -> Predictions:
    """Runs a predictor over a whole split, each sample once, clean. bar: shows how far it is, in samples."""
    rows = _Rows(split, task)
    with bar(what, len(split)) as advance:
        for batch in clean_batches(split, batch_size=predictor.fixed_batch or batch_size):
            rows.add(torch.from_numpy(predictor(batch.inputs.numpy())), batch)
            advance(batch.size)
    return rows.predictions()


def metrics(predictions: Predictions, task: Task) -> dict[str, float]:
    """Every metric of the task over the labelled samples of a split; percent where the task says so."""
    said = (predictions.logits, predictions.targets)
    return {name: float(function(*said)) for name, function in task.metrics().items()}


@torch.inference_mode()
def validate(
    model: Model, split: Split, task: Task, device: torch.device, batch_size: int, precision: str
) -> dict[str, float]:
    """Metrics of a model in training, in its own precision, leaving its modes as they were.

    Of several processes each takes its part of the split and has the metrics of the whole, every sample counted once.
    """
    everyone = ranks.current() if len(split) >= ranks.current().size else Ranks()
    own = split if everyone.size == 1 else split.subset(torch.arange(len(split))[everyone.part(len(split))])
    was_training = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        rows, steps = _Rows(own, task), 0
        for batch in clean_batches(own, batch_size=batch_size, device=device):
            with devices.autocast(device, precision):
                outputs = task.forward(model, batch)
            rows.add(task.signals(outputs, batch).logits, batch)
            steps += 1
        if steps < math.ceil(math.ceil(len(split) / everyone.size) / batch_size):
            task.forward(model, batch)  # sharded weights are put together by all processes or none
        said = rows.predictions()
        parts = (everyone.gathered(torch.from_numpy(part)).numpy() for part in (said.logits, said.targets, said.index))
        return metrics(Predictions(*parts), task)
    finally:
        for name, module in model.named_modules():
            module.training = was_training[name]


@torch.no_grad()
def ask(
    teacher: Teacher, split: Split, task: Task, name: str, device: torch.device, batch_size: int, precision: str
) -> Predictions:
    """What a teacher says of a clean split (train, val or test), as it says it in training: from its store, if any."""
    rows = _Rows(split, task)
    for batch in clean_batches(split, batch_size=batch_size, name=name, device=device):
        with devices.autocast(device, precision):
            rows.add(teacher(batch, taps=()).logits, batch)
    return rows.predictions()


# ---------------------------------------------------------------------------------------------------------------- runs


def evaluate_run(
    run: Run,
    experiment: Experiment,
    *,
    split: str = "test",
    checkpoint: str = "best",
    data: Data | None = None,
    with_teacher: bool = True,
    device: str = "cpu",
    bar: Bar = no_bar,
) -> dict[str, Any]:
    """Measures a run's student and its teacher on the same samples, both loaded from disk, in fp32.

    Writes eval/<split>.json and the predictions beside it for the shipped weights (`best`); `last` only returns. For
    the shipped weights both are asked about the validation split too, on which their temperature is fitted. Raises
    MissingError when the split or the student's weights are not there.
    """
    data = data or build.build_data(experiment)
    samples = data.split(split)
    task = build.build_task(experiment)
    size = experiment.data.eval_batch_size
    student = load_student(run, experiment, checkpoint)
    build.check_fits(student.record, data, "student")
    predictor = TorchPredictor(quick(student), device)
    predictions = predict(predictor, samples, task, size, bar, f"student, {split}")
    fitted = checkpoint == "best" and split != "val" and data.val is not None and isinstance(task, Classification)
    splits = [split, "val"] if fitted else [split]
    val = predict(predictor, data.split("val"), task, size, bar, "student, val") if fitted else None
    document = describe(predictions, task, data, val) | {"split": split, "checkpoint": checkpoint}
    said, notes = ask_teachers(run, experiment, data, splits, device, bar) if with_teacher else (None, [])
    teacher = None if said is None else said[split]
    document |= {"teacher": None, "agreement": None, "notes": notes}
    if said is not None and teacher is not None:
        document["teacher"] = metrics(teacher, task)
        document["agreement"] = float(task.agreement(predictions.logits, teacher.logits))
        _compare(document, predictions, teacher, task, data, said.get("val") if fitted else None)
    if checkpoint == "best":
        (run / "eval").mkdir(exist_ok=True)
        predictions.save(run / "eval" / f"{split}.npz")
        if teacher is not None:
            teacher.save(run / "eval" / f"{split}.teacher.npz")
        runs.write_json(run / "eval" / f"{split}.json", document)
    return document


def evaluate_config(
    experiment: Experiment, split: str = "test", device: str = "cpu", bar: Bar = no_bar
) -> dict[str, Any]:
    """Measures the student that a file names with its weights, without a run: nothing is trained or written.

    Raises MissingError where the student has no weights.
    """
    if experiment.student.weights is None:
        hint = "name student.weights, or train the file first and evaluate the run"
        raise MissingError(Problem("the student has no weights to measure", key="student.weights", hint=hint))
    data, task = build.build_data(experiment), build.build_task(experiment)
    student = build.build_model(experiment.student, data, "student")
    predictor, size = TorchPredictor(quick(student), device), experiment.data.eval_batch_size
    predictions = predict(predictor, data.split(split), task, size, bar, f"student, {split}")
    return describe(predictions, task, data) | {"split": split, "teacher": None, "agreement": None, "notes": []}


def quick(model: Model) -> Model:
    """The model in the form that predicts most samples a second, the same up to rounding: batch normalisation folded,
    channels last in memory."""
    net = copy.deepcopy(folded(model.eval().net))
    return Model(net, model.record, model.base).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def labelled(predictions: Predictions) -> int:
    """How many samples, or words, of a split have a label: what its metrics are over."""
    return int(has_label(torch.from_numpy(predictions.targets)).sum())


def describe(predictions: Predictions, task: Task, data: Data, val: Predictions | None = None) -> dict[str, Any]:
    """Samples, metrics, the metric of each class and, of a classifier, how good its probabilities are and what it
    takes for what. val: its predictions on the validation split, which the temperature is fitted on."""
    rows = task.per_class(predictions.logits, predictions.targets)
    rows = [{"name": name} | row for name, row in zip(data.class_names, rows, strict=bool(rows))]
    document: dict[str, Any] = {
        "samples": labelled(predictions),
        "metrics": metrics(predictions, task),
        "per_class": rows,
    }
    document |= {"quality": {"student": None, "teacher": None}, "fidelity": None, "confusion": None, "confused": []}
    if isinstance(task, Classification):
        document["quality"]["student"] = _quality(predictions, data, val)
        document["confusion"] = quality.describe_confusion(predictions.logits, None, predictions.targets)
        document["confused"] = confused(predictions.logits, predictions.targets, data.class_names)
    return document


def _compare(
    document: dict[str, Any],
    student: Predictions,
    teacher: Predictions,
    task: Task,
    data: Data,
    val: Predictions | None,
) -> None:
    """Adds what a classifier's teacher says to the document of its student, and what the two share."""
    if not isinstance(task, Classification):
        return
    said = (student.logits, teacher.logits, student.targets)
    document["quality"]["teacher"] = _quality(teacher, data, val)
    document["fidelity"] = quality.describe_fidelity(*said)
    document["confusion"] = quality.describe_confusion(*said)


def _quality(predictions: Predictions, data: Data, val: Predictions | None) -> dict[str, Any]:
    fitted = None if val is None else (val.logits, val.targets)
    said = (predictions.logits, predictions.targets)
    document = quality.describe(said, data.class_names, data.class_counts(), fitted)
    return document | describe_entities(*said, predictions.index, data.class_names)


def load_student(run: Run, experiment: Experiment, checkpoint: str = "best") -> Model:
    """The shipped student (`best`), or the student as the last step left it (`last`)."""
    model = load_model(run / "student")
    if checkpoint == "last":
        stage = experiment.student_stage
        model.net.load_state_dict(checkpoints.student_weights(run.stage_dir(stage.name) / "checkpoints", "last"))
    return model


def load_teachers(run: Run, experiment: Experiment, data: Data) -> list[Model]:
    """The teachers of the stage that made the shipped student. Raises MissingError where one is not there."""
    stage = experiment.student_stage
    return build.build_teachers(stage, data, experiment.train.seed, lambda name: run.stage_dir(name) / "model")


def predict_teacher(
    run: Run, experiment: Experiment, data: Data, split: str, device: str = "cpu"
) -> tuple[Predictions | None, list[str]]:
    """What the last stage's teacher says of a split, as `ask_teachers` has it."""
    said, notes = ask_teachers(run, experiment, data, [split], device)
    return None if said is None else said[split], notes


def ask_teachers(
    run: Run, experiment: Experiment, data: Data, splits: Sequence[str], device: str = "cpu", bar: Bar = no_bar
) -> tuple[dict[str, Predictions] | None, list[str]]:
    """What the last stage's teacher says of each of some splits, in fp32; the mean of the logits of several.

    With a `teacher_cache` it is asked once for all runs. Gives a note instead where the teacher is not there.
    """
    specs = experiment.student_stage.teachers
    if not specs:
        return None, []
    try:
        teachers = load_teachers(run, experiment, data)
    except MissingError as error:
        return None, [f"the teacher was not measured: {error}"]
    return {name: _mean_logits(teachers, experiment, data, name, device, bar) for name in splits}, []


def _mean_logits(
    teachers: Sequence[Model], experiment: Experiment, data: Data, split: str, device: str, bar: Bar
) -> Predictions:
    """What the mean of the teachers' logits says of a split."""
    stage, size, task = experiment.student_stage, experiment.data.eval_batch_size, build.build_task(experiment)
    samples = data.split(split)

    def measure(*models: Model) -> Predictions:
        predictors = [TorchPredictor(quick(model), device) for model in models]
        predictor = predictors[0] if len(predictors) == 1 else _Mean(predictors)
        return predict(predictor, samples, task, size, bar, f"teacher, {split}")

    if experiment.teacher_cache is None or device != "cpu" or data.head != "sample":
        return measure(*teachers)
    said = [
        clean_logits(experiment, stage, number, model, data, split, lambda model=model: measure(model).logits)  # type: ignore[misc]
        for number, model in enumerate(teachers)
    ]
    mean = said[0] if len(said) == 1 else np.mean(np.stack(said), axis=0, dtype=np.float32)
    return Predictions(np.asarray(mean), samples.targets.numpy(), samples.index.numpy())


class _Mean:
    """Several predictors as one: the mean of their logits."""

    def __init__(self, members: Sequence[Predictor]) -> None:
        self._members = members
        first = members[0]
        self.runtime, self.image_shape, self.num_classes = first.runtime, first.image_shape, first.num_classes
        self.fixed_batch = first.fixed_batch

    def __call__(self, images: NDArray[Any]) -> Floats:
        return np.mean(np.stack([member(images) for member in self._members]), axis=0, dtype=np.float32)
