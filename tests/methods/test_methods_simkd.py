"""SimKD: the student's features learn to fit the teacher's classifier, which is shipped with them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from method_runs import (
    BASE,
    LOOSE,
    TEACHER,
    check_resumes,
    check_shipped_is_validated,
    first_batch,
    run_it,
    stop_and_resume,
)
from method_runs import built as build_it
from torch import nn

from kdctl.errors import ConfigError
from kdctl.models.record import ModelRecord, build_model, load_model, save_model

LOSSES = "losses: [{kind: fitnet, name: feature, regressor: none, taps: [{student: projector, teacher: layer3}]}]\n"
METHOD = "method: {kind: simkd}\n"
STAGES = "stages:" + TEACHER + "  - {name: student, teacher: {kind: digits_cnn, width: 8, from: teacher}}\n"
CONTROL = "teacher: {kind: digits_cnn, width: 8, control: true}\n"
ALONE = BASE + LOSSES + METHOD + CONTROL
TEXT = BASE + LOSSES + METHOD + STAGES


def test_the_net_is_the_students_start_a_projector_and_the_teachers_classifier(tmp_path: Path) -> None:
    parts = build_it(tmp_path, ALONE)
    net, (teacher,) = parts.method.student.net, parts.teachers
    names = [name for name, _ in net.named_children()]
    assert names == ["conv1", "bn1", "relu", "layer1", "layer2", "layer3", "projector", "pool", "flatten", "fc"]
    kinds = [type(module) for module in net.projector]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 3
    convs = [module for module in net.projector if isinstance(module, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size[0]) for c in convs] == [(8, 8, 1), (8, 8, 3), (8, 16, 1)]
    assert torch.equal(net.fc.weight, teacher.net.fc.weight) and net.fc.weight is not teacher.net.fc.weight
    moved = {id(p) for group in parts.optimizer.param_groups for p in group["params"]}
    assert id(net.fc.weight) not in moved and id(net.conv1.weight) in moved


def test_the_loss_is_the_mean_squared_distance_of_the_features(tmp_path: Path) -> None:
    parts = build_it(tmp_path, ALONE)
    method, batch = parts.method, first_batch(parts)
    net, teacher = copy.deepcopy(method.student.net).train(), copy.deepcopy(parts.teachers[0].net).eval()
    method.train()
    got = method.step(batch, 0.0)
    x = (batch.inputs - method.student.mean) / method.student.std
    theirs = nn.Sequential(*list(teacher)[:6])(x)
    mine = nn.Sequential(*list(net)[:7])(x)
    assert mine.shape == theirs.shape == (batch.size, 16, 4, 4)
    torch.testing.assert_close(got["feature"] / method.counts(batch)["feature"], F.mse_loss(mine, theirs))


@pytest.mark.parametrize(
    ("student", "teacher", "size"),
    [("layer1", "layer3", 4), ("layer3", "layer1", 4)],
    ids=["larger student", "larger teacher"],
)
def test_the_larger_map_is_pooled(student: str, teacher: str, size: int, tmp_path: Path) -> None:
    """The teacher's layer1 (8 channels) cannot go into its classifier of 16: its width is chosen so that it can."""
    (tmp_path / "even.py").write_text(EVEN)
    own = f"teacher: {{kind: './even.py:Even', control: true}}\nmethod: {{kind: simkd, student_tap: {student}, "
    text = BASE + LOSSES.replace("teacher: layer3", f"teacher: {teacher}") + own + f"teacher_tap: {teacher}}}\n"
    parts = build_it(tmp_path, text)
    method, batch = parts.method, first_batch(parts)
    net, theirs = copy.deepcopy(method.student.net).eval(), copy.deepcopy(parts.teachers[0].net).eval()
    assert ("resize" in dict(net.named_children())) is (student == "layer1")
    method.trained.eval()
    got = method.step(batch, 0.0)
    x = (batch.inputs - method.student.mean) / method.student.std
    features = []
    for module in (net, theirs):
        kept = {}
        y = x
        for name, child in module.named_children():
            y = child(y)
            kept[name] = y.clone()
        features.append(kept)
    mine, target = features[0]["projector"], features[1][teacher]
    assert mine.shape[-1] == size
    if teacher == "layer1":
        target = F.avg_pool2d(target, 2)
    torch.testing.assert_close(got["feature"] / batch.size, F.mse_loss(mine, target))


