"""The experiment, whole and typed: what a file may say (`ExperimentFile`) and what it comes to (`Experiment`).

One screen a section. Unknown keys are refused everywhere; a component (`kind: ...`) takes further keys, which are the
arguments of its class and are checked against that class's signature (config/check.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from kdctl.config.types import (
    DEVICE,
    Fraction,
    NonNegative,
    NonNegativeInt,
    PathStr,
    Positive,
    PositiveInt,
    Precision,
    Tap,
    When,
)
from kdctl.errors import ConfigError, Problem

NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$"
"""What can name a run or a stage: it becomes a folder."""

# --------------------------------------------------------------------------------------------------------- building


class Section(BaseModel):
    """A map with known keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True, allow_inf_nan=False)


class Component(Section):
    """A map with a `kind`; its further keys are the arguments of that kind."""

    model_config = ConfigDict(extra="allow")
    group: ClassVar[str] = ""
    kind: str = Field(min_length=1, description="the component's name: see `kdctl list`")

    @property
    def arguments(self) -> dict[str, Any]:
        """What the component's class is called with."""
        return dict(self.model_extra or {})


@dataclass(frozen=True)
class Group:
    """Says of which group of the registry a plain Component is."""

    name: str

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        return {**handler(core_schema), "group": self.name}


MethodSpec = Annotated[Component, Group("methods")]
EnsembleSpec = Annotated[Component, Group("ensembles")]
OptimizerSpec = Annotated[Component, Group("optimizers")]
ScheduleSpec = Annotated[Component, Group("schedules")]
AugmentSpec = Annotated[Component, Group("augment")]
ExpansionSpec = Annotated[Component, Group("expansions")]
SourceSpec = Annotated[Component, Group("data")]
LoggerSpec = Annotated[Component, Group("loggers")]


# ----------------------------------------------------------------------------------------------------- task and data


class TaskSpec(Component):
    """What is learnt."""

    group = "tasks"


class DataSpec(Component):
    """Where samples come from and how they become batches. Further keys are arguments of the source."""

    group = "data"
    batch_size: PositiveInt = Field(128, le=2**20, description="samples a step, over all processes")
    eval_batch_size: PositiveInt = Field(512, le=2**20, description="samples at once when measuring")
    val_fraction: float = Field(0.1, ge=0, lt=1, description="share of train held out, by class; best is picked here")
    split_seed: NonNegativeInt = Field(0, description="draws the validation split and which samples keep labels")
    augment: list[AugmentSpec] = Field([], description="batched augmentations, in order")
    strong_augment: list[AugmentSpec] = Field(
        [], description="a second, stronger version of each image beside the first: every term sees both"
    )
    views: Literal["fresh", "all"] | PositiveInt = Field(
        "fresh", description="fresh: new draws each epoch; k: k of them in turn; all: every one of a finite set"
    )
    augment_seed: NonNegativeInt = Field(0, description="the draws of augmentation; not changed by train.seed")
    labels_per_class: PositiveInt | Literal["all"] = Field(
        "all", description="training samples of each class that keep their label; the others stay, unlabelled"
    )
    limit: PositiveInt | None = Field(None, description="use only this many training samples, by class")
    transfer: list[SourceSpec] = Field([], description="further sources whose train split is added without labels")
    expand: list[ExpansionSpec] = Field([], description="further texts made of the training texts, without labels")
    workers: NonNegativeInt | Literal["auto"] = Field("auto", description="decoding processes, for data not in memory")


class StageData(Section):
    """What one stage changes of the experiment's data."""

    batch_size: PositiveInt | None = None
    augment: list[AugmentSpec] | None = None
    strong_augment: list[AugmentSpec] | None = None
    views: Literal["fresh", "all"] | PositiveInt | None = None
    labels_per_class: PositiveInt | Literal["all"] | None = None
    limit: PositiveInt | None = None


# ------------------------------------------------------------------------------------------------------------ models


