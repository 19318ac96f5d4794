"""Makes the table of methods on CIFAR-100: each against the student alone and against tuned kd, seed by seed.

    python scripts/results_methods.py --data cifar100.npz --weights FOLDER --epochs 10 --seeds 5 --jobs 2
    python scripts/results_methods.py --table

Teacher: the pretrained ResNet-56 (cifar100_resnet56.pth in FOLDER); student: ResNet-8; the terms and weights of
configs/methods/small/<method>.yaml, which are the published ones. The settings of kd are chosen on the validation split
with a seed that the table does not use. Several teachers: ResNet-56, ResNet-20 (cifar100_resnet20.pth) and a third one
that is trained here. Works in --work (run directories, the store of teacher outputs), appends each result to
docs/results/methods.json as it comes and goes on where it stopped. --jobs: commands at a time; --device: cpu or cuda.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kdctl.stats import interval, paired  # noqa: E402

SMALL = ROOT / "configs" / "methods" / "small"
NOT_COMPARED = {"data_free_mnist", "supervised", "kd", "ca_mkd", "multi_teacher"}
"""Configs of other data, those that are run as controls, and those that need several teachers."""
TUNING_SEED = 100
GRID = [(temperature, weight) for temperature in (2.0, 4.0, 8.0) for weight in (0.9, 2.0, 9.0)]
"""Temperature and weight of kd beside ce x 0.1, to choose from."""
RATES = {"mlld": 0.025, "semckd": 0.02}
"""Rates of the methods that the common one does not train: mlld's published one; semckd diverges at its own."""
EXTRA_EPOCHS = {"ab": 1, "fitnet_then_kd": 1, "fsp": 1, "progressive": 3}
"""Epochs that the student of a staged method trains before its last stage: taken off that one."""
SLOW = ("crd", "kdsvd", "mlld", "wkd_logit", "nst", "semckd")
"""Methods that are started last, so that a stop before the end costs few others."""
ENSEMBLES = ("mean_logits", "mean", "ebkd", "ca_mkd", "aekd", "best")


@dataclass(frozen=True)
class Job:
    """One command: what it is called in the results, its file and its overrides."""

    name: str
    config: str
    overrides: list[str] = field(default_factory=list)
    seeds: int = 1
    first_seed: int = 0


