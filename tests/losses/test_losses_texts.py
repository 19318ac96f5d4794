"""Every loss on texts, through the real step: neither padding nor the split into micro-batches changes it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kdctl.losses
from kdctl import build, registry
from kdctl.clock import Clock
from kdctl.config.expand import load_experiment
from kdctl.device import settle_by_rule
from kdctl.errors import ConfigError
from kdctl.signals import Batch
from kdctl.step import Step
from kdctl.watch import Reporter

pytest.importorskip("tokenizers")

FILE = """
name: texts
task: {kind: text_classification}
data: {kind: text, root: ., class_names: [a, b, c], max_length: 24, vocab_size: 60, val_fraction: 0, batch_size: 24}
teacher: {kind: bert, depth: 2, width: 24, heads: HEADS, control: true}
student: {kind: bert, depth: 2, width: 16, heads: 2, dropout: 0}
losses: [{kind: KIND}]
optimizer: {kind: sgd, lr: 0.01}
train: {epochs: 1, device: cpu, threads: 1, precision: fp32}
"""
LAYERS = "[bert.encoder.layer.0, bert.encoder.layer.1]"
SELF = "bert.encoder.layer.1.attention.self"
LOSSES: dict[str, Any] = kdctl.losses.LOSSES
KNOWN = {kind: registry.signature(registry.find("losses", kind)).attributes for kind in LOSSES}
OTHERS = {
    "binary_kd": "its logits are of another link",
    "ca_mkd": "it needs several teachers",
    "uskd": "it taps a map",
    "byot": "it has maps or vectors of its own exits",
}
TOKENS = {
    "hidden_mse": ["hidden_mse, taps: [bert.embeddings, bert.encoder.layer.1]"],
    "cosine": [f"cosine, taps: {LAYERS}"],
    "pkd": [f"pkd, taps: {LAYERS}"],
    "text_fsp": [f"text_fsp, taps: {LAYERS}"],
    "text_nst": [f"text_nst, taps: {LAYERS}", f"text_nst, layers: same, taps: {LAYERS}"],
    "attention_mse": [f"attention_mse, taps: ['{SELF}.softmax']", f"attention_mse, taps: ['{SELF}.softmax:in']"],
    "attention_kl": [
        f"attention_kl, of: probabilities, taps: ['{SELF}.softmax']", f"attention_kl, taps: ['{SELF}.softmax:in']",
    ],
    "token_relations": [f"token_relations, heads: 4, taps: [{SELF}.query, {SELF}.key, {SELF}.value]"],
}  # fmt: skip
"""Losses that are given tokens, some of which are padding."""
RESPONSE = [kind for kind in LOSSES if KNOWN[kind].get("needs_taps", False) is False and kind not in OTHERS]
EMBEDDING = ["fitnet", "normalized_l1", "rkd", "similarity_preserving", "pkt", "srd", "mmd", "hidden_mse", "cosine"]
"""Losses of vectors, on the text's embedding."""
ARGUMENTS = {"ctkd": ", decay_epochs: 0", "crd": ", bank: batch", "wkd_logit": ", head: classifier"}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """24 texts of 1 to 10 words, 2 of which have no label."""
    place = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    for name in ("train.tsv",):
        words = ["the", "film", "was", "it", "and", "good", "bad"]
        lines = [f"{' '.join(draw.choices(words, k=1 + i % 10))}\t{'abc'[i % 3] if i > 1 else ''}" for i in range(24)]
        (place / name).write_text("\n".join(["text\tlabel", *lines]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDCTL_CACHE", str(place / "cache"))
        yield place


@cache
def _data(place: Path) -> Any:
    return build.build_data(_experiment(place, "kd", 2))


def _experiment(place: Path, term: str, heads: int) -> Any:
    (place / "texts.yaml").write_text(FILE.replace("KIND", term).replace("HEADS", str(heads)))
    loaded = load_experiment(place / "texts.yaml").experiment
    return loaded.model_copy(update={"train": settle_by_rule(loaded.train)})


def built_of(place: Path, term: str, heads: int = 2) -> Any:
    experiment = _experiment(place, term, heads)
    stage = experiment.train_stages[-1]
    return build.build_stage(experiment, stage, _data(place), lambda name: place / name), stage


class Trial:
    """A term in the step of a student that stays as it is."""

    def __init__(self, place: Path, term: str, heads: int) -> None:
        self.built, self.stage = built_of(place, term, heads)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in [p for m in (self.built.method.student, *self.built.teachers) for p in m.parameters()]:
                if parameter.ndim > 1:
                    parameter.add_(0.2 * torch.randn(parameter.shape))  # attention that is not even
        self.batch = next(iter(self.built.loader.epoch(0)))
        self.built.method.begin_epoch(0)
        self.built.method.train()

    def loss_and_gradient(self, batch: Batch, parts: int = 1) -> tuple[float, Tensor]:
        """Of a batch, in so many micro-batches."""
        kept: list[Tensor] = []
        parameters = [p for p in self.built.method.parameters() if p.requires_grad]

        def keep(*_: Any, **__: Any) -> None:
            kept.extend(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters)

        self.built.optimizer.step = keep
        done = Step(self.built, self.stage, Clock(), Reporter(), parts)(batch, 1.0)
        return float(done.loss), torch.cat([gradient.flatten() for gradient in kept])


def twice_as_long(batch: Batch) -> Batch:
    length = batch.inputs.shape[1]
    inputs, mask = (F.pad(value, (0, length)) for value in (batch.inputs, batch.extra["attention_mask"]))
    assert int(mask.sum()) < mask.numel() // 2, "there was padding before"
    return replace(batch, inputs=inputs, extra=batch.extra | {"attention_mask": mask})


def agree(one: tuple[float, Tensor], other: tuple[float, Tensor]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5, abs=1e-7)
    assert float(one[1].norm()) > 0
    assert float((one[1] - other[1]).norm()) <= 1e-5 * float(one[1].norm()) + 1e-8


TERMS = [
    *(kind + ARGUMENTS.get(kind, "") for kind in RESPONSE),
    *(term for terms in TOKENS.values() for term in terms),
    *(f"{kind}{ARGUMENTS.get(kind, '')}, taps: [bert.pooler]" for kind in EMBEDDING),
]


@pytest.mark.parametrize("term", TERMS)
def test_padding_and_split_change_nothing(term: str, folder: Path) -> None:
    trial = Trial(folder, term, heads=4 if term.startswith("token_relations") else 2)
    whole = trial.loss_and_gradient(trial.batch)
    agree(whole, trial.loss_and_gradient(twice_as_long(trial.batch)))
    if not KNOWN[term.partition(",")[0]].get("batchwise", False):
        agree(whole, trial.loss_and_gradient(trial.batch, parts=4))


TAPPED = [kind for kind in LOSSES if KNOWN[kind].get("needs_taps", False) is not False and kind not in OTHERS]


@pytest.mark.parametrize("kind", [kind for kind in TAPPED if kind not in TOKENS])
def test_a_loss_that_would_take_padding_for_tokens_is_refused(kind: str, folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        built_of(folder, f"{kind}{ARGUMENTS.get(kind, '')}, taps: {LAYERS}")
    (problem,) = caught.value.problems
    assert "padding among these tokens would count" in problem.message and "hidden_mse" in str(problem.hint)


@pytest.mark.parametrize("kind", ["attention_mse", "attention_kl"])
def test_other_numbers_of_heads_are_refused_with_what_takes_them(kind: str, folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        built_of(folder, f"{kind}, taps: ['{SELF}.softmax']", heads=4)
    assert "heads differ: 2 and 4" in str(caught.value) and "token_relations" in str(caught.value.problems[0].hint)
