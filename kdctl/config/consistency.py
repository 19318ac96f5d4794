"""What has to hold between the sections of a file, as far as it can be known without building anything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kdctl import registry
from kdctl.config.inheritance import check_inherit
from kdctl.config.schema import (
    ExperimentFile,
    Keeping,
    ModelSpec,
    Normalize,
    OutputStage,
    TeacherSpec,
    TrainStage,
)
from kdctl.config.terms import (
    ADD_TEACHER,
    Finding,
    check_links,
    check_losses,
    check_need,
    check_several,
    teachers_of,
    teaches,
)
from kdctl.config.yaml_io import KeyPath
from kdctl.errors import KdctlError, did_you_mean
from kdctl.runs import RESERVED

_WAYS = "weights: a file, a run directory or `pretrained`; or train: {} to train it first; or control: true"
_UNTRAINED = "name its weights, or train it for an epoch at least"


def check_consistency(file: ExperimentFile) -> Iterator[Finding]:
    """All that is wrong between sections that are each valid on their own."""
    if file.name in RESERVED:
        hint = "give it another `name:`; without one it is called like its file"
        yield ("name",), f"'{file.name}' means something else among runs: no experiment can be called that", hint
    yield from _check_normalize(("student",), file.student)
    yield from check_losses(("losses",), file.losses or [])
    yield from check_links(file)
    if file.distill is not None and file.losses is not None:
        hint = "write its terms into losses: ce with weight 1 - alpha, kd with weight alpha"
        yield ("distill",), "`distill` is a shorthand for `losses`: give one of them", hint
    if file.student.stage is not None and file.stages is None:
        yield ("student", "from"), "there is no earlier stage", "weights: names a file or a run directory"
    for path, spec in teachers_of(("teacher",), file.teacher):
        yield from _check_teacher(path, spec, file.stages is not None)
    if file.stages is None:
        yield from _check_shorthands(file)
    else:
        yield from _check_stages(file, file.stages)
    yield from _check_cache(file)


# ----------------------------------------------------------------------------------------------------------- teachers


def _check_teacher(path: KeyPath, spec: TeacherSpec, staged: bool) -> Iterator[Finding]:
    yield from _check_normalize(path, spec)
    if spec.inherit is not None:
        yield (*path, "inherit"), "a teacher inherits from nobody", "inherit is a key of the student"
    sources = {"weights": spec.weights, "from": spec.stage, "train": spec.train}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1:
        yield (*path, given[1]), f"a teacher's weights come from one place: both {' and '.join(given)} are given", None
    elif not given and not spec.control:
        yield path, "this teacher has no weights", _WAYS
    if spec.train is not None:
        yield from check_losses((*path, "train", "losses"), spec.train.losses or [])
        yield from check_need((*path, "train", "losses"), spec.train.losses or [], "a teacher's own training")
        if staged:
            hint = "give the stage `role: teacher` and the teacher `from: <its name>`"
            yield (*path, "train"), "with `stages:`, a teacher is trained by a stage", hint
    if spec.stage is not None and not staged:
        yield (*path, "from"), "there is no earlier stage", _WAYS


def _check_normalize(path: KeyPath, spec: ModelSpec) -> Iterator[Finding]:
    normalize = spec.normalize
    if isinstance(normalize, Normalize) and len(normalize.mean) != len(normalize.std):
        message = f"mean has {len(normalize.mean)} numbers, std {len(normalize.std)}"
        yield (*path, "normalize"), message, "one of each a channel"


def _check_cache(file: ExperimentFile) -> Iterator[Finding]:
    """A store of teacher outputs for which there is no teacher, or no term that needs what it keeps."""
    cache = file.teacher_cache
    if cache is None:
        return
    stages = [stage for stage in file.stages or [] if isinstance(stage, TrainStage)]
    if not file.teacher and not any(stage.teacher for stage in stages):
        hint = f"leave it out, or {ADD_TEACHER}"
        yield ("teacher_cache",), "there is no teacher whose outputs could be stored", hint
    terms = [*(file.losses or []), *(loss for stage in stages for loss in stage.losses)]
    if cache.store != "logits" and not any(loss.taps for loss in terms):
        message = f"'{cache.store}' keeps the features that terms tap, and no term has taps"
        yield ("teacher_cache", "store"), message, "store: logits"
    if cache.store == "features" and cache.top_k is not None:
        yield ("teacher_cache", "top_k"), "top_k is of logits, and the store keeps features alone", "store: both"


# ------------------------------------------------------------------------------------------------------------- stages


def _check_shorthands(file: ExperimentFile) -> Iterator[Finding]:
    if file.teacher is None or file.teacher == []:
        if not teaches(file.method):
            if file.distill is not None:
                yield ("distill",), "there is no teacher to distil from", ADD_TEACHER
            yield from check_need(("losses",), file.losses or [], "this experiment")
    given = file.teacher if isinstance(file.teacher, list) else [file.teacher] if file.teacher else []
    yield from check_inherit(("student",), file.student, given, "this experiment")
    single = isinstance(file.teacher, TeacherSpec)
    made = [s.name or ("teacher" if single else f"teacher-{i + 1}") for i, s in enumerate(given) if s.train]
    names = Counter([*made, "student"])
    for name in [name for name, count in names.items() if count > 1]:
        yield ("teacher",), f"two stages would be called '{name}'", "give each teacher another name"
    yield from check_several(("losses",), file.losses or [], ("ensemble",), file.ensemble, len(given))
    if file.losses == []:
        yield ("losses",), "there is no term to train with", "leave `losses` out for the default"
    if file.train.early_stop is not None and file.data.val_fraction == 0:
        yield ("train", "early_stop"), "early stopping needs a validation split", "set data.val_fraction"
    if file.train.epochs == 0 and not _has_weights(file.student):
        yield ("train", "epochs"), "a student without weights has to be trained", _UNTRAINED
    for index, stage in enumerate(file.compress):
        if isinstance(stage, TrainStage) and stage.kind != "finetune":
            message = "a stage of `compress` has a kind: prune, low_rank, finetune, quantize or export"
            yield ("compress", index, "kind"), message, "{kind: finetune, epochs: 5} trains again, with the teacher"
    places: dict[KeyPath, TrainStage | OutputStage] = {("compress", i): s for i, s in enumerate(file.compress)}
    places |= {("export", i): s for i, s in enumerate(file.export)}
    names_before = [*made, "student"]
    for path, stage in places.items():
        yield from _check_name(path, stage, names_before)
        names_before = [*names_before, *_own_name(stage)]
    yield from _check_products(file, places, [*made, "student"])


def _check_products(
    file: ExperimentFile, places: Mapping[KeyPath, TrainStage | OutputStage], earlier: list[str]
) -> Iterator[Finding]:
    """Stages of compression, in order, after stages of these names, which have made models."""
    for path, stage in places.items():
        if isinstance(stage, TrainStage):
            yield from _check_finetune(file, path, stage, earlier)
        elif stage.start != "previous" and stage.start not in earlier:
            yield _unknown_stage((*path, "from"), stage.start, earlier)
        earlier = [*earlier, *(_own_name(stage) if kind_makes_model(stage.kind) else [])]


def kind_makes_model(kind: Any) -> bool:
    """Whether a stage of compression of this kind makes a model; false where there is no such kind."""
    if kind == "finetune":
        return True
    try:
        return registry.signature(registry.find("compressors", kind)).attributes.get("makes") == "model"
    except (KdctlError, TypeError):
        return False


def _own_name(stage: TrainStage | OutputStage) -> list[str]:
    """The name that a file gives a stage, if any."""
    return [stage.name] if "name" in stage.model_fields_set and stage.name else []


def _check_name(path: KeyPath, stage: TrainStage | OutputStage, earlier: list[str]) -> Iterator[Finding]:
    for name in _own_name(stage) if stage.kind != "train" else [stage.name]:
        if name in earlier:
            yield (*path, "name"), f"two stages are called '{name}'", "each stage has a name of its own"


def _check_finetune(file: ExperimentFile, path: KeyPath, stage: TrainStage, earlier: list[str]) -> Iterator[Finding]:
    if "role" in stage.model_fields_set:
        yield (*path, "role"), "a finetune has no role of its own", "remove it"
    if "student" in stage.model_fields_set:
        hint = f"remove it; from: names the stage, one of {', '.join(earlier)}"
        yield (*path, "student"), "a finetune trains the model that a stage has made, and no other", hint
    if stage.start == "fresh":
        yield (*path, "from"), "a finetune starts from the model of a stage", f"one of {', '.join(earlier)}"
    if stage.epochs == 0:
        yield (*path, "epochs"), "a finetune of no epochs does nothing", "epochs: 5"
    if stage.early_stop is not None and file.data.val_fraction == 0:
        yield (*path, "early_stop"), "early stopping needs a validation split", "set data.val_fraction"
    yield from check_losses((*path, "losses"), stage.losses)
    for place, spec in teachers_of((*path, "teacher"), stage.teacher):
        yield from _check_teacher(place, spec, True)
    for place, name in _references(path, stage, stage.teacher):
        if name not in earlier:
            yield _unknown_stage(place, name, earlier)
    if "teacher" in stage.model_fields_set and not stage.teacher:
        yield from check_need((*path, "losses"), stage.losses, "this finetune")


def _has_weights(student: ModelSpec) -> bool:
    return student.weights is not None or student.stage is not None


def _unknown_stage(path: KeyPath, name: str, earlier: list[str]) -> Finding:
    allowed = ", ".join(earlier) if earlier else "none, this is the first"
    message = f"there is no earlier stage '{name}' with a model to take; there are: {allowed}"
    return path, message, did_you_mean(name, earlier)


def _check_stages(file: ExperimentFile, stages: Sequence[TrainStage | OutputStage]) -> Iterator[Finding]:
    for key in ("compress", "export"):
        if getattr(file, key):
            yield (key,), f"with `stages:`, `{key}` is a stage", "move its stages to the end of `stages`"
    if not any(isinstance(stage, TrainStage) for stage in stages):
        yield ("stages",), "no stage trains", "the first stage is {kind: train, name: student}"
    names: list[str] = []
    trained: list[str] = []
    models: list[str] = []
    for index, stage in enumerate(stages):
        path: KeyPath = ("stages", index)
        yield from _check_name(path, stage, names)
        names = [*names, *(_own_name(stage) if stage.kind != "train" else [stage.name])]
        if isinstance(stage, TrainStage) and stage.kind == "train":
            compressed = stage.role == "compressed"
            yield from _check_train_stage(file, path, stage, models if compressed else trained)
            if compressed and ("start" not in stage.model_fields_set or stage.start == "fresh"):
                yield (*path, "from"), "what was compressed starts from the model of a stage", "from: its name"
            models, trained = [*models, stage.name], [*trained, *([] if compressed else [stage.name])]
            continue
        if not any(isinstance(s, TrainStage) and s.kind == "train" and s.role == "student" for s in stages[:index]):
            yield path, "there is no student yet to compress", "a stage {kind: train, name: student} comes first"
        yield from _check_products(file, {path: stage}, models)
        models = [*models, *(_own_name(stage) if kind_makes_model(stage.kind) else [])]
    yield from _check_used(file, [s for s in stages if isinstance(s, TrainStage) and s.kind == "train"])


def _check_train_stage(file: ExperimentFile, path: KeyPath, stage: TrainStage, earlier: list[str]) -> Iterator[Finding]:
    own_teacher = "teacher" in stage.model_fields_set
    taken = stage.teacher if own_teacher or stage.role == "teacher" else file.teacher
    if own_teacher:
        for place, spec in teachers_of((*path, "teacher"), stage.teacher):
            yield from _check_teacher(place, spec, True)
    if stage.student is not None:
        yield from _check_normalize((*path, "student"), stage.student)
    elif stage.role == "teacher" and not isinstance(file.teacher, TeacherSpec):
        yield path, "a stage with `role: teacher` needs the model that it trains", "add student: {kind: ...}"
    for place, name in _references(path, stage, taken if stage.role != "teacher" or own_teacher else None):
        if name not in earlier:
            yield _unknown_stage(place, name, earlier)
    epochs = stage.epochs if "epochs" in stage.model_fields_set else file.train.epochs
    starts = stage.start == "fresh" or ("start" not in stage.model_fields_set and not earlier)
    if stage.role != "teacher" and (starts or stage.student is not None):
        own = (*path, "student") if stage.student is not None else ("student",)
        teachers = [spec for _, spec in teachers_of((), taken)]
        start = None if starts or "start" not in stage.model_fields_set else stage.start
        yield from check_inherit(own, stage.student or file.student, teachers, f"stage '{stage.name}'", start)
    if epochs == 0 and starts and not _has_weights(stage.student or file.student):
        yield (*path, "epochs"), "a student without weights has to be trained", _UNTRAINED
    yield from check_losses((*path, "losses"), stage.losses)
    losses, place = stage.losses, (*path, "losses")
    method, ensemble = (
        getattr(stage if name in stage.model_fields_set or stage.role == "teacher" else file, name)
        for name in ("method", "ensemble")
    )
    if "losses" not in stage.model_fields_set and stage.role != "teacher":
        losses, place = file.losses or [], ("losses",)
        if file.distill is not None and not taken and not teaches(method):
            yield ("distill",), f"stage '{stage.name}' has no teacher to distil from", None
    if "losses" in stage.model_fields_set and not stage.losses:
        yield place, "there is no term to train with", "leave `losses` out for the default"
    if not taken and not teaches(method):
        yield from check_need(place, losses, f"stage '{stage.name}'")
    given = taken if isinstance(taken, list) else [taken] if taken else []
    own = (*path, "ensemble") if "ensemble" in stage.model_fields_set else ("ensemble",)
    yield from check_several(place, losses, own, ensemble, len(given))
    early_stop = stage.early_stop if "early_stop" in stage.model_fields_set else file.train.early_stop
    if early_stop is not None and file.data.val_fraction == 0:
        yield (*path, "early_stop"), "early stopping needs a validation split", "set data.val_fraction"


def _references(path: KeyPath, stage: TrainStage, teachers: Any) -> Iterator[tuple[KeyPath, str]]:
    if stage.start not in ("previous", "fresh"):
        yield (*path, "from"), stage.start
    if stage.student is not None and stage.student.stage is not None:
        yield (*path, "student", "from"), stage.student.stage
    for place, spec in teachers_of((*path, "teacher"), teachers):
        if spec.stage is not None:
            yield (*place, "from"), spec.stage


def _check_used(file: ExperimentFile, stages: Sequence[TrainStage]) -> Iterator[Finding]:
    """Values of the experiment that no stage takes, since each sets its own."""
    learners = [stage for stage in stages if stage.role != "teacher"]
    if file.frozen is not None and all("frozen" in s.model_fields_set for s in stages if s.role == "student"):
        yield _unused(("frozen",), "frozen", stages)
    for key in ("optimizer", "schedule", "method", "ensemble", "balance", "losses", "distill", "teacher"):
        takers = stages if key in ("optimizer", "schedule") else learners
        own = "losses" if key == "distill" else key
        if getattr(file, key) is not None and all(own in stage.model_fields_set for stage in takers):
            yield _unused((key,), own, stages)
    for key in sorted(file.train.model_fields_set & set(Keeping.model_fields)):
        if all(key in stage.model_fields_set for stage in stages):
            yield _unused(("train", key), key, stages)


def _unused(path: KeyPath, own: str, stages: Sequence[TrainStage]) -> Finding:
    name = stages[-1].name if stages else "student"
    return path, f"this has no effect: every stage has its own {own}", f"set stages.{name}.{own}"
