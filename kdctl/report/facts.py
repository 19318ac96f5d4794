"""What run directories say: one reader of their files, each of which may be absent. No torch, no numpy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from kdctl import runs
from kdctl.config.expand import load_experiment
from kdctl.errors import KdctlError, MissingError
from kdctl.runs import Run

Document = dict[str, Any]

STUDENT = "student"
BASELINE = "baseline"
ANALYSES = ("cka", "robustness", "cost")


class RunFacts:
    """The files of one run, read when they are asked for. What is absent is None or empty; what is damaged is noted."""

    def __init__(self, run: Run, notes: list[str] | None = None) -> None:
        self.run = run
        self.notes = [] if notes is None else notes
        self.read = cache(self._read)
        self.info: Document = run.info

    def _read(self, name: str) -> Any:
        path = self.run / name
        if not path.exists():
            return None
        try:
            document = runs.read_json(path)
        except MissingError as error:
            self.notes.append(str(error))
            return None
        if not isinstance(document, dict):
            self.notes.append(f"{path}: the file is damaged: it holds no map")
            return None
        return document

    @property
    def name(self) -> str:
        """`student`, or the name of the control that the run is."""
        return STUDENT if self.info["role"] == "main" else str(self.info.get("control") or BASELINE)

    @property
    def seed(self) -> int:
        return int(self.info.get("seed", 0))

    @cached_property
    def taught(self) -> bool:
        """Whether a stage of the student had a teacher, be it not the last one."""
        if self.summary.get("teacher"):
            return True
        try:
            stages = load_experiment(self.run.config, require_files=False).experiment.train_stages
        except KdctlError:
            return False
        return any(stage.teachers for stage in stages if stage.role == "student")

    @property
    def done(self) -> bool:
        return self.info["status"] == "done"

    @property
    def summary(self) -> Document:
        return self.read("summary.json") or {}

    @property
    def split(self) -> str:
        """The split that the summary measures: test, or what stands in for it."""
        best = self.summary.get("student", {}).get("best", {})
        return next((key for key in best if key not in ("epoch", "val")), "val" if "val" in best else "test")

    @property
    def measured(self) -> Document:
        """Metrics of the student on that split, best checkpoint."""
        return self.summary.get("student", {}).get("best", {}).get(self.split, {})

    @property
    def agreement(self) -> float | None:
        """Percent of samples decided as the teacher does: of a control, as the teacher of its group's student does,
        which stands in the finished group's file. Its own teacher is a placebo, or none."""
        if self.name == STUDENT:
            return self.summary.get("agreement")
        document = (self.read(f"../{self.info['group']}") if _group_path(self) else None) or {}
        rows = [row for row in (document.get("result") or {}).get("seeds", []) if row["seed"] == self.seed]
        found = [
            row.get(BASELINE) if self.name == BASELINE else (row.get("controls") or {}).get(self.name) for row in rows
        ]
        return next((one.get("agreement") for one in found if one), None)

    @property
    def evaluation(self) -> Document:
        return self.read(f"eval/{self.split}.json") or {}

    def analysis(self, name: str) -> Document:
        return self.read(f"analysis/{name}.json") or {}

    @property
    def of_texts(self) -> bool:
        """Whether the student reads texts, not images."""
        return bool((self.read("student.json") or {}).get("tokens"))

    @property
    def lacking(self) -> list[str]:
        """The analyses that are not there, damaged, older than the student, or made while the teacher was away; layers
        are compared where there is a teacher, and corruptions are of images."""
        weights = self.run / "student.safetensors"
        if not weights.is_file():
            return []
        unfit = {"cka": not self.summary.get("teacher"), "robustness": self.of_texts}
        wanted = [name for name in ANALYSES if not unfit.get(name)]
        paths = {name: self.run / "analysis" / f"{name}.json" for name in wanted}
        made = weights.stat().st_mtime_ns
        old = [name for name, path in paths.items() if not self.analysis(name) or path.stat().st_mtime_ns < made]
        models = self.analysis("cost").get("models") or {}
        whole = "cost" in old or not self.summary.get("teacher") or models.get("teacher")
        return old if whole else [*old, "cost"]

    @property
    def config_text(self) -> str:
        return self.run.config.read_text(encoding="utf-8")

    @property
    def environment(self) -> Document:
        return self.read("env.json") or {}

    @property
    def provenance(self) -> Document:
        return self.read("provenance.json") or {}

    @property
    def bench_rows(self) -> list[Document]:
        return (self.read("bench.json") or {}).get("rows", [])

    @cached_property
    def artefacts(self) -> list[Document]:
        """The documents of the finished artefacts, by name."""
        documents = [self.read(str((path / "result.json").relative_to(self.run.path))) for path in self.run.artefacts]
        return [document for document in documents if document and "after" in document]

    @cached_property
    def lines(self) -> list[Document]:
        """The lines of metrics.jsonl; the last one may be half written while the run is training."""
        path, lines = self.run / "metrics.jsonl", []
        for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
        return lines

    def stage_lines(self, stage: str) -> list[Document]:
        return [line for line in self.lines if line.get("stage") == stage]

    @property
    def trained_stages(self) -> list[str]:
        """The stages of which there is an epoch, in their order."""
        return list(dict.fromkeys(str(line.get("stage")) for line in self.lines))

    def stage_result(self, stage: str) -> Document:
        return self.read(f"stages/{stage}/result.json") or {}

    def cost_of(self, who: str) -> Document:
        """parameters, macs, bytes and rows (latencies) of student or teacher, as far as they were measured."""
        known = dict((self.analysis("cost").get("models") or {}).get(who) or {})
        rows = [row for row in self.bench_rows if row.get("what") == who]
        if rows:
            known = {name: rows[0].get(name) for name in ("bytes", "parameters", "macs")} | known
            known["rows"] = known.get("rows") or rows
        model = self.summary.get(who) or {}
        return {"kind": model.get("kind"), "parameters": model.get("parameters")} | known