class Normalize(Section):
    """Channel statistics of images in [0, 1]: (x - mean) / std is the first thing a model does."""

    mean: list[float] = Field(min_length=1)
    std: list[Positive] = Field(min_length=1)


class Inherit(Section):
    """What a student takes over of a trained model before it trains: the weights of the same name, layer by layer."""

    source: Literal["teacher"] | PathStr = Field(
        "teacher", description="`teacher`, the stage's first one, or a run directory, weights file or encoder's folder"
    )
    parts: Literal["all", "embeddings"] = Field("all", description="every weight with a counterpart, or embeddings")
    layers: list[NonNegativeInt] | None = Field(
        None,
        min_length=1,
        description="the source's layer for each of the student's, from 0; left out: evenly spaced, first and last "
        "among them (12 to 6: 0, 2, 4, 7, 9, 11)",
    )
    widths: Literal["svd", "truncate"] = Field(
        "svd",
        description="where the student is narrower. svd: hidden states projected to the directions in which the "
        "embeddings of the training texts' tokens vary most; truncate: the first units",
    )


class ModelSpec(Component):
    """A model: kind, arguments of its class, and where its weights come from."""

    group = "models"
    weights: PathStr | None = Field(None, description="a run directory, a weights file, or `pretrained`")
    stage: str | None = Field(None, alias="from", description="take the weights that this earlier stage made")
    mapping: dict[str, str] = Field({}, description="names in a foreign weights file -> ours (`prefix.` maps prefixes)")
    normalize: Literal["data", "imagenet", "none"] | Normalize = Field("data", description="input normalisation")
    input_size: PositiveInt | None = Field(None, description="resize images to this many pixels a side first")
    inherit: Inherit | None = Field(None, description="of a student: begin with weights of the teacher, cut to size")


class TeacherTraining(Section):
    """How a teacher without weights is made: a stage of its own before the student's."""

    epochs: PositiveInt | None = None
    losses: list[LossSpec] | None = None
    optimizer: OptimizerSpec | None = None
    schedule: ScheduleSpec | None = None
    data: StageData = StageData()


class TeacherSpec(ModelSpec):
    """A model that teaches; without `weights` it needs `train`."""

    name: str | None = None
    train: TeacherTraining | None = None
    control: bool = Field(False, description="declared a control (for example a random teacher): chance is no error")
    tokenizer: PathStr | None = Field(None, description="of texts: its own tokenizer, where data.tokenizer is another")
    shuffled: bool = Field(
        False, description="a placebo: each sample is taught what the teacher says of another one of its batch"
    )
    classes: Literal["by_name"] | Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="a teacher whose classes stand in another order or are others: matched by name, or named here in "
        "its own order; a class of the data that it lacks gets no probability",
    )


# ------------------------------------------------------------------------------------------------------------ losses


class TapPair(Section):
    """One place in the student and its counterpart in the teacher, or in each of several teachers."""

    student: Tap
    teacher: Tap | list[Tap]


class LossSpec(Component):
    """One term of the loss; further keys are its own hyperparameters."""

    group = "losses"
    name: str | None = Field(None, description="what the term is called in metrics; its kind when left out")
    weight: float | Annotated[dict[When, float], Field(min_length=1)] = Field(
        1.0, description="a number, or {epoch: number} or {500 steps: number}, linear between"
    )
    taps: list[Tap | TapPair] = Field([], description="module paths; {student, teacher} where they differ")
    force: bool = Field(False, description="use it on logits it is not meant for: a softmax on several labels")

    @property
    def label(self) -> str:
        return self.name or self.kind.rpartition(":")[2]


class Distill(Section):
    """Shorthand: ce x (1 - alpha) + kd x alpha. alpha is the teacher's share."""

    temperature: Positive = Field(4.0, alias="T")
    alpha: Fraction = Field(0.9, description="the teacher's share; published tools disagree on its meaning")


# ------------------------------------------------------------------------------------------------------------ stages


