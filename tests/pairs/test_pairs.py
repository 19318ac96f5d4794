"""Any two features of a file go together, or are refused before anything is trained; what goes together resumes alike.

The pairs are drawn once and for all: a few in the default suite, a few hundred in the slow one.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from features import EXPERIMENTS, OF_IMAGES, OF_TEXTS, together, write_texts
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


def _drawn(count: int, seed: int) -> list[Any]:
    """Pairs of an experiment and two features, half of them of images, by name."""
    draw = random.Random(seed)
    images = [("images", *pair) for pair in itertools.combinations(OF_IMAGES, 2)]
    texts = [(name, *pair) for name in EXPERIMENTS if name != "images" for pair in itertools.combinations(OF_TEXTS, 2)]
    chosen = [*draw.sample(images, count // 2), *draw.sample(texts, count // 2)]
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


def plan_of(pair: Pair) -> Plan | None:
    """What is trained; None where the features ask for different things. Raises KdctlError."""
    name, *chosen = pair
    table = OF_IMAGES if name == "images" else OF_TEXTS
    features = [table[feature] for feature in chosen]
    document = together(EXPERIMENTS[name], features)
    if document is None:
        return None
    text = yaml.safe_dump(document, sort_keys=False)
    Path("pair.yaml").write_text(text)
    loaded = load_experiment(Path("pair.yaml"), []).experiment
    loaded = loaded.model_copy(update={"train": settle_by_rule(loaded.train)})
    controls = parse_controls(",".join(feature.controls for feature in features))
    return Plan(loaded, text, max(feature.seeds for feature in features), controls)


def _runs() -> list[runs.Run]:
    return [runs.Run(path) for path in sorted(Path("runs").glob("pair/[0-9]*"))]


def goes_or_is_refused(pair: Pair) -> None:
    """What trained is measured again from disk. Only stages of compression refuse what a model is."""
    try:
        plan = plan_of(pair)
        if plan is None:
            return
        train(plan, Reporter())
    except KdctlError as error:
        assert str(error)
        assert all((run / "summary.json").exists() for run in _runs()), "it was refused in the middle of training"
    else:
        assert _runs()
    for run in _runs():
        student = runs.read_json(run / "summary.json")["student"]
        split = next(iter(student["last"]))
        again, told = evaluate_run(run, load_run(run), split=split, device="cpu")["metrics"], student["best"][split]
        assert told and {name: again[name] for name in told} == pytest.approx(told, rel=1e-4, nan_ok=True)


def resumes_alike(pair: Pair, draw: random.Random) -> None:
    """What was killed at any step and resumed has the weights, to the bit, of what was not."""
    try:
        plan = plan_of(pair)
        if plan is None:
            return
        whole = KilledAt()
        train(plan, whole)
    except KdctlError:
        return
    expected = _weights()
    Path("runs").rename("whole")
    if Path("store").exists():
        Path("store").rename("other")
    with pytest.raises(Killed):
        train(plan, KilledAt(draw.randint(2, whole.steps)))
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
@pytest.mark.parametrize("pair", _drawn(100, seed=3))
def test_pairs_that_were_killed_go_on_as_if_they_had_not_been(pair: Pair) -> None:
    resumes_alike(pair, random.Random(repr(pair)))
