"""The nets: published parameter counts, shapes, taps, arithmetic, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kdctl import registry
from kdctl.errors import ConfigError
from kdctl.models import MODELS
from kdctl.models.record import Model, ModelRecord, build_model

PUBLISHED = {
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "resnet50": 23_705_252,
    "wrn_16_1": 180_916,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg11": 9_277_284,
    "vgg13": 9_462_180,
    "vgg16": 14_774_436,
    "vgg19": 20_086_692,
    "mobilenet_v2": 812_836,
    "shufflenet_v1": 949_258,
    "shufflenet_v2": 1_355_528,
}
"""Parameters with 100 classes and three channels: the numbers of RepDistiller's and mdistiller's nets."""

OPTION_A = {"resnet20": 269_722, "resnet32": 464_154, "resnet44": 658_586, "resnet56": 853_018, "resnet110": 1_727_962}
"""Parameters with 10 classes and parameter-free shortcuts: 0.27, 0.46, 0.66, 0.85 and 1.7 M in He et al., table 6."""

FAMILIES = [
    "resnet8", "wrn_16_2", "vgg8", "mobilenet_v2", "shufflenet_v1", "shufflenet_v2", "digits_cnn", "tiny_transformer",
]  # fmt: skip
"""One quick kind a family: every parameter learns, samples of a batch stay apart, and bf16 is close to fp32."""

ARGUMENTS: dict[str, dict[str, object]] = {
    "cifar_resnet": {"depth": 14},
    "wide_resnet": {"depth": 10, "width": 2},
    "mlp": {"hidden": [16, 8]},
    "reused_head": {"base": {"kind": "digits_cnn", "width": 4}, "width": 8, "channels": 16},
}
SLOW_KINDS = {"resnet34", "resnet50", "vgg13", "vgg16", "vgg19", "resnet110", "wrn_40_2", "resnet32x4"}
QUICK_KINDS = sorted(
    set(MODELS) - SLOW_KINDS - {"bert", "gpt", "mobilebert"}
)  # which read texts, and have tests of theirs


def record(kind: str, shape: tuple[int, int, int] = (3, 32, 32), classes: int = 7, **arguments: object) -> ModelRecord:
    names = [f"class {i}" for i in range(classes)]
    return ModelRecord(kind, ARGUMENTS.get(kind, {}) | arguments, classes, names, list(shape))


def build(kind: str, shape: tuple[int, int, int] = (3, 32, 32), classes: int = 7, **arguments: object) -> Model:
    torch.manual_seed(0)
    return build_model(record(kind, shape, classes, **arguments))


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("kind", PUBLISHED)
def test_parameter_counts_are_the_published_ones(kind: str) -> None:
    with torch.device("meta"):
        net = registry.create("models", kind, {}, num_classes=100, in_channels=3)
    assert count(net) == PUBLISHED[kind]


@pytest.mark.parametrize("kind", OPTION_A)
def test_parameter_counts_with_parameter_free_shortcuts(kind: str) -> None:
    with torch.device("meta"):
        net = registry.create("models", kind, {"shortcut": "pad"}, num_classes=10, in_channels=3)
    assert count(net) == OPTION_A[kind]


@pytest.mark.parametrize(("width", "parameters"), [(4, 1_182), (8, 4_370), (32, 65_834)])
def test_parameter_counts_of_the_digits_net(width: int, parameters: int) -> None:
    assert count(build("digits_cnn", (1, 8, 8), 10, width=width)) == parameters


@pytest.mark.parametrize("kind", QUICK_KINDS)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8)])
def test_logits_have_one_column_a_class(kind: str, shape: tuple[int, int, int]) -> None:
    model = build(kind, shape).eval()
    logits = model(torch.rand(2, *shape))
    assert logits.shape == (2, 7)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_parameter_learns(kind: str) -> None:
    model = build(kind)
    model(torch.rand(4, 3, 32, 32)).logsumexp(1).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("kind", FAMILIES)
def test_evaluation_does_not_depend_on_the_batch(kind: str) -> None:
    model = build(kind).eval()
    images = torch.rand(3, 3, 32, 32)
    before = {n: b.clone() for n, b in model.named_buffers()}
    together, alone = model(images), torch.cat([model(i[None]) for i in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


@pytest.mark.parametrize("kind", FAMILIES)
def test_bfloat16_and_channels_last_are_close_to_fp32(kind: str) -> None:
    model = build(kind)
    images = torch.rand(8, 3, 32, 32)
    expected = model.eval()(images)
    model.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images.to(memory_format=torch.channels_last))
        training = model.train()(images)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).norm() < 0.03 * expected.norm()
    assert torch.isfinite(training).all()


TAPS = {
    "resnet20": ["relu", "layer1", "layer2", "layer3", "layer3.2.add", "layer3.2.relu", "pool", "flatten", "fc"],
    "resnet18": ["layer1", "layer4", "layer4.1.add"],
    "wrn_16_2": ["layer1", "layer3", "layer2.0.bn1", "layer3.0.bn1", "bn1", "relu", "flatten", "fc"],
    "vgg8": ["layer1", "layer5", "layer5.relu", "layer5.bn1", "pool1", "flatten", "fc"],
    "mobilenet_v2": ["conv1", "layer1", "layer7", "conv2.relu", "layer2.0.branch.relu1", "flatten", "fc"],
    "shufflenet_v1": ["relu", "layer1", "layer3", "layer3.3.join", "flatten", "fc"],
    "shufflenet_v2": ["relu", "layer1", "layer3", "layer3.3.branch.bn3", "relu2", "flatten", "fc"],
    "digits_cnn": ["relu", "layer1", "layer3", "layer3.bn", "layer3.relu", "flatten", "fc"],
    "tiny_transformer": [
        "patch",
        "tokens",
        "blocks.5",
        "blocks.0.attention",
        "blocks.0.attention.softmax",
        "blocks.3.attention.q",
        "blocks.5.mlp",
        "blocks.5.mlp.act",
        "norm",
        "pool",
        "fc",
    ],
    "mlp": ["flatten", "layer1", "layer2.linear", "layer2.relu", "fc"],
}


@pytest.mark.parametrize("kind", TAPS)
def test_documented_taps_are_modules_that_are_called(kind: str) -> None:
    model = build(kind).eval()
    called: dict[str, Tensor] = {}
    for path in TAPS[kind]:
        hook = lambda module, inputs, output, path=path: called.setdefault(path, output)  # noqa: E731
        model.net.get_submodule(path).register_forward_hook(hook)
    logits = model(torch.rand(2, 3, 32, 32))
    assert list(called) and set(called) == set(TAPS[kind])
    assert torch.equal(called["fc"], logits) if "fc" in called else True


def test_stage_shapes_of_a_cifar_resnet() -> None:
    net = build("resnet8x4").net
    x = net.relu(net.bn1(net.conv1(torch.rand(2, 3, 32, 32))))
    shapes = []
    for stage in (net.layer1, net.layer2, net.layer3):
        x = stage(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(64, 32, 32), (128, 16, 16), (256, 8, 8)]


def test_the_sum_of_a_block_is_its_output_before_the_relu() -> None:
    net = build("resnet8").eval().net
    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    kept: dict[str, Tensor] = {}
    net.layer3[0].add.register_forward_hook(lambda m, i, o: kept.update(before=o))
    net.layer3.register_forward_hook(lambda m, i, o: kept.update(after=o))
    net(torch.rand(2, 3, 32, 32))
    assert (kept["before"] < 0).any()
    assert torch.equal(kept["before"].relu(), kept["after"])


def test_where_a_wide_resnet_widens_the_shortcut_starts_after_the_activation() -> None:
    block = build("wrn_16_2").eval().net.layer2[0]
    seen: list[Tensor] = []
    block.shortcut.register_forward_pre_hook(lambda m, i: seen.append(i[0].clone()))
    x = torch.randn(2, 32, 8, 8)
    block(x)
    assert torch.equal(seen[0], block.bn1(x).relu())
    assert not torch.equal(seen[0], x)


def test_a_padded_shortcut_keeps_every_second_pixel_in_the_middle_channels() -> None:
    shortcut = build("resnet8", shortcut="pad").net.layer2[0].downsample
    x = torch.rand(1, 16, 8, 8)
    y = shortcut(x)
    assert y.shape == (1, 32, 4, 4)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any() and not y[:, 24:].any()


def test_shuffle_interleaves_the_groups() -> None:
    shuffle = build("shufflenet_v1").net.layer2[0].branch.shuffle
    channels = torch.arange(6.0).view(1, 6, 1, 1)
    assert shuffle(channels).flatten().tolist() == [0, 2, 4, 1, 3, 5]


def test_convolutions_start_by_he_fan_out() -> None:
    weight = build("resnet8x4").net.layer3[0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        ("cifar_resnet", {"depth": 21}, "6n + 2"),
        ("cifar_resnet", {"depth": 2}, "6n + 2"),
        ("wide_resnet", {"depth": 20}, "6n + 4"),
        ("mobilenet_v2", {"width": 0.01}, "width 0.01"),
        ("resnet20", {"shortcut": "pad", "stem": 32}, "narrow"),
        ("resnet20", {"depth": 32}, "depth"),
        ("resnet20", {"widht": 8}, "widht"),
        ("resnet21", {}, "resnet2"),
    ],
)
def test_what_cannot_be_built_is_a_config_error(kind: str, arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("+", r"\+")):
        build(kind, **arguments)
