"""Run directories with every file that a report reads, made of numbers from a seeded generator: nothing is trained."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdctl import runs, stats
from kdctl.runs import Run

CONTROLS = ("baseline", "equal_time", "label_smoothing", "random_teacher", "shuffled_labels", "self")
PLACEBOS = ("random_teacher", "shuffled_labels")
LEVEL = {"student": 97.0, "teacher": 99.0, "baseline": 91.0, "equal_time": 91.5, "label_smoothing": 92.0}
CLASSES = ["<b>bold</b>", "cat & dog", "1.5", *map(str, range(3, 10))]
"""Names that a page must not take for markup, nor a test for a number."""

CONFIG = """\
name: made
data:
  kind: digits
student:
  kind: digits_cnn
  width: 4
teacher:
  kind: digits_cnn
  width: 16
  train: {epochs: 6}
distill:
  T: 4
  alpha: 0.9
train:
  epochs: 6
"""


def write(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def make_run(
    root: Path, name: str = "made", role: str = "student", seed: int = 0, group: str | None = None,
    classes: Sequence[str] = CLASSES, status: str = "done", whole: bool = True,
) -> Run:  # fmt: skip
    """A finished run of this role (`student`, or a control), or one that is training; whole: with all analyses."""
    run = runs.create(
        name, CONFIG, CONFIG, stages=["teacher", "student"], seed=seed, root=root, group=group,
        role="main" if role == "student" else "control",
    )  # fmt: skip
    rng = random.Random(f"{name} {role} {seed}")
    taught = role == "student"
    stages = dict.fromkeys(["teacher", "student"] if taught else ["student"], "done")
    seconds = {stage: rng.uniform(3, 300) for stage in stages}
    run.update(
        control=None if taught else role, status=status, stages=stages, seconds=seconds,
        created=f"2026-01-02T03:04:{seed:02d}.000000+00:00", command=["/usr/bin/kdctl", "train", "a b.yaml", "--seeds"],
    )  # fmt: skip
    for stage in stages:
        for line in _lines(stage, rng, taught and stage == "student", half=status != "done"):
            run.append_metrics(line)
    if status == "done":
        _finish(run, role, rng, list(classes), whole)
    return run


def _lines(stage: str, rng: random.Random, taught: bool, half: bool) -> list[dict[str, Any]]:
    lines = []
    for epoch in range(1, 4 if half else 7):
        terms = {"supervised": 2.3 / epoch + rng.random() / 10}
        if taught:
            terms["kd"] = 30 / epoch**2 + rng.random()
        share = rng.uniform(0.1, 0.3)
        lines.append({
            "stage": stage, "epoch": epoch, "lr": 0.01 / epoch, "loss": sum(terms.values()), "terms": terms,
            "gradient_shares": {"supervised": share, "kd": 1 - share} if taught else {},
            "val": {"top1": 80 + 3 * epoch + rng.random(), "nll": 1 / epoch}, "best": True, "seconds": rng.random(),
            "eval_seconds": 0.01, "samples_per_second": rng.uniform(1000, 9000),
            "times": {name: rng.random() for name in ("data", "forward", "backward", *(["teacher"] if taught else []))},
        })  # fmt: skip
    return lines


def _finish(run: Run, role: str, rng: random.Random, classes: list[str], whole: bool) -> None:
    taught = role == "student"
    test = measured(rng, LEVEL.get(role, 91.0))
    teacher = measured(rng, LEVEL["teacher"]) if taught else None
    matrix = confusion(rng, len(classes), 0.9)
    per_class = [
        {"name": name, "samples": sum(row), "top1": 100 * row[i] / sum(row)}
        for i, (name, row) in enumerate(zip(classes, matrix, strict=True))
    ]
    pairs = [(matrix[i][j], i, j) for i in range(len(classes)) for j in range(len(classes)) if i != j and matrix[i][j]]
    write(run / "eval/test.json", {
        "samples": sum(map(sum, matrix)), "metrics": test, "per_class": per_class, "split": "test",
        "checkpoint": "best", "teacher": teacher, "agreement": 95.25 if taught else None,
        "notes": ["a note of <eval>"],
        "quality": {"student": quality(rng), "teacher": quality(rng) if taught else None},
        "fidelity": fidelity(rng) if taught else None,
        "confusion": {"student": matrix, "teacher": confusion(rng, len(classes), 0.97) if taught else None}
        if len(classes) <= 100 else None,
        "confused": [{"truth": classes[i], "chosen": classes[j], "samples": s} for s, i, j in sorted(pairs)[-10:]],
    })  # fmt: skip
    write(run / "summary.json", {
        "run": str(run.path), "status": "done", "epochs": 6, "seconds": 33.5, "samples_per_second": 4321.0,
        "precision": "fp32", "threads": 1,
        "student": {"kind": "digits_cnn", "parameters": 4370, "kept": "best",
                    "best": {"epoch": 5, "val": {"top1": 98.25}, "test": test}, "last": {"test": measured(rng, 90)}},
        "teacher": {"kind": "digits_cnn", "parameters": 65834, "test": teacher} if taught else None,
        "agreement": 95.25 if taught else None, "baseline": None, "group": run.info["group"], "notes": ["noted 0.125"],
    })  # fmt: skip
    for stage in run.info["stages"]:
        result = {"kept": "best", "best_epoch": 5, "epochs": 6, "finished": "all epochs done"}
        write(run / f"stages/{stage}/result.json", result | {"peak_bytes": 123456789, "energy_joules": None})
    (run / "student.safetensors").write_bytes(b"weights")
    if whole:
        _analyse(run, rng, taught)


def measured(rng: random.Random, level: float) -> dict[str, float]:
    return {
        "top1": level + rng.uniform(-1, 1),
        "top5": 99.5 + rng.random() / 2,
        "nll": rng.random(),
        "ece": rng.random(),
    }


def confusion(rng: random.Random, size: int, right: float) -> list[list[int]]:
    rows = [[0] * size for _ in range(size)]
    for i in range(size):
        for _ in range(40):
            rows[i][i if rng.random() < right else rng.randrange(size)] += 1
    return rows


def quality(rng: random.Random) -> dict[str, Any]:
    def scores() -> dict[str, float]:
        return {name: rng.random() for name in ("nll", "brier", "ece", "adaptive_ece")}

    def a_bin(i: int) -> dict[str, Any]:
        low, high = 100 * i / 15, 100 * (i + 1) / 15
        if i < 4:
            return {"low": low, "high": high, "samples": 0, "confidence": None, "accuracy": None}
        centre = (low + high) / 2
        return {
            "low": low,
            "high": high,
            "samples": 5 * i,
            "confidence": centre,
            "accuracy": centre - rng.uniform(0, 9),
        }

    groups = {name: {"classes": c, "samples": 40 * c, "top1": 80 + c} for name, c in (("many", 3), ("few", 7))}
    return scores() | {
        "temperature": 1 + rng.random(), "scaled": scores(), "reliability": [a_bin(i) for i in range(15)],
        "balanced_accuracy": 90 + rng.random(), "macro_f1": 90 + rng.random(),
        "worst_class": {"name": CLASSES[0], "top1": 80 + rng.random()}, "groups": groups,
    }  # fmt: skip


def fidelity(rng: random.Random) -> dict[str, float]:
    parts = [90 + rng.random(), 1 + rng.random(), 2 + rng.random()]
    names = ("both_right", "student_only", "teacher_only")
    return dict(zip(names, parts, strict=True)) | {
        "agreement": 95.25, "kl": rng.random(), "js": rng.random() / 2, "both_wrong": 100 - sum(parts),
        "same_wrong": rng.random(), "inherited_errors": 50 * rng.random(),
    }  # fmt: skip


def bench_row(rng: random.Random, what: str, batch: int) -> dict[str, Any]:
    return {
        "what": what, "runtime": "torch 2.13.0+cpu", "batch": batch, "threads": 1, "p50_ms": rng.random() * batch,
        "p95_ms": 2 * rng.random() * batch, "cpu_ms": rng.random(), "samples_per_second": 1e4 * rng.random(),
        "peak_bytes": rng.randrange(10**8, 10**9), "calls": 99,
    }  # fmt: skip


def _analyse(run: Run, rng: random.Random, taught: bool) -> None:
    corruptions = [("none", 0, 0.0)]
    corruptions += [(kind, s, s / 12) for kind in ("noise", "blur", "contrast") for s in range(1, 6)]
    rows = [
        {"corruption": kind, "severity": s, "level": level, "student": 97 - 8 * s * rng.random(),
         "teacher": 99 - 8 * s * rng.random() if taught else None}
        for kind, s, level in corruptions
    ]  # fmt: skip
    write(run / "analysis/robustness.json", {"split": "test", "samples": 400, "rows": rows})
    models = {
        who: {"kind": "digits_cnn", "parameters": p, "macs": 9 * p, "bytes": 4 * p + 1234,
              "rows": [bench_row(rng, who, batch) for batch in (1, 32)]}
        for who, p in (("student", 4370), ("teacher", 65834))
    }  # fmt: skip
    if not taught:
        models["teacher"] = None  # type: ignore[assignment]
    write(run / "analysis/cost.json", {
        "processor": "A Processor 3.5 GHz", "threads": 1, "models": models,
        "training": {"student_seconds": 30.25, "teacher_seconds": 99.75, "asking_seconds": 12.125,
                     "peak_bytes": 123456789, "energy_joules": None, "energy_source": "no meter can be read"},
        "break_even": {"inferences": 1234567, "saved_ms": 0.105, "text": "paid back after 1,234,567 images"},
    })  # fmt: skip
    write(run / "provenance.json", {
        "command": ["kdctl", "train", "x.yaml"], "config_sha256": "ab" * 32,
        "data": {"kind": "digits", "fingerprint": "cd" * 32, "samples": {"train": 1000, "val": 100, "test": 400}},
        "teachers": [{"kind": "digits_cnn", "weights": None, "sha256": "ef" * 32}],
        "student": {"kind": "digits_cnn", "sha256": "01" * 32},
    })  # fmt: skip
    if taught:
        cka = [[rng.random() for _ in range(4)] for _ in range(3)]
        layers = {
            "student_layers": ["layer1", "layer2", "head"],
            "teacher_layers": ["layer1", "layer2", "layer3", "fc"],
        }
        write(run / "analysis/cka.json", {"split": "test", "samples": 400, **layers, "cka": cka})
        _artefact(run, rng)


def _artefact(run: Run, rng: random.Random) -> None:
    def column(size: int) -> dict[str, Any]:
        return {
            "bytes": size, "parameters": 4370, "macs": 39330, "metrics": measured(rng, 96.0),
            "latency_ms": {"1": rng.random(), "32": 9 * rng.random()}, "cpu_ms": {"1": 0.5, "32": 9.5},
        }  # fmt: skip

    folder = run / "artefacts/int8"
    write(folder / "manifest.json", {"target": "onnx", "model": "model.onnx"})
    write(folder / "result.json", {
        "run": str(run.path), "variant": "int8", "artefact": str(folder), "kind": "quantize", "target": "onnx",
        "runtime": "onnxruntime 1.32.0", "threads": 1, "split": "test", "samples": 400, "before": column(18714),
        "same_runtime": column(20000), "after": column(6004), "agreement": 98.75, "agreement_teacher": 94.5,
        "gates": [{"name": "max_drop", "limit": 1.0, "value": 0.5, "passed": True}],
        "notes": ["int8: 3.12 times smaller"],
    })  # fmt: skip


def make_group(
    root: Path, seeds: int = 2, controls: Sequence[str] = CONTROLS, name: str = "made", **settings: Any
) -> tuple[list[Run], Path]:
    """A finished group of all these roles and seeds, and its file; the first run is the student of seed 0."""
    document = {"format": 1, "name": name, "source": CONFIG, "agents": [], "members": []}
    path = runs.create_group(name, document, root)
    place = f"groups/{path.name}"
    made: dict[tuple[str, int], Run] = {}
    for seed in range(seeds):
        for role in ("student", *controls):
            settings_of = settings if seed == 0 else settings | {"whole": False}
            made[role, seed] = make_run(root, name, role, seed, place, **settings_of)
    members = [
        {"role": "main" if role == "student" else "control", "control": None if role == "student" else role,
         "seed": seed, "run": run.path.name}
        for (role, seed), run in made.items()
    ]  # fmt: skip
    write(path, document | {"members": members, "result": _result(made, seeds, controls)})
    return list(made.values()), path


def _result(made: dict[tuple[str, int], Run], seeds: int, controls: Sequence[str]) -> dict[str, Any]:
    tests = {
        key: json.loads((run / "summary.json").read_text())["student"]["best"]["test"] for key, run in made.items()
    }
    rows = []
    for seed in range(seeds):
        row: dict[str, Any] = {"seed": seed, "run": made["student", seed].path.name, "baseline": None}
        row["student"] = {"test": tests["student", seed], "last": {}, "agreement": 95.25}
        of = {c: {"run": made[c, seed].path.name, "test": tests[c, seed], "agreement": 90.125} for c in controls}
        row["baseline"] = of.get("baseline")
        rows.append(row | {"controls": {name: one for name, one in of.items() if name != "baseline"}})

    def values(role: str, metric: str) -> list[float]:
        return [tests[role, seed][metric] for seed in range(seeds)]

    def gain(a: str, b: str, metric: str = "top1") -> dict[str, Any]:
        return stats.paired(values(a, metric), values(b, metric)).as_dict()

    def mean(role: str, metric: str = "top1") -> dict[str, Any]:
        return stats.interval(values(role, metric)).as_dict()

    metrics = {
        m: {"student": mean("student", m), "baseline": mean("baseline", m), "gain": gain("student", "baseline", m)}
        for m in ("top1", "top5", "nll", "ece")
    }  # fmt: skip
    others = {
        c: {"what": f"what {c} is", "placebo": c in PLACEBOS, "values": mean(c), "gain": gain("student", c),
            "against_baseline": gain(c, "baseline"), "verdict": f"{c}: no evidence, p = 0.375"}
        for c in controls if c != "baseline"
    }  # fmt: skip
    summary = {"metric": "top1", **metrics["top1"], "metrics": metrics, "controls": others}
    claim = stats.verdict(stats.paired(values("student", "top1"), values("baseline", "top1")))
    lead = json.loads((made["student", 0] / "summary.json").read_text())
    return lead | {
        "seeds": rows, "summary": summary, "verdict": claim, "statements": [claim, "no placebo gains more than 0.25"],
        "artefacts": [],
    }  # fmt: skip
