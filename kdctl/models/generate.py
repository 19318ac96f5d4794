"""Texts that a language model goes on with, token by token."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from kdctl.models.gpt import places_seen
from kdctl.models.record import Model
from kdctl.signals import find_logits


@torch.no_grad()
def continued(model: Model, prompts: Tensor, length: int, uniforms: Tensor | None, temperature: float = 1.0) -> Tensor:
    """Prompts, int64 (N, P), with further tokens up to `length`, int64 (N, length).

    uniforms: (N, length), numbers in [0, 1) that choose the token of each place by the distribution function of the
    model's probabilities at `temperature`; None takes the most probable token. The tokenizer's padding is never chosen.
    A net whose forward pass takes `past` computes each place once. The model is in eval mode and stays so.
    """
    tokens, past = prompts, _start(model)
    while tokens.shape[1] < length:
        shown = tokens[:, places_seen(past) :]
        logits = _last(model, shown, past).float()
        if model.record.tokens is not None:
            logits[:, model.record.tokens.pad] = -torch.inf
        if uniforms is None or temperature == 0:
            chosen = logits.argmax(1)
        else:
            reached = (logits / temperature).softmax(1).cumsum(1)
            drawn = uniforms[:, tokens.shape[1], None] * reached[:, -1:]
            chosen = torch.searchsorted(reached, drawn, right=True)[:, 0].clamp_max(logits.shape[1] - 1)
        tokens = torch.cat([tokens, chosen[:, None]], 1)
    return tokens


def _start(model: Model) -> list[list[Tensor]] | None:
    """What a net keeps of the tokens that it has seen: keys and values of each layer, nothing yet; None without."""
    if "past" not in inspect.signature(model.net.forward).parameters:
        return None
    return [[] for _ in model.net.layer]  # type: ignore[union-attr]


def _last(model: Model, tokens: Tensor, past: Any) -> Tensor:
    """The logits (N, V) behind the last of these tokens."""
    return find_logits(model(tokens) if past is None else model.net(tokens, past=past))[:, -1]
