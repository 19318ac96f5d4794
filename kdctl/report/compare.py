"""Runs, groups of seeds and artefacts side by side: a row each, what differs in their files, who is on the front.

Everything is read from run directories. A run that belongs to a group of several seeds stands for all of them; what is
in no file is None, never 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from kdctl import stats
from kdctl.config.dump import flat, plain
from kdctl.config.expand import load_experiment
from kdctl.config.schema import Experiment
from kdctl.errors import KdctlError
from kdctl.report.entries import Entry, find_entries, unique
from kdctl.report.facts import STUDENT, Document, RunFacts

COSTS = ("bytes", "latency_ms")
"""What quality is held against on a front."""
_TRAINING_ONLY = {
    "batch_size", "eval_batch_size", "augment", "strong_augment", "views", "augment_seed", "labels_per_class", "limit",
    "transfer", "expand", "workers", "root", "path", "download",
}  # fmt: skip
"""Keys of `data:` that change neither what is measured on nor how; where files lie is no matter."""


def compare(words: Sequence[str], baseline: str | None = None) -> Document:
    """The document of `kdctl compare`: rows, differences, same, pareto, notes.

    words: runs, artefacts or files of groups. baseline: what the others are held against; the first row when left out.
    Raises MissingError where one of them is not there.
    """
    notes: list[str] = []
    entries = [entry for word in words for entry in find_entries(word, notes)]
    reference = find_entries(baseline, notes)[0] if baseline else None
    entries = unique([*([reference] if reference else []), *entries])
    chosen = entries[0]
    configs = {entry.what: _experiment(entry, notes) for entry in entries}
    rows = [_row(entry, configs[entry.what]) for entry in entries]
    for entry, row in zip(entries, rows, strict=True):
        row["against_baseline"] = None if entry is chosen else _against(row, rows[0])
    alike = _comparable(rows, entries, configs, notes)
    for row in (row for row in rows if row not in alike):
        row["against_baseline"] = None  # a difference between numbers about other samples is none
    pareto = _fronts(rows, alike)
    differences, same = _differences(entries, configs)
    notes += _about_noise(rows)
    for row in rows:
        del row["scope"]
    return {
        "baseline": chosen.what, "rows": rows, "differences": differences, "same": same, "pareto": pareto,
        "notes": list(dict.fromkeys(notes)),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- rows


def _row(entry: Entry, experiment: Experiment | None) -> Document:
    """The numbers of one row; of several seeds their mean, and the interval of the metric."""
    if entry.artefact is None:
        parts = [(m, _of_run(m, experiment)) for m in entry.members]
    else:
        parts = [(m, _of_artefact(m, d)) for m, d in entry.documents()]
    metric = next((next(iter(p["metrics"])) for _, p in parts if p["metrics"]), None)
    values = {m.seed: p["metrics"][metric] for m, p in parts if p["metrics"].get(metric) is not None}
    first = parts[0][1] if parts else _of_run(entry.lead, experiment)
    means = ("agreement", "ece", "bytes", "parameters", "macs", "latency_ms", "epochs", "seconds")
    return {
        "what": entry.what,
        "kind": "artefact" if entry.artefact else "group" if len(entry.members) > 1 else "run",
        "runs": [str(m.run) for m, _ in parts],
        "student": first["student"],
        "method": _method(experiment),
        "runtime": first["runtime"],
        "seeds": len(values),
        "metric": metric,
        "split": first["split"],
        "samples": first["samples"],
        "value": stats.interval(list(values.values())).as_dict() if values else None,
        "values": {str(seed): value for seed, value in values.items()},
        **{name: _mean([p[name] for _, p in parts]) for name in means},
        "scope": entry.scope,
    }


def _of_run(facts: RunFacts, experiment: Experiment | None) -> Document:
    summary, cost = facts.summary, facts.cost_of(STUDENT)
    weights = facts.run / "student.safetensors"
    made_of: Document = next((d["before"] for d in facts.artefacts if d.get("before")), {})
    mine = [s.name for s in experiment.train_stages if s.role == "student"] if experiment else []
    spent = [s for name, s in (facts.info.get("seconds") or {}).items() if name in mine]
    measured, latency = facts.measured, _latency(cost.get("rows") or [])
    if latency is None:
        latency = made_of.get("latency_ms", {}).get("1")
    return {
        "student": cost["kind"] or (experiment.student.kind if experiment else None),
        "runtime": "torch",
        "split": facts.split if measured else None,
        "samples": facts.evaluation.get("samples"),
        "metrics": measured,
        "agreement": facts.agreement,
        "ece": measured.get("ece"),
        "bytes": weights.stat().st_size if weights.is_file() else cost.get("bytes"),
        "parameters": cost.get("parameters"),
        "macs": cost["macs"] if cost.get("macs") is not None else made_of.get("macs"),
        "latency_ms": latency,
        "epochs": summary.get("epochs"),
        "seconds": sum(spent) if spent else None,
    }


def _of_artefact(facts: RunFacts, document: Document) -> Document:
    after = document["after"]
    latency = _latency([row for row in facts.bench_rows if row.get("what") == document["variant"]])
    return {
        "student": facts.cost_of(STUDENT)["kind"],
        "runtime": " ".join(str(document.get("runtime", "")).split()[:2]) or None,
        "split": document.get("split"),
        "samples": document.get("samples"),
        "metrics": after.get("metrics") or {},
        "agreement": document.get("agreement_teacher"),
        "ece": (after.get("metrics") or {}).get("ece"),
        **{name: after.get(name) for name in ("bytes", "parameters", "macs")},
        "latency_ms": (after.get("latency_ms") or {}).get("1") if latency is None else latency,
        "epochs": None,
        "seconds": None,
    }


def _latency(rows: Sequence[Document]) -> float | None:
    """The median time of one image in ms, with as few threads as were measured."""
    single = [row for row in rows if row.get("batch") == 1 and row.get("p50_ms") is not None]
    return min(single, key=lambda row: row.get("threads") or 1)["p50_ms"] if single else None


def _mean(values: Sequence[float | None]) -> float | int | None:
    """The mean of those that are there; whole where all are the same whole number."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    return there[0] if len(set(there)) == 1 else stats.mean(there)


