"""Any two features of a file go together, or are refused before anything is trained; what goes together resumes alike.

The pairs are drawn once and for all: a few in the default suite, a few hundred in the slow one.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from features import EXPERIMENTS, OF_IMAGES, OF_TEXTS, Feature, together, write_texts
from safetensors.torch import load_file

from kdctl import runs
from kdctl.artefacts import measure
from kdctl.bench.latency import Row
from kdctl.config.expand import load_experiment
from kdctl.control import parse_controls
from kdctl.device import settle_by_rule
from kdctl.errors import KdctlError
from kdctl.evaluate import evaluate_run
from kdctl.experiment import Plan, load_run, resume, train
from kdctl.watch import Reporter

pytest.importorskip("tokenizers")

Pair = tuple[str, str, str]


def _features(pair: Pair) -> list[Feature]:
    name, *chosen = pair
    table = OF_IMAGES if name == "images" else OF_TEXTS
    return [table[feature] for feature in chosen]


def _drawn(count: int, seed: int, without: Sequence[str] = ()) -> list[Any]:
    """Pairs of an experiment and two features, by name, half of them of images; none that contradict each other."""
    draw = random.Random(seed)
    images: list[Pair] = [("images", *pair) for pair in itertools.combinations(OF_IMAGES, 2)]
    tasks = [name for name in EXPERIMENTS if name != "images"]
    texts: list[Pair] = [(name, *pair) for name in tasks for pair in itertools.combinations(OF_TEXTS, 2)]
    chosen: list[Pair] = []
    for pairs in (images, texts):
        draw.shuffle(pairs)
        asked = (pair for pair in pairs if not set(without) & set(pair))
        possible = (pair for pair in asked if together(EXPERIMENTS[pair[0]], _features(pair)) is not None)
        chosen += itertools.islice(possible, count // 2)
    return [pytest.param(pair, id="-".join(pair)) for pair in chosen]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the texts; latencies, which are no matter here, are not measured."""
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path)

    def untimed(cells: Any, **_: Any) -> list[Row]:
        return [Row(cell.what, "", cell.batch, cell.threads, 1, 1, 1, 1, 1, 1) for cell in cells]

    monkeypatch.setattr(measure, "measure_latency", untimed)
    yield tmp_path


class Killed(Exception):
    """The process dies here."""


class KilledAt(Reporter):
    """Dies at the n-th step; counts them."""

    def __init__(self, last: int | None = None) -> None:
        self.last, self.steps = last, 0

    def step(self, stage: str, epoch: int, epochs: int, step: int, steps: int) -> None:
        self.steps += 1
        if self.steps == self.last:
            raise Killed


def plan_of(pair: Pair, *overrides: str) -> Plan:
    """What is trained. Raises KdctlError."""
    features = _features(pair)
    document = together(EXPERIMENTS[pair[0]], features)
    text = yaml.safe_dump(document, sort_keys=False)
    Path("pair.yaml").write_text(text)
    loaded = load_experiment(Path("pair.yaml"), overrides).experiment
    loaded = loaded.model_copy(update={"train": settle_by_rule(loaded.train)})
    controls = parse_controls(",".join(feature.controls for feature in features))
    return Plan(loaded, text, max(feature.seeds for feature in features), controls)


def _runs() -> list[runs.Run]:
    return [runs.Run(path) for path in sorted(Path("runs").glob("pair/[0-9]*"))]


def goes_or_is_refused(pair: Pair) -> None:
    """What trained is measured again from disk. Only stages of compression refuse what a model is."""
    try:
        train(plan_of(pair), Reporter())
    except KdctlError as error:
        assert str(error)
        assert all((run / "summary.json").exists() for run in _runs()), "it was refused in the middle of training"
    else:
        assert _runs()
    for run in _runs():
        experiment, student = load_run(run), runs.read_json(run / "summary.json")["student"]
        split = next(iter(student["last"]))
        _check_same(evaluate_run(run, experiment, split=split, device="cpu")["metrics"], student["best"][split])
        told = _told_in_training(run)
        if told and experiment.train.precision == "fp32":  # validation is in the precision of training
            _check_same(evaluate_run(run, experiment, split="val", device="cpu")["metrics"], told)


def _check_same(again: dict[str, float], told: dict[str, float]) -> None:
    """1e-5: correlations of answers that are all but constant have no more digits in fp32."""
    assert told and {name: again[name] for name in told} == pytest.approx(told, rel=1e-5, nan_ok=True)


def _told_in_training(run: runs.Run) -> dict[str, float] | None:
    """What the epoch whose weights are shipped had on the validation split, if any."""
    kept = runs.read_json(run / "stages" / "student" / "result.json")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    epoch = kept["best_epoch"] if kept["kept"] == "best" else kept["epochs"]
    told: dict[str, float] | None = next(
        line.get("val") for line in lines if (line["stage"], line["epoch"]) == ("student", epoch)
    )
    return told


def resumes_alike(pair: Pair, draw: random.Random) -> None:
    """What was killed, late enough for a checkpoint to be there, and resumed has the weights, to the bit, of what was
    not."""
    whole = KilledAt()
    try:
        plan = plan_of(pair, "train.keep=last")  # the weights that every step has made
        train(plan, whole)
    except KdctlError as error:
        pytest.skip(f"refused: {error}")
    expected = _weights()
    Path("runs").rename("whole")
    if Path("store").exists():
        Path("store").rename("other")
    with pytest.raises(Killed):
        train(plan, KilledAt(draw.randint(whole.steps // 2 + 1, whole.steps)))
    resume(next(run for run in _runs() if run.info["status"] != "done"), Reporter())
    found = _weights()
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def _weights() -> dict[str, torch.Tensor]:
    files = [path for path in sorted(Path("runs").rglob("*.safetensors")) if "checkpoints" not in path.parts]
    return {f"{path} {name}": value for path in files for name, value in load_file(path).items()}


@pytest.mark.parametrize("pair", _drawn(20, seed=1))
def test_two_features_go_together_or_are_refused_at_once(pair: Pair) -> None:
    goes_or_is_refused(pair)


@pytest.mark.slow
@pytest.mark.parametrize("pair", _drawn(400, seed=2))
def test_many_pairs_of_features(pair: Pair) -> None:
    goes_or_is_refused(pair)


@pytest.mark.slow
@pytest.mark.parametrize("pair", _drawn(100, seed=3, without=["equal_time"]))  # whose epochs follow from seconds
def test_pairs_that_were_killed_go_on_as_if_they_had_not_been(pair: Pair) -> None:
    resumes_alike(pair, random.Random(repr(pair)))
