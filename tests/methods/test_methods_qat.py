"""Quantisation-aware training: folded, rounded, trained with the teacher, shipped, resumed, and loaded again."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from method_runs import BASE, first_batch, load, run_it, stop_and_resume
from method_runs import built as build_it
from torch import nn

from kdctl import build
from kdctl.build import Built
from kdctl.errors import ConfigError
from kdctl.evaluate import validate
from kdctl.methods.qat import QAT
from kdctl.models.record import ModelRecord, build_model, load_model, save_model
from kdctl.quant import fake
from kdctl.signals import TokenInput

KD = "losses: [{kind: kd, temperature: 2.0}]\n"
CONTROL = "teacher: {kind: digits_cnn, width: 8, control: true}\n"
ALONE = BASE + KD + CONTROL + "method: {kind: qat, samples: 32}\n"
STAGES = """
stages:
  - {name: plain, losses: [{kind: ce}], epochs: 6, method: {kind: distill}}
  - name: student
    from: plain
    teacher: {from: plain}
    losses: [{kind: kd, temperature: 2.0}]
    method: {kind: qat, weight_bits: 3, activation_bits: 4, samples: 32}
    epochs: 3
"""
TEXT = BASE.replace("epochs: 3, ", "").replace("width: 4", "width: 8") + STAGES


def wrapped(parts: Built) -> dict[str, fake.FakeQuant]:
    return dict(fake.layers(parts.method.student.net))


def bits(layer: fake.FakeQuant) -> tuple[int, int | None]:
    inputs = layer.input_quantizer
    return layer.weight_quantizer.bits, None if inputs is None else inputs.bits


def test_normalisation_is_folded_and_every_layer_rounds(tmp_path: Path) -> None:
    fp32 = build_it(tmp_path, BASE + KD + CONTROL).method.student.eval()
    parts = build_it(tmp_path, ALONE)
    net = parts.method.student.net
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    layers = wrapped(parts)
    assert set(layers) == {n for n, m in fp32.net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert all(bits(layer) == (8, 8) and layer.weight.requires_grad for layer in layers.values())
    assert all(p.requires_grad for p in net.parameters()) and all(layer.bias is not None for layer in layers.values())
    for layer in layers.values():
        layer.quantizing = False
    images = first_batch(parts).inputs
    torch.testing.assert_close(parts.method.student(images), fp32(images), rtol=1e-4, atol=1e-5)


def test_ranges_come_from_training_samples_before_the_first_step(tmp_path: Path) -> None:
    parts = build_it(tmp_path, ALONE, "method.calibration=minmax", "method.samples=100")
    method, layers = parts.method, wrapped(parts)
    method.train()
    before = copy.deepcopy(method.student.net.state_dict())
    modes: list[bool] = []
    method.student.net.register_forward_pre_hook(lambda net, _: modes.append(net.training))
    method.start(parts.loader)
    assert modes == [False, False]  # in eval mode, in two parts
    few = parts.loader.few(100).inputs
    first = next(iter(layers.values())).input_quantizer
    assert first is not None
    normalised = (few - method.student.mean) / method.student.std
    width = float(normalised.max() - normalised.min())
    low, high = first.range()
    assert high - low == pytest.approx(width, rel=1e-5)
    assert low == pytest.approx(float(normalised.min()), abs=width / 500)
    changed = {name for name, value in method.student.net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("quantizer" in name for name in changed)
    assert method.student.net.training and all(layer.quantizing for layer in layers.values())


def test_first_and_last_layer_and_what_is_skipped(tmp_path: Path) -> None:
    some = ("method.weight_bits=3", "method.activation_bits=4")
    layers = wrapped(build_it(tmp_path, ALONE, *some, "method.skip=[layer2.*, layer3.con?]"))
    found = {path: bits(layer) for path, layer in layers.items()}
    assert found["conv1"] == found["fc"] == (8, 8) and not any(p.startswith("layer2") for p in found)
    inner = {value for path, value in found.items() if path not in ("conv1", "fc")}
    assert inner <= {(3, 4)} and len(layers) < len(wrapped(build_it(tmp_path, ALONE)))
    layers = wrapped(build_it(tmp_path, ALONE, *some, "method.first_last_bits=null"))
    assert {bits(layer) for layer in layers.values()} == {(3, 4)}
    layers = wrapped(build_it(tmp_path, ALONE, "method.weight_bits=4", "method.activation_bits=null"))
    assert {bits(layer) for layer in layers.values()} == {(8, None), (4, None)}


def test_the_gradient_is_taken_at_the_rounded_weights(tmp_path: Path) -> None:
    """Quantized distillation: that of the distillation loss of the net with weights on the grid, applied to those in
    full precision."""
    parts = build_it(tmp_path, ALONE, "method.quantizer=plain", "method.weight_bits=4", "method.activation_bits=null")
    method, batch = parts.method, first_batch(parts)
    method.train()
    plain, _ = fake.release(method.student.net)
    method.step(batch, 0.0)["kd"].backward()
    x = (batch.inputs - method.student.mean) / method.student.std
    with torch.no_grad():
        target = F.softmax(parts.teachers[0](batch.inputs) / 2, 1)
    (-4 * (target * F.log_softmax(plain(x) / 2, 1)).sum()).backward()
    at_grid = dict(plain.named_parameters())
    for name, parameter in method.student.net.named_parameters():
        torch.testing.assert_close(parameter.grad, at_grid[name].grad, rtol=1e-4, atol=1e-4)
        assert name.endswith("bias") or not torch.equal(parameter, at_grid[name])


def test_steps_have_a_group_of_their_own(tmp_path: Path) -> None:
    parts = build_it(tmp_path, ALONE, "optimizer.weight_decay=0.1", "method.step_lr=0.25")
    *others, own = parts.optimizer.param_groups
    assert own["weight_decay"] == 0 and own["lr"] == own["initial_lr"] == 0.0025
    assert {id(p) for p in own["params"]} == {id(p) for p in fake.steps(parts.method.student.net)}
    held = [id(p) for group in parts.optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in parts.method.trained.parameters())
    assert all(group["weight_decay"] == 0.1 for group in others)
    plain = build_it(tmp_path, ALONE, "method.quantizer=plain")
    assert len(plain.optimizer.param_groups) == 1


def test_it_recovers_what_rounding_lost_and_ships_a_model_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    more = ("data.limit=600", "student.width=12", "stages.plain.epochs=10")
    more += ("stages.student.optimizer={kind: adam, lr: 0.005}", "stages.student.method.weight_bits=2")
    run = run_it(tmp_path, TEXT, *more)
    values = {line["stage"]: line["val"]["top1"] for line in run.metrics()}
    experiment = load(tmp_path, TEXT, *more)
    stage = next(s for s in experiment.train_stages if s.name == "student")
    data = build.build_data(experiment)
    parts = build.build_stage(
        experiment, stage, data, lambda name: run.stage_dir(name) / "model", run / "stages/plain/model"
    )
    parts.method.start(parts.loader)
    assert data.val is not None
    rounded = validate(parts.method.student, data.val, parts.task, torch.device("cpu"), 256, "fp32")["top1"]
    print(values, rounded)
    assert rounded < values["plain"] - 10 and values["student"] > (rounded + values["plain"]) / 2
    student = load_model(run / "student")
    kinds = [edit["edit"] for edit in student.record.structure or []]
    assert set(kinds) == {"skip", "bias", "fake_quant"}
    assert {bits(layer) for _, layer in fake.layers(student.net)} == {(2, 4), (8, 8)}
    again = validate(student, data.val, parts.task, torch.device("cpu"), 256, "fp32")["top1"]
    assert again == max(line["val"]["top1"] for line in run.metrics() if line["stage"] == "student")
    plain, learned = fake.release(student.net)
    assert set(learned) == {path for path, _ in fake.layers(student.net)} and not fake.is_quantized(plain)


@pytest.mark.parametrize(
    "more",
    [
        ("train.ema=0.9", "stages.student.accumulate=2"),
        ("stages.student.method.quantizer=plain", "stages.student.method.observe_epochs=1", "train.precision=bf16"),
    ],
    ids=["lsq, averaged, in micro-batches", "plain, bf16"],
)
def test_it_resumes_bit_identically(more: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stopped, whole = stop_and_resume(tmp_path, TEXT, 7, *more)
    assert stopped == whole


def test_observed_ranges_stop(tmp_path: Path) -> None:
    parts = build_it(tmp_path, ALONE, "method.quantizer=plain", "method.observe_epochs=1")
    method, batch = parts.method, first_batch(parts)
    method.start(parts.loader)
    method.train()

    def highs() -> list[float]:
        return [float(layer.input_quantizer.high) for layer in wrapped(parts).values()]  # type: ignore[union-attr]

    before = highs()
    method.step(batch, 0.9)
    moved = highs()
    method.step(batch, 1.0)
    assert before != moved == highs()


def test_micro_batches_change_nothing(tmp_path: Path) -> None:
    parts = build_it(tmp_path, ALONE, "method.weight_bits=4", "method.activation_bits=4")
    method, batch = parts.method, first_batch(parts)
    method.start(parts.loader)
    method.train()
    found = []
    for count in (1, 4):
        for micro in batch.micro_batches(count):
            method.step(micro, 0.0)["kd"].backward()
        found.append([p.grad.clone() for p in method.student.net.parameters()])  # type: ignore[union-attr]
        method.student.net.zero_grad()
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)
    assert all(p.grad is None for p in method.student.net.parameters())


def test_taps_keep_their_paths(tmp_path: Path) -> None:
    taps = "[layer1, {student: layer2.conv, teacher: layer2}, conv1]"
    parts = build_it(tmp_path, ALONE)
    paths = [path for path, _ in parts.method.student.net.named_modules()]
    assert set(paths) > {path for path, _ in build_it(tmp_path, BASE).method.student.net.named_modules()}
    conv = next(path for path in wrapped(parts) if path.startswith("layer2"))
    losses = KD.replace("]", ", {kind: attention_transfer, taps: " + taps.replace("layer2.conv", conv) + "}]", 1)
    parts = build_it(tmp_path, BASE + losses + CONTROL + "method: {kind: qat, samples: 32}\n")
    parts.method.train()
    parts.method.step(first_batch(parts), 0.0)["attention_transfer"].backward()
    assert parts.method.student.net.conv1.weight_quantizer.step.grad.any()


def test_frozen_layers_keep_weights_and_steps(tmp_path: Path) -> None:
    stages = "stages: [{name: student, frozen: [layer1], teacher: {kind: digits_cnn, width: 8, control: true}}]\n"
    text = BASE + KD + "method: {kind: qat, samples: 32}\n" + stages
    parts = build_it(tmp_path, text)
    parts.method.train()
    net = parts.method.student.net
    assert not net.layer1.training and not any(p.requires_grad for p in net.layer1.parameters())
    assert any(path.startswith("layer1") for path in wrapped(parts)) and net.fc.weight_quantizer.step.requires_grad


def test_a_saved_model_gives_the_same_logits(tmp_path: Path) -> None:
    parts = build_it(tmp_path, ALONE, "method.quantizer=plain", "method.symmetric=true", "method.skip=[fc]")
    parts.method.start(parts.loader)
    student = parts.method.finalize().eval()
    save_model(student, tmp_path / "model")
    images = first_batch(parts).inputs
    again = load_model(tmp_path / "model")
    assert torch.equal(again(images), student(images)) and fake.is_quantized(again.net)
    assert not torch.equal(build_model(student.record).eval()(images), student(images))


BYPASSED = '''
from torch import nn


class Bypassed(nn.Module):
    """A net with one of torch's encoder layers."""

    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(self.encoder(x[:, 0]).mean(1))