def _method(experiment: Experiment | None) -> str | None:
    """The method, where it is not the usual one, and the terms of the student's loss with their weights."""
    if experiment is None:
        return None
    stage = experiment.student_stage
    terms = []
    for term in stage.losses:
        weight = f"{term.weight:g}" if isinstance(term.weight, int | float) else str(term.weight)
        heat = term.arguments.get("temperature")
        terms.append(f"{weight} {term.label}" + (f" (T {heat:g})" if isinstance(heat, int | float) else ""))
    text = " + ".join(terms)
    return text if stage.method.kind == "distill" else f"{stage.method.kind}: {text}" if text else stage.method.kind


# ------------------------------------------------------------------------------------------------------- held together


def _against(row: Document, other: Document) -> Document | None:
    """Row minus other: seed by seed where both are of one group or run, else by Welch's test."""
    if not row["values"] or not other["values"] or row["metric"] != other["metric"]:
        return None
    common = [seed for seed in row["values"] if seed in other["values"]]
    if row["scope"] == other["scope"] and common:
        result = stats.paired([row["values"][s] for s in common], [other["values"][s] for s in common])
        return result.as_dict() | {"test": "paired"}
    return stats.welch(list(row["values"].values()), list(other["values"].values())).as_dict() | {"test": "welch"}


def _comparable(
    rows: list[Document], entries: list[Entry], configs: dict[str, Experiment | None], notes: list[str]
) -> list[Document]:
    """The rows that were measured on what the first measured row was; a note on each that was not."""
    known = [(row, entry) for row, entry in zip(rows, entries, strict=True) if row["values"]]
    if not known:
        return []
    (first, lead), alike = known[0], []
    for row, entry in known:
        why = _other_data(row, entry, configs[entry.what], first, lead, configs[lead.what])
        if why is None:
            alike.append(row)
        else:
            notes.append(f"{row['what']} does not compare with {first['what']}: {why}")
    processors = {str(m.read("bench.json")["processor"]) for e in entries for m in e.members if _has_processor(m)}
    if len(processors) > 1:
        notes.append(f"latencies were measured on different processors: {', '.join(sorted(processors))}")
    return alike


def _has_processor(facts: RunFacts) -> bool:
    return bool((facts.read("bench.json") or {}).get("processor"))


def _other_data(
    row: Document, entry: Entry, mine: Experiment | None, other: Document, lead: Entry, its: Experiment | None
) -> str | None:
    """Why two rows were not measured on the same samples by the same metric; None where they were."""
    for name in ("metric", "split", "samples"):
        if row[name] != other[name] and None not in (row[name], other[name]):
            return f"{name} {row[name]}, not {other[name]}"
    if mine is None or its is None:
        return None
    here, there = plain(mine.data), plain(its.data)
    unread = _TRAINING_ONLY if row["split"] == "val" else _TRAINING_ONLY | {"val_fraction", "split_seed"}
    for key in dict.fromkeys([*here, *there]):
        if key not in unread and here.get(key) != there.get(key):
            return f"data.{key} is {here.get(key)}, not {there.get(key)}"
    prints = [(e.lead.provenance.get("data") or {}).get("fingerprint") for e in (entry, lead)]
    split_alike = all(here.get(k) == there.get(k) for k in ("val_fraction", "split_seed", "transfer", "expand"))
    if all(prints) and split_alike and prints[0] != prints[1]:
        return "its data files are others: the fingerprints differ"
    return None


