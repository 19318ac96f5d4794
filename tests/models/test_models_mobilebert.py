"""MobileBERT: that it is MobileBERT, that padding is nothing to it, its size, its weights, its files."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kdctl.compress.base import Workbench
from kdctl.compress.quantize import Quantize
from kdctl.errors import ConfigError
from kdctl.evaluate import TorchPredictor
from kdctl.export import files
from kdctl.export import onnx as exporting
from kdctl.export.onnx import OnnxPredictor, record_metadata
from kdctl.models.record import Model, ModelRecord, build_model
from kdctl.models.weights import load_weights
from kdctl.signals import TokenInput
from kdctl.taps import Taps
from kdctl.tasks.classification import Classification

TOKENS = TokenInput(vocab_size=60, length=12, pad=0, first=2, separator=3, mask=4, tokenizer="a")
SMALL = {"depth": 2, "width": 24, "bottleneck": 16, "heads": 4, "hidden": 20, "feedforwards": 3, "embedding": 8}
LENGTHS = (12, 3, 7, 1, 9)


def record(tokens: TokenInput = TOKENS, head: str = "sample", **arguments: Any) -> ModelRecord:
    return ModelRecord("mobilebert", SMALL | arguments, 3, ["a", "b", "c"], image_shape=[], tokens=tokens, head=head)


def build(tokens: TokenInput = TOKENS, **arguments: Any) -> Model:
    torch.manual_seed(0)
    return enlarged(build_model(record(tokens, **arguments)))


def enlarged(model: Any) -> Any:
    """Weights that are large enough for every part to matter; padding is embedded as zero."""
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float(name.endswith("LayerNorm.weight")), std=0.2)
        if name.endswith("word_embeddings.weight"):
            parameter.data[0] = 0
    return model.eval()


def texts(pad: int = 0) -> Tensor:
    numbers = torch.randint(5, 59, (len(LENGTHS), 12), generator=torch.Generator().manual_seed(1))
    for row, length in enumerate(LENGTHS):
        numbers[row, length // 2] = 3
        numbers[row, length:] = pad
    return numbers


# ------------------------------------------------------------------------------------------------------ its arithmetic


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="compares with the transformers library")
@pytest.mark.parametrize(
    ("own", "theirs"),
    [
        ({}, {}),
        ({"feedforwards": 1, "norm": "layer_norm", "activation": "gelu"},
         {"num_feedforward_networks": 1, "normalization_type": "layer_norm", "hidden_act": "gelu"}),
        ({"bottleneck_attention": True}, {"use_bottleneck_attention": True, "key_query_shared_bottleneck": False}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("head", ["sample", "vocabulary"])
def test_it_is_the_mobilebert_of_transformers(
    own: dict[str, Any], theirs: dict[str, Any], head: str, tmp_path: Path
) -> None:
    from kdctl.torchvision_guard import ensure_torchvision

    ensure_torchvision()
    from transformers import MobileBertConfig
    from transformers.models.mobilebert import modeling_mobilebert as published

    config = MobileBertConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=20,
        intra_bottleneck_size=16, embedding_size=8, max_position_embeddings=12, num_labels=3,
        **({"num_feedforward_networks": 3} | theirs),
    )  # fmt: skip
    kinds = {"sample": published.MobileBertForSequenceClassification, "vocabulary": published.MobileBertForMaskedLM}
    torch.manual_seed(0)
    reference = enlarged(kinds[head](config)).double()
    for module in reference.modules():  # two of its normalisations have another eps than the published code's 1e-12
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-12
    reference.save_pretrained(tmp_path)
    pairs = dataclasses.replace(TOKENS, pairs=True)
    model = build_model(record(pairs, head, **own)).eval().double()
    load_weights(model.net, tmp_path)
    numbers = texts()
    segments = pairs.segments(numbers)
    assert segments.any()
    taps = [f"mobilebert.encoder.layer.{number}" for number in (0, 1)]
    with torch.no_grad(), Taps(model.net, taps) as hooks, hooks.recording() as features:
        mine = model(numbers)
        wanted = reference(
            input_ids=numbers, attention_mask=(numbers != 0).long(), token_type_ids=segments, output_hidden_states=True
        )
    words = numbers != 0
    where = words if head == "vocabulary" else slice(None)
    torch.testing.assert_close(mine[where], wanted.logits[where], rtol=1e-5, atol=1e-5)
    for name, state in zip(taps, wanted.hidden_states[1:], strict=True):
        torch.testing.assert_close(features[name][words], state[words], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pad", [0, 59])
def test_neither_padding_nor_other_texts_of_the_batch_change_its_logits(pad: int) -> None:
    model = build(dataclasses.replace(TOKENS, pad=pad)).double()
    numbers = texts(pad)
    with torch.no_grad():
        whole = model(numbers)
        for row, length in enumerate(LENGTHS):
            alone = model(numbers[row : row + 1, :length])
            torch.testing.assert_close(alone, whole[row : row + 1], rtol=1e-5, atol=1e-5)
    assert len({tuple(row) for row in whole.tolist()}) == len(LENGTHS)


@pytest.mark.parametrize("ending", ["", ":in"])
def test_attention_is_the_same_whether_it_is_tapped_or_not(ending: str) -> None:
    model, numbers = build(), texts()
    tap = f"mobilebert.encoder.layer.1.attention.self.softmax{ending}"
    with torch.no_grad():
        free = model(numbers)
        with Taps(model.net, [tap]) as hooks, hooks.recording() as features:
            torch.testing.assert_close(model(numbers), free, rtol=1e-5, atol=1e-5)
    maps = features[tap] if not ending else features[tap].softmax(-1)
    padded = (numbers == 0)[:, None, None, :].expand_as(maps)
    assert maps.shape == (5, 4, 12, 12) and float(maps[padded].max()) == 0


# --------------------------------------------------------------------------------------------- its size, its weights


@pytest.mark.parametrize(
    ("arguments", "millions"),
    [
        ({}, 25.3),
        ({"feedforwards": 2, "bottleneck_attention": True}, 15.1),
        ({"bottleneck": 1024, "feedforwards": 1, "norm": "layer_norm", "key_query_shared_bottleneck": False}, 293),
    ],
    ids=["mobilebert", "tiny", "ib_bert_large"],
)
def test_its_size(arguments: dict[str, Any], millions: float) -> None:
    """Table 1 of the paper, which counts the model of masked words."""
    tokens = dataclasses.replace(TOKENS, vocab_size=30_522, length=512)
    with torch.device("meta"):
        model = build_model(ModelRecord("mobilebert", arguments, 2, ["a", "b"], image_shape=[], tokens=tokens))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.045)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"heads": 3}, "3 heads"), ({"positions": 8}, "8 positions"), ({"embedding": 25}, "embeddings of 25")],
)
def test_what_cannot_be(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_model(record(**arguments))


def test_an_encoder_without_a_head_leaves_the_head_as_it_was(tmp_path: Path) -> None:
    source, model = build(), build_model(record())
    own = {name: value.clone() for name, value in model.net.state_dict().items()}
    state = source.net.state_dict()
    save_file(
        {n.removeprefix("mobilebert."): v.clone() for n, v in state.items() if n.startswith("mobilebert.")},
        tmp_path / "model.safetensors",
    )
    load_weights(model.net, tmp_path)
    for name, value in model.net.state_dict().items():
        assert value.equal(own[name] if name.startswith("classifier.") else state[name]), name
    with pytest.raises(ConfigError, match="has what the model has not"):
        load_weights(build_model(record(depth=1)).net, tmp_path)


def test_padding_is_embedded_as_zero_and_stays_so() -> None:
    torch.manual_seed(0)
    model = build_model(record())
    model(texts()).square().sum().backward()
    words = model.net.get_submodule("mobilebert.embeddings.word_embeddings").weight
    assert isinstance(words, Tensor) and words.grad is not None
    assert not words[0].any() and not words.grad[0].any() and words.grad[5:].any()


# ---------------------------------------------------------------------------------------------------------- elsewhere


def test_it_runs_elsewhere_and_in_int8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    model, rows = build(depth=1, feedforwards=2), texts().numpy()
    made = exporting.to_graph(model, model.record.input_shape)
    monkeypatch.setattr(exporting, "to_graph", lambda *_: copy.deepcopy(made))  # it takes seconds
    metadata = record_metadata(model.record.to_dict())
    files.write("onnx", model, tmp_path / "model.onnx", metadata)
    predictor = OnnxPredictor(tmp_path / "model.onnx", 1)
    for count, width in ((5, 12), (1, 12), (2, 5)):
        given = np.ascontiguousarray(rows[:count, :width])
        assert np.abs(predictor(given) - TorchPredictor(model)(given)).max() < 1e-4
    bench = Workbench(Classification(), lambda: iter([rows]), lambda: iter([]), lambda p: 0.0, lambda: 0)
    Quantize(dtype="int8").convert(model, bench, model.record.input_shape, tmp_path / "int8.onnx", metadata)
    small = OnnxPredictor(tmp_path / "int8.onnx", 1)
    assert 0 < np.abs(small(rows) - TorchPredictor(model)(rows)).max() < 1


def test_embeddings_are_the_mean_of_the_last_states_without_padding() -> None:
    torch.manual_seed(0)
    model = enlarged(build_model(dataclasses.replace(record(head="embedding"), num_classes=24, class_names=[])))
    numbers, tap = texts(), "mobilebert.encoder.layer.1"
    with torch.no_grad(), Taps(model.net, [tap]) as hooks, hooks.recording() as features:
        found = model(numbers)
    wanted = torch.stack([state[:length].mean(0) for state, length in zip(features[tap], LENGTHS, strict=True)])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
