"""`kdctl compress`: makes a run's student smaller and faster in stages, re-loads what they made, and measures it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from kdctl import runs
from kdctl.cli import console, products
from kdctl.cli.verb import Argument, ExperimentOptions, Option, Reply
from kdctl.errors import Interrupted, KdctlError, MissingError, UsageError


def compress(
    options: ExperimentOptions,
    run: Annotated[str, Argument(help="a run directory, or latest")] = "latest",
    quantize: Annotated[str | None, Option("--quantize", help="int8, int4, fp16 or bf16")] = None,
    prune: Annotated[
        float | None, Option("--prune", min=0, max=1, help="share of the multiply-accumulates to remove")
    ] = None,
    low_rank: Annotated[
        float | None, Option("--low-rank", min=0, max=1, help="share of the layers' parameters that stays")
    ] = None,
    finetune: Annotated[
        int | None, Option("--finetune", min=1, help="epochs of training with the teacher, before --quantize")
    ] = None,
    latency_target: Annotated[
        float | None, Option("--latency-target", min=0, help="prune to this many ms an image in ONNX Runtime, measured")
    ] = None,
    recipe: Annotated[str | None, Option("--recipe", help="a YAML file with a `compress:` list of stages")] = None,
    max_drop: Annotated[float | None, Option("--max-drop", min=0, help="gate: most points that may be lost")] = None,
    min_speedup: Annotated[
        float | None, Option("--min-speedup", min=0, help="gate: speed-up over fp32 in the same runtime, batch 1")
    ] = None,
) -> Reply:
    """Make a run's student smaller and faster, and prove what it costs."""
    from kdctl.config import recipe as recipes

    stages: list[dict[str, Any]] = []
    if prune is not None and latency_target is not None:
        raise UsageError("--prune and --latency-target are two budgets of one stage", hint="name one of them")
    if prune is not None:
        stages.append({"kind": "prune", "ratio": float(prune)})
    if latency_target is not None:
        stages.append({"kind": "prune", "latency_ms": float(latency_target)})
    if low_rank is not None:
        stages.append({"kind": "low_rank", "keep_ratio": float(low_rank)})
    if finetune is not None:
        stages.append({"kind": "finetune", "epochs": finetune})
    if quantize is not None:
        stages.append({"kind": "quantize", "dtype": quantize})
    if bool(stages) == (recipe is not None):
        what = "--recipe or stages (--quantize, --prune, --low-rank, --finetune, --latency-target), not both"
        raise UsageError(f"name {what}" if stages else f"name {what.removesuffix(', not both')}",
                         hint="kdctl compress --quantize int8")  # fmt: skip
    wanted = recipes.recipe_of_options(stages) if recipe is None else recipes.read_recipe(Path(recipe))
    gates = {name: v for name, v in (("max_drop", max_drop), ("min_speedup", min_speedup)) if v is not None}
    last = wanted.data["compress"][-1]
    if isinstance(last, dict):  # anything else is refused with the rest of the recipe
        last.update(gates)
    return extend(options, finished(run), wanted)


def finished(run: str) -> runs.Run:
    """The run that is meant, with its student. Raises MissingError."""
    found = runs.find(run)
    if not (found / "student.safetensors").is_file():
        raise MissingError(f"{found} has no finished student yet", hint=f"`kdctl resume {found}` continues it")
    return found


def extend(options: ExperimentOptions, run: runs.Run, recipe: Any) -> Reply:
    """Runs a recipe's stages on a run; the last one's document, with those of all, and the error of a missed gate."""
    from kdctl.config.recipe import with_stages

    more = with_stages(run.config, options.overrides, recipe)
    console.say("loading torch ...")
    from kdctl import extension
    from kdctl.artefacts.measure import check_gates
    from kdctl.cli.progress import TextReporter

    try:
        documents = extension.extend(run, more, TextReporter(options.quiet))
    except Interrupted as stopped:
        return Reply({"run": stopped.run, "status": "interrupted"}, lambda _: None, stopped)
    missed: list[KdctlError] = [error for error in map(check_gates, documents) if error is not None]
    document = documents[-1] | {"stages": documents}
    return Reply(document, lambda shown: products.show(shown["stages"]), missed[0] if missed else None)
