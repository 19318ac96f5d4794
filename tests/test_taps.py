"""Taps on small models of every awkward kind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdctl.errors import ConfigError
from kdctl.taps import Taps, check


class Block(nn.Module):
    """Two convolutions; the same in-place ReLU is called twice, and the shortcut is added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 2, 3, padding=1)
        self.conv2 = nn.Conv2d(2, 2, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.conv1(x))
        out = self.conv2(out)
        out += x
        return self.relu(out)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(Block(), Block())
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer1(x).mean((2, 3)))


class Structured(nn.Module):
    """Says its outputs in dicts, tuples and keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.rnn = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> dict[str, Any]:
        said = self.encoder(x, scale=torch.tensor(2.0))
        return {"logits": self.rnn(said["last"])[0], "said": said}


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Any]:
        first = self.hidden(x) * scale
        return {"last": first + 1, "hidden": (x, first), "length": 5}


X = torch.arange(32.0).reshape(1, 2, 4, 4) / 16 - 1


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def record(model: nn.Module, *paths: str, x: Tensor = X) -> dict[str, Tensor]:
    with Taps(model, paths) as taps, taps.recording() as features:
        model(x)
    return features


def num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_outputs_inputs_and_calls() -> None:
    model = net()
    block = model.layer1[0]
    features = record(model, "layer1.0", "layer1.0.conv1:in", "layer1.0.relu", "layer1.0.relu#2", "layer1.0.relu:in#2")
    first = F.relu(block.conv1(X))
    second = block.conv2(first) + X
    torch.testing.assert_close(features["layer1.0.conv1:in"], X)
    torch.testing.assert_close(features["layer1.0.relu"], first)
    torch.testing.assert_close(features["layer1.0.relu:in#2"], second)
    torch.testing.assert_close(features["layer1.0.relu#2"], F.relu(second))
    torch.testing.assert_close(features["layer1.0"], F.relu(second))
    assert second.min() < 0, "the test would not see an in-place ReLU"


def test_overwritten_tensors_are_kept_at_every_forward_and_in_both_modes() -> None:
    """conv1's output is overwritten by the in-place ReLU, conv2's by the shortcut."""
    model = net()
    with Taps(model, ["layer1.0.conv1", "layer1.0.conv2", "layer1.0"]) as taps:
        for training in (True, False, True):
            model.train(training)
            with taps.recording() as features:
                result = model(X)
            first = model.layer1[0].conv1(X)
            torch.testing.assert_close(features["layer1.0.conv1"], first)
            torch.testing.assert_close(features["layer1.0.conv2"], model.layer1[0].conv2(F.relu(first)))
            torch.testing.assert_close(result, net()(X))


def test_a_tensor_that_nothing_overwrites_is_not_copied_again() -> None:
    model, made = net(), []
    model.layer1.register_forward_hook(lambda module, arguments, output: made.append(output))
    with Taps(model, ["layer1"]) as taps:
        for _ in range(2):
            with taps.recording() as features:
                model(X)
    assert features["layer1"] is made[1]


def test_overwriting_that_starts_later_is_not_silent() -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.inplace = nn.Conv2d(2, 2, 1), False

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv(x), inplace=self.inplace)

    model = Moody()
    with Taps(model, ["conv"]) as taps:
        with taps.recording():
            model(X)
        model.inplace = True
        with pytest.raises(ConfigError, match="'conv' was overwritten"), taps.recording():
            model(X)


def test_inference_mode() -> None:
    model = net()
    with torch.inference_mode():
        features = record(model, "layer1.0.conv1")
        torch.testing.assert_close(features["layer1.0.conv1"], model.layer1[0].conv1(X))


def test_gradients_flow() -> None:
    model = net()
    for _ in range(2):
        features = record(model, "layer1.0.conv1", "layer1.0")
        model.zero_grad()
        sum(f.square().sum() for f in features.values()).backward()
        assert model.layer1[0].conv1.weight.grad.abs().sum() > 0
        assert model.layer1[1].conv1.weight.grad is None


def test_the_first_forward_has_the_graph_of_any_other() -> None:
    """Else the first step of a resumed training would sum gradients in another order, and round them otherwise."""
    model = net()
    with Taps(model, ["layer1", "layer1.0.conv1"]) as taps:
        kinds = []
        for _ in range(2):
            with taps.recording() as features:
                model(X)
            kinds.append({path: type(feature.grad_fn).__name__ for path, feature in features.items()})
    assert kinds[0] == kinds[1] and kinds[0]["layer1.0.conv1"] == "CloneBackward0" != kinds[0]["layer1"]


def test_training_gradients_are_those_without_taps() -> None:
    gradients = []
    for paths in ([], ["layer1.0.conv1", "layer1.0.relu#2"]):
        model = net()
        with Taps(model, paths) as taps:
            for _ in range(2):
                model.zero_grad()
                with taps.recording():
                    value = model(X).square().sum()
                value.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_items_of_dicts_tuples_and_keywords() -> None:
    model, x = Structured(), torch.randn(2, 5, 4)
    paths = ["encoder.last", "encoder#1.hidden.1", "encoder#1.hidden.-1", "rnn.0", "rnn.1.0", ".said.last", ":in"]
    features = record(model, *paths, "encoder:in", "encoder:in.0", "encoder:in.scale", x=x)
    said = model.encoder(x, scale=torch.tensor(2.0))
    torch.testing.assert_close(features["encoder.last"], said["last"])
    torch.testing.assert_close(features[".said.last"], said["last"])
    torch.testing.assert_close(features["encoder#1.hidden.1"], said["hidden"][1])
    torch.testing.assert_close(features["encoder#1.hidden.-1"], said["hidden"][1])
    assert features["rnn.0"].shape == (2, 5, 3) and features["rnn.1.0"].shape == (1, 2, 3)
    assert features["encoder:in.scale"] == 2
    for path in (":in", "encoder:in", "encoder:in.0"):
        torch.testing.assert_close(features[path], x)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("layer1.0.conv3", r"there is no 'conv3' in a tensor of shape .*did you mean 'layer1.0.conv"),
        ("layerr1", "no module 'layerr1' .*did you mean 'layer1'"),
        ("xyz.abc", "no module 'xyz.abc' .*it has layer1, head"),
        ("layer1.7.conv1", "there is no '7'"),
        ("layer1.0.relu#3", "wants call 3 of its module, which was called 2 times"),
        ("layer1.0:out", "is not a tap"),
        ("layer1#0", "is not a tap"),
        ("", "is not a tap"),
        ("head:in.nothing", "there is no 'nothing' in a dict with 0"),
        ("layer1..0", "there is no"),
    ],
)
def test_wrong_taps_say_what_there_is(path: str, message: str) -> None:
    model = net()
    with pytest.raises(ConfigError, match=message) as error:
        record(model, path)
    assert error.value.code == 3
    assert num_hooks(model) == 0


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("encoder", "holds no tensor but a dict with last, hidden, length"),
        ("encoder.length", "holds no tensor but a int"),
        ("rnn.1", "holds no tensor but a tuple of 2"),
        ("rnn.2", "there is no '2' in a tuple of 2"),
        (".logit", "there is no 'logit' in a dict with logits, said"),
    ],
)
def test_taps_that_hold_no_tensor(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        record(Structured(), path, x=torch.randn(2, 5, 4))


def test_a_container_without_output_is_named() -> None:
    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(2, 2)])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](x)

    with pytest.raises(ConfigError, match=r"'blocks' was not called.*a container"):
        record(Looped(), "blocks", x=torch.zeros(1, 2))


def test_all_wrong_paths_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        Taps(net(), ["layerr1", "head", "haed"])
    assert len(error.value.problems) == 2
    with pytest.raises(ConfigError, match="did you mean 'head'"):
        check(net(), "haed")
    check(net(), "head")


def test_shared_modules_have_all_their_names() -> None:
    shared = nn.Linear(2, 2)
    features = record(nn.Sequential(shared, shared), "1", "0#2", x=torch.ones(1, 2))
    torch.testing.assert_close(features["1"], shared(torch.ones(1, 2)))
    torch.testing.assert_close(features["0#2"], shared(shared(torch.ones(1, 2))))


def test_no_paths_set_no_hooks() -> None:
    model = net()
    taps = Taps(model, [])
    assert num_hooks(model) == 0
    with taps.recording() as features:
        model(X)
    assert features == {}


def test_hooks_go_with_remove_and_with_exceptions() -> None:
    model = net()
    taps = Taps(model, ["layer1.0", "layer1.0:in"])
    assert num_hooks(model) > 0
    taps.remove()
    taps.remove()
    assert num_hooks(model) == 0
    with pytest.raises(ZeroDivisionError), Taps(model, ["layer1"]) as taps, taps.recording():
        raise ZeroDivisionError
    assert num_hooks(model) == 0


def test_a_failed_forward_leaves_the_taps_usable() -> None:
    model = net()
    with Taps(model, ["layer1"]) as taps:
        with pytest.raises(RuntimeError), taps.recording():
            model(torch.zeros(1, 7, 4, 4))
        with taps.recording() as features:
            model(X)
    assert features["layer1"].shape == (1, 2, 4, 4)


def test_nothing_is_recorded_outside() -> None:
    model = net()
    with Taps(model, ["layer1"]) as taps:
        model(X)
        with taps.recording() as features:
            model(X)
        before = features["layer1"]
        model(2 * X)
        assert features["layer1"] is before


def test_the_last_forward_counts() -> None:
    model = net()
    with Taps(model, ["layer1.0.relu#2"]) as taps, taps.recording() as features:
        model(2 * X)
        model(X)
    torch.testing.assert_close(features["layer1.0.relu#2"], record(model, "layer1.0")["layer1.0"])


def test_nested_recordings_and_two_sets_of_taps() -> None:
    model = net()
    with Taps(model, ["layer1"]) as taps, Taps(model, ["head"]) as others:
        with taps.recording() as outer, others.recording() as of_others:
            model(X)
            kept = outer["layer1"]
            with taps.recording() as inner:
                model(2 * X)
            assert outer["layer1"] is kept
            assert not torch.equal(inner["layer1"], kept)
            result = model(3 * X)
            assert outer["layer1"] is not kept
        assert of_others["head"].equal(result)


def test_copies_do_not_record() -> None:
    model = net()
    with Taps(model, ["layer1", "layer1:in"]) as taps:
        twin = copy.deepcopy(model)
        with taps.recording() as features:
            model(X)
            kept = features["layer1"].clone()
            twin(2 * X)
        assert torch.equal(features["layer1"], kept)
        with pytest.raises(ConfigError, match="'layer1' was not called"), taps.recording():
            twin(X)


def test_what_is_in_place_in_train_mode_alone() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Dropout(1.0, inplace=True))
    with Taps(model, ["0"]) as taps:
        for training in (False, True, True):
            with taps.recording() as features:
                model.train(training)(X)
            torch.testing.assert_close(features["0"], model[0](X))


def test_modules_are_left_as_they_were() -> None:
    model = net()
    before = {name: {k: v for k, v in vars(m).items() if "hooks" not in k} for name, m in model.named_modules()}
    record(model, "layer1.0.conv1", "layer1.0.relu:in")
    after = {name: {k: v for k, v in vars(m).items() if "hooks" not in k} for name, m in model.named_modules()}
    assert str(after) == str(before)
    assert all(m.inplace for m in model.modules() if isinstance(m, nn.ReLU))
