"""A term against several teachers: adapters of its own for each, weighed as the ensemble says."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from kdctl import build, registry
from kdctl.assembly.terms import build_terms, dry_run
from kdctl.config.expand import load_experiment
from kdctl.config.schema import Component, Experiment, LossSpec
from kdctl.device import settle_by_rule
from kdctl.errors import ConfigError
from kdctl.losses.base import Loss
from kdctl.methods.base import Term
from kdctl.models.record import Model, ModelRecord, build_model
from kdctl.signals import Batch, Signals
from kdctl.taps import Taps
from kdctl.tasks.base import Task
from kdctl.tasks.classification import Classification
from kdctl.tasks.multilabel import Multilabel
from kdctl.tasks.regression import Regression
from kdctl.teachers.ensemble import Ensemble
from kdctl.teachers.live import LiveTeacher
from kdctl.teachers.several import Several

KINDS: list[tuple[str, dict[str, Any], str]] = [
    ("digits_cnn", {"width": 6}, "layer2"),
    ("mlp", {"hidden": [9]}, "layer1"),
    ("resnet8", {}, "layer2"),
]
TASK = Classification()


def made(kind: str, arguments: dict[str, Any], seed: int) -> Model:
    torch.manual_seed(seed)
    names = [str(number) for number in range(10)]
    return build_model(ModelRecord(kind, arguments, 10, names, [1, 8, 8])).eval()


def batch_of(size: int = 6) -> Batch:
    index = torch.arange(size)
    images = torch.rand(size, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return Batch(images, index % 10, index, index * 0)


class Scene:
    """A student, three teachers of other kinds and widths, and one term against all of them."""

    def __init__(self, spec: LossSpec, ensemble: Component) -> None:
        self.student = made("digits_cnn", {"width": 4}, 0)
        self.teachers = [made(kind, arguments, n + 1) for n, (kind, arguments, _) in enumerate(KINDS)]
        taps = [place if spec.taps else "" for _, _, place in KINDS]
        self.lives = [LiveTeacher(m, TASK, [t] if t else []) for m, t in zip(self.teachers, taps, strict=True)]
        self.ensemble = Ensemble(self.lives)
        (self.term,) = build_terms([spec], 3, ensemble, 3)
        self.batch = batch_of()
        dry_run(self.student, self.ensemble, [self.term], TASK, self.batch, 6)

    def see(self) -> Signals:
        taps = sorted({s for s, _ in self.term.loss.taps})
        with Taps(self.student.net, taps).recording() as features:
            outputs = TASK.forward(self.student, self.batch)
        return TASK.signals(outputs, self.batch, features)

    def by_hand(self, spec: LossSpec) -> tuple[list[Tensor], Signals]:
        """The term against each teacher alone, with the adapters that it has there."""
        values, student = [], self.see()
        for number, (live, own) in enumerate(zip(self.lives, self.term.loss.losses, strict=True)):  # type: ignore[arg-type]
            loss: Loss = registry.create("losses", spec.kind, spec.arguments)
            loss.taps = (("layer2", KINDS[number][2]),) if spec.taps else ()
            if hasattr(own, "adapters"):
                loss.adapters = own.adapters
            values.append(loss(student, live(self.batch), self.batch))
        return values, student


TAPPED = LossSpec.model_validate(
    {"kind": "fitnet", "taps": [{"student": "layer2", "teacher": [place for _, _, place in KINDS]}]}
)


def test_a_feature_term_has_adapters_for_each_teacher() -> None:
    scene = Scene(TAPPED, Component(kind="weighted", weights=[1.0, 2.0, 5.0]))
    assert isinstance(scene.term.loss, Several)
    values, _ = scene.by_hand(TAPPED)
    value = scene.term.loss(scene.see(), scene.ensemble(scene.batch), scene.batch)
    expected = (values[0] + 2 * values[1] + 5 * values[2]) / 8
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    parts = [list(loss.parameters()) for loss in scene.term.loss.losses]
    assert all(parts) and len({id(p) for part in parts for p in part}) == sum(map(len, parts))
    shapes = [tuple(part[0].shape) for part in parts]
    assert len(set(shapes)) == 3
    value.backward()
    trained = [*scene.term.parameters(), *scene.student.net.layer2.parameters()]  # type: ignore[union-attr]
    assert all(p.grad is not None and bool(p.grad.any()) for p in trained)
    assert all(p.grad is None for teacher in scene.teachers for p in teacher.parameters())
    assert scene.term.loss.count(scene.batch) == 6


@pytest.mark.parametrize("kind", ["mean", "mean_logits", "ebkd", "ca_mkd", "best", "aekd"])
def test_taps_go_with_every_ensemble(kind: str) -> None:
    scene = Scene(TAPPED, Component(kind=kind))
    value = scene.term.loss(scene.see(), scene.ensemble(scene.batch), scene.batch)
    value.backward()
    assert bool(torch.isfinite(value)) and all(p.grad is not None for p in scene.term.parameters())


def test_a_term_on_logits_is_averaged_or_sees_the_mean_logits() -> None:
    spec = LossSpec.model_validate({"kind": "kd", "temperature": 2.0})
    scene = Scene(spec, Component(kind="mean"))
    values, student = scene.by_hand(spec)
    value = scene.term.loss(student, scene.ensemble(scene.batch), scene.batch)
    assert float(value.detach()) == pytest.approx(float(sum(v.detach() for v in values)) / 3, rel=1e-5)
    spoken = Scene(spec, Component(kind="mean_logits"))
    assert not isinstance(spoken.term.loss, Several)
    mean = torch.stack([live(scene.batch).logits for live in scene.lives]).mean(0)
    one = registry.create("losses", "kd", {"temperature": 2.0})(student, Signals(mean), scene.batch)
    value = spoken.term.loss(student, spoken.ensemble(scene.batch), scene.batch)
    assert float(value.detach()) == pytest.approx(float(one.detach()), rel=1e-5)


def test_a_term_that_compares_samples_takes_the_mean_weights() -> None:
    spec = LossSpec(kind="similarity_preserving", taps=TAPPED.taps)
    scene = Scene(spec, Component(kind="weighted", weights=[1.0, 2.0, 5.0]))
    assert scene.term.loss.batchwise
    values, student = scene.by_hand(spec)
    value = scene.term.loss(student, scene.ensemble(scene.batch), scene.batch)
    expected = (values[0] + 2 * values[1] + 5 * values[2]) / 8
    assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_aekd_looks_at_what_its_own_term_sees() -> None:
    """The tap of another term is no part of what a term on logits sees, and micro-batches would change it."""
    spec = LossSpec.model_validate({"kind": "kd"})
    scene = Scene(spec, Component(kind="aekd", largest=1.0))
    assert scene.term.loss.batchwise
    student = scene.see()
    other = student.logits.new_ones(6, 1, requires_grad=True)
    student.features["other"] = other
    student.logits = student.logits + 1e3 * other
    alone = Signals(student.logits.detach().requires_grad_())
    teacher = scene.ensemble(scene.batch)
    found = [scene.term.loss(seen, teacher, scene.batch).detach() for seen in (student, alone)]
    assert float(found[0]) == pytest.approx(float(found[1]), rel=1e-6)


class Streams(Loss):
    """Looks at both versions by itself."""

    sees_streams: ClassVar[bool] = True

    def values(self, student: Signals, teacher: Signals | None, batch: Batch) -> Tensor:
        assert teacher is not None and teacher.strong is not None and student.strong is not None
        return (student.strong.logits * teacher.strong.logits).sum(1) + (student.logits * teacher.logits).sum(1)


def test_a_term_that_sees_streams_gets_each_teachers_own() -> None:
    loss = Several([Streams(), Streams()], registry.create("ensembles", "weighted", {"weights": [1.0, 3.0]}))
    a, b, c, d, s, t = (torch.randn(4, 3, generator=torch.Generator().manual_seed(n)) for n in range(6))
    teacher = Signals((a + b) / 2, members=(Signals(a), Signals(b)))
    teacher.strong = Signals((c + d) / 2, members=(Signals(c), Signals(d)))
    index = torch.arange(4)
    batch = Batch(torch.zeros(4, 1), index * 0, index, index * 0, strong=torch.ones(4, 1))
    value = loss(Signals(s, strong=Signals(t)), teacher, batch)
    expected = ((s * a).sum() + (t * c).sum()) / 4 + 3 * ((s * b).sum() + (t * d).sum()) / 4
    assert loss.sees_streams and float(value) == pytest.approx(float(expected), rel=1e-5)


# ------------------------------------------------------------------------------------------------------- experiments

FILE = """
data: {kind: digits, limit: 200}
teacher:
  - {kind: digits_cnn, width: 6, control: true}
  - {kind: digits_cnn, width: 10, control: true}
