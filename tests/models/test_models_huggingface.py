"""Models of the transformers library: their logits, their weights, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdctl import registry
from kdctl.errors import ConfigError, MissingError
from kdctl.models.huggingface import HuggingFaceModel, find_folder
from kdctl.models.record import Model, ModelRecord, build_model, load_model, save_model
from kdctl.models.weights import load_weights
from kdctl.runs import holds_model
from kdctl.signals import TokenInput, find_logits
from kdctl.taps import Taps

TOKENS = TokenInput(vocab_size=60, length=12, pad=0, first=2, separator=3, mask=4, tokenizer="a")
HAS_LIBRARY = importlib.util.find_spec("transformers") is not None
needs_library = pytest.mark.skipif(not HAS_LIBRARY, reason="needs the transformers library")
_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": {**_SMALL, "max_position_embeddings": 16},
    "distilbert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 16},
    "roberta": {**_SMALL, "max_position_embeddings": 16, "type_vocab_size": 1},
    "electra": {**_SMALL, "embedding_size": 8, "max_position_embeddings": 16},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 2, "eos_token_id": 3},
}
HEADS = {"sample": "SequenceClassification", "token": "TokenClassification", "vocabulary": "MaskedLM"}


def library() -> Any:
    from kdctl.torchvision_guard import ensure_torchvision

    ensure_torchvision()
    import transformers

    return transformers


def published(folder: Path, kind: str = "bert", head: str = "sample", labels: int = 3, **changes: Any) -> Any:
    """A model of the library in a folder, with weights large enough for every part of it to matter."""
    transformers = library()
    torch.manual_seed(0)
    settings = {"vocab_size": 60, "pad_token_id": 0, "num_labels": labels} | CONFIGS[kind] | changes
    auto = "CausalLM" if (kind, head) == ("gpt2", "vocabulary") else HEADS[head]
    made = getattr(transformers, f"AutoModelFor{auto}").from_config(transformers.AutoConfig.for_model(kind, **settings))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    made.save_pretrained(folder)
    return made.eval()


def record(folder: Path | str, head: str = "sample", tokens: TokenInput | None = TOKENS, **given: Any) -> ModelRecord:
    shape = [] if tokens else [1, 8, 8]
    return ModelRecord(f"huggingface:{folder}", given, 3, ["a", "b", "c"], shape, tokens=tokens, head=head)


def loaded(folder: Path, **given: Any) -> Model:
    model = build_model(record(folder, **given))
    load_weights(model.net, "pretrained")
    return model.eval()


def texts() -> Tensor:
    numbers = torch.randint(5, 60, (4, 12), generator=torch.Generator().manual_seed(1))
    for row, length in enumerate((12, 3, 7, 1)):
        numbers[row, length // 2] = 3
        numbers[row, length:] = 0
    return numbers


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return find_logits(model(texts()))


# --------------------------------------------------------------------------------------------------- what is computed


@needs_library
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_are_those_of_the_library_and_a_record_needs_no_folder(kind: str, head: str, tmp_path: Path) -> None:
    theirs = published(tmp_path / "model", kind, head)
    numbers = texts()
    with torch.no_grad():
        wanted = theirs(input_ids=numbers, attention_mask=(numbers != 0).long()).logits
    model = loaded(tmp_path / "model", head=head)
    counts = torch.ones(4, dtype=torch.bool) if head == "sample" else numbers != 0
    torch.testing.assert_close(logits(model)[counts], wanted[counts], rtol=0, atol=1e-5)
    save_model(model, tmp_path / "run" / "student")
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    assert torch.equal(logits(load_model(tmp_path / "run")), logits(model))
    assert str(tmp_path) not in json.dumps(model.record.arguments)


@needs_library
def test_segments_of_pairs_reach_models_that_have_them(tmp_path: Path) -> None:
    pairs, numbers = dataclasses.replace(TOKENS, pairs=True), texts()
    segments = pairs.segments(numbers)
    assert segments.any()
    for kind, takes in (("bert", True), ("roberta", False), ("gpt2", False)):
        theirs = published(tmp_path / kind, kind)
        given = {"token_type_ids": segments} if takes else {}
        with torch.no_grad():
            wanted = theirs(input_ids=numbers, attention_mask=(numbers != 0).long(), **given).logits
        torch.testing.assert_close(logits(loaded(tmp_path / kind, tokens=pairs)), wanted, rtol=0, atol=1e-5)


@needs_library
def test_attention_can_be_tapped_where_it_is_computed_step_by_step(tmp_path: Path) -> None:
    published(tmp_path)
    eager = loaded(tmp_path, attention="eager", output_attentions=True)
    inner, outer = "bert.encoder.layer.1.attention.self.1", ".attentions.1"
    with Taps(eager.net, [inner, outer]) as hooks, hooks.recording() as found, torch.no_grad():
        eager(texts())
    assert found[inner].shape == (4, 2, 12, 12) and torch.equal(found[inner], found[outer])
    torch.testing.assert_close(found[inner].sum(-1), torch.ones(4, 2, 12))
    assert float(found[inner][(texts() == 0)[:, None, None, :].expand_as(found[inner])].max()) == 0
    plain = loaded(tmp_path, attention="sdpa")
    torch.testing.assert_close(logits(plain), logits(eager), rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="attention: eager"), Taps(plain.net, [inner]) as hooks, hooks.recording():
        plain(texts())


# --------------------------------------------------------------------------------------------------------- its weights


@needs_library
def test_a_new_head_keeps_its_first_values_and_the_rest_is_loaded(tmp_path: Path) -> None:
    """Of another number of classes, of an encoder without a head, and of the first layers alone."""
    theirs = published(tmp_path / "five", labels=5)
    theirs.bert.save_pretrained(tmp_path / "bare")
    for folder, layers in (("five", 2), ("bare", 2), ("five", 1)):
        fresh = build_model(record(tmp_path / folder, num_hidden_layers=layers))
        before = fresh.net.state_dict()["classifier.weight"].clone()
        load_weights(fresh.net, tmp_path / folder)
        state, wanted = fresh.net.state_dict(), theirs.state_dict()
        assert torch.equal(state["classifier.weight"], before)
        body = [name for name in state if name.startswith("bert.")]
        assert len(body) > 20 and all(torch.equal(state[name], wanted[name]) for name in body)


@needs_library
def test_shards_are_read_and_nothing_outside_the_folder(tmp_path: Path) -> None:
    wanted = logits_of(published(tmp_path))
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, held in parts.items():
        save_file({name: state[name] for name in held}, tmp_path / file)
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not holds_model(str(tmp_path))
    torch.testing.assert_close(logits(loaded(tmp_path)), wanted, rtol=0, atol=1e-5)
    index["weight_map"][names[0]] = "../model-00001-of-00002.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="no safetensors file of this folder"):
        loaded(tmp_path)


def logits_of(theirs: Any) -> Tensor:
    with torch.no_grad():
        return theirs(input_ids=texts(), attention_mask=(texts() != 0).long()).logits


@needs_library
def test_rows_that_fill_the_vocabulary_up_are_left_out(tmp_path: Path) -> None:
    theirs = published(tmp_path, head="vocabulary", vocab_size=64)
    with pytest.raises(ConfigError, match="64 tokens, the data's tokenizer makes 60"):
        loaded(tmp_path, head="vocabulary")
    (tmp_path / "tokenizer.json").write_text("{}")  # the one that the assembly has compared with the data's
    ours = logits(loaded(tmp_path, head="vocabulary"))
    words = texts() != 0
    torch.testing.assert_close(ours[words], logits_of(theirs)[words][:, :60], rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="64 tokens, the data's tokenizer makes 70"):
        loaded(tmp_path, tokens=dataclasses.replace(TOKENS, vocab_size=70))


@needs_library
def test_a_pickle_is_not_loaded(tmp_path: Path) -> None:
    published(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "away")
    with pytest.raises(MissingError, match=r"there is no model\.safetensors"):
        loaded(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(print))
    with pytest.raises(ConfigError, match=r"pickle.*save_pretrained"):
        loaded(tmp_path)


# ------------------------------------------------------------------------------------------------------ what is refused


@needs_library
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_hiden_layers": 1}, "did you mean 'num_hidden_layers'"),
        ({"num_attention_heads": 3}, "does not take these arguments"),
        ({"max_position_embeddings": 8}, "positions for 8 tokens, texts have up to 12"),
        ({"num_hidden_layers": 3}, r"lack.*bert\.encoder\.layer\.2"),
        ({"hidden_size": 32}, "in another shape, bert"),
    ],
)
def test_what_does_not_fit(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    published(tmp_path)
    with pytest.raises(ConfigError, match=said):
        loaded(tmp_path, **given)


@needs_library
@pytest.mark.parametrize(
    ("config", "head", "said"),
    [
        ({"model_type": "brt"}, "sample", "no model type 'brt'"),
        ({}, "sample", "does not say its model_type"),
        ({"model_type": "bert", "quantization_config": {}}, "sample", "are quantised"),
        ({"model_type": "t5"}, "sample", "an encoder and a decoder"),
        ({"model_type": "vit"}, "token", r"no head for what the task asks of a model \(token\)"),
        ({"model_type": "bert"}, "embedding", "for embeddings of texts: kind: bert"),
    ],
)
def test_configurations_of_other_models(config: dict[str, Any], head: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_model(record("any", head, config=config))


@needs_library
def test_positions_of_roberta_begin_behind_padding(tmp_path: Path) -> None:
    published(tmp_path, "roberta", max_position_embeddings=13)
    loaded(tmp_path)
    with pytest.raises(ConfigError, match="positions for 12 tokens, texts have up to 13"):
        build_model(record(tmp_path, tokens=dataclasses.replace(TOKENS, length=13)))


def test_it_reads_texts_alone() -> None:
    with pytest.raises(ConfigError, match="reads texts, and the data are none"):
        build_model(record("any", tokens=None))


@pytest.mark.skipif(HAS_LIBRARY, reason="the transformers library is there")
def test_transformers_is_an_extra() -> None:
    with pytest.raises(MissingError, match=r"kdctl\[huggingface\]"):
        build_model(record("any", config={"model_type": "bert"}))


def test_a_folder_is_read_against_its_file(tmp_path: Path) -> None:
    found = registry.find("models", "huggingface:./minilm", tmp_path)
    assert found.name == f"huggingface:{tmp_path}/minilm" and found.preset == {"name": f"{tmp_path}/minilm"}
    assert registry.load(found) is HuggingFaceModel
    assert registry.find("models", "huggingface:org/minilm@v1", tmp_path).preset == {"name": "org/minilm@v1"}
    with pytest.raises(MissingError, match="there is no folder"):
        find_folder(f"{tmp_path}/minilm", [])


@pytest.mark.skipif(importlib.util.find_spec("huggingface_hub") is None, reason="needs huggingface_hub")
def test_a_name_is_found_in_the_cache_of_the_hub_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    folder = tmp_path / "models--org--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    snapshot = folder / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("KDCTL_OFFLINE", "1")
    assert find_folder("org/tiny", ["config.json"]) == snapshot
    with pytest.raises(MissingError, match="could not be had"):
        find_folder("org/other", ["config.json"])
