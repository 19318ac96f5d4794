"""Tiny experiments and what files ask for beside them, a feature each, so that any two can be put into one file."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

IMAGES = """
name: pair
data: {kind: digits, limit: 96, batch_size: 32}
teacher: {kind: digits_cnn, width: 8, control: true}
student: {kind: digits_cnn, width: 4}
losses: [{kind: ce, weight: 0.3}, {kind: kd, weight: 0.7}]
optimizer: {kind: sgd, lr: 0.02, momentum: 0.9}
train: {epochs: 2, device: cpu, threads: 1, precision: fp32, layout: contiguous}
"""
_TEXTS = """
name: pair
data: {kind: text, root: ., max_length: 12, vocab_size: 60, val_fraction: 0.2, batch_size: 32}
teacher: {kind: bert, depth: 2, width: 16, heads: 2, control: true}
student: {kind: bert, depth: 2, width: 8, heads: 2}
optimizer: {kind: adamw, lr: 0.01}
train: {epochs: 2, device: cpu, threads: 1, precision: fp32}
"""
_CORPUS = """
name: pair
data: {kind: corpus, root: ., TOKENS, max_length: 16, val_share: 0.1, test_share: 0.1, batch_size: 32, limit: 160}
teacher: {kind: KIND, depth: 2, width: 16, heads: 2, control: true}
student: {kind: KIND, depth: 2, width: 8, heads: 2}
optimizer: {kind: adamw, lr: 0.01}
train: {epochs: 2, device: cpu, threads: 1, precision: fp32}
"""


def _of_texts(task: str, teacher_term: str, files: str = "", text: str = _TEXTS) -> str:
    """The experiment of a task; files: the stem and the ending of its training and test file."""
    stem, _, ending = files.partition(".")
    given = (
        f"root: ., train: {stem}_train.{ending}, test: {stem}_test.{ending}" if files else "root: ., train: corpus.txt"
    )
    terms = f"losses: [{{kind: ce, weight: 0.3}}, {{kind: {teacher_term}, weight: 0.7}}]\n"
    return f"task: {{kind: {task}}}" + text.replace("root: .", given) + terms


EXPERIMENTS = {
    "images": IMAGES,
    "classes": _of_texts("text_classification", "kd", "classes.tsv"),
    "several": _of_texts("multilabel", "binary_kd", "several.tsv"),
    "number": _of_texts("regression", "logit_mse", "number.tsv"),
    "tags": _of_texts("token_classification", "kd", "tags.jsonl"),
    "next": _of_texts("causal_lm", "kd", text=_CORPUS.replace("KIND", "gpt").replace("TOKENS", "units: characters")),
    "hidden": _of_texts("masked_lm", "kd", text=_CORPUS.replace("KIND", "bert").replace("TOKENS", "vocab_size: 60")),
}  # fmt: skip


def write_texts(folder: Path) -> None:
    """The files that the experiments on texts read."""
    draw = random.Random(0)
    good, bad = "good fine lovely warm bright".split(), "bad awful cold dark grim".split()
    plain = "the a film story of and with plot scene was is".split()

    def words(number: int) -> list[str]:
        mine = good if number % 2 else bad
        return [draw.choice(plain) if draw.random() < 0.6 else draw.choice(mine) for _ in range(draw.randint(3, 14))]

    for split, count in (("train", 160), ("test", 60)):
        texts = [words(number) for number in range(count)]
        labels = {
            "classes": ["pos" if number % 2 else "neg" for number in range(count)],
            "several": [",".join(word for word in ("warm", "cold", "bright") if word in text) for text in texts],
            "number": [str(sum(w in good for w in text) - sum(w in bad for w in text)) for text in texts],
        }
        for stem, column in labels.items():
            lines = [f"{' '.join(text)}\t{label}" for text, label in zip(texts, column, strict=True)]
            (folder / f"{stem}_{split}.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")
        tagged = [{"tokens": t, "tags": ["P" if w in good else "N" if w in bad else "O" for w in t]} for t in texts]
        (folder / f"tags_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tagged))
    (folder / "corpus.txt").write_text(" ".join(" ".join(words(number)) + "." for number in range(900)))


# ----------------------------------------------------------------------------------------------------------- features


@dataclass(frozen=True)
class Feature:
    """keys: what is set, by its place (`train.ema`). losses: further terms. only: terms in place of the experiment's.
    more_teachers: beside its own. alone: without a teacher. compress, export: further stages. controls, seeds: what the
    command is asked for."""

    keys: Mapping[str, Any] = field(default_factory=dict)
    losses: Sequence[Any] = ()
    only: Sequence[Any] | None = None
    more_teachers: Sequence[Any] = ()
    alone: bool = False
    compress: Sequence[Any] = ()
    export: Sequence[Any] = ()
    controls: str = ""
    seeds: int = 1


def together(experiment: str, features: Sequence[Feature]) -> dict[str, Any] | None:
    """The file's document with all of these features; None where two of them ask for different things."""
    document = yaml.safe_load(experiment)
    given: dict[str, Any] = {}
    for feature in features:
        for place, value in feature.keys.items():
            if given.setdefault(place, value) != value:
                return None
            *path, last = place.split(".")
            section = document
            for key in path:
                section = section.setdefault(key, {})
            section[last] = copy.deepcopy(value)
    replaced = [feature.only for feature in features if feature.only is not None]
    if len(replaced) > 1 or (any(f.alone for f in features) and any(f.more_teachers for f in features)):
        return None
    document["losses"] = [*(replaced or [document["losses"]])[0], *(loss for f in features for loss in f.losses)]
    others = [teacher for feature in features for teacher in feature.more_teachers]
    if others:
        document["teacher"] = [document["teacher"], *others]
    if any(feature.alone for feature in features):
        del document["teacher"]
    document["compress"] = [stage for feature in features for stage in feature.compress]
    document["export"] = [stage for feature in features for stage in feature.export]
    return document


