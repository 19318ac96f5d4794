"""Models as an experiment asks for them: built, with their weights, and refused where they cannot fit the data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kdctl import registry
from kdctl.assembly.published import WITH_ANOTHER, check_pooling, check_tokenizer
from kdctl.assembly.translated import as_read
from kdctl.config.schema import ModelSpec, Normalize, TeacherSpec, TrainStage
from kdctl.data.prepare import Data
from kdctl.errors import ConfigError, MissingError, Problem, counted
from kdctl.models import record as records
from kdctl.models.record import Model, ModelRecord
from kdctl.models.weights import load_weights
from kdctl.runs import holds_model
from kdctl.signals import IGNORE, TokenInput, find_logits

_GIVEN = {
    "sample": "an answer a sample",
    "token": "an answer a token",
    "vocabulary": "tokens",
    "embedding": "embeddings of texts",
}
IMAGENET = Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])


def seed_everything(seed: int, *names: str) -> None:
    """Seeds torch from the run's seed and what is drawn next, so that one part's draws never shift another's."""
    digest = hashlib.sha256("/".join([str(seed), *names]).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def build_model(spec: ModelSpec, data: Data, key: str, stage_file: Callable[[str], Path] | None = None) -> Model:
    """A model of the given kind for this data, with its weights loaded where the spec names some.

    key: the model in the file, such as `student`. stage_file gives the stem of the model that an earlier stage made.
    Raises ConfigError where class counts, channels or names cannot match, MissingError where weights are not there.
    """
    with _under(key):
        path = spec.tokenizer if isinstance(spec, TeacherSpec) else None
        if path is not None:
            data, translated = as_read(data, Path(path).expanduser())
        model = _build(spec, data, key, stage_file)
        model.record = replace(model.record, link=_link(data))
        check_fits(model.record, data, key)
    return model if path is None else translated(model)


@contextmanager
def _under(key: str) -> Iterator[None]:
    """Puts the model before the key of a problem with its kind, its weights, their names or normalisation."""
    try:
        yield
    except (ConfigError, MissingError) as error:
        own = ("weights", "mapping", "normalize", "kind", "tokenizer")
        inside = [p.key is not None and p.key.partition(".")[0] in own for p in error.problems]
        raise type(error)(
            *(replace(p, key=f"{key}.{p.key}") if i else p for p, i in zip(error.problems, inside, strict=True))
        ) from error


def _build(spec: ModelSpec, data: Data, key: str, stage_file: Callable[[str], Path] | None) -> Model:
    own_classes = spec.classes if isinstance(spec, TeacherSpec) else None
    check_pooling(spec, data)
    if own_classes is not None:
        model = _load_other_classes(spec, own_classes, data, key, stage_file)
    elif spec.stage is not None and stage_file is not None:
        model = records.load_model(stage_file(spec.stage))
        _check_classes(model.record, data, key)
    elif spec.weights and holds_model(spec.weights):
        model = records.load_model(Path(spec.weights))
        _check_record(spec, model.record, data, key)
        _check_classes(model.record, data, key)
    else:
        model = records.build_model(_record(spec, data))
        _begin_at_shares(model, data)
        if spec.weights:
            check_tokenizer(spec, data)
            load_weights(model.net, "pretrained" if spec.weights == "pretrained" else Path(spec.weights), spec.mapping)
    return model


@torch.no_grad()
def _begin_at_shares(model: Model, data: Data) -> None:
    """Of a new net with a sigmoid a class, the last bias begins at the log-odds of the share of samples that have it.

    Begun at a half, rare classes drive all features in one direction first, out of which a small net may not come
    (Lin et al., Focal Loss, ICCV 2017, section 3.3). A net whose last bias is not one a class stays as it is.
    """
    if _link(data) != "sigmoid":
        return
    known = data.train.targets[(data.train.targets != IGNORE).all(1)]
    bias = next((p for n, p in reversed(list(model.net.named_parameters())) if n.endswith("bias")), None)
    if bias is not None and bias.shape == (model.record.num_classes,) and len(known):
        shares = (known.sum(0) + 1) / (len(known) + 2)
        bias.copy_(shares.logit())


def _load_other_classes(
    spec: ModelSpec, classes: str | list[str], data: Data, key: str, stage_file: Callable[[str], Path] | None
) -> Model:
    """A teacher whose classes are not those of the data, or stand in another order: its logits are put in order.

    classes: the names of its classes in its own order; `by_name` takes those that its record holds. Raises ConfigError
    where they cannot be told, or none of them is a class of the data.
    """
    key = f"{key}.classes"
    if spec.stage is not None and stage_file is not None:
        model = records.load_model(stage_file(spec.stage))
    elif spec.weights and holds_model(spec.weights):
        model = records.load_model(Path(spec.weights))
        _check_record(spec, model.record, data, key.removesuffix(".classes"))
    elif isinstance(classes, str):
        hint = "list the teacher's class names in its own order"
        raise ConfigError(Problem("these weights have no record of their class names", key=key, hint=hint))
    else:
        model = records.build_model(replace(_record(spec, data), num_classes=len(classes), class_names=list(classes)))
        if spec.weights:
            check_tokenizer(spec, data)
            load_weights(model.net, "pretrained" if spec.weights == "pretrained" else Path(spec.weights), spec.mapping)
    names = model.record.class_names if isinstance(classes, str) else classes
    if len(names) != model.record.num_classes:
        message = f"{counted(len(names), 'name')} for the {model.record.num_classes} classes of the teacher"
        raise ConfigError(Problem(message, key=key))
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(Problem(f"two classes of the teacher are called '{twice}'", key=key))
    order = [names.index(name) if name in names else -1 for name in data.class_names]
    if max(order) < 0:
        message = f"no class of the teacher ({names[0]}, ...) is one of the data ({data.class_names[0]}, ...)"
        raise ConfigError(Problem(message, key=key, hint="name the teacher's classes as the data do, in its order"))
    same = order == list(range(len(names)))
    model.record = replace(model.record, class_names=list(names), class_order=None if same else order)
    return model


def _link(data: Data) -> str:
    """How logits become what the data's targets are: Task.link."""
    if data.head == "embedding":
        return "embedding"
    targets = data.whole.targets
    if targets.is_floating_point():
        return "identity"
    return "sigmoid" if targets.ndim == 2 else "softmax"


def _record(spec: ModelSpec, data: Data) -> ModelRecord:
    names = [] if data.head == "embedding" else list(data.class_names)
    if data.tokens is not None:
        return ModelRecord(
            spec.kind, spec.arguments, len(names), names, image_shape=[], tokens=data.tokens, head=data.head
        )
    return ModelRecord(
        kind=spec.kind,
        arguments=spec.arguments,
        num_classes=len(names),
        class_names=names,
        image_shape=list(data.input_shape),
        normalize=_normalize(spec, data),
        input_size=spec.input_size,
    )


def _normalize(spec: ModelSpec, data: Data) -> dict[str, list[float]] | None:
    """Mean and deviation of the channels, as a spec asks for them; None without."""
    channels = data.input_shape[0]
    if spec.normalize == "imagenet" and channels != 3:
        grey = "normalize: {mean: [0.449], std: [0.226]}, the means of the three"
        message = f"imagenet's statistics are of 3 channels, and the images have {channels}"
        raise ConfigError(
            Problem(message, key="normalize", hint=f"write {grey if channels == 1 else 'normalize: data'}")
        )
    if spec.normalize == "none":
        return None
    if spec.normalize == "data":
        return {"mean": list(data.mean), "std": list(data.std)}
    chosen = IMAGENET if spec.normalize == "imagenet" else spec.normalize
    return {"mean": list(chosen.mean), "std": list(chosen.std)}


def build_teachers(stage: TrainStage, data: Data, seed: int, stage_file: Callable[[str], Path]) -> list[Model]:
    """The teachers of a stage; a declared control without weights is the same random net whenever it is built."""
    seed_everything(seed, stage.name, "teacher")
    several = len(stage.teachers) > 1
    models = [
        build_model(spec, data, f"teacher.{number}" if several else "teacher", stage_file)
        for number, spec in enumerate(stage.teachers)
    ]
    if several and data.head == "embedding":
        _check_widths(models)
    return models


@torch.no_grad()
def _check_widths(models: Sequence[Model]) -> None:
    """Refuses teachers whose embeddings have unlike numbers of dimensions: several teach by the mean of them."""
    widths = [find_logits(model.eval()(model.record.example(1))).shape[-1] for model in models]
    at = next((number for number, width in enumerate(widths) if width != widths[0]), None)
    if at is not None:
        message = f"its embeddings have {widths[at]} dimensions, those of teacher 0 have {widths[0]}"
        hint = "several teachers teach by the mean of their embeddings: name teachers of one width, or a single one"
        raise ConfigError(Problem(message, key=f"teacher.{at}", hint=hint))


def _check_record(spec: ModelSpec, record: ModelRecord, data: Data, key: str) -> None:
    """Refuses a spec that asks for something else than the record beside its weights says."""
    asked = _record(spec, data)
    kind, own = registry.canonical("models", spec.kind), record.kind
    if registry.is_file_kind(kind) and registry.is_file_kind(own):  # the record names its copy of the user's file
        kind, own = kind.rpartition(":")[2], own.rpartition(":")[2]
    pairs: dict[str, tuple[Any, Any]] = {"kind": (kind, own)}
    pairs |= {name: (value, record.arguments.get(name, value)) for name, value in spec.arguments.items()}
    if spec.normalize != "data":
        pairs["normalize"] = (asked.normalize, record.normalize)
    if spec.input_size is not None:
        pairs["input_size"] = (spec.input_size, record.input_size)
    problems = [
        Problem(f"got {got!r}, but {spec.weights} holds {has!r}", key=f"{key}.{name}", hint="leave it out, or agree")
        for name, (got, has) in pairs.items()
        if got != has
    ]
    if problems:
        raise ConfigError(*problems)


def _check_classes(record: ModelRecord, data: Data, key: str) -> None:
    """Refuses a model whose classes stand in another order than the data's: every label would mean something else."""
    names = record.answers
    if len(names) != len(data.class_names):
        return
    pairs = enumerate(zip(names, data.class_names, strict=True))
    at = next((i for i, (own, wanted) in pairs if own not in (wanted, None)), None)
    if at is None:
        return
    message = f"class {at} of the model is '{names[at]}', of the data '{data.class_names[at]}'"
    raise ConfigError(Problem(message, key=key, hint="name weights that were trained on these classes in this order"))


def check_fits(record: ModelRecord, data: Data, key: str) -> None:
    """Refuses a model for other inputs or another number of classes than the data have."""
    if record.head != data.head:
        message = f"the model gives {_GIVEN[record.head]}, and the task asks for {_GIVEN[data.head]}"
        raise ConfigError(Problem(message, key=key, hint="name weights that were trained on this task"))
    if record.num_logits != len(data.class_names) and data.head != "embedding":
        message = f"the model has {counted(record.num_logits, 'class')}, the data {len(data.class_names)}"
        raise ConfigError(Problem(message, key=key, hint="name weights that were trained on these classes"))
    if record.tokens != data.tokens:
        _refuse_tokens(record.tokens, data.tokens, key)
    elif record.tokens is None and record.image_shape[0] != data.input_shape[0]:
        message = f"the model takes {record.image_shape[0]} channels, the data have {data.input_shape[0]}"
        raise ConfigError(Problem(message, key=key))


def _refuse_tokens(own: TokenInput | None, there: TokenInput | None, key: str) -> None:
    """Raises ConfigError for a model of other texts than the data's: its numbers would mean something else."""
    if own is None or there is None:
        kinds = ["images" if tokens is None else "texts" for tokens in (own, there)]
        raise ConfigError(Problem(f"the model takes {kinds[0]}, the data are {kinds[1]}", key=key))
    if own.tokenizer != there.tokenizer:
        hint = "name the tokenizer that the model was trained with as data.tokenizer"
        if key.startswith("teacher"):
            hint += f"; {WITH_ANOTHER}"
        raise ConfigError(Problem("the model's texts were made into numbers by another tokenizer", key=key, hint=hint))
    if own.length < there.length:
        message = f"the model takes texts of {own.length} tokens, the data's have up to {there.length}"
        raise ConfigError(Problem(message, key=key, hint=f"data.max_length: {own.length}"))


def check_teacher(top1: float, chance: float, spec: TeacherSpec) -> None:
    """Refuses a teacher that is no better than chance, unless it is declared a control."""
    if top1 <= chance and not spec.control:
        message = f"the teacher is no better than chance: {top1:.1f} against {chance:.1f} percent"
        hint = "check its weights, `normalize` and class order; a deliberate control says `control: true`"
        raise ConfigError(Problem(message, key="teacher", hint=hint))


@torch.no_grad()
def check_causal(model: Model, key: str) -> None:
    """Refuses a model that sees the tokens which it is asked about: its answers before a token change with it."""
    tokens = model.record.tokens
    if tokens is None:
        return
    text = model.record.example(1)
    other = text.clone()
    other[0, -1] = next(n for n in range(tokens.vocab_size) if n not in (tokens.pad, int(text[0, -1])))
    training = {module: module.training for module in model.modules()}
    try:
        said = [find_logits(model.eval()(given))[:, :-1] for given in (text, other)]
    finally:
        for module, mode in training.items():
            module.training = mode
    if not isinstance(said[0], torch.Tensor) or said[0].shape != said[1].shape:
        return  # which the task refuses
    if float((said[0] - said[1]).abs().max()) > 1e-5 * float(said[0].abs().max()):
        message = f"{model.record.kind} sees later tokens, so that the next one is no question to it"
        hint = "a decoder, such as kind: gpt; or task: {kind: masked_lm}"
        raise ConfigError(Problem(message, key=key, hint=hint))
