"""A BERT that gives embeddings: the pooled hidden states, as published sentence encoders have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from kdctl.assembly.models import build_model
from kdctl.config.schema import DataSpec, ModelSpec
from kdctl.data.prepare import Data, prepare
from kdctl.errors import ConfigError
from kdctl.models.bert import Bert

SIZES: dict[str, Any] = {"depth": 2, "width": 16, "heads": 2}
ROWS = torch.tensor([[2, 5, 6, 7, 3], [2, 9, 3, 0, 0]])
MASK = (ROWS != 0).long()


def bert(head: str = "embedding", **more: Any) -> Bert:
    torch.manual_seed(0)
    return Bert(**SIZES, **more, num_classes=0, vocab_size=40, max_length=8, head=head).eval()


@torch.no_grad()
@pytest.mark.parametrize("pooling", [None, "mean", "first"])
def test_pooled_hidden_states_and_nothing_behind_them(pooling: Any) -> None:
    net = bert(pooling=pooling)
    assert not [name for name in net.state_dict() if name.startswith(("classifier", "cls", "bert.pooler"))]
    seen: list[torch.Tensor] = []
    net.bert.encoder.register_forward_hook(lambda *hooked: seen.append(hooked[2]))
    given = net(ROWS, MASK, torch.zeros_like(ROWS))
    means = torch.stack([seen[0][0].mean(0), seen[0][1, :3].mean(0)])
    torch.testing.assert_close(given, seen[0][:, 0] if pooling == "first" else means)


def test_a_classifier_is_still_pooled_by_its_first_token() -> None:
    torch.manual_seed(0)
    net = Bert(**SIZES, num_classes=3, vocab_size=40, max_length=8)
    assert net.bert.pooler is not None and net.bert.pooler.pooling == "first"
    assert {"bert.pooler.dense.weight", "classifier.weight"} <= set(net.state_dict())


@pytest.fixture
def data(tmp_path: Path) -> Data:
    pytest.importorskip("tokenizers")
    (tmp_path / "train.tsv").write_text("text\tlabel\n" + "a film\tx\nthe book\ty\n" * 8)
    spec = DataSpec(kind="text", root=str(tmp_path), test="train.tsv", vocab_size=40, max_length=8, val_fraction=0)
    return prepare(spec, target="embedding")


def publish(folder: Path, net: Bert, pooling: str | None) -> str:
    """A folder as sentence-transformers writes it, with a pooler that nobody uses."""
    folder.mkdir()
    tensors = {name.removeprefix("bert."): value.clone() for name, value in net.state_dict().items()}
    tensors |= {"pooler.dense.weight": torch.ones(16, 16), "pooler.dense.bias": torch.ones(16)}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        told = {"word_embedding_dimension": 16, "pooling_mode_cls_token": False, f"pooling_mode_{pooling}": True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(told))
    return str(folder)


def of_folder(data: Data, weights: str, **more: Any) -> Any:
    return build_model(ModelSpec(kind="bert", weights=weights, **SIZES, **more), data, "teacher")


def test_an_encoder_is_a_teacher_as_it_is(data: Data, tmp_path: Path) -> None:
    assert data.head == "embedding" and data.tokens is not None
    torch.manual_seed(1)
    made = Bert(**SIZES, num_classes=0, vocab_size=data.tokens.vocab_size, max_length=8, head="embedding").eval()
    model = of_folder(data, publish(tmp_path / "encoder", made, "mean_tokens")).eval()
    rows = data.train.fetch(torch.arange(2))
    mask = data.tokens.is_text(rows).long()
    torch.testing.assert_close(model(rows), made(rows, mask, torch.zeros_like(rows)))
    record = model.record
    assert (record.head, record.link, record.class_names, record.num_classes) == ("embedding", "embedding", [], 0)
    assert record.from_dict(record.to_dict()) == record


@pytest.mark.parametrize(
    ("told", "own", "hint"),
    [
        ("cls_token", {}, "pooling: first"),
        ("mean_tokens", {"pooling": "first"}, "pooling: mean"),
        ("max_tokens", {}, "weights with the pooling mean or first"),
    ],
)
def test_another_pooling_than_the_published_one_is_refused(
    data: Data, tmp_path: Path, told: str, own: dict[str, str], hint: str
) -> None:
    folder = publish(tmp_path / "encoder", bert(), told)
    with pytest.raises(ConfigError) as caught:
        of_folder(data, folder, **own)
    assert (caught.value.problems[0].key, caught.value.problems[0].hint) == ("teacher.weights", hint)


def test_a_model_of_another_task_is_refused(data: Data, tmp_path: Path) -> None:
    from kdctl.models.record import save_model

    classes = prepare(
        DataSpec(kind="text", root=str(tmp_path), test="train.tsv", vocab_size=40, max_length=8, val_fraction=0)
    )
    save_model(build_model(ModelSpec(kind="bert", **SIZES), classes, "student"), tmp_path / "made" / "student")
    with pytest.raises(ConfigError, match="gives an answer a sample, and the task asks for embeddings of texts"):
        of_folder(data, str(tmp_path / "made"))


def test_the_numbers_are_those_of_transformers_pooled(data: Data, tmp_path: Path) -> None:
    from kdctl.torchvision_guard import ensure_torchvision

    ensure_torchvision()
    transformers = pytest.importorskip("transformers")
    assert data.tokens is not None
    config = transformers.BertConfig(
        vocab_size=data.tokens.vocab_size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=8,
    )  # fmt: skip
    theirs = transformers.BertModel(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    rows = data.train.fetch(torch.arange(2))
    mask = data.tokens.is_text(rows).long()
    with torch.no_grad():
        states = theirs(input_ids=rows, attention_mask=mask).last_hidden_state
        pooled = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        torch.testing.assert_close(of_folder(data, str(tmp_path / "theirs")).eval()(rows), pooled, atol=1e-5, rtol=0)
