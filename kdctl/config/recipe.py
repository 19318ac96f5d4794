"""Further stages for a run that is there: from a recipe file's `compress:` list, or from command-line options."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdctl.config.check import check
from kdctl.config.expand import expand
from kdctl.config.overrides import load_document
from kdctl.config.schema import Experiment, OutputStage
from kdctl.config.yaml_io import Document, Origin, read_file
from kdctl.errors import ConfigError, Problem


def read_recipe(path: Path) -> Document:
    """A recipe: a file whose one key, `compress`, is a list of stages. Raises ConfigError for anything else."""
    recipe = read_file(path)
    if set(recipe.data) != {"compress"} or not isinstance(recipe.data["compress"], list) or not recipe.data["compress"]:
        hint = "compress: [{kind: quantize, dtype: int8}]"
        raise ConfigError(Problem("a recipe has one key, `compress`, with a list of stages", str(path), 1, hint=hint))
    return recipe


def stage_of_options(**arguments: Any) -> Document:
    """The recipe of one stage that options of the command line describe."""
    return Document({"compress": [arguments]}, {(): Origin("command line", None, "override")})


def with_stages(config: Path, overrides: Sequence[str], recipe: Document) -> tuple[Experiment, list[OutputStage]]:
    """A run's experiment, and the recipe's stages checked and completed as if its file had named them."""
    document = load_document(config, overrides)
    stages = document.data.setdefault("stages", [])
    first = len(stages)
    for path, origin in recipe.origins.items():
        if len(path) > 1:
            document.origins["stages", first + int(path[1]), *path[2:]] = origin
    stages += recipe.data["compress"]
    experiment = expand(check(document, require_files=False))
    return experiment, [s for s in experiment.stages[first:] if isinstance(s, OutputStage)]