@dataclass(frozen=True)
class Facts:
    """A run to report, all runs of its group, and other runs to compare it with."""

    lead: RunFacts
    members: list[RunFacts]
    """All runs of the group that there are, the lead among them; the lead alone without a group."""
    group: Document | None = None
    """The file of the group: members and, once all are done, result."""
    others: list[RunFacts] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def result(self) -> Document:
        """The document of the group, once it is whole."""
        return (self.group or {}).get("result") or {}

    @property
    def primary(self) -> str:
        """The metric that the summary is about."""
        known = self.result.get("summary", {}).get("metric")
        return known or next(iter(self.lead.measured), "top1")

    @property
    def seeds(self) -> list[Document]:
        return self.result.get("seeds", [])

    @property
    def unfinished(self) -> bool:
        """Whether there is a group that is not summed up yet, be it at work or interrupted."""
        return self.group is not None and not self.result

    @property
    def training(self) -> bool:
        """Whether something is still to come: a run at work, or members of the group that have not begun."""
        statuses = {member.info["status"] for member in self.members}
        if "running" in statuses:
            return True
        return self.unfinished and statuses <= {"done"}

    def control(self, name: str = BASELINE) -> RunFacts | None:
        """The control of this name with the lead's seed, once it is measured."""
        fitting = [m for m in self.members if m.name == name and m.seed == self.lead.seed and m.summary]
        return fitting[0] if fitting else None

    def intervals(self, metric: str, who: str) -> Document | None:
        """Mean and interval over the seeds of `student`, `baseline` or (for the gain) `gain`."""
        summary = self.result.get("summary", {})
        known = summary.get("metrics", {}).get(metric, {}).get(who)
        return known or (summary.get(who) if metric == summary.get("metric") else None)


def collect(given: Sequence[Run], keep: bool = False) -> Facts:
    """The facts of the first run and its group; the other runs, without those of the same group, to compare with.

    Of a group whose control was named, the report is about its first student; keep: about the control all the same.
    """
    notes: list[str] = []
    first = RunFacts(given[0], notes)
    path = _group_path(first)
    group = _group_document(path, notes)
    members = _members(first, group, path, notes)
    lead = first
    if first.name != STUDENT and not keep:
        lead = next((member for member in members if member.name == STUDENT), first)
    mine = {member.run.path.resolve() for member in members}
    others = [RunFacts(run, notes) for run in given[1:] if run.path.resolve() not in mine]
    return Facts(lead, members, group, others, notes)


def _group_path(run: RunFacts) -> Path | None:
    name = run.info.get("group")
    path = run.run.path.parent / name if name else None
    return path if path is not None and path.is_file() else None


def _group_document(path: Path | None, notes: list[str]) -> Document | None:
    if path is None:
        return None
    try:
        return runs.read_json(path)
    except MissingError as error:
        notes.append(str(error))
        return None


def _members(first: RunFacts, group: Document | None, path: Path | None, notes: list[str]) -> list[RunFacts]:
    found, gone = [first], []
    for member in (group or {}).get("members", []):
        assert path is not None
        place = path.parent.parent / str(member.get("run"))
        if member.get("run") is None or place.resolve() == first.run.path.resolve():
            continue
        if not runs.is_run(place):
            gone.append(str(member["run"]))
            continue
        try:
            found.append(RunFacts(Run(place), notes))
        except KdctlError as error:
            notes.append(str(error))
    if gone:
        notes.append(f"runs of the group that are not there any more: {', '.join(gone)}")
    return sorted(found, key=lambda m: (m.name != STUDENT, m.name, m.seed))
