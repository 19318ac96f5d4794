"""The decoder, and texts that it goes on with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kdctl.errors import ConfigError
from kdctl.models import generate, structure
from kdctl.models.generate import continued
from kdctl.models.record import Model, ModelRecord, build_model
from kdctl.signals import TokenInput
from kdctl.taps import Taps

TOKENS = TokenInput(vocab_size=40, length=20, pad=0)


def gpt(**arguments: Any) -> Model:
    """A model whose answers depend much on what it reads."""
    torch.manual_seed(0)
    arguments = {"depth": 2, "width": 16, "heads": 4} | arguments
    record = ModelRecord("gpt", arguments, 40, [str(n) for n in range(40)], [], tokens=TOKENS, head="vocabulary")
    model = build_model(record).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, 40, (3, 12), generator=torch.Generator().manual_seed(1))


def test_no_token_sees_those_behind_it(tokens: Tensor) -> None:
    model = gpt()
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 5) % 39 + 1
    before, after = model(tokens), model(changed)
    assert before.shape == (3, 12, 40)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_tapped_attention_is_the_same_up_to_rounding(tokens: Tensor) -> None:
    model = gpt()
    plain = model(tokens)
    taps = Taps(model.net, ["layer.1.attention.softmax"])
    with taps.recording() as features:
        tapped = model(tokens)
    torch.testing.assert_close(tapped, plain, atol=1e-4, rtol=1e-4)
    maps = features["layer.1.attention.softmax"]
    assert maps.shape == (3, 4, 12, 12) and not bool(maps.triu(1).any())
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 4, 12))


def test_what_was_seen_is_not_computed_again(tokens: Tensor) -> None:
    model = gpt()
    past: list[list[Tensor]] = [[], []]
    first = model.net(tokens[:, :11], past=past)
    last = model.net(tokens[:, 11:], past=past)
    torch.testing.assert_close(torch.cat([first, last], 1), model(tokens), atol=1e-4, rtol=1e-4)
    assert last.shape[1] == 1


def test_a_text_goes_on_as_the_model_says(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt()
    uniforms = torch.rand(3, 20, generator=torch.Generator().manual_seed(2))
    written = continued(model, tokens[:, :5], 20, uniforms)
    assert written.shape == (3, 20) and written[:, :5].equal(tokens[:, :5]) and not (written == TOKENS.pad).any()
    monkeypatch.setattr(generate, "_start", lambda model: None)  # each place anew from all before it
    assert written.equal(continued(model, tokens[:, :5], 20, uniforms))


def test_the_most_probable_token_is_taken_without_draws(tokens: Tensor) -> None:
    model = gpt()
    greedy = continued(model, tokens[:, :5], 9, None)
    assert greedy.equal(continued(model, tokens[:, :5], 9, torch.rand(3, 20), temperature=0))
    logits = model(greedy[:, :-1])
    logits[..., TOKENS.pad] = -torch.inf
    assert greedy[:, 5:].equal(logits.argmax(2)[:, 4:])


def test_tokens_come_as_often_as_they_are_probable() -> None:
    model = gpt()
    prompt = torch.full((4000, 1), 7)
    uniforms = ((torch.arange(4000) + 0.5) / 4000)[:, None].expand(-1, 2)
    drawn = continued(model, prompt, 2, uniforms, temperature=2.0)[:, 1]
    logits = model(prompt[:1])[0, -1]
    logits[TOKENS.pad] = -torch.inf
    share = torch.bincount(drawn, minlength=40) / 4000
    torch.testing.assert_close(share, (logits / 2).softmax(0), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "match"), [({"width": 10}, "divided among 4 heads"), ({"positions": 8}, "8 positions")]
)
def test_sizes_that_do_not_fit_are_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        gpt(**arguments)


def test_it_answers_for_the_vocabulary_alone() -> None:
    record = ModelRecord("gpt", {}, 2, ["a", "b"], [], tokens=TOKENS)
    with pytest.raises(ConfigError, match="which token comes next"):
        build_model(record)


@pytest.mark.parametrize("dropped", [["layer.0"], ["layer.1"], ["layer.0", "layer.1"]])
def test_a_net_without_some_layers_goes_on_as_it_says(
    dropped: list[str], tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gpt()
    for path in dropped:
        structure.skip(model.net, path)
    written = continued(model, tokens[:, :5], 14, None)
    monkeypatch.setattr(generate, "_start", lambda model: None)
    assert written.equal(continued(model, tokens[:, :5], 14, None))


def test_tapped_attention_in_half_precision(tokens: Tensor) -> None:
    model = gpt()
    taps = Taps(model.net, ["layer.1.attention.softmax"])
    with torch.autocast("cpu", torch.float16), taps.recording() as features:
        model(tokens)
    maps = features["layer.1.attention.softmax"]
    assert bool(maps.isfinite().all()) and not bool(maps.triu(1).any())
