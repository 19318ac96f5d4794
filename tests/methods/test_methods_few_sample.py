"""FSKD: layers are mapped onto the teacher's by least squares, and the map goes into their weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_runs import BASE, check_resumes, check_shipped_is_validated, first_batch, load, run_it
from method_runs import built as build_it
from torch import Tensor, nn

from kdctl import build
from kdctl.build import Built
from kdctl.errors import ConfigError
from kdctl.evaluate import validate
from kdctl.models.record import Model, load_model, save_model

NORMS = "[bn1, layer1.bn, layer2.bn, layer3.bn]"
CONVS = "[conv1, layer1.conv, layer2.conv, layer3.conv]"


def text(layers: str = NORMS, **more: Any) -> str:
    given = "".join(f", {name}: {value}" for name, value in more.items())
    return (
        BASE.replace("lr: 0.01", "lr: 0.000001")
        .replace("width: 4", "width: 8, weights: student.safetensors")
        .replace("epochs: 3", "epochs: 1")
        .replace("limit: 300", "labels_per_class: all, limit: 1200")
        + "losses: [{kind: kd}]\nteacher: {kind: digits_cnn, width: 8, weights: teacher.safetensors}\n"
        + f"method: {{kind: few_sample, layers: {layers}, samples: 200{given}}}\n"
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained teacher."""
    folder = tmp_path_factory.mktemp("fskd")
    teacher = BASE.replace("width: 4", "width: 8").replace("limit: 300", "labels_per_class: all, limit: 1200")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run = run_it(folder, teacher, "train.epochs=12", "optimizer.lr=0.03")
        save_model(load_model(run / "student"), folder / "made" / "teacher")
    return folder / "made"


@pytest.fixture
def folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the teacher and a student that is the teacher with disturbed weights."""
    teacher = load_model(trained / "teacher")
    save_model(teacher, tmp_path / "teacher")
    save_model(disturbed(teacher), tmp_path / "student")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def disturbed(teacher: Model) -> Model:
    """The teacher with a third of the input weights of each convolution pruned, and channels mixed a little."""
    model = copy.deepcopy(teacher)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.net.modules():
            if isinstance(module, nn.Conv2d):
                channels = module.out_channels
                mix = torch.eye(channels) + 0.35 * torch.randn(channels, channels, generator=generator)
                module.weight.copy_(torch.einsum("oc,cihw->oihw", mix, module.weight))
                small = module.weight.abs() < module.weight.abs().flatten().quantile(0.2)
                module.weight[small] = 0.0
    return model


def top1(model: Model, folder: Path, text: str) -> float:
    experiment = load(folder, text)
    data = build.build_data(experiment)
    assert data.val is not None
    return validate(model, data.val, build.build_task(experiment), torch.device("cpu"), 256, "fp32")["top1"]


def outputs(net: nn.Module, images: Tensor, path: str) -> Tensor:
    """What a module of a net gives, in eval mode, as rows."""
    kept: list[Tensor] = []
    handle = net.get_submodule(path).register_forward_hook(lambda *given: kept.append(given[2].detach().clone()))
    with torch.no_grad():
        net.eval()(images)
    handle.remove()
    return kept[0].movedim(1, -1).flatten(0, 2).double()


def started(folder: Path, text: str) -> tuple[Built, Model, Tensor]:
    """A stage after its alignment, the student before it, and the normalised images that it saw."""
    parts = build_it(folder, text)
    before = copy.deepcopy(parts.method.student)
    parts.method.start(parts.loader)
    images = (parts.loader.few(200).inputs - before.mean) / before.std
    return parts, before, images


def test_a_disturbed_copy_of_the_teacher_recovers_on_200_samples(folder: Path) -> None:
    given = text()
    parts, before, _ = started(folder, given)
    teacher, worse, better = (top1(m, folder, given) for m in (parts.teachers[0], before, parts.method.student))
    assert teacher > 80 and worse < teacher - 30
    assert better > teacher - 10
    errors = parts.method.errors
    assert list(errors) == ["bn1", "layer1.bn", "layer2.bn", "layer3.bn"]
    assert all(after < 0.5 * first for first, after in errors.values())


@pytest.mark.parametrize(("path", "conv"), [("layer1.bn", "layer1.conv"), ("bn1", "conv1")])
def test_the_solution_is_that_of_least_squares(path: str, conv: str, folder: Path) -> None:
    """Against numpy's solver on the stacked system, ridge and all; the layer before is what it was."""
    parts, before, images = started(folder, text(f"[{path}]", ridge=0.01))
    own, other = (outputs(net, images, path).numpy() for net in (before.net, parts.teachers[0].net))
    channels = own.shape[1]
    weight = np.sqrt(0.01 * np.square(own).sum(0).mean())
    system = np.concatenate([np.c_[own, np.ones(len(own))], np.c_[weight * np.eye(channels), np.zeros(channels)]])
    wanted = np.concatenate([other, weight * np.eye(channels)])
    solution = np.linalg.lstsq(system, wanted, rcond=None)[0]
    expected = np.c_[own, np.ones(len(own))] @ solution
    got = outputs(parts.method.student.net, images, path).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)
    names = {name for name, value in parts.method.student.net.state_dict().items() if not same(before, name, value)}
    assert names <= {f"{conv}.weight", *(f"{path}.{n}" for n in ("weight", "bias", "running_mean", "running_var"))}