student: {kind: digits_cnn, width: 4}
ensemble: {kind: ca_mkd}
losses:
  - {kind: ce, weight: 1}
  - {kind: fitnet, weight: 1, taps: [{student: layer2, teacher: [layer2, layer3]}]}
train: {epochs: 1, device: cpu, threads: 1}
"""


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Experiment]:
    def go(*overrides: str, text: str = FILE) -> Experiment:
        (tmp_path / "a.yaml").write_text(text)
        found = load_experiment(tmp_path / "a.yaml", overrides).experiment
        return found.model_copy(update={"train": settle_by_rule(found.train)})

    return go


def first_value(experiment: Experiment) -> tuple[dict[str, float], build.Built]:
    data = build.build_data(experiment)
    built = build.build_stage(experiment, experiment.student_stage, data, Path)
    batch = next(iter(built.loader.epoch(0)))
    built.method.trained.eval()
    return {name: float(v.detach()) for name, v in built.method.step(batch, 0.0).items()}, built


@pytest.mark.parametrize("ensemble", ["ca_mkd", "mean", "aekd"])
@pytest.mark.parametrize("store", ["both", "features", "logits"])
def test_stored_and_live_teachers_agree(
    load: Callable[..., Experiment], tmp_path: Path, ensemble: str, store: str
) -> None:
    live, _ = first_value(load(f"ensemble={{kind: {ensemble}}}"))
    cache = f"teacher_cache={{store: {store}, dtype: fp32, dir: {tmp_path / 'store'}}}"
    for _ in range(2):  # filled, then read
        stored, built = first_value(load(f"ensemble={{kind: {ensemble}}}", cache))
        assert stored == pytest.approx(live, rel=1e-5)
        assert built.teacher is not None
        built.teacher.flush()
    rows = [member.store.turn("train", 0).held for member in built.members]  # type: ignore[attr-defined]
    kept = store == "both" or (store == "features" and ensemble != "ca_mkd")  # what is asked for is there
    assert rows == ([built.loader.batch_size] * 2 if kept else [0, 0])


def test_a_term_that_sees_members_gets_all_of_them_once(tmp_path: Path) -> None:
    (tmp_path / "members.py").write_text(
        "import torch\nfrom kdctl.losses.base import Loss\n\n\nclass Members(Loss):\n    needs_taps = None\n"
        "    sees_members = True\n\n    def values(self, student, teacher, batch):\n"
        "        return sum((student.logits * m.logits).sum(1) for m in teacher.members)\n"
    )
    spec = LossSpec.model_validate({"kind": f"{tmp_path / 'members.py'}:Members", "taps": TAPPED.model_dump()["taps"]})
    (term,) = build_terms([spec], 1, Component(kind="ca_mkd"), 3)
    assert not isinstance(term.loss, Several)
    assert term.loss.taps == tuple(("layer2", place) for _, _, place in KINDS)
    scene = Scene(LossSpec(kind="kd"), Component(kind="mean"))
    student, teacher = scene.see(), scene.ensemble(scene.batch)
    expected = sum((student.logits * live(scene.batch).logits).sum() for live in scene.lives)
    assert float(term.loss(student, teacher, scene.batch).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)  # type: ignore[union-attr]


WRONG = [
    ("losses: [{kind: ce}, {kind: fitnet, taps: [{student: layer2, teacher: [layer2]}]}]", "1 place for 2 teachers"),
    ("losses: [{kind: ce}, {kind: fitnet, taps: [{student: a, teacher: [a, b, c]}]}]", "3 places for 2 teachers"),
    ("ensemble: {kind: weighted, weights: [1, 2, 3]}", "3 weights for 2 teachers"),
    ("ensemble: {kind: class_groups, groups: [[1]]}", "1 group for 2 teachers"),
]


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize(("text", "words"), WRONG)
def test_lists_of_another_length_are_refused_with_their_line(
    load: Callable[..., Experiment], text: str, words: str, staged: bool
) -> None:
    base = FILE[: FILE.index("ensemble")] + "train: {epochs: 1}\n"
    whole = base + (f"stages: [{{name: student, {text}}}]\n" if staged else text + "\n")
    with pytest.raises(ConfigError) as caught:
        load(text=whole)
    (problem,) = caught.value.problems
    assert words in problem.message and problem.line == base.count("\n") + 1
    assert str(problem.key).startswith("stages.0." if staged else text.partition(":")[0])


def test_what_an_ensemble_is_not_asked_for_it_does_not_give(load: Callable[..., Experiment]) -> None:
    asked: list[tuple[Collection[str] | None, bool]] = []

    class Asked(LiveTeacher):
        def __call__(self, batch: Batch, taps: Collection[str] | None = None, logits: bool = True) -> Signals:
            asked.append((taps, logits))
            return super().__call__(batch, taps, logits)

    member = Asked(made("digits_cnn", {"width": 4}, 0), TASK, ["layer1", "layer2"])
    Ensemble([member])(batch_of(), ["layer1", "elsewhere"], False)
    assert asked == [(("layer1",), False)]


def test_terms_without_a_teacher_stay_as_they_are() -> None:
    terms: list[Term] = build_terms([LossSpec(kind="ce")], 1, Component(kind="mean"), 3)
    assert not isinstance(terms[0].loss, Several)


@pytest.mark.parametrize("kind", ["ebkd", "ca_mkd", "best"])
@pytest.mark.parametrize("task", [Multilabel(), Regression()])
def test_weights_by_the_one_class_of_a_sample_need_such_a_task(kind: str, task: Task) -> None:
    models = [made("mlp", {"hidden": [4]}, seed) for seed in range(3)]
    ensemble = Ensemble([LiveTeacher(model, task, []) for model in models[1:]])
    (term,) = build_terms([LossSpec(kind="logit_mse")], 3, Component(kind=kind), 2)
    batch = batch_of()
    targets = torch.zeros(6, 10).long() if task.target == "classes" else torch.zeros(6)
    batch = Batch(batch.inputs, targets, batch.index, batch.view)
    with pytest.raises(ConfigError, match="of which a sample has one") as caught:
        dry_run(models[0], ensemble, [term], task, batch, 6)
    assert caught.value.problems[0].key == "ensemble.kind"