class Keeping(Section):
    """Settings of a training loop that a stage may set for itself."""

    epochs: NonNegativeInt = Field(30, description="passes over the training data; 0: the weights stay as they are")
    clip_norm: Positive | None = Field(None, description="largest gradient norm")
    accumulate: PositiveInt = Field(1, le=2**16, description="micro-batches a step; the loss does not change")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of an exponential moving average of the weights")
    early_stop: PositiveInt | None = Field(None, description="stop after this many epochs without a better validation")
    keep: Literal["best", "last"] = Field("best", description="which weights are shipped")


class Gates(Section):
    """What the product of a stage has to hold; where it does not, the stages after it do not run."""

    max_drop: NonNegative | None = Field(None, description="gate: most points of the task's metric that may be lost")
    min_speedup: Positive | None = Field(
        None, description="gate: least speed-up over fp32 in the same runtime, batch 1"
    )


class TrainStage(Keeping, Gates):
    """A stage that trains: what it does not set, it takes from the experiment.

    `finetune` trains what stages of compression before it made, with the teacher, else with the model as it was.
    """

    kind: Literal["train", "finetune"] = "train"
    name: str = Field("student", min_length=1, pattern=NAME)
    role: Literal["student", "teacher", "assistant", "compressed"] = Field(
        "student", description="what the trained model is for"
    )
    student: ModelSpec | None = Field(None, description="the model that learns")
    teacher: TeacherSpec | list[TeacherSpec] | None = None
    ensemble: EnsembleSpec = Field(
        Component(kind="mean_logits"), description="how several teachers are combined: `kdctl list ensembles`"
    )
    method: MethodSpec = Component(kind="distill")
    losses: list[LossSpec] = []
    balance: Literal["none", "gradient"] = Field(
        "none", description="gradient: weights are shares of the gradient's norm instead of factors of the terms"
    )
    optimizer: OptimizerSpec = Component(kind="sgd", lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule: ScheduleSpec = Component(kind="cosine")
    start: str = Field("previous", alias="from", description="`previous`, `fresh`, or the name of a stage")
    frozen: list[str] = Field([], description="module paths of the student that do not train")
    data: StageData = StageData()

    @property
    def teachers(self) -> list[TeacherSpec]:
        if self.teacher is None:
            return []
        return self.teacher if isinstance(self.teacher, list) else [self.teacher]


class OutputStage(Component, Gates):
    """A stage that makes an artefact: a smaller model (`prune`, ...) or a file (`quantize`, `export` to a `target`)."""

    model_config = ConfigDict(extra="allow")
    name: str = Field("", pattern=f"^$|{NAME}", description="the variant's name; made from the arguments when left out")
    start: str = Field(
        "previous", alias="from", description="`previous`, the last stage that made a model, or the name of a stage"
    )


ExportSpec = Annotated[OutputStage, Group("exporters")]


def stage_type(value: Any) -> str:
    """The tag of the stage that a value is: one that trains, which is what a map without a kind does, or another."""
    kind = value.get("kind", "train") if isinstance(value, dict) else getattr(value, "kind", "train")
    return "<train>" if kind in ("train", "finetune") else "<output>"


Stage = Annotated[
    Annotated[TrainStage, Tag("<train>")] | Annotated[OutputStage, Tag("<output>")], Discriminator(stage_type)
]


# ------------------------------------------------------------------------------------------------------ teacher cache


class TeacherCache(Section):
    """The store of teacher outputs: each teacher is asked once for every view of a sample, by all runs together."""

    store: Literal["logits", "features", "both"] = Field("logits", description="what is kept of the teacher")
    top_k: PositiveInt | None = Field(None, description="keep this many logits a sample and the mass of the others")
    dtype: Literal["fp16", "fp32"] = Field("fp16", description="how values are kept; losses see them as kept")
    fill: Literal["lazy", "before"] = Field("lazy", description="lazy: filled by training; before: ahead of the stage")
    dir: PathStr | None = Field(None, description="the folder of the store; left out, one of its content's key")


# -------------------------------------------------------------------------------------------------------- experiment


class RunSettings(Section):
    """What holds for all stages of a run."""

    seed: NonNegativeInt = Field(0, description="initialisation and order; augmentation has its own seed")
    precision: Precision = Field("auto", description="arithmetic of training; auto: measured, never fp16")
    layout: Literal["auto", "contiguous", "channels_last"] = Field("auto", description="of images; auto: measured")
    device: str = Field("auto", pattern=DEVICE, description="auto, cpu, cuda, cuda:1, mps")
    threads: Annotated[int, Field(gt=0, le=1024)] | Literal["auto"] = Field(
        "auto", description="of the CPU's arithmetic; auto: OMP_NUM_THREADS where it is set, else measured"
    )
    compile: Literal["auto"] | bool = Field("auto", description="torch.compile of the student; auto: measured on CUDA")
    sharding: Literal["none", "fsdp"] = Field(
        "none",
        description="fsdp: each process holds a part of the student's weights; for students too large for one device",
    )
    max_minutes: Positive | None = Field(None, description="time to train the student; teachers are not counted")


class TrainSettings(RunSettings, Keeping):
    """The `train:` section of a file: the run's settings and the defaults of its training stages."""


class _Common(Section):
    name: str = Field("", pattern=f"^$|{NAME}", description="names the runs; the file's stem when left out")
    task: TaskSpec = TaskSpec(kind="classification")
    data: DataSpec
    student: ModelSpec
    teacher_cache: TeacherCache | None = Field(None, description="store what the teachers say instead of asking again")
    loggers: list[LoggerSpec] = Field([], description="where else a run is logged: `kdctl list loggers`")


class ExperimentFile(_Common):
    """What an experiment file may say."""

    teacher: TeacherSpec | list[TeacherSpec] | None = None
    ensemble: EnsembleSpec | None = None
    distill: Distill | None = None
    method: MethodSpec | None = None
    balance: Literal["none", "gradient"] | None = None
    losses: list[LossSpec] | None = None
    optimizer: OptimizerSpec | None = None
    schedule: ScheduleSpec | None = None
    frozen: list[str] | None = Field(None, description="module paths of the student that do not train")
    train: TrainSettings = TrainSettings()
    stages: list[Stage] | None = Field(None, description="the stages in full, instead of the shorthands")
    compress: list[Stage] = Field([], description="stages after training: prune, low_rank, finetune, quantize, export")
    export: list[ExportSpec] = Field([], description="files for other runtimes")


class Experiment(_Common):
    """An experiment with its shorthands expanded: what runs, and what `config.yaml` in a run directory holds."""

    train: RunSettings = RunSettings()
    stages: list[Stage]

    @property
    def train_stages(self) -> list[TrainStage]:
        return [s for s in self.stages if isinstance(s, TrainStage)]

    @property
    def student_stage(self) -> TrainStage:
        """The stage whose student is shipped: the last one that trains the student."""
        mine = [s for s in self.train_stages if s.role == "student"]
        if not mine:
            hint = "role: student is what a stage has when it does not say"
            raise ConfigError(Problem("no stage trains the student", key="stages", hint=hint))
        return mine[-1]

    @property
    def products(self) -> list[TrainStage | OutputStage]:
        """The stages that leave an artefact."""
        return [s for s in self.stages if isinstance(s, OutputStage) or s.role == "compressed"]

    def origin(self, stage: TrainStage | OutputStage) -> TrainStage:
        """The training stage whose model a stage of compression goes back to."""
        by_name = {s.name: s for s in self.stages}
        while isinstance(stage, OutputStage) or stage.role == "compressed":
            stage = by_name[stage.start]
        return stage


for _model in (TeacherTraining, TeacherSpec, TrainStage, ExperimentFile, Experiment):
    _model.model_rebuild()
