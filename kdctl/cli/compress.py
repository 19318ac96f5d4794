"""`kdctl compress`: quantises a run's student, re-loads it from disk, measures it again and says what it gained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from kdctl import runs
from kdctl.cli import console
from kdctl.cli.verb import Argument, ExperimentOptions, Option, Reply
from kdctl.errors import MissingError, UsageError


def compress(
    options: ExperimentOptions,
    run: Annotated[str, Argument(help="a run directory, or latest")] = "latest",
    quantize: Annotated[str | None, Option("--quantize", help="int8")] = None,
    recipe: Annotated[str | None, Option("--recipe", help="a YAML file with a `compress:` list of stages")] = None,
    max_drop: Annotated[float | None, Option("--max-drop", min=0, help="gate: most points that may be lost")] = None,
    min_speedup: Annotated[
        float | None, Option("--min-speedup", min=0, help="gate: speed-up over fp32 in the same runtime, batch 1")
    ] = None,
) -> Reply:
    """Make a run's student smaller and faster, and prove what it costs."""
    found = runs.find(run)
    if not (found / "student.safetensors").is_file():
        raise MissingError(f"{found} has no finished student yet", hint=f"`kdctl resume {found}` continues it")
    if (quantize is None) == (recipe is None):
        raise UsageError("name one of --quantize and --recipe", hint="kdctl compress --quantize int8")
    from kdctl.config import recipe as recipes

    gates = {name: v for name, v in (("max_drop", max_drop), ("min_speedup", min_speedup)) if v is not None}
    if recipe is not None:
        wanted = recipes.read_recipe(Path(recipe))
        last = wanted.data["compress"][-1]
        if isinstance(last, dict):  # anything else is refused with the rest of the recipe
            last.update(gates)
    else:
        wanted = recipes.stage_of_options(kind="quantize", dtype=quantize, **gates)
    experiment, stages = recipes.with_stages(found.config, options.overrides, wanted)
    console.say("loading torch ...")
    from kdctl import artefacts, pipeline

    documents = [pipeline.compress(found, experiment, stage) for stage in stages]
    missed = [error for error in map(artefacts.check_gates, documents) if error is not None]
    document = documents[-1] if len(documents) == 1 else documents[-1] | {"stages": documents}
    return Reply(document, show, missed[0] if missed else None)


def show(document: dict[str, Any]) -> None:
    """fp32 in PyTorch, fp32 in the same runtime, and the artefact, side by side; then gates and reasons."""
    columns = [document[name] for name in ("before", "same_runtime", "after")]
    metric = next(iter(columns[0]["metrics"]))
    rows = [
        ["bytes", *(f"{c['bytes']:,}" for c in columns)],
        [f"{metric} on {document['split']}", *(f"{c['metrics'][metric]:.2f}" for c in columns)],
        ["latency, batch 1 (ms)", *(f"{c['latency_ms']['1']:.3f}" for c in columns)],
        ["latency, batch 32 (ms)", *(f"{c['latency_ms']['32']:.3f}" for c in columns)],
    ]
    console.print_table(["", "fp32, PyTorch", f"fp32, {document['runtime'].split()[0]}", document["variant"]], rows)
    same, after = document["same_runtime"], document["after"]
    smaller = document["before"]["bytes"] / after["bytes"]
    faster = same["cpu_ms"]["1"] / after["cpu_ms"]["1"]
    console.out(f"{smaller:.2f}x smaller than fp32, {faster:.2f}x as fast as fp32 in the same runtime at batch 1")
    console.out(f"agreement with the fp32 student {document['agreement']:.2f} %; {document['threads']} thread(s)")
    for gate in document["gates"]:
        verdict = "passed" if gate["passed"] else "missed"
        console.out(f"gate {gate['name']}: {gate['value']:.3f}, limit {gate['limit']:g}: {verdict}")
    for note in document["notes"]:
        console.out(f"note: {note}")
    console.out(f"artefact {document['artefact']}")
