"""`kdctl export`: a run's student, or an artefact's model, as files of other runtimes, each run in its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from kdctl import registry, runs
from kdctl.cli import console, products
from kdctl.cli.compress import finished
from kdctl.cli.verb import Argument, ExperimentOptions, Option, Reply
from kdctl.errors import GateError, Interrupted, KdctlError, UsageError, did_you_mean

DTYPES = ("fp32", "int8", "int4", "fp16", "bf16")


def export(
    options: ExperimentOptions,
    what: Annotated[str, Argument(help="a run directory, an artefact of a run, or latest")] = "latest",
    to: Annotated[str, Option("--to", help="targets, as onnx,pt2: `kdctl list exporters`")] = "onnx",
    dtype: Annotated[str, Option("--dtype", help="fp32, int8, int4, fp16, bf16; several as fp32,int8")] = "fp32",
) -> Reply:
    """Write files for other runtimes, run each on real samples there, and compare it with the model."""
    targets, dtypes = _words(to, registry.catalogue("exporters"), "--to"), _words(dtype, DTYPES, "--dtype")
    run, start = _found(what)
    from kdctl.config.recipe import recipe_of_options, with_stages
    from kdctl.export.elsewhere import python_of

    recipes = [recipe_of_options([_stage(target, kind, start)]) for target in targets for kind in dtypes]
    all_of = [with_stages(run.config, options.overrides, recipe) for recipe in recipes]  # says what is wrong with any
    if len(targets) == 1:
        python_of(targets[0], converting=True)  # of several, what can be made is made
    console.say("loading torch ...")
    from kdctl import extension
    from kdctl.cli.progress import TextReporter

    documents: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    errors: list[KdctlError] = []
    reporter = TextReporter(options.quiet)
    with extension.yardstick(run, all_of[0].experiment, reporter) as measured:
        for recipe in recipes:
            more = with_stages(run.config, options.overrides, recipe)
            try:
                documents += extension.extend(run, more, reporter, measured)
            except Interrupted as stopped:
                return Reply({"run": stopped.run, "status": "interrupted"}, lambda _: None, stopped)
            except KdctlError as error:
                if len(recipes) == 1:
                    raise
                console.say(f"{more.names[0]}: {error}")
                target = recipe.data["compress"][0]["target"]
                failures.append({"target": target, "variant": more.names[0], "error": str(error)})
                errors.append(error)
    return Reply(_document(run, documents, failures), _show, _verdict(documents, errors))


def _words(text: str, allowed: Any, option: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if word not in allowed:
            raise UsageError(
                f"{option}: there is no '{word}'; allowed: {', '.join(allowed)}", hint=did_you_mean(word, allowed)
            )
    if not words:
        raise UsageError(f"{option} names nothing", hint=f"one or more of {', '.join(allowed)}")
    return list(dict.fromkeys(words))


def _found(what: str) -> tuple[runs.Run, str | None]:
    """The run, and the stage whose model is exported where an artefact is named: its own, or the one it was made of."""
    path = Path(what).resolve()
    if not (path / "manifest.json").is_file():
        return finished(what), None
    made = runs.read_json(path / "manifest.json")
    return finished(str(path.parent.parent)), path.name if made["target"] == "torch" else made["source"]


def _stage(target: str, dtype: str, start: str | None) -> dict[str, Any]:
    stage = (
        {"kind": "export", "target": target}
        if dtype == "fp32"
        else {"kind": "quantize", "target": target, "dtype": dtype}
    )
    return stage if start is None else stage | {"from": start}


def _document(run: runs.Run, documents: list[dict[str, Any]], failures: list[dict[str, Any]]) -> dict[str, Any]:
    artefacts = [
        {
            "target": d["target"], "variant": d["variant"], "path": d["artefact"], "bytes": d["after"]["bytes"],
            "runtime": d["runtime"], "max_abs_diff": d["max_abs_diff"], "agreement": d["agreement"],
            "samples": d["samples"], "metrics": d["after"]["metrics"], "latency_ms": d["after"]["latency_ms"],
            "delegated": d["delegated"],
        }
        for d in documents
    ]  # fmt: skip
    return {"run": str(run), "artefacts": artefacts, "failures": failures, "stages": documents}


def _show(document: dict[str, Any]) -> None:
    if document["stages"]:
        products.show(document["stages"])
        console.say("beside each file, manifest.json says what it takes and gives: shapes, layout, range, class names")
    for failure in document["failures"]:
        console.out(f"{failure['variant']}: failed: {failure['error']}")


def _verdict(documents: list[dict[str, Any]], errors: list[KdctlError]) -> KdctlError | None:
    """A missed gate, or one of several exports that failed."""
    from kdctl.artefacts.measure import check_gates

    if errors:
        return GateError(*[problem for error in errors for problem in error.problems])
    missed = [error for error in map(check_gates, documents) if error is not None]
    return missed[0] if missed else None
