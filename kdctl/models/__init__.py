"""The table of models: kind -> (target, summary, preset arguments). Nothing here imports torch.

A kind may also be `torchvision:NAME`, `timm:NAME`, `huggingface:NAME_OR_FOLDER`, `package.module:Class` or
`./my_file.py:Class`.
"""

from __future__ import annotations

from typing import Any


def _cifar(depth: int, **widths: int) -> tuple[str, str, dict[str, Any]]:
    wide = ", four times as wide" if widths else ""
    summary = f"CIFAR ResNet with {depth} layers{wide} (three stages)"
    return "resnet_cifar:CifarResNet", summary, {"depth": depth, **widths}


def _four_stages(depth: int) -> tuple[str, str, dict[str, Any]]:
    summary = f"ResNet with {depth} layers in its CIFAR form (3x3 stem, no max-pool, four stages)"
    return "resnet_cifar:FourStageResNet", summary, {"depth": depth}


def _wide(depth: int, width: int) -> tuple[str, str, dict[str, Any]]:
    summary = f"wide ResNet with {depth} layers, widening factor {width}"
    return "wide_resnet:WideResNet", summary, {"depth": depth, "width": width}


def _vgg(depth: int) -> tuple[str, str, dict[str, Any]]:
    return "vgg:VGG", f"VGG with {depth} layers and batch norm, one linear layer at the end", {"depth": depth}


MODELS: dict[str, tuple[str, str] | tuple[str, str, dict[str, Any]]] = {
    "resnet8": _cifar(8),
    "resnet14": _cifar(14),
    "resnet20": _cifar(20),
    "resnet32": _cifar(32),
    "resnet44": _cifar(44),
    "resnet56": _cifar(56),
    "resnet110": _cifar(110),
    "resnet8x4": _cifar(8, stem=32, width=64),
    "resnet32x4": _cifar(32, stem=32, width=64),
    "cifar_resnet": ("resnet_cifar:CifarResNet", "CIFAR ResNet of any depth 6n + 2 and width"),
    "resnet18": _four_stages(18),
    "resnet34": _four_stages(34),
    "resnet50": _four_stages(50),
    "wrn_16_1": _wide(16, 1),
    "wrn_16_2": _wide(16, 2),
    "wrn_40_1": _wide(40, 1),
    "wrn_40_2": _wide(40, 2),
    "wide_resnet": ("wide_resnet:WideResNet", "wide ResNet of any depth 6n + 4 and widening factor"),
    "vgg8": _vgg(8),
    "vgg11": _vgg(11),
    "vgg13": _vgg(13),
    "vgg16": _vgg(16),
    "vgg19": _vgg(19),
    "mobilenet_v2": ("mobilenet:MobileNetV2", "MobileNetV2 for 32x32 images, half width as in the literature"),
    "shufflenet_v1": ("shufflenet:ShuffleNetV1", "ShuffleNet V1 for 32x32 images, three groups"),
    "shufflenet_v2": ("shufflenet:ShuffleNetV2", "ShuffleNet V2 for 32x32 images"),
    "digits_cnn": ("small:DigitsCNN", "small convolutional net for digits (8x8 or 28x28)"),
    "lenet5": ("small:LeNet5", "LeNet-5 for digits of 28x28 pixels, of any width, with or without batch norm"),
    "mlp": ("small:MLP", "multilayer perceptron over the flattened image"),
    "tiny_transformer": ("tiny_transformer:TinyTransformer", "small vision transformer over patches of small images"),
    "gpt": ("gpt:GPT", "a decoder for texts of any depth and width: language models"),
    "bert": ("bert:Bert", "BERT for texts, of any size; published encoders load into it"),
    "mobilebert": ("mobilebert:MobileBert", "MobileBERT for texts: deep, and narrow inside each layer (ACL 2020)"),
    "reused_head": ("reused_head:ReusedHead", "the first part of a net under another's classifier (what simkd ships)"),
}

ALIASES = {
    "wrn": "wide_resnet",
    "mobilenetv2": "mobilenet_v2",
    "shufflenetv1": "shufflenet_v1",
    "shufflenetv2": "shufflenet_v2",
}
