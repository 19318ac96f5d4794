"""One cell of TextBrewer in its own environment: prints what it measured as one line of JSON.

    PEERS/bin/python scripts/bench/textbrewer_peer.py live --batches batches.npz --teacher MINILM --warmup 10

As its documentation has it: models of transformers, AdamW of torch, a data loader of dictionaries. What is timed are
the optimizer's steps after --warmup others: the pass that fills its cache of logits, and checkpoints, are not.

    live       GeneralDistiller with the soft cross entropy of logits
    features   and hidden states of two layers through projections, attention of two layers summed over heads
    stored     BasicDistiller with is_caching_logits: it keeps batches and logits in memory before the first epoch
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Cell, Meter, peak_mib

sys.path[0] = str(Path(__file__).resolve().parents[2])  # in this folder `textbrewer` is a script of ours
from kdctl.torchvision_guard import ensure_torchvision  # noqa: E402

ensure_torchvision()
import textbrewer  # noqa: E402
import transformers  # noqa: E402

_TEMPERATURE = 4
_FEATURES = [
    {"layer_T": 3, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 1, "proj": ["linear", 128, 384]},
    {"layer_T": 6, "layer_S": 2, "feature": "hidden", "loss": "hidden_mse", "weight": 1, "proj": ["linear", 128, 384]},
    {"layer_T": 2, "layer_S": 0, "feature": "attention", "loss": "attention_mse_sum", "weight": 1},
    {"layer_T": 5, "layer_S": 1, "feature": "attention", "loss": "attention_mse_sum", "weight": 1},
]
"""Hidden states are numbered from the embeddings on, attention from the first layer on."""


class Batches:
    """The batches of a file as a data loader: dictionaries as the models of transformers take them."""

    def __init__(self, file: Path, epochs: int) -> None:
        with np.load(file, allow_pickle=False) as kept:
            found = [torch.from_numpy(kept[f"arr_{i}"]).long() for i in range(len(kept.files))]
        size = len(found) // epochs
        self.epochs = [found[i * size : (i + 1) * size] for i in range(epochs)]
        self.taken = 0

    def __len__(self) -> int:
        return len(self.epochs[0])

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        batches = self.epochs[self.taken % len(self.epochs)]
        self.taken += 1
        for numbers in batches:
            yield {"input_ids": numbers, "attention_mask": (numbers != 0).long()}


def models(options: argparse.Namespace) -> tuple[Any, Any]:
    """The teacher and its small student, as the transformers library builds them."""
    attention = {"attn_implementation": "eager" if options.case == "features" else "sdpa"}  # only eager gives attention
    teacher = transformers.AutoModelForSequenceClassification.from_pretrained(options.teacher, **attention)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
    config = transformers.BertConfig(vocab_size=teacher.config.vocab_size, max_position_embeddings=64, **sizes)
    config._attn_implementation = attention["attn_implementation"]
    return teacher.eval(), transformers.BertForSequenceClassification(config)


def adapted(batch: dict[str, torch.Tensor], outputs: Any) -> dict[str, Any]:
    """What the distiller sees of a model's outputs."""
    seen = {"logits": outputs.logits}
    if outputs.hidden_states is not None:
        seen |= {"hidden": outputs.hidden_states, "attention": outputs.attentions}
        seen["inputs_mask"] = batch["attention_mask"]
    return seen


def measure(options: argparse.Namespace) -> Cell:
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    teacher, student = models(options)
    batches = Batches(options.batches, options.epochs)
    matches = _FEATURES if options.case == "features" else None
    distilled = textbrewer.DistillationConfig(
        temperature=_TEMPERATURE, kd_loss_weight=1, hard_label_weight=0, intermediate_matches=matches,
        is_caching_logits=options.case == "stored",
    )  # fmt: skip
    kind = textbrewer.BasicDistiller if options.case == "stored" else textbrewer.GeneralDistiller
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=options.fused or None)
    total, done, meter, cell = options.epochs * len(batches), 0, Meter(), {}

    def stepped(*_: Any) -> None:
        nonlocal done, cell
        done += 1
        if done == options.warmup:
            meter.start()
        if done == total:
            seconds, cpu = meter.read()
            texts = (total - options.warmup) * options.batch
            cell = {"texts": texts, "seconds": seconds, "cpu_seconds": cpu, "peak_mib": peak_mib()}

    optimizer.register_step_post_hook(stepped)
    given = {"output_hidden_states": True, "output_attentions": True} if options.case == "features" else {}
    with tempfile.TemporaryDirectory() as folder:
        trained = textbrewer.TrainingConfig(device="cpu", output_dir=folder)
        distiller = kind(trained, distilled, teacher, student, adapted, adapted)
        with distiller:
            distiller.train(optimizer, batches, num_epochs=options.epochs, **given)
    return cell | {"versions": {"transformers": transformers.__version__, "torch": torch.__version__}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=["live", "features", "stored"])
    parser.add_argument("--batches", type=Path, required=True, help=".npz with one array of token numbers a batch")
    parser.add_argument("--teacher", type=Path, required=True, help="the folder of the teacher")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--fused", action="store_true", help="AdamW in one kernel, which torch offers and nobody asks for"
    )
    options = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    print(json.dumps(measure(options)))


if __name__ == "__main__":
    main()