class Table:
    """The results: a JSON document that grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.document: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"results": {}}

    @property
    def results(self) -> dict[str, Any]:
        return self.document["results"]

    def add(self, name: str, result: dict[str, Any]) -> None:
        self.results[name] = result
        aside = self.path.with_suffix(".part")
        aside.write_text(json.dumps(self.document, indent=1, sort_keys=True) + "\n")
        aside.replace(self.path)


class Bench:
    """Runs jobs with the settings that all share."""

    def __init__(self, args: argparse.Namespace, table: Table) -> None:
        self.args, self.table = args, table
        self.work = args.work.resolve()
        self.work.mkdir(parents=True, exist_ok=True)
        (self.work / "logs").mkdir(exist_ok=True)

    def common(self) -> list[str]:
        args = self.args
        return [
            *data_overrides(args.data), f"data.batch_size={args.batch_size}",
            f"data.views={args.epochs}", f"data.limit={args.limit or 'null'}", f"train.epochs={args.epochs}",
            f"train.device={args.device}", "train.threads=1",
            f"train.precision={args.precision}", f"train.layout={args.layout}", "train.compile=false",
            "optimizer={kind: sgd, lr: 0.1, momentum: 0.9, weight_decay: 5e-4, nesterov: false}",
            "schedule={kind: cosine, warmup_epochs: 1}",
        ]  # fmt: skip

    def run(self, job: Job) -> dict[str, Any]:
        """The command's document, with the seconds that it took; raises CalledProcessError where it fails."""
        seeds = ["--seeds", str(job.seeds)] if job.seeds > 1 else []
        overrides = [*self.common(), *job.overrides, f"train.seed={job.first_seed}", f"name={job.name}"]
        began = time.monotonic()
        document = self.kdctl(job.name, "train", job.config, *overrides, *seeds)
        return document | {"wall_seconds": round(time.monotonic() - began, 1)}

    def fill_store(self) -> None:
        """Asks the teacher once for all that the methods will ask it, so that they need not do it side by side."""
        teacher = teacher_override(self.args)
        self.kdctl("store", "cache", "build", str(SMALL / "kd.yaml"), *self.common(), teacher)

    def kdctl(self, name: str, *words: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "kdctl", *words, "--json", "-q"]
        own = {"KDCTL_CACHE": str(self.work / "cache"), "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        environment = os.environ | own | {"OMP_NUM_THREADS": "1"}
        with open(self.work / "logs" / f"{name}.log", "w") as log:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=self.work, env=environment
            )
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout)
        return json.loads(done.stdout)

    def measure(self, jobs: list[Job]) -> None:
        """Runs the seeds of the jobs that have no result yet; one that fails is told and left out."""
        with ThreadPoolExecutor(self.args.jobs) as pool:
            running = [pool.submit(self._measured, job) for job in map(self._missing, jobs) if job.seeds > 0]
            for future in as_completed(running):
                job, found = future.result()
                if found is not None:
                    self.table.add(job.name, joined(self.table.results.get(job.name), found))

    def _missing(self, job: Job) -> Job:
        """The job with the seeds that it lacks."""
        have = len(self.table.results.get(job.name, {}).get("test", []))
        return replace(job, seeds=job.seeds - have, first_seed=job.first_seed + have)

    def _told(self, override: str) -> str:
        """An override without this machine's folders."""
        places = {"WEIGHTS": self.args.weights.resolve(), "WORK": self.work}
        for name, place in places.items():
            override = override.replace(str(place), name)
        return override

    def _measured(self, job: Job) -> tuple[Job, dict[str, Any] | None]:
        if self.args.until and time.time() > self.args.until:
            return job, None
        try:
            document = self.run(job)
        except subprocess.CalledProcessError as error:
            print(f"{job.name}: exit {error.returncode}: {str(error.output)[-600:]}", file=sys.stderr, flush=True)
            return job, None
        found = describe(document, job) | {"overrides": [self._told(override) for override in job.overrides]}
        print(f"{job.name}: {found['test']}, {found['wall_seconds']} s", file=sys.stderr, flush=True)
        return job, found


def joined(before: dict[str, Any] | None, found: dict[str, Any]) -> dict[str, Any]:
    """A result with the seeds of an earlier one before its own."""
    if before is None:
        return found
    lists = ("seeds", "test", "last", "val")
    seconds = round(before["wall_seconds"] + found["wall_seconds"], 1)
    return found | {name: before[name] + found[name] for name in lists} | {"wall_seconds": seconds}


def describe(document: dict[str, Any], job: Job) -> dict[str, Any]:
    """What the table keeps of a group or a single run: top-1 of each seed by the kept and by the last epoch."""
    rows = document.get("seeds") or [{"seed": job.first_seed, "student": document["student"]}]
    students = [row["student"] for row in rows]
    return {
        "seeds": [row["seed"] for row in rows],
        "test": [s["test"]["top1"] if "test" in s else s["best"]["test"]["top1"] for s in students],
        "last": [_last(s) for s in students],
        "val": [s.get("best", {}).get("val", {}).get("top1") for s in students],
        "teacher": (document.get("teacher") or {}).get("test", {}).get("top1"),
        "epochs": document["epochs"],
        "precision": document["precision"],
        "config": Path(job.config).relative_to(ROOT).as_posix(),
        "wall_seconds": document["wall_seconds"],
    }


def _last(student: dict[str, Any]) -> float:
    last = student["last"]
    return last["test"]["top1"] if "test" in last else last["top1"]


def kd_losses(temperature: float, weight: float) -> str:
    return f"losses=[{{kind: ce, weight: 0.1}}, {{kind: kd, weight: {weight}, temperature: {temperature}}}]"


