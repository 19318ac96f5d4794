"""Further stages for a run that is there: from a recipe file's `compress:` list, or from command-line options."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdctl.config.check import check
from kdctl.config.consistency import kind_makes_model
from kdctl.config.dump import dump_plain, plain
from kdctl.config.expand import expand, makes_model
from kdctl.config.overrides import load_document
from kdctl.config.schema import Experiment, Gates, OutputStage, TrainStage
from kdctl.config.yaml_io import Document, Origin, read_file
from kdctl.errors import ConfigError, Problem

Stage = TrainStage | OutputStage


@dataclass(frozen=True)
class Extended:
    """A run's experiment with further stages.

    experiment: the whole, overrides applied. names: of the stages that were asked for, in order. known: of the stages
    that the run has had and keeps. waiting: of those that are to be run; a stage that makes a model and is there
    already, equal but for its gates, is not run again. sources: of each stage that the run has had those whose models
    it was made of.
    """

    experiment: Experiment
    names: list[str]
    known: list[str]
    waiting: list[str]
    sources: Mapping[str, set[str]]
    stored: Mapping[str, Any]
    added: Mapping[str, Any]

    @property
    def config(self) -> str:
        """The run's config.yaml with the new stages."""
        return self.config_of(self.added)

    def config_of(self, names: Collection[str]) -> str:
        """The run's config.yaml with some of the new stages, after those it had that stay as they are then."""
        chosen = {name: stage for name, stage in self.added.items() if name in names}
        left = self.untouched(names)
        stored = [stage for stage in self.stored["stages"] if stage.get("name", "student") in left]
        stages = [chosen.pop(stage.get("name"), stage) for stage in stored]
        return dump_plain({**self.stored, "stages": [*stages, *chosen.values()]})

    def untouched(self, names: Collection[str]) -> list[str]:
        """The stages that the run has had and that stay as they are where only new ones of these names are run."""
        return _untouched(self.sources, set(names) & set(self.waiting))


def read_recipe(path: Path) -> Document:
    """A recipe: a file whose one key, `compress`, is a list of stages. Raises ConfigError for anything else."""
    recipe = read_file(path)
    if set(recipe.data) != {"compress"} or not isinstance(recipe.data["compress"], list) or not recipe.data["compress"]:
        hint = "compress: [{kind: quantize, dtype: int8}]"
        raise ConfigError(Problem("a recipe has one key, `compress`, with a list of stages", str(path), 1, hint=hint))
    return recipe


def recipe_of_options(stages: Sequence[Mapping[str, Any]]) -> Document:
    """The recipe of the stages that options of the command line describe."""
    return Document({"compress": [dict(stage) for stage in stages]}, {(): Origin("command line", None, "override")})


def with_stages(config: Path, overrides: Sequence[str], recipe: Document) -> Extended:
    """A run's experiment with the recipe's stages, checked and completed as if its file had named them.

    A stage of the recipe that is named like one of the run takes its place. Raises ConfigError.
    """
    stored = read_file(config).data
    document = load_document(config, overrides)
    stages = document.data.setdefault("stages", [])
    before = expand(check(copy.deepcopy(document), require_files=False))
    _refuse_training(recipe)
    named = {s["name"] for s in recipe.data["compress"] if isinstance(s, dict) and isinstance(s.get("name"), str)}
    stages[:] = _without(stages, named)
    first = len(stages)
    if not any(len(path) > 1 for path in recipe.origins):  # of options, which have no places in a file
        document.origins |= {("stages", first + i): recipe.origins[()] for i in range(len(recipe.data["compress"]))}
    for path, origin in recipe.origins.items():
        if len(path) > 1:
            document.origins["stages", first + int(path[1]), *path[2:]] = origin
    stages += _from_student(recipe.data["compress"], before.student_stage.name)
    whole = expand(check(document, require_files=False))
    old = {stage.name: stage for stage in before.stages}
    kept, same = list(whole.stages[:first]), {s.name: s.name for s in whole.stages[:first]}
    names: list[str] = []
    waiting: list[str] = []
    added: dict[str, Any] = {}
    for stage in whole.stages[first:]:
        stage = _renamed(stage, same)
        alike = (s for s in old.values() if _content(s) == _content(stage))
        twin = None if _sources(stage) & set(waiting) else next(alike, None)
        same[stage.name] = stage.name if twin is None else twin.name
        stage = stage.model_copy(update={"name": same[stage.name]})
        there = any(s.name == stage.name for s in kept)
        kept = [stage if s.name == stage.name else s for s in kept] + ([] if there else [stage])
        names.append(stage.name)
        if twin is None or not makes_model(stage):
            waiting.append(stage.name)
        added[stage.name] = _relative(plain(stage), config.absolute().parent)
    sources = {stage.name: _sources(stage) for stage in before.stages}
    left, taken = _untouched(sources, set(waiting)), {s.name for s in kept}
    kept = [s for s in kept if s.name in left or s.name in names]
    kept += [old[name] for name in left if name not in taken]  # it goes back to what turned out to be there already
    known = [name for name in old if name in left or name in names]
    return Extended(whole.model_copy(update={"stages": kept}), names, known, waiting, sources, stored, added)


