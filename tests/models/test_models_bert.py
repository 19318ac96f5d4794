"""BERT: that it is BERT, that padding is nothing to it, and weights of published encoders."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kdctl.assembly.models import check_fits
from kdctl.config.schema import DataSpec
from kdctl.data.base import ArraySplit, Dataset
from kdctl.data.prepare import Data, split_dataset
from kdctl.data.tokens import TokenSplit
from kdctl.errors import ConfigError
from kdctl.models.record import Model, ModelRecord, build_model, load_model, save_model
from kdctl.models.weights import load_weights
from kdctl.signals import TokenInput
from kdctl.taps import Taps

TOKENS = TokenInput(vocab_size=60, length=12, pad=0, first=2, separator=3, mask=4, tokenizer="a")
SMALL = {"depth": 2, "width": 16, "heads": 4, "hidden": 24}


def record(tokens: TokenInput = TOKENS, **arguments: Any) -> ModelRecord:
    return ModelRecord("bert", SMALL | arguments, 3, ["a", "b", "c"], image_shape=[], tokens=tokens)


def build(tokens: TokenInput = TOKENS, **arguments: Any) -> Model:
    """A model whose weights are large enough for every part of it to matter."""
    torch.manual_seed(0)
    return enlarged(build_model(record(tokens, **arguments)))


def enlarged(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float(name.endswith("LayerNorm.weight")), std=0.3)
    return model.eval()


def texts(lengths: tuple[int, ...] = (12, 3, 7, 1, 9), pad: int = 0) -> Tensor:
    numbers = torch.randint(5, 60, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    for row, length in enumerate(lengths):
        numbers[row, length // 2] = 3
        numbers[row, length:] = pad
    return numbers


def outputs(net: nn.Module, taps: list[str], call: Any) -> dict[str, Tensor]:
    with Taps(net, taps) as hooks, hooks.recording() as features:
        logits = call()
    return dict(features) | {"logits": logits}


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ its arithmetic


@pytest.mark.parametrize("taps", [["bert.encoder.layer.1"], ["bert.encoder.layer.0.attention.self.softmax"]])
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_taps_change_no_value_and_no_gradient(taps: list[str], pooling: str) -> None:
    model, numbers = build(pooling=pooling, depth=3), texts()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    every = [f"bert.encoder.layer.{i}" for i in range(3)]
    for name, tapped in (("none", []), ("some", taps), ("all", every)):
        model.zero_grad()
        logits = outputs(model.net, tapped, lambda: model(numbers))["logits"]
        logits.square().sum().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        seen[name] = logits.detach(), torch.cat(gradients)
    for name in ("none", "some"):
        assert close(seen[name][0], seen["all"][0])
        torch.testing.assert_close(seen[name][1], seen["all"][1], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="compares with the transformers library")
def test_it_is_the_bert_of_transformers() -> None:
    from kdctl.torchvision_guard import ensure_torchvision

    ensure_torchvision()
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=12, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    theirs = enlarged(BertForSequenceClassification(config))
    pairs = dataclasses.replace(TOKENS, pairs=True)
    model = build(pairs)
    model.net.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.endswith("position_ids")})
    numbers = texts()
    given = {"input_ids": numbers, "attention_mask": (numbers != 0).long(), "token_type_ids": pairs.segments(numbers)}
    assert given["token_type_ids"].any()
    with torch.no_grad():
        wanted = theirs(**given, output_hidden_states=True)
        layers = ["bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1"]
        ours = outputs(model.net, layers, lambda: model(numbers))
    torch.testing.assert_close(ours["logits"], wanted.logits, rtol=1e-5, atol=1e-5)
    words = numbers != 0
    for name, state in zip(layers, wanted.hidden_states, strict=True):
        torch.testing.assert_close(ours[name][words], state[words], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("pad", [0, 59])
def test_neither_padding_nor_other_texts_of_the_batch_change_its_logits(pooling: str, pad: int) -> None:
    model = build(dataclasses.replace(TOKENS, pad=pad), pooling=pooling)
    numbers = texts(pad=pad)
    with torch.no_grad():
        whole = model(numbers)
        for row, length in enumerate((12, 3, 7, 1, 9)):
            assert close(model(numbers[row : row + 1, :length]), whole[row : row + 1])
        assert close(torch.cat([model(part) for part in numbers.split(2)]), whole)
    assert len({tuple(row) for row in whole.tolist()}) == 5


def test_padding_gets_no_attention() -> None:
    model, numbers = build(), texts()
    tap = "bert.encoder.layer.0.attention.self.softmax"
    with torch.no_grad():
        weights = outputs(model.net, [tap], lambda: model(numbers))[tap]
    padded = (numbers == 0)[:, None, None, :].expand_as(weights)
    assert weights.shape == (5, 4, 12, 12) and float(weights[padded].max()) == 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(5, 4, 12))


def test_attention_is_the_same_whether_it_is_tapped_or_not() -> None:
    model, numbers = build(), texts()
    softmax = "bert.encoder.layer.1.attention.self.softmax"
    hidden = [f"bert.encoder.layer.{layer}" for layer in (0, 1)]
    words = numbers != 0
    with torch.no_grad():
        free = outputs(model.net, hidden, lambda: model(numbers))
        for tap in (softmax, f"{softmax}:in"):
            tapped = outputs(model.net, [*hidden, tap], lambda: model(numbers))
            assert close(tapped["logits"], free["logits"])
            assert all(close(tapped[name][words], free[name][words]) for name in hidden)
    with Taps(model.net, [f"{softmax}:in", softmax]) as hooks, hooks.recording() as features:
        model(numbers)
    assert close(features[f"{softmax}:in"].softmax(-1), features[softmax])


def test_tapped_and_untapped_attention_learn_alike() -> None:
    model, numbers = build(), texts()
    gradients = []
    for taps in ([], ["bert.encoder.layer.0.attention.self.softmax"]):
        model.zero_grad()
        outputs(model.net, taps, lambda: model(numbers))["logits"].square().sum().backward()
        query = model.net.get_submodule("bert.encoder.layer.0.attention.self.query")
        gradients.append(query.weight.grad.clone())  # type: ignore[union-attr,operator]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
    assert float(gradients[0].abs().max()) > 1e-3


def test_the_order_of_words_and_their_segment_count() -> None:
    model = build(dataclasses.replace(TOKENS, pairs=True))
    numbers = torch.tensor([[2, 10, 11, 3, 12, 3]])
    with torch.no_grad():
        base = model(numbers)
        assert not torch.allclose(model(numbers[:, [0, 2, 1, 3, 4, 5]]), base, atol=1e-3)
        alone = build()
        alone.net.load_state_dict(model.net.state_dict())
        assert not torch.allclose(alone(numbers), base, atol=1e-3)


# ------------------------------------------------------------------------------------------------- its size, its parts


def test_its_size() -> None:
    tokens = dataclasses.replace(TOKENS, vocab_size=30_522, length=512)
    model = build_model(ModelRecord("bert", {}, 2, ["a", "b"], image_shape=[], tokens=tokens))
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_386_178


def test_a_factorised_embedding_is_small_and_widened() -> None:
    full, factorised = build(), build(embedding=5)
    embeddings = factorised.net.get_submodule("bert.embeddings")
    assert embeddings.word_embeddings.weight.shape == (60, 5)  # type: ignore[union-attr]
    saved = [sum(p.numel() for p in model.parameters()) for model in (full, factorised)]
    assert saved[0] - saved[1] == 60 * 16 - 60 * 5 - 5 * 16
    words = embeddings.word_embeddings.weight @ embeddings.widen.weight.T  # type: ignore[union-attr,operator]
    state = {k: v for k, v in factorised.net.state_dict().items() if not k.endswith("widen.weight")}
    full.net.load_state_dict(state | {"bert.embeddings.word_embeddings.weight": words})
    with torch.no_grad():
        assert close(full(texts()), factorised(texts()))


def test_padding_is_embedded_as_zero_at_first() -> None:
    torch.manual_seed(0)
    model = build_model(record(dataclasses.replace(TOKENS, pad=7)))
    weight = model.net.get_submodule("bert.embeddings.word_embeddings").weight
    assert not weight[7].any() and 0.01 < float(weight.detach().std()) < 0.03  # type: ignore[operator,index]


@pytest.mark.parametrize(("arguments", "said"), [({"heads": 3}, "3 heads"), ({"positions": 8}, "8 positions")])
def test_what_cannot_be(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_model(record(**arguments))


# ------------------------------------------------------------------------------------------------------------- weights


def published(model: Model) -> dict[str, Tensor]:
    """The tensors of an encoder under the names of a published file: no classifier, no leading `bert.`."""
    state = {k: v.clone() for k, v in model.net.state_dict().items() if k.startswith("bert.")}
    return {name.removeprefix("bert."): value for name, value in state.items()}


@pytest.mark.parametrize("form", ["encoder", "pretraining", "old", "no_pooler"])
def test_weights_of_published_encoders_are_adopted(tmp_path: Path, form: str) -> None:
    source, model = build(), build_model(record())
    own = {name: value.clone() for name, value in model.net.state_dict().items()}
    state = published(source)
    if form == "pretraining":
        heads = {"cls.predictions.bias": torch.zeros(60), "cls.seq_relationship.weight": torch.zeros(2, 16)}
        state = {f"bert.{name}": value for name, value in state.items()} | heads
    if form == "old":
        state["embeddings.position_ids"] = torch.arange(12)[None]
    if form == "no_pooler":
        state = {name: value for name, value in state.items() if not name.startswith("pooler.")}
    save_file(state, tmp_path / "model.safetensors")
    load_weights(model.net, tmp_path)
    for name, value in model.net.state_dict().items():
        kept = name.startswith("classifier.") or (form == "no_pooler" and "pooler" in name)
        assert value.equal(own[name] if kept else source.net.state_dict()[name]), name


def test_a_layer_that_is_missing_or_too_many_is_refused(tmp_path: Path) -> None:
    for depth, said in ((1, "lacks bert.encoder.layer.1"), (3, "has what the model has not: bert.encoder.layer.2")):
        save_file(published(build(depth=depth)), tmp_path / "model.safetensors")
        with pytest.raises(ConfigError, match=said):
            load_weights(build_model(record()).net, tmp_path)


def test_a_saved_model_comes_back_by_its_record(tmp_path: Path) -> None:
    model = build(dataclasses.replace(TOKENS, pairs=True), embedding=5, pooling="mean")
    save_model(model, tmp_path / "student")
    loaded = load_model(tmp_path)
    assert loaded.record == model.record and loaded.record.tokens == model.record.tokens
    assert loaded.record.input_shape == (12,)
    with torch.no_grad():
        assert loaded(texts()).equal(model(texts()))
    (tmp_path / "student.json").unlink()
    assert load_model(tmp_path / "student.safetensors").record == model.record


def test_the_example_of_a_record_is_texts_of_full_length() -> None:
    for pad in (0, 59):
        made = record(dataclasses.replace(TOKENS, pad=pad)).example(50)
        assert made.shape == (50, 12) and made.dtype == torch.int64
        assert not (made == pad).any() and 0 <= int(made.min()) and int(made.max()) < 60


# ---------------------------------------------------------------------------------------------------- does it fit data


def data_of(tokens: TokenInput) -> Data:
    numbers = [[2, 5 + row, 3] for row in range(6)]
    split = TokenSplit.of(numbers, torch.arange(6) % 3, tokens)
    return split_dataset(Dataset(split, class_names=["a", "b", "c"]), DataSpec(kind="text", val_fraction=0))


def test_a_model_of_another_tokenizer_is_refused() -> None:
    check_fits(record(), data_of(TOKENS), "student")
    with pytest.raises(ConfigError, match="by another tokenizer"):
        check_fits(record(dataclasses.replace(TOKENS, tokenizer="b")), data_of(TOKENS), "student")


def test_a_model_of_shorter_texts_is_refused_and_one_of_longer_texts_is_not() -> None:
    check_fits(record(dataclasses.replace(TOKENS, length=20)), data_of(TOKENS), "student")
    with pytest.raises(ConfigError, match=r"texts of 8 tokens, the data's have up to 12.*data\.max_length: 8"):
        check_fits(record(dataclasses.replace(TOKENS, length=8)), data_of(TOKENS), "student")


def test_images_and_texts_do_not_go_together() -> None:
    images = ArraySplit(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.arange(3))
    pictures = split_dataset(Dataset(images, class_names=["a", "b", "c"]), DataSpec(kind="digits", val_fraction=0))
    with pytest.raises(ConfigError, match="the model takes texts, the data are images"):
        check_fits(record(), pictures, "student")
    of_images = ModelRecord("mlp", {}, 3, ["a", "b", "c"], image_shape=[1, 8, 8])
    with pytest.raises(ConfigError, match="the model takes images, the data are texts"):
        check_fits(of_images, data_of(TOKENS), "student")