'''
UNUSED = BYPASSED.replace("self.encoder(x[:, 0])", "x[:, 0]").replace("Bypassed", "Unused")
UNUSED = UNUSED.replace("nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)", "nn.Linear(8, 8)")
SHARED = UNUSED.replace("Unused", "Shared").replace("nn.Linear(8, num_classes)", "self.encoder")


@pytest.mark.parametrize(
    ("change", "key", "said"),
    [
        ("method.skip=[layer9.*]", "method.skip", "no layer matches"),
        ("method.skip=['*']", "method.skip", "no layer is left"),
        ("student={kind: './own.py:Bypassed'}", "method", "TransformerEncoderLayer"),
        ("student={kind: './own.py:Unused'}", "method.skip", "encoder"),
        ("student={kind: './own.py:Shared'}", "method", "same layer"),
    ],
)
def test_what_cannot_work_is_refused(change: str, key: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(BYPASSED + UNUSED + SHARED)
    with pytest.raises(ConfigError, match=said) as caught:
        build_it(tmp_path, ALONE, change.replace("./", f"{tmp_path}/"))
    assert caught.value.problems[0].key == key and caught.value.problems[0].hint


NORMALISED = '''
import torch.nn.functional as F
from torch import nn


class Branching(nn.Module):
    """A net that torch.fx cannot follow, with a norm soon after its first layer."""

    def __init__(self, *, num_classes: int, in_channels: int, before: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 4, 3)
        self.before = before
        self.relu = nn.ReLU(inplace=True)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x):
        y = self.conv(x)
        if float(y.detach().sum()) > 1e9:
            return x
        if self.before == "relu":
            y = self.relu(y)
        z = self.norm(self.drop(y))
        return self.fc((z + y if self.before == "sum" else z).mean((2, 3)))
