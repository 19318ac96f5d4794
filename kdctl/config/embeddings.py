"""What a file may not ask for where a model gives embeddings of texts: these have no classes, and learn no labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kdctl import registry
from kdctl.config.schema import ExperimentFile, LossSpec, TeacherSpec, TrainStage
from kdctl.config.yaml_io import KeyPath
from kdctl.errors import KdctlError

_ON_EMBEDDINGS = "terms on features, such as {kind: cosine, weight: 1, taps: [bert.pooler]}, or pkt, rkd, hidden_mse"


def check_embedding(
    file: ExperimentFile, teachers: Sequence[tuple[KeyPath, TeacherSpec]]
) -> Iterator[tuple[KeyPath, str, str | None]]:
    """Path, message and hint of what needs labels, classes or logits in a file whose models give embeddings."""
    stages = [(i, stage) for i, stage in enumerate(file.stages or []) if isinstance(stage, TrainStage)]
    places: list[tuple[KeyPath, Sequence[LossSpec]]] = [(("losses",), file.losses or [])]
    places += [(("stages", index, "losses"), stage.losses) for index, stage in stages]
    untold = file.losses is None and not all(stage.losses for _, stage in stages)
    if file.distill is not None:
        yield ("distill",), f"`distill` softens a softmax over classes, and {file.task.kind} has none", _ON_EMBEDDINGS
    elif untold or (file.losses is None and file.stages is None):
        yield ("losses",), f"{file.task.kind} has no loss of its own, and no terms are given", _ON_EMBEDDINGS
    for path, losses in places:
        for index, loss in enumerate(losses):
            if not _fits(loss):
                message = f"'{loss.kind}' looks at labels or logits, and {file.task.kind} has embeddings alone"
                yield (*path, index), message, _ON_EMBEDDINGS
    for path, spec in teachers:
        if spec.train is not None:
            message = f"{file.task.kind} learns from a teacher, so this one cannot be trained here"
            yield (*path, "train"), message, "weights: a folder of a sentence encoder, or a run"
        if spec.classes is not None:
            yield (*path, "classes"), "embeddings have no classes", "leave it out"
    if file.teacher_cache is not None and file.teacher_cache.top_k is not None:
        yield ("teacher_cache", "top_k"), "top_k keeps the largest logits, and embeddings are no logits", "leave it out"


def _fits(loss: LossSpec) -> bool:
    """Whether a term looks at features alone. A kind that there is not is told elsewhere."""
    try:
        links = registry.signature(registry.find("losses", loss.kind)).attributes.get("links")
    except KdctlError:
        return True
    return links is None or "embedding" in links