def tuned_kd(bench: Bench) -> str:
    """The losses of kd with the temperature and weight that validate best; each point of the grid is a result too."""
    teacher = teacher_override(bench.args)
    jobs = [
        Job(f"tune-kd-T{t:g}-w{w:g}", str(SMALL / "kd.yaml"), [teacher, kd_losses(t, w)], 1, TUNING_SEED)
        for t, w in GRID
    ]
    bench.measure(jobs)
    found = {job.name: bench.table.results[job.name]["val"][0] for job in jobs if job.name in bench.table.results}
    best = max(found, key=lambda name: found[name])
    bench.table.document["tuned_kd"] = best
    return next(job.overrides[-1] for job in jobs if job.name == best)


def data_overrides(data: Path) -> list[str]:
    """CIFAR-100 from arrays, or CIFAR-10 from the folder of its official files."""
    place = data.resolve()
    return [f"data.root={place}", "data.kind=cifar10"] if data.is_dir() else ["data.kind=npz", f"data.path={place}"]


def pretrained(weights: Path, data: Path, depth: int) -> str:
    """The pretrained teacher of this depth, as a file would say it."""
    if data.is_dir():
        file = {20: "resnet20-12fca82f.th", 56: "resnet56-4bfd9763.th"}[depth]
        more = "shortcut: pad, mapping: {linear.: fc.}, normalize: imagenet"
    else:
        file = f"cifar100_resnet{depth}.pth"
        more = "normalize: {mean: [0.5070, 0.4865, 0.4409], std: [0.2673, 0.2564, 0.2761]}"
    return f"{{kind: resnet{depth}, weights: {weights.resolve() / file}, {more}}}"


def teacher_override(args: argparse.Namespace) -> str:
    return f"teacher={pretrained(args.weights, args.data, 56)}"


def method_jobs(args: argparse.Namespace) -> list[Job]:
    """Every method that has a small config, with its published settings."""
    names = sorted(path.stem for path in SMALL.glob("*.yaml") if path.stem not in NOT_COMPARED)
    taught = [teacher_override(args), "teacher_cache={store: logits}"]
    jobs = []
    for name in names:
        overrides = list(taught) if "\nteacher:" in (SMALL.parent / f"{name}.yaml").read_text() else []
        if name in EXTRA_EPOCHS:
            overrides.append(f"train.epochs={args.epochs - EXTRA_EPOCHS[name]}")
        if name == "crd" and args.limit:  # as large a share of the images as the published 16,384 of 50,000
            overrides.append(f"losses.crd.negatives={16384 * args.limit // 50000}")
        if name in RATES:
            overrides.append(f"optimizer.lr={RATES[name]}")
        jobs.append(Job(name, str(SMALL / f"{name}.yaml"), overrides, args.seeds))
    jobs.sort(key=lambda job: job.name in SLOW)
    return [job for job in jobs if any(fnmatch.fnmatch(job.name, only) for only in args.only.split(","))]


def several_teachers(bench: Bench, losses: str) -> list[Job]:
    """One teacher against three, the third of which is trained here, with each way to combine them."""
    args = bench.args
    longer = 2 * args.epochs
    third = Job(
        "teacher-wrn_16_1", str(SMALL / "supervised.yaml"),
        ["student={kind: wrn_16_1}", f"train.epochs={longer}", f"data.views={longer}", "data.limit=20000"],
    )  # fmt: skip
    bench.measure([third])
    runs = sorted((bench.work / "runs" / third.name).glob("[0-9]*"))
    if third.name not in bench.table.results or not runs:
        return []
    known = [pretrained(args.weights, args.data, depth) for depth in (56, 20)]
    kd = str(SMALL / "kd.yaml")
    teachers = f"teacher=[{known[0]}, {known[1]}, {{kind: wrn_16_1, weights: {runs[-1].resolve()}}}]"
    return [
        Job(f"three-teachers-{kind}", kd, [teachers, f"ensemble={{kind: {kind}}}", losses], args.seeds)
        for kind in ENSEMBLES
    ]