EVEN = '''
from collections import OrderedDict

from torch import nn


class Even(nn.Sequential):
    """Two stages of eight channels, the second half as large."""

    def __init__(self, *, num_classes: int, in_channels: int = 1) -> None:
        def stage(channels: int, stride: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(channels, 8, 3, stride, 1), nn.BatchNorm2d(8), nn.ReLU())

        parts = OrderedDict(layer1=stage(in_channels, 1), layer3=stage(8, 2), pool=nn.AdaptiveAvgPool2d(1))
        super().__init__(parts | OrderedDict(flatten=nn.Flatten(), fc=nn.Linear(8, num_classes)))
'''


def test_it_trains_and_ships_a_model_that_loads_by_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    more = ("data.limit=1200", "optimizer.lr=0.03", "stages.teacher.epochs=8", "train.epochs=8")
    run = run_it(tmp_path, TEXT, *more)
    mine = [line for line in run.metrics() if line["stage"] == "student"]
    teacher, student = load_model(run / "teacher"), load_model(run / "student")
    assert student.record.kind == "reused_head" and student.record.arguments["base"]["kind"] == "digits_cnn"
    assert torch.equal(student.net.fc.weight, teacher.net.fc.weight)
    assert torch.equal(student.net.fc.bias, teacher.net.fc.bias)
    assert set(mine[-1]["terms"]) == {"feature"}
    assert mine[-1]["terms"]["feature"] < 0.5 * mine[0]["terms"]["feature"]
    assert mine[-1]["val"]["top1"] > 50
    check_shipped_is_validated(tmp_path, TEXT.replace("limit: 300", "limit: 1200"), run)


def test_the_teacher_never_changes(tmp_path: Path) -> None:
    parts = build_it(tmp_path, ALONE)
    (teacher,) = parts.teachers
    before = copy.deepcopy(teacher.net.state_dict())
    parts.method.train()
    for batch in parts.loader.epoch(0):
        parts.method.step(batch, 0.0)["feature"].backward()
        parts.optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in teacher.net.state_dict().items())
    assert not any(module.training for module in teacher.net.modules())


def test_it_resumes_bit_identically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_resumes(tmp_path, TEXT, 7)
    stopped, whole = stop_and_resume(tmp_path, TEXT, 6)
    assert stopped == whole


def test_frozen_parts_stay_frozen(tmp_path: Path) -> None:
    stages = "stages: [{name: student, frozen: [layer1], teacher: {kind: digits_cnn, width: 8, control: true}}]\n"
    parts = build_it(tmp_path, BASE + LOSSES + METHOD + stages)
    parts.method.train()
    net = parts.method.student.net
    assert not net.layer1.training and not any(p.requires_grad for p in net.layer1.parameters())
    assert net.layer2.training and all(p.requires_grad for p in net.layer2.parameters())


def test_a_saved_model_gives_the_same_logits(tmp_path: Path) -> None:
    base = {"kind": "cifar_resnet", "depth": 8, "width": 4}
    arguments = {"base": base, "cut": "layer2", "width": 8, "channels": 6, "factor": 3, "resize": [4, 4], "bias": False}
    names = [str(i) for i in range(5)]
    model = build_model(ModelRecord("reused_head", arguments, 5, names, [3, 32, 32])).eval()
    save_model(model, tmp_path / "model")
    images = torch.rand(2, 3, 32, 32)
    again = load_model(tmp_path / "model")
    assert torch.equal(again(images), model(images)) and again.net.fc.bias is None


@pytest.mark.parametrize(
    ("change", "key", "said"),
    [
        ("teacher=null", "teacher", "there are 0"),
        ("teacher=[{kind: digits_cnn, control: true}, {kind: digits_cnn, control: true}]", "teacher", "there are 2"),
        ("student={kind: './loose.py:Loose'}", "student", "no sequential net"),
        ("method.student_tap=layer9", "method.student_tap", "no part 'layer9'"),
        ("method.student_tap=flatten", "method.student_tap", "a map"),
        ("method.teacher_tap=layer1", "method.teacher_tap", "takes 16 channels"),
        ("method.head=classifier", "method.head", "no module 'classifier'"),
        ("method.head=pool", "method.head", "no linear layer"),
        ("method.factor=17", "factor", "leave none"),
        ("student={kind: './even.py:Even'}", "student.kind", "from a file of yours"),
    ],
)
def test_what_cannot_work_is_refused(change: str, key: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "loose.py").write_text(LOOSE)
    (tmp_path / "even.py").write_text(EVEN)
    change = change.replace("./", f"{tmp_path}/")
    losses = ("losses=[{kind: ce}]",) if change.startswith("teacher=") else ()
    with pytest.raises(ConfigError, match=said) as caught:
        build_it(tmp_path, ALONE, change, *losses)
    assert caught.value.problems[0].key == key and caught.value.problems[0].hint