def _set(place: str, value: Any) -> Feature:
    return Feature({place: value})


def _term(kind: str, *taps: Any, **arguments: Any) -> Feature:
    return Feature(losses=[{"kind": kind, **({"taps": list(taps)} if taps else {}), **arguments}])


def _method(kind: str, **arguments: Any) -> Feature:
    return _set("method", {"kind": kind, **arguments})


def _taught_by_itself(kind: str, **arguments: Any) -> Feature:
    return Feature({"method": {"kind": kind, **arguments}}, alone=True)


def _stage(kind: str, **arguments: Any) -> Feature:
    return Feature(compress=[{"kind": kind, **arguments}])


def _tuned(name: str, **arguments: Any) -> Feature:
    return _stage("finetune", name=name, epochs=1, losses=[{"kind": "ce"}], **arguments)


def _ensemble(second: Mapping[str, Any], kind: str, **arguments: Any) -> Feature:
    teacher = {"name": "second", "control": True, **second}
    return Feature({"ensemble": {"kind": kind, **arguments}}, more_teachers=[teacher])


_ANY: dict[str, Feature] = {
    "batch_7": _set("data.batch_size", 7),
    "no_val": _set("data.val_fraction", 0),
    "few_labels": _set("data.labels_per_class", 5),
    "fewer": _set("data.limit", 64),
    "bf16": _set("train.precision", "bf16"),
    "ema": _set("train.ema", 0.9),
    "accumulate": _set("train.accumulate", 3),
    "clip": _set("train.clip_norm", 0.5),
    "early_stop": _set("train.early_stop", 1),
    "last": _set("train.keep", "last"),
    "balance": _set("balance", "gradient"),
    "store": _set("teacher_cache", {"store": "logits", "dir": "store"}),
    "store_both": _set("teacher_cache", {"store": "both", "dir": "store"}),
    "store_top": _set("teacher_cache", {"store": "logits", "top_k": 2, "fill": "before", "dir": "store"}),
    "dkd": _term("dkd"),
    "mlld": _term("mlld"),
    "ctkd": _term("ctkd"),
    "dist": _term("dist"),
    "top_k_kl": _term("top_k_kl", k=2),
    "balanced_kd": _term("balanced_kd"),
    "wsld": _term("wsld"),
    "tf_reg": _term("tf_reg"),
    "ramp": _term("logit_mse", name="ramp", weight={0: 0, 1: 1}),
    "ramp_in_steps": _term("logit_mse", name="steps", weight={"0 steps": 0, "2 steps": 1}),
    "teacher_alone": Feature(only=[{"kind": "logit_mse"}]),
    "student_alone": Feature(only=[{"kind": "ce"}], alone=True),
    "mutual": _taught_by_itself("mutual"),
    "self_ema": _taught_by_itself("self_distill"),
    "self_last": _taught_by_itself("self_distill", teacher="last_epoch"),
    "sparse": _method("sparse"),
    "sparsify": _stage("sparsify", sparsity=0.5),
    "low_rank": _stage("low_rank", keep_ratio=0.7, round_to=1),
    "int8": _stage("quantize", name="q8"),
    "int4": _stage("quantize", name="q4", dtype="int4"),
    "finetune": _tuned("tuned"),
    "onnx": Feature(export=[{"kind": "onnx"}]),
    "torchscript": Feature(export=[{"kind": "torchscript"}]),
    "baseline": Feature(controls="baseline"),
    "placebos": Feature(controls="baseline,label_smoothing,random_teacher,shuffled_labels,self"),
    "equal_time": Feature(controls="baseline,equal_time"),
    "seeds": Feature(seeds=2),
}
_CNN = {"kind": "digits_cnn", "width": 6}
OF_IMAGES: dict[str, Feature] = _ANY | {
    "augment": _set("data.augment", [{"kind": "random_crop", "padding": 1}, {"kind": "horizontal_flip"}]),
    "strong": _set("data.strong_augment", [{"kind": "cutout", "size": 3}]),
    "views": Feature({"data.augment": [{"kind": "random_crop", "padding": 1}], "data.views": 2}),
    "all_views": Feature({"data.augment": [{"kind": "horizontal_flip"}], "data.views": "all"}),
    "batch_1": Feature({"data.batch_size": 1, "data.limit": 24}),
    "transfer": _set("data.transfer", [{"kind": "digits"}]),
    **{
        f"of_{kind}": _ensemble(_CNN, kind)
        for kind in ("mean_logits", "mean", "ebkd", "ca_mkd", "aekd", "best")
    },
    "of_weighted": _ensemble(_CNN, "weighted", weights=[1, 2]),
    "of_class_groups": _ensemble(_CNN, "class_groups", groups=[[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]),
    "fitnet": _term("fitnet", "layer3"),
    "at": _term("at", "layer2", "layer3"),
    "crd": _term("crd", "flatten", negatives=16),
    "rkd": _term("rkd", "flatten"),
    "srrl": _term("srrl", "flatten"),
    "byot": _term("byot", "layer2", "flatten"),
    "uskd": _term("uskd", "layer2"),
    "cat_kd": _term("cat_kd", "layer3"),
    "reviewkd": _term("reviewkd", "layer2", "layer3"),
    "cwd": _term("cwd", "layer3"),
    "vid": _term("vid", "layer3"),
    "ofd": _term("ofd", "layer2.bn", "layer3.bn"),
    "wkd": _term("wkd_logit"),
    "ca_mkd_term": _term("ca_mkd", "layer3"),
    "one": _taught_by_itself("one"),
    "simkd": Feature(
        {"method": {"kind": "simkd"}},
        only=[{"kind": "fitnet", "regressor": "none", "taps": [{"student": "projector", "teacher": "layer3"}]}],
    ),
    "data_free": Feature(
        {"method": {"kind": "data_free", "preset": "dfq", "steps": 4, "generator_width": 4}}, only=[{"kind": "kd"}]
    ),
    "few_sample": Feature(
        {"method": {"kind": "few_sample", "samples": 32, "layers": ["layer1.bn"]}, "student.width": 8}
    ),
    "qat": _method("qat", samples=32),
    "dot": _method("dot"),
    "channels_last": _set("train.layout", "channels_last"),
    "frozen": _set("frozen", ["layer1"]),
    "one_cycle": _set("schedule", {"kind": "one_cycle"}),
    "adamw": _set("optimizer", {"kind": "adamw", "lr": 0.005}),
    "inherit": _set("student.inherit", {"source": "teacher", "widths": "truncate"}),
    "resized": _set("student.input_size", 12),
    "prune": _stage("prune", round_to=2, samples=64),
    "finetune_qat": _tuned("rounded", method={"kind": "qat", "samples": 32}),
    "finetune_sparse": _tuned("zeros", method={"kind": "sparse"}),
}  # fmt: skip
_LAYER = "bert.encoder.layer."
_SOFTMAX = ".attention.self.softmax"
OF_TEXTS: dict[str, Feature] = _ANY | {
    "mask": _set("data.augment", [{"kind": "mask_tokens", "rate": 0.2}]),
    "strong": _set("data.strong_augment", [{"kind": "mask_tokens", "rate": 0.4}]),
    "ngrams": _set("data.expand", [{"kind": "ngrams", "count": 40}]),
    "swaps": _set("data.expand", [{"kind": "swaps", "count": 40}]),
    "hidden_states": _term("hidden_mse", {"student": f"{_LAYER}0", "teacher": f"{_LAYER}1"}),
    "embeddings": _term("hidden_mse", "bert.embeddings", name="embeddings"),
    "pkd": _term("pkd", f"{_LAYER}0"),
    "attention_mse": _term("attention_mse", f"{_LAYER}0{_SOFTMAX}:in", heads="mean"),
    "attention_kl": _term("attention_kl", f"{_LAYER}1{_SOFTMAX}"),
    "minilm": _term("token_relations", f"{_LAYER}1.attention.self.query", f"{_LAYER}1.attention.self.key", heads=2),
    "text_nst": _term("text_nst", f"{_LAYER}0", f"{_LAYER}1"),
    "cosine": _term("cosine", f"{_LAYER}1"),
    "jsd": _term("jsd"),
    "reverse_kl": _term("reverse_kl"),
    "uld": _term("uld"),
    "on_policy": _method("on_policy", prompt=4),
    "sequence_level": _method("on_policy", prompt=4, sampler="teacher"),
    "qat": _method("qat", samples=32, activation_bits=None),
    "inherit": _set("student.inherit", {"source": "teacher"}),
    "truncate": _set("student.inherit", {"source": "teacher", "widths": "truncate"}),
    "heads": _stage("prune_heads", samples=32, heads=1, round_to=2),
    "drop_layers": _stage("drop_layers", blocks=1),
}
"""Of models of texts; those with taps are of `bert`."""
