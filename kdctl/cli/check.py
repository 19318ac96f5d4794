"""`kdctl check`: every problem of an experiment at once, and the plan when there is none; built only with --deep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from kdctl import registry
from kdctl.cli import console
from kdctl.cli.verb import Argument, ExperimentOptions, Option, Reply
from kdctl.errors import ConfigError, KdctlError, MissingError, counted

if TYPE_CHECKING:
    from kdctl.config.expand import Loaded
    from kdctl.config.schema import Component, Experiment, ModelSpec, OutputStage, TrainStage


def check(
    options: ExperimentOptions,
    config: Annotated[str, Argument(help="The experiment file.")],
    deep: Annotated[bool, Option("--deep", help="Build it: shapes, terms, memory, time. Needs torch.")] = False,
) -> Reply:
    """Every problem of an experiment file at once, with file, line and key; where there is none, what would run.

    Needs no torch and writes nothing. With --deep it builds data, models and terms too and takes a few steps of every
    stage on throw-away models: shapes, taps, adapters, each term's value and share of the gradient, parameters, MACs,
    memory, the size of the store and the time to expect.
    """
    from kdctl.config.expand import load_experiment

    try:
        loaded = load_experiment(Path(config), options.overrides)
        planned = plan(loaded.experiment)
        if deep:
            planned["deep"] = _deep(loaded)
    except (ConfigError, MissingError) as error:
        return Reply({"errors": [], "plan": None}, _show_count(config, error), error)
    return Reply({"errors": [], "plan": planned}, _show)


def _deep(loaded: Loaded) -> dict[str, Any]:
    """What building the experiment shows. Raises what training would, with the place in the file."""
    from kdctl.cli.check_deep import needs
    from kdctl.loggers.base import build_loggers

    build_loggers(loaded.experiment)  # a library that is not there is told before torch is loaded
    console.say("loading torch ...")
    from kdctl.config.overrides import locating
    from kdctl.forecast import forecast

    with locating(loaded.document):
        found = forecast(loaded.experiment, console.say)
    return found | {"needs": needs(loaded.experiment)}


def plan(experiment: Experiment) -> dict[str, Any]:
    """What an experiment comes to: data, models and stages, as plain values."""
    data = experiment.data
    return {
        "name": experiment.name,
        "task": experiment.task.kind,
        "data": {
            "kind": data.kind,
            "batch_size": data.batch_size,
            "val_fraction": data.val_fraction,
            "labels_per_class": data.labels_per_class,
            "augment": [a.kind for a in data.augment],
            "strong_augment": [a.kind for a in data.strong_augment],
            "views": data.views,
            "expand": [_component(item) for item in data.expand],
        },
        "student": _model(experiment.student),
        "teacher": _teachers(experiment),
        "teacher_cache": None if experiment.teacher_cache is None else experiment.teacher_cache.model_dump(),
        "loggers": [_component(logger) for logger in experiment.loggers],
        "stages": [_stage(stage) for stage in experiment.stages],
    }


def _teachers(experiment: Experiment) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for stage in experiment.train_stages:
        found += [t for t in map(_model, stage.teachers) if t not in found]
    return found


def _model(spec: ModelSpec) -> dict[str, Any]:
    model = {"kind": spec.kind, "arguments": spec.arguments, "weights": spec.weights, "from": spec.stage}
    return model if spec.inherit is None else model | {"inherit": spec.inherit.model_dump()}


def _stage(stage: TrainStage | OutputStage) -> dict[str, Any]:
    from kdctl.config.schema import TrainStage

    if not isinstance(stage, TrainStage):
        return {"name": stage.name, "kind": stage.kind, "arguments": stage.arguments}
    return {
        "name": stage.name,
        "kind": stage.kind,
        "role": stage.role,
        "from": stage.start,
        "epochs": stage.epochs,
        "method": _component(stage.method),
        "ensemble": _component(stage.ensemble) if len(stage.teachers) > 1 else None,
        "balance": stage.balance,
        "losses": [
            {"kind": loss.kind, "name": loss.label, "weight": loss.weight, "arguments": loss.arguments}
            for loss in stage.losses
        ],
        "optimizer": _component(stage.optimizer),
        "schedule": _component(stage.schedule),
    }


def _component(component: Component) -> dict[str, Any]:
    return {"kind": component.kind, "arguments": component.arguments}


def _show_count(config: str, error: KdctlError) -> Callable[[dict[str, Any]], None]:
    count = len(error.problems)
    return lambda _: console.say(f"{config}: {count} problem{'s' * (count != 1)}")


def _show(document: dict[str, Any]) -> None:
    plan = document["plan"]
    data = plan["data"]
    known = data["labels_per_class"]
    labels = "every label" if known == "all" else f"{counted(known, 'label')} a class"
    augment = ", ".join(data["augment"]) or "no augmentation"
    if data["strong_augment"]:
        augment += f"; beside it {', '.join(data['strong_augment'])}"
    further = "".join(f", + {item['arguments'].get('count', '')} {item['kind']}" for item in data["expand"])
    lines = [
        ("valid", f"{plan['name']} ({plan['task']})"),
        ("data", f"{registry.shown_kind(data['kind'])}, batch {data['batch_size']}, {labels}, {augment}{further}"),
        ("student", _model_text(plan["student"])),
        *(("teacher", _model_text(teacher)) for teacher in plan["teacher"]),
        *([("store", _store_text(plan))] if plan["teacher_cache"] else []),
        *(("logger", logger["kind"] + _arguments_text(logger["arguments"])) for logger in plan["loggers"]),
        *((f"stage {i}", _stage_text(stage)) for i, stage in enumerate(plan["stages"], 1)),
    ]
    for label, text in lines:
        console.out(f"{label:<9}{text}")
    if "deep" in plan:
        from kdctl.cli.check_deep import show

        show(plan["deep"])


def _model_text(model: dict[str, Any]) -> str:
    origin = f" from {model['weights']}" if model["weights"] else ""
    origin += f" from stage {model['from']}" if model["from"] else ""
    if "inherit" in model:
        parts = "embeddings" if model["inherit"]["parts"] == "embeddings" else "weights"
        source = model["inherit"]["source"]
        origin += f" with {parts} of {'the teacher' if source == 'teacher' else source}"
    return _component_text(model) + origin


def _store_text(plan: dict[str, Any]) -> str:
    store, views = plan["teacher_cache"], plan["data"]["views"]
    kept = {"both": "logits and features"}.get(store["store"], store["store"])
    filled = "filled while training" if store["fill"] == "lazy" else "filled before training"
    return f"{kept} of the teacher in {store['dtype']}, views {views}, {filled}; `kdctl cache show` says what it costs"


def _stage_text(stage: dict[str, Any]) -> str:
    if "epochs" not in stage:
        return f"{stage['name']}: {_component_text(stage)}"
    losses = " + ".join(_weight_text(loss["weight"]) + _component_text(loss) for loss in stage["losses"])
    method, ensemble = stage["method"], stage["ensemble"]
    if method["kind"] != "distill":
        losses = f"{_component_text(method)}: {losses}"
    if ensemble is not None:
        losses += f", teachers by {_component_text(ensemble)}"
    if stage["balance"] != "none":
        losses += ", balanced"
    rate = stage["optimizer"]["arguments"].get("lr")
    optimizer = stage["optimizer"]["kind"] + ("" if rate is None else f" (lr {rate:g})")
    return f"{stage['name']}: {counted(stage['epochs'], 'epoch')}, {losses}, {optimizer}, {stage['schedule']['kind']}"


def _component_text(component: dict[str, Any]) -> str:
    return registry.shown_kind(component["kind"]) + _arguments_text(component["arguments"])


def _weight_text(weight: Any) -> str:
    if isinstance(weight, dict):
        return "{" + ", ".join(f"{epoch}: {value:g}" for epoch, value in weight.items()) + "} x "
    return "" if weight == 1 else f"{weight:g} x "


def _arguments_text(arguments: dict[str, Any]) -> str:
    """The arguments that say something at a glance: neither off nor a list."""
    shown = [k if v is True else f"{k} {v}" for k, v in arguments.items() if v and not isinstance(v, list | dict)]
    return f" ({', '.join(shown)})" if shown else ""