def same(model: Model, name: str, value: Tensor) -> bool:
    return torch.equal(model.net.state_dict()[name], value)


def test_the_statistics_of_an_aligned_norm_are_those_of_the_samples(folder: Path) -> None:
    """So training goes on from where the alignment left off: train mode gives what eval mode gives."""
    parts, _, images = started(folder, text("[bn1]"))
    net = copy.deepcopy(parts.method.student.net)
    rows = outputs(net, images, "conv1")
    torch.testing.assert_close(net.bn1.running_mean.double(), rows.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.bn1.running_var.double(), rows.var(0, correction=0), rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        features = net.conv1(images)
        torch.testing.assert_close(net.bn1.train()(features), net.bn1.eval()(features), rtol=1e-3, atol=1e-3)


def test_convolutions_are_aligned_before_their_norm_without_a_shift(folder: Path) -> None:
    parts, before, images = started(folder, text(CONVS, ridge=0.0))
    own, other = (outputs(net, images, "conv1").numpy() for net in (before.net, parts.teachers[0].net))
    expected = own @ np.linalg.lstsq(own, other, rcond=None)[0]
    got = outputs(parts.method.student.net, images, "conv1").numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)
    assert same(before, "bn1.running_var", parts.method.student.net.bn1.running_var)
    assert top1(parts.method.student, folder, text()) > top1(before, folder, text()) + 20


BIASED = '''
from collections import OrderedDict

from torch import nn


class Biased(nn.Sequential):
    """A convolution with a bias, with groups where asked for."""

    def __init__(self, *, groups: int = 1, num_classes: int, in_channels: int = 1) -> None:
        parts = OrderedDict(first=nn.Conv2d(in_channels, 4, 3), second=nn.Conv2d(4, 4, 3, groups=groups))
        super().__init__(parts | OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(4, 10)))
'''


def biased(folder: Path, layers: str, student: str = "", teacher: str = "") -> str:
    (folder / "biased.py").write_text(BIASED)
    kind = "kind: './biased.py:Biased'"
    return (
        BASE.replace("kind: digits_cnn, width: 4", f"{kind}{student}")
        + f"losses: [{{kind: kd}}]\nteacher: {{{kind}, control: true{teacher}}}\n"
        + f"method: {{kind: few_sample, layers: {layers}, ridge: 0}}\n"
    )


def test_a_bias_takes_the_shift_and_places_may_have_two_names(tmp_path: Path) -> None:
    """A linear chain: with weights of its own the second layer becomes the teacher's but for what the first lost."""
    parts, before, images = started(tmp_path, biased(tmp_path, "[second=second]"))
    images = (parts.loader.few(500).inputs - before.mean) / before.std
    own, other = (outputs(net, images, "second").numpy() for net in (before.net, parts.teachers[0].net))
    own = np.c_[own, np.ones(len(own))]
    expected = own @ np.linalg.lstsq(own, other, rcond=None)[0]
    got = outputs(parts.method.student.net, images, "second").numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_the_average_of_the_weights_starts_after_the_alignment(folder: Path) -> None:
    run = run_it(folder, text(), "train.ema=0.9999", "train.keep=last")
    assert run.metrics()[-1]["val"]["top1"] > 60


def test_the_teacher_never_changes(folder: Path) -> None:
    before = load_model(folder / "teacher").net.state_dict()
    parts, _, _ = started(folder, text())
    parts.method.train()
    parts.method.step(first_batch(parts), 0.0)["kd"].backward()
    (teacher,) = parts.teachers
    assert all(torch.equal(value, before[name]) for name, value in teacher.net.state_dict().items())
    assert not any(module.training for module in teacher.net.modules())
    assert all(p.grad is None for p in teacher.net.parameters())


def test_it_trains_ships_and_resumes(folder: Path) -> None:
    given = text().replace("epochs: 1", "epochs: 2")
    run = run_it(folder, given)
    check_shipped_is_validated(folder, given, run)
    assert run.metrics()[-1]["val"]["top1"] > 60
    check_resumes(folder, given, 3)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ("[]", "no layer is named"),
        ("[layer9]", "the student has no module 'layer9'"),
        ("[layer1.bn=layer9]", "the teacher has no module 'layer9'"),
        ("[layer1.relu]", "is a ReLU"),
        ("[layer1.bn=layer2.bn]", "gives"),
    ],
)
def test_layers_that_cannot_be_aligned_are_refused(layers: str, said: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        build_it(folder, text(layers))
    assert caught.value.problems[0].key == "method.layers" and caught.value.problems[0].hint


def test_a_grouped_convolution_and_a_lack_of_teachers_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="grouped convolution"):
        build_it(folder, biased(folder, "[second]", student=", groups: 2"))
    with pytest.raises(ConfigError, match="there are 0") as caught:
        build_it(folder, text(), "teacher=null", "losses=[{kind: ce}]")
    assert caught.value.problems[0].key == "teacher"