def _refuse_training(recipe: Document) -> None:
    for index, stage in enumerate(recipe.data["compress"]):
        if not isinstance(stage, dict) or stage.get("kind", "train") == "train":
            origin = recipe.origin(("compress", index))
            hint = "{kind: finetune, epochs: 5} trains again, with the teacher"
            message = "a stage of a recipe has a kind: prune, low_rank, finetune, quantize or export"
            file, line = (origin.file, origin.line) if origin else (recipe.main or None, None)
            raise ConfigError(Problem(message, file, line, f"compress.{index}", hint))


def _sources(stage: Stage) -> set[str]:
    """The stages whose models a stage takes."""
    teachers = stage.teachers if isinstance(stage, TrainStage) else []
    return {stage.start, *(t.stage for t in teachers if t.stage)} - {"fresh"}


def _untouched(sources: Mapping[str, set[str]], replaced: set[str]) -> list[str]:
    """The stages that are neither replaced nor made of the model of one that is, in order."""
    gone = set(replaced)
    while more := {name for name, own in sources.items() if name not in gone and own & gone}:
        gone |= more
    return [name for name in sources if name not in gone]


def _without(stages: Sequence[Any], named: set[str]) -> list[Any]:
    """The stages but those of compression with these names, and what was made of their models."""
    gone, kept = set(named), []
    for stage in stages:
        compression = stage.get("kind", "train") != "train" or stage.get("role") == "compressed"
        if compression and (stage.get("name") in gone or stage.get("from") in gone):
            gone.add(stage.get("name"))
        else:
            kept.append(stage)
    return kept


def _from_student(stages: Sequence[Any], student: str) -> list[Any]:
    """The recipe's stages, those before its first model from the student, and not from what an earlier recipe made."""
    named, own = [], False
    for stage in stages:
        free = isinstance(stage, dict) and "from" not in stage and not own
        named.append({**stage, "from": student} if free else stage)
        own = own or (isinstance(stage, dict) and kind_makes_model(stage.get("kind")))
    return named


def _renamed(stage: Stage, same: Mapping[str, str]) -> Stage:
    """The stage, with the stages that it takes models from by the names they have in the run."""
    update: dict[str, Any] = {"start": same.get(stage.start, stage.start)}
    if isinstance(stage, TrainStage):
        teachers = [t.model_copy(update={"stage": same.get(t.stage or "", t.stage)}) for t in stage.teachers]
        if teachers:
            update["teacher"] = teachers if isinstance(stage.teacher, list) else teachers[0]
    return stage.model_copy(update=update)


def _content(stage: Stage) -> dict[str, Any]:
    """What a stage makes its model or file by: all but its name and its gates."""
    return {key: value for key, value in plain(stage).items() if key not in ("name", *Gates.model_fields)}


def _relative(value: Any, base: Path) -> Any:
    """The value with paths inside a folder relative to it, so that the folder can be moved."""
    if isinstance(value, dict):
        return {key: _relative(item, base) for key, item in value.items()}
    if isinstance(value, list):
        return [_relative(item, base) for item in value]
    start = f"{base}/"
    return f"./{value.removeprefix(start)}" if isinstance(value, str) and value.startswith(start) else value