'''


@pytest.mark.parametrize(("before", "refused"), [("nothing", True), ("relu", False), ("sum", False)])
def test_a_norm_that_an_exporter_would_fold_is_refused(before: str, refused: bool, tmp_path: Path) -> None:
    """One after an activation, or that shares its input with a sum, has to stay in any file."""
    (tmp_path / "own.py").write_text(NORMALISED)
    change = f"student={{kind: '{tmp_path}/own.py:Branching', before: {before}}}"
    if refused:
        with pytest.raises(ConfigError, match="batch normalisation after conv cannot") as caught:
            build_it(tmp_path, ALONE, change)
        assert caught.value.problems[0].hint
        assert list(wrapped(build_it(tmp_path, ALONE, change, "method.skip=[conv]"))) == ["fc"]
    else:
        assert list(wrapped(build_it(tmp_path, ALONE, change))) == ["conv", "fc"]


def test_a_quantised_student_is_not_quantised_again(tmp_path: Path) -> None:
    parts = build_it(tmp_path, ALONE)
    save_model(parts.method.student, tmp_path / "model")
    with pytest.raises(ConfigError, match="quantised already"):
        build_it(tmp_path, ALONE, f"student={{kind: digits_cnn, width: 4, weights: {tmp_path}/model.safetensors}}")


def test_models_of_texts_learn_the_steps_of_weights_alone() -> None:
    """No file of texts holds ranges of activations, which is said before anything is trained."""
    tokens = TokenInput(vocab_size=20, length=6, pad=0)
    student = build_model(ModelRecord("bert", {"depth": 1, "width": 8}, 2, ["a", "b"], [], tokens=tokens))
    with pytest.raises(ConfigError, match="activation_bits: 8, and no file of texts") as caught:
        QAT().prepare(student, [], lambda number: student)
    assert caught.value.problems[0].key == "method.activation_bits"
    rounding = QAT(activation_bits=None).prepare(student, [], lambda number: student).eval()
    assert {bits(layer) for _, layer in fake.layers(rounding.net)} == {(8, None)}
    texts = torch.tensor([[3, 4, 5, 0, 0, 0], [6, 7, 8, 9, 10, 11]])
    torch.testing.assert_close(rounding(texts[:1]), rounding(texts)[:1], rtol=1e-4, atol=1e-5)
