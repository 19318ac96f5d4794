"""Self-distillation: the student's own past is its teacher."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from method_runs import (
    BASE,
    TEACHER,
    check_resumes,
    check_shipped_is_validated,
    first_batch,
    run_it,
    stage_of,
    stop_and_resume,
)
from method_runs import built as build_it

from kdctl.build import Built
from kdctl.clock import Clock
from kdctl.config.schema import TrainStage
from kdctl.errors import ConfigError
from kdctl.models.record import load_model
from kdctl.step import Step
from kdctl.watch import Reporter

LOSSES = "losses: [{kind: ce, name: ce}, {kind: kd, T: 2}, {kind: fitnet, taps: [layer2]}]\n"
EMA = BASE + LOSSES + "method: {kind: self_distill, decay: 0.7}\n"
LAST = BASE + LOSSES + "method: {kind: self_distill, teacher: last_epoch}\n"


def steps(parts: Built, stage: TrainStage, epoch: int, count: int) -> list[dict[str, torch.Tensor]]:
    """The student's weights before the first of so many steps of an epoch, and after each."""
    step = Step(parts, stage, Clock(), Reporter(), 1)
    net = parts.method.student.net
    seen = [copy.deepcopy(net.state_dict())]
    parts.method.begin_epoch(epoch)
    parts.method.train()
    for number, batch in enumerate(parts.loader.epoch(epoch)):
        if number == count:
            break
        step(batch, epoch + number / len(parts.loader))
        seen.append(copy.deepcopy(net.state_dict()))
    return seen


def test_the_teacher_is_the_average_of_the_steps(tmp_path: Path) -> None:
    parts = build_it(tmp_path, EMA)
    seen = steps(parts, stage_of(tmp_path, EMA), 0, 4)
    past = parts.method.state_dict()["past"]
    for name in ("conv1.weight", "fc.bias", "bn1.running_mean", "bn1.running_var"):
        value = seen[0][name].double()
        for number, weights in enumerate(seen[1:], start=1):
            decay = min(0.7, number / (number + 1))
            value = decay * value + (1 - decay) * weights[name].double()
        torch.testing.assert_close(past[name], value.float())
    assert past["bn1.num_batches_tracked"] == 4


def test_terms_see_the_average_in_eval_mode(tmp_path: Path) -> None:
    parts = build_it(tmp_path, EMA)
    steps(parts, stage_of(tmp_path, EMA), 0, 3)
    method, batch = parts.method, first_batch(parts, epoch=1)
    past, net = copy.deepcopy(method.student.net), copy.deepcopy(method.student.net)
    past.load_state_dict(method.state_dict()["past"])
    got = method.step(batch, 1.0)
    x = (batch.inputs - method.student.mean) / method.student.std
    log_s, p_t = F.log_softmax(net.train()(x) / 2, 1), F.softmax(past.eval()(x) / 2, 1)
    torch.testing.assert_close(got["kd"], 4 * F.kl_div(log_s, p_t, reduction="sum"))
    assert got["kd"].item() > 1e-3


def test_the_teacher_is_the_student_of_the_epoch_before(tmp_path: Path) -> None:
    parts = build_it(tmp_path, LAST)
    first = steps(parts, stage_of(tmp_path, LAST), 0, 100)
    second = steps(parts, stage_of(tmp_path, LAST), 1, 2)
    past = parts.method.state_dict()["past"]
    for name, value in past.items():
        assert torch.equal(value, first[-1][name])
    assert not torch.equal(second[-1]["fc.weight"], past["fc.weight"])


def test_there_is_no_teacher_in_the_first_epoch(tmp_path: Path) -> None:
    parts = build_it(tmp_path, LAST)
    method, batch = parts.method, first_batch(parts)
    method.train()
    assert method.weights(0.99) == {"ce": 1.0, "kd": 0.0, "fitnet": 0.0} and set(method.step(batch, 0.99)) == {"ce"}
    assert method.weights(1.0) == {"ce": 1.0, "kd": 1.0, "fitnet": 1.0} and len(method.step(batch, 1.0)) == 3
    scheduled = build_it(tmp_path, LAST, "losses.kd.weight={0: 0, 4: 1}")
    assert [scheduled.method.weights(epoch)["kd"] for epoch in (0.5, 1.0, 3.0)] == [0.0, 0.25, 0.75]


def test_it_starts_from_the_students_weights(tmp_path: Path) -> None:
    """In the dry run of the terms the teacher has others, which would be a random teacher afterwards."""
    parts = build_it(tmp_path, EMA)
    past, student = parts.method.state_dict()["past"], parts.method.student.net.state_dict()
    assert all(torch.equal(past[name], value) for name, value in student.items())


@pytest.mark.parametrize("text", [EMA, LAST], ids=["ema", "last_epoch"])
def test_it_trains_resumes_and_ships_the_student_alone(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = run_it(tmp_path, text, "data.limit=1200", "train.epochs=8", "optimizer.lr=0.03")
    lines = run.metrics()
    assert lines[-1]["terms"]["ce"] < 0.75 * lines[0]["terms"]["ce"]
    assert ("kd" in lines[0]["terms"]) is (text == EMA) and lines[-1]["terms"]["kd"] > 0
    check_shipped_is_validated(tmp_path, text.replace("limit: 300", "limit: 1200"), run)
    assert sum(p.numel() for p in load_model(run / "student").parameters()) == 1182
    check_resumes(tmp_path, text, 7)


@pytest.mark.parametrize("text", [EMA, LAST], ids=["ema", "last_epoch"])
@pytest.mark.parametrize("step", [4, 6])
def test_it_continues_after_a_signal(text: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4: at the end of an epoch; 6: within the second."""
    monkeypatch.chdir(tmp_path)
    stopped, whole = stop_and_resume(tmp_path, text, step)
    assert stopped == whole


def test_a_teacher_beside_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="own past is its teacher") as caught:
        build_it(tmp_path, EMA + "teacher: {kind: digits_cnn, control: true}\n")
    assert caught.value.problems[0].key == "teacher" and caught.value.problems[0].hint


def test_a_first_epoch_without_any_term_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no teacher yet") as caught:
        build_it(tmp_path, LAST, "losses=[{kind: kd}]")
    assert caught.value.problems[0].key == "losses" and caught.value.problems[0].hint


def test_it_can_follow_another_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The past has the architecture of the model that was trained before, whatever the experiment's student is."""
    monkeypatch.chdir(tmp_path)
    stages = "stages:" + TEACHER + "  - {name: student, teacher: null, from: teacher}\n"
    run = run_it(tmp_path, EMA + stages, "train.epochs=1")
    assert load_model(run / "student").record.arguments == {"width": 8}