def _fronts(rows: list[Document], alike: list[Document]) -> dict[str, list[str]]:
    """For each cost the rows that no other beats in quality and cost at once; sets `pareto` of each row."""
    for row in rows:
        row["pareto"] = dict.fromkeys(COSTS)
    fronts = {}
    for cost in COSTS:
        placed = [row for row in alike if row[cost] is not None]
        for row in placed:
            row["pareto"][cost] = not any(_beats(other, row, cost) for other in placed)
        fronts[cost] = [row["what"] for row in placed if row["pareto"][cost]]
    return fronts


def _beats(row: Document, other: Document, cost: str) -> bool:
    """Whether a row is no worse than another in quality and cost, and better in one: over the seeds that both have,
    where they are of one group, for an artefact has a single one."""
    common = [seed for seed in row["values"] if seed in other["values"]] if row["scope"] == other["scope"] else []
    mine, its = (
        stats.interval([one["values"][seed] for seed in common]).mean if common else one["value"]["mean"]
        for one in (row, other)
    )
    return mine >= its and row[cost] <= other[cost] and (mine, row[cost]) != (its, other[cost])


def _about_noise(rows: list[Document]) -> list[str]:
    """What a single seed cannot tell."""
    if len(rows) < 2 or not any(row["seeds"] == 1 for row in rows):
        return []
    spread = [(row["value"]["std"], row["what"]) for row in rows if row["value"] and row["value"]["std"]]
    known = f", which here is about {2 * max(spread)[0]:.2f} points ({max(spread)[1]})" if spread else ""
    return [
        "a single seed: a difference between two trained models of up to about two standard deviations of seeds"
        f"{known} is noise; `kdctl train --seeds 5` shows the spread"
    ]


# ------------------------------------------------------------------------------------------------------ configurations


def _experiment(entry: Entry, notes: list[str]) -> Experiment | None:
    try:
        return load_experiment(entry.lead.run.config, require_files=False).experiment
    except KdctlError as error:
        notes.append(f"the configuration of {entry.lead.run} cannot be read: {error}")
        return None


def _differences(entries: list[Entry], configs: dict[str, Experiment | None]) -> tuple[list[Document], int]:
    """The keys whose values differ between the runs, with the value of each; and how many keys are the same."""
    flats: dict[str, dict[str, Any]] = {}
    shown = {m.run.path.resolve() for entry in entries if entry.artefact is None for m in entry.members}
    for entry in entries:
        experiment, home = configs[entry.what], entry.lead.run.path.resolve()
        if experiment is None or (entry.artefact is not None and home in shown):
            continue
        shown.add(home)
        flats[entry.what] = flat(plain(experiment))
        if len(entry.members) > 1:
            flats[entry.what]["train.seed"] = [m.seed for m in entry.members]
    keys = list(dict.fromkeys(itertools.chain.from_iterable(flats.values())))
    differing = [key for key in keys if _several([values.get(key) for values in flats.values()])]
    rows: list[Document] = []
    for key in differing:
        whole = _lacking(key, flats)
        if whole is None:
            rows.append({"key": key, "values": {what: values.get(key) for what, values in flats.items()}})
        elif whole not in [row["key"] for row in rows]:
            rows.append({"key": whole, "values": {what: _under(whole, values) for what, values in flats.items()}})
    return rows, len(keys) - len(differing)


def _several(values: list[Any]) -> bool:
    return any(value != values[0] for value in values[1:])


def _lacking(key: str, flats: dict[str, dict[str, Any]]) -> str | None:
    """The uppermost section around a key that some run lacks and all others have alike; None without such a one."""
    parts = key.split(".")
    for size in range(1, len(parts)):
        section = ".".join(parts[:size])
        found = [_under(section, values) for values in flats.values()]
        there = [values for values in found if values is not None]
        if len(there) < len(found):
            return None if _several(there) else section
    return None


def _under(section: str, values: dict[str, Any]) -> dict[str, Any] | None:
    """The keys of a section without its name; None where there are none."""
    start = section + "."
    return {key.removeprefix(start): value for key, value in values.items() if key.startswith(start)} or None
