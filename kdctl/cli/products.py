"""How the artefacts of compress and export are shown: one table, then gates and reasons."""

from __future__ import annotations

from typing import Any

from kdctl.cli import console


def show(documents: list[dict[str, Any]]) -> None:
    """One row an artefact, against the student in fp32 in PyTorch (the first row) and in the artefact's runtime."""
    first = documents[0]
    metric = next(iter(first["before"]["metrics"]))
    head = [f"{first['split']} ({first['samples']:,})", "runtime", metric, "agree", "bytes", "parameters", "MACs"]
    head += ["ms, 1", "ms, 32", "x eager", "x fp32"]
    rows = [["fp32 student", "torch", *_row(first["before"], metric, None), "1.00", "1.00"]]
    for document in documents:
        before, same, after = (document[name] for name in ("before", "same_runtime", "after"))
        gains = [f"{column['cpu_ms']['1'] / after['cpu_ms']['1']:.2f}" for column in (before, same)]
        runtime = " ".join(document["runtime"].split()[:2])
        rows.append([document["variant"], runtime, *_row(after, metric, document["agreement"]), *gains])
    console.print_table(head, rows)
    console.out(
        f"agree: % of samples decided as the fp32 student does; ms: median of a call at batch 1 and 32, "
        f"{first['threads']} thread; x: process time at batch 1 against fp32 in PyTorch and in the same runtime"
    )
    for document in documents:
        _show_one(document)


def _row(column: dict[str, Any], metric: str, agreement: float | None) -> list[str]:
    return [
        f"{column['metrics'][metric]:.2f}",
        "-" if agreement is None else f"{agreement:.2f}",
        f"{column['bytes']:,}",
        f"{column['parameters']:,}",
        f"{column['macs']:,}",
        f"{column['latency_ms']['1']:.3f}",
        f"{column['latency_ms']['32']:.3f}",
    ]


def _show_one(document: dict[str, Any]) -> None:
    name, after, before = document["variant"], document["after"], document["before"]
    gain = before["bytes"] / after["bytes"]
    facts = [f"{gain:.2f}x smaller" if gain >= 1 else f"{1 / gain:.2f}x larger"]
    if document["max_abs_diff"] is not None:
        facts.append(f"largest difference {document['max_abs_diff']:.3g}")
    if document["delegated"] is not None:
        facts.append(f"{100 * document['delegated']:.0f} % of operators on the fast path")
    console.out(f"{name}: {', '.join(facts)}; {document['artefact']}")
    latency = document["details"].get("latency")
    if latency:
        last = latency["tried"][-1]
        told = f"predicted {last['predicted_ms']:.3f} ms, measured {last['measured_ms']:.3f} ms"
        console.out(f"{name}: in ONNX Runtime, batch 1, one thread: {told}, allowed {latency['wanted_ms']:g} ms")
    kept = document["details"].get("kept")
    if kept:
        console.out(f"{name}: kept in fp32: {', '.join(kept)}")
    for gate in document["gates"]:
        verdict = "passed" if gate["passed"] else "missed"
        console.out(f"{name}: gate {gate['name']}: {gate['value']:.3g}, limit {gate['limit']:g}: {verdict}")
    for note in document["notes"]:
        console.out(f"{name}: note: {note}")