def rows(table: Table) -> list[dict[str, Any]]:
    """A row a method: mean, and the paired differences from both controls over the seeds that they share."""
    results = table.results
    found = []
    for name, result in results.items():
        if name.startswith(("tune-", "teacher-")):
            continue
        row: dict[str, Any] = {
            "name": name,
            "mean": interval(result["test"]).as_dict(),
            "last": interval(result["last"]).mean,
        }
        for control in ("supervised", "kd_tuned"):
            if control not in results or control == name:
                continue
            other = dict(zip(results[control]["seeds"], results[control]["test"], strict=True))
            own = dict(zip(result["seeds"], result["test"], strict=True))
            shared = sorted(set(own) & set(other))
            if shared:
                row[control] = paired([own[s] for s in shared], [other[s] for s in shared]).as_dict()
        found.append(row)
    return sorted(found, key=lambda row: -row["mean"]["mean"])


def markdown(table: Table) -> str:
    lines = [
        "| method | top-1 % | seeds | against the student alone | against tuned kd | |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows(table):
        verdicts = []
        for control in ("supervised", "kd_tuned"):
            result = row.get(control)
            if result is None or result["ci95"] is None:
                verdicts.append("-")
                continue
            low, high = result["ci95"]
            verdicts.append(f"{result['mean']:+.2f} ({low:+.2f} to {high:+.2f})")
        low, high = (row.get("kd_tuned") or {}).get("ci95") or (-1, 1)
        said = "better than tuned kd" if low > 0 else "worse than tuned kd" if high < 0 else "tie"
        said = "control" if row["name"] in ("supervised", "kd_tuned") else said
        spread = f" ± {row['mean']['std']:.2f}" if row["mean"]["std"] is not None else ""
        mean = f"{row['mean']['mean']:.2f}{spread}"
        lines.append(f"| {row['name']} | {mean} | {row['mean']['n']} | {' | '.join(verdicts)} | {said} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="cifar100.npz, or the folder with cifar-10-batches-py")
    parser.add_argument("--weights", type=Path, help="folder with the weights of ResNet-56 and ResNet-20")
    parser.add_argument("--work", type=Path, default=Path("results_methods"))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "methods.json")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--limit", type=int, default=0, help="use so many training images only")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--more-seeds", type=int, default=0, help="of the controls and the best methods, at the end")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--tuned", default="", help="temperature,weight of kd: no search for them")
    parser.add_argument("--layout", default="auto")
    parser.add_argument("--only", default="*", help="patterns of method names, with commas between; `ensembles`")
    parser.add_argument("--minutes", type=float, default=0, help="start no command after this long")
    parser.add_argument("--table", action="store_true", help="print the table of the results and stop")
    args = parser.parse_args()
    args.until = time.time() + 60 * args.minutes if args.minutes else 0
    table = Table(args.out)
    if args.table:
        print(markdown(table))
        return
    bench = Bench(args, table)
    table.document["settings"] = {
        "epochs": args.epochs, "batch_size": args.batch_size, "device": args.device, "precision": args.precision,
        "student": "resnet8",
        "teacher": "resnet56", "data": "CIFAR-10" if args.data.is_dir() else "CIFAR-100",
        "training_images": args.limit or 45000,
    }  # fmt: skip
    teacher = teacher_override(args)
    bench.fill_store()
    losses = kd_losses(*map(float, args.tuned.split(","))) if args.tuned else tuned_kd(bench)
    controls = [
        Job("supervised", str(SMALL / "supervised.yaml"), [], args.seeds),
        Job("kd_tuned", str(SMALL / "kd.yaml"), [teacher, losses], args.seeds),
        *([] if args.tuned else [Job("kd", str(SMALL / "kd.yaml"), [teacher], args.seeds)]),
    ]
    bench.measure(controls + method_jobs(args))
    if args.only == "*" or "ensembles" in args.only.split(","):
        bench.measure(several_teachers(bench, losses))
    if args.more_seeds:
        worth = [row["name"] for row in rows(table) if not row["name"].startswith("three-")][:8]
        jobs = controls + method_jobs(args)
        again = [Job(j.name, j.config, j.overrides, args.more_seeds) for j in jobs if j in controls or j.name in worth]
        bench.measure(again)
    print(markdown(table))


if __name__ == "__main__":
    main()
