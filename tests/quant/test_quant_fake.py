"""Layers with rounded weights and inputs: their arithmetic, their gradients by hand, and what they leave behind."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdctl.models.structure import apply
from kdctl.quant import fake
from kdctl.quant.learned import Learned
from kdctl.quant.quantizers import FollowedInputs, LearnedInputs, LearnedWeights, rounded
from kdctl.quant.ranges import weight_scales


def nearest(x: Tensor, low: float, high: float, bits: int) -> Tensor:
    """Each number as the nearest of 2^bits levels between low and high, which are multiples of the step."""
    step = (high - low) / (2**bits - 1)
    levels = (torch.arange(2**bits) + round(low / step)) * step
    return levels[(x[..., None] - levels).abs().argmin(-1)]


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 25, 3)).eval()


def quantised(net: nn.Module, **arguments: Any) -> nn.Module:
    apply(net, [{"edit": "fake_quant", "path": path, **arguments} for path in ("0", "3")])
    return net


# ----------------------------------------------------------------------------------------------------------- arithmetic

LAYERS = {
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, 2, padding=1, dilation=2, groups=2, padding_mode="circular"), (2, 4, 9, 9)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 3, padding="same", bias=False), (2, 3, 7)),
    "linear": (lambda: nn.Linear(6, 4), (3, 5, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("quantizer", ["lsq", "plain"])
@pytest.mark.parametrize("per_channel", [True, False], ids=["channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
def test_a_layer_computes_with_the_levels_that_it_leaves_behind(
    name: str, quantizer: fake.Quantizer, per_channel: bool, symmetric: bool
) -> None:
    """Rounding by the numbers of `Learned`, as an exporter does it, then the plain layer: the same to the last bit but
    for the step, which is a difference of floats there."""
    torch.manual_seed(1)
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape) + 0.5
    arguments: dict[str, Any] = {"per_channel": per_channel, "quantizer": quantizer, "symmetric": symmetric}
    made = fake.wrap(layer, weight_bits=4, activation_bits=5, **arguments)
    assert isinstance(made, type(layer)) and made.weight is layer.weight and made.bias is layer.bias
    fake.calibrate(made, lambda: made(x), "minmax")
    made.eval()
    plain, learned = fake.release(made)
    (found,) = learned.values()
    assert type(plain) is type(layer) and isinstance(found, Learned)
    assert found.weight_scale.shape == ((len(layer.weight),) if per_channel else ()) and found.weight_bits == 4
    scale = torch.from_numpy(found.weight_scale).reshape(-1, *[1] * (layer.weight.ndim - 1))
    levels = plain.weight.data / scale
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-5)
    assert float(levels.abs().max()) == pytest.approx(7) and not torch.equal(plain.weight, layer.weight)
    torch.testing.assert_close(plain.weight.data, (layer.weight.data / scale).round() * scale)
    assert found.input_range is not None and found.input_bits == 5
    low, high = found.input_range
    assert low < 0 < high and (high - low) >= 0.99 * float(x.max() - x.min())
    assert (-low / (high - low) * 31) == pytest.approx(16 if symmetric else round(-low / (high - low) * 31))
    torch.testing.assert_close(made(x), plain(nearest(x, low, high, 5)))


def test_inputs_may_stay_in_float() -> None:
    layer, x = nn.Linear(6, 4), torch.randn(3, 6)
    made = fake.wrap(layer, weight_bits=3, activation_bits=None)
    plain, learned = fake.release(made)
    assert torch.equal(made(x), plain(x)) and not torch.equal(made(x), layer(x))
    assert learned[""].input_range is None


def test_zero_is_a_level_and_zeros_cost_nothing() -> None:
    x = torch.tensor([[0.0, -0.31, 1.7, 0.0]])
    for inputs in (LearnedInputs(3, False), FollowedInputs(3, False), LearnedInputs(3, True)):
        inputs.eval().set_range(-0.31, 1.7)
        assert (inputs(x)[0, [0, 3]] == 0).all() and len(inputs(torch.linspace(-9, 9, 999)).unique()) == 8


def test_an_input_without_values_and_weights_of_zero_stay_finite() -> None:
    layer = nn.Linear(2, 2)
    nn.init.zeros_(layer.weight)
    for quantizer in ("lsq", "plain"):
        made: Any = fake.wrap(copy.deepcopy(layer), quantizer=quantizer).eval()
        made.input_quantizer.set_range(0.0, 0.0)
        assert made(torch.zeros(1, 2)).isfinite().all() and made(torch.ones(1, 2)).isfinite().all()
        assert fake.release(made)[1][""].input_range == pytest.approx((0.0, 1.0))
        assert (fake.release(made)[1][""].weight_scale == 1).all()


@pytest.mark.parametrize("value", [-0.5, 0.0])
def test_a_step_that_passed_through_zero_is_the_smallest(value: float) -> None:
    step = torch.tensor([value], requires_grad=True)
    y = rounded(torch.ones(1), step, zero=1, top=2)
    y.sum().backward()
    assert 0 < float(y.detach()) < 1e-7 and step.grad is not None and step.grad.isfinite().all()


def test_the_step_left_behind_is_the_one_that_rounded() -> None:
    made: Any = fake.wrap(nn.Linear(3, 2))
    with torch.no_grad():
        made.weight_quantizer.step.copy_(torch.tensor([-0.5, 0.25]))
    plain, learned = fake.release(made)
    scale = torch.from_numpy(learned[""].weight_scale)
    assert (scale > 0).all() and scale[1] == 0.25
    torch.testing.assert_close((plain.weight / scale[:, None]).round() * scale[:, None], plain.weight)


def test_numbers_of_half_precision_are_rounded_in_fp32() -> None:
    """In bfloat16 itself v = 250.6 would be 251 or 250 before it is rounded: its levels lie one apart there."""
    x = (torch.arange(40) * 6.265).bfloat16()
    step = torch.tensor([0.9371])
    got = rounded(x, step, zero=0, top=255)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, rounded(x.float(), step, zero=0, top=255).bfloat16(), rtol=0, atol=0)
    layer: Any = fake.wrap(nn.Linear(8, 8), activation_bits=4)
    layer.input_quantizer.set_range(-1, 1)
    x = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert layer.rounded_weight().dtype == layer.rounded_input(x).dtype == torch.float32


# ------------------------------------------------------------------------------------------------------------ gradients


def by_hand(x: list[float], step: float, lowest: int, highest: int, out: list[float]) -> tuple[list[float], float]:
    """LSQ, equations 2 and 3, written out: gradients of sum(out * y) by each x and by the step."""
    by_x, by_step = [], 0.0
    for value, weight in zip(x, out, strict=True):
        v = value / step
        if v < lowest:
            by_x.append(0.0)
            by_step += weight * lowest
        elif v > highest:
            by_x.append(0.0)
            by_step += weight * highest
        else:
            by_x.append(weight)
            by_step += weight * (round(v) - v)
    return by_x, by_step


def test_the_gradient_of_learned_steps_by_hand() -> None:
    """Weights: a step a channel, levels -7..7, gradient of the step times 1 / sqrt(N Qp)."""
    torch.manual_seed(2)
    layer = nn.Conv2d(3, 4, 3).double()
    made: Any = fake.wrap(layer, weight_bits=4)
    made.weight_quantizer.step.data = torch.tensor([0.01, 0.02, 0.03, 0.05], dtype=torch.float64)
    out = torch.randn_like(layer.weight)
    (made.rounded_weight() * out).sum().backward()
    clipped = 0
    for c, step in enumerate([0.01, 0.02, 0.03, 0.05]):
        values = layer.weight[c].flatten().tolist()
        by_x, by_step = by_hand(values, step, -7, 7, out[c].flatten().tolist())
        clipped += sum(g == 0 for g in by_x)
        torch.testing.assert_close(layer.weight.grad[c].flatten().tolist(), by_x)  # type: ignore[index]
        assert float(made.weight_quantizer.step.grad[c]) == pytest.approx(by_step / math.sqrt(27 * 7), rel=1e-9)
    assert 0 < clipped < layer.weight.numel()


def test_the_gradient_of_a_learned_offset_by_hand() -> None:
    """LSQ+: outside of the grid the offset has 1; the step 0 below and 2^b - 1 above, for the offset carries the rest.
    Both are multiplied by 1 / sqrt(N Qp), N the numbers of one sample."""
    x = torch.tensor([[-3.0, -0.5, 0.04, 0.4], [0.63, 1.2, 2.5, 9.0]], dtype=torch.float64, requires_grad=True)
    out = [2.0, -1.0, 0.5, 3.0, 1.5, -0.7, 0.9, 1.1]
    inputs = LearnedInputs(3, False).double()
    inputs.step.data.fill_(0.25)
    inputs.offset.data.fill_(-0.52)  # two levels below zero: the grid is -0.5 .. 1.25
    (inputs(x) * torch.tensor(out).view(2, 4)).sum().backward()
    values = x.flatten().tolist()
    by_x, by_step = by_hand(values, 0.25, -2, 5, out)
    below = sum(w for v, w in zip(values, out, strict=True) if v / 0.25 < -2)
    above = sum(w for v, w in zip(values, out, strict=True) if v / 0.25 > 5)
    scale = 1 / math.sqrt(4 * 7)
    torch.testing.assert_close(x.grad.flatten().tolist(), by_x)  # type: ignore[union-attr]
    assert float(inputs.offset.grad) == pytest.approx((below + above) * scale)
    assert float(inputs.step.grad) == pytest.approx((by_step + 2 * (below + above)) * scale)
    assert below and above


def test_the_gradient_of_a_clipped_number_is_the_slope_of_what_is_computed() -> None:
    """Where everything is clipped nothing is approximated: autograd's gradient is the difference quotient."""
    x = torch.tensor([[-50.0, 60.0, 70.0]], dtype=torch.float64)
    inputs = LearnedInputs(4, False).double()
    inputs.set_range(-2.0, 3.0)
    out = torch.tensor([1.3, -0.4, 0.9], dtype=torch.float64)

    def value() -> Tensor:
        return (inputs(x) * out).sum() * math.sqrt(3 * 15)  # without the factor of LSQ

    value().backward()
    by_step, by_offset = float(inputs.step.grad), float(inputs.offset.grad)
    before = value().item()
    inputs.step.data += 1e-4
    slope = (value().item() - before) / 1e-4 / math.sqrt(45)
    assert slope == pytest.approx(-6 * 1.3 + 9 * (-0.4 + 0.9))  # six levels below zero and nine above
    assert by_step - 6 * by_offset == pytest.approx(slope)  # the offset is -6 steps, and moves along


def test_a_range_from_zero_upwards_stays_one() -> None:
    inputs = LearnedInputs(4, False)
    inputs.set_range(0.0, 3.0)
    inputs(torch.tensor([[-1.0, 5.0, 9.0]])).sum().backward()
    assert inputs.offset.grad == 0 and inputs.step.grad > 0
    inputs.set_range(-0.1, 3.0)
    inputs(torch.tensor([[-1.0, 5.0, 9.0]])).sum().backward()
    assert inputs.offset.grad > 0


def test_plain_gradients_pass_straight_through() -> None:
    layer = nn.Linear(5, 3)
    made: Any = fake.wrap(layer, weight_bits=2, quantizer="plain").eval()
    made.input_quantizer.set_range(-1.0, 1.0)
    x = torch.tensor([[-1.6, -0.7, 0.1, 0.8, 1.6]], requires_grad=True)
    made(x).sum().backward()
    assert (x.grad == 0).tolist() == [[True, False, False, False, True]]  # type: ignore[union-attr]
    torch.testing.assert_close(layer.weight.grad, made.rounded_input(x).detach().expand(3, 5))
    assert fake.steps(made) == []


def test_frozen_weights_have_frozen_steps() -> None:
    layer = nn.Linear(5, 3).requires_grad_(False)
    assert not any(p.requires_grad for p in fake.wrap(layer).parameters())
    assert len(fake.steps(fake.wrap(nn.Linear(5, 3)))) == 3


# --------------------------------------------------------------------------------------------------------------- ranges


def test_followed_ranges_move_a_hundredth_of_the_way() -> None:
    inputs = FollowedInputs(8, False)
    inputs.set_range(-1.0, 1.0)
    inputs.train()(torch.tensor([[0.5, 3.0]]))
    assert (float(inputs.low), float(inputs.high)) == pytest.approx((-0.99, 1.02))
    inputs.eval()(torch.tensor([[50.0]]))
    net = nn.Sequential(fake.wrap(nn.Linear(1, 1), quantizer="plain"))
    net[0].input_quantizer = inputs
    fake.observe(net.train(), False)
    net(torch.tensor([[50.0]]))
    assert float(inputs.high) == pytest.approx(1.02)
    fake.observe(net, True)
    net(torch.tensor([[50.0]]))
    assert float(inputs.high) == pytest.approx(0.99 * 1.02 + 0.5)


def test_learned_steps_begin_as_published() -> None:
    weight = torch.randn(4, 6)
    learned = LearnedWeights(4, True, weight)
    torch.testing.assert_close(learned.step.data, 2 * weight.abs().mean(1) / math.sqrt(7))


@pytest.mark.parametrize("quantizer", ["lsq", "plain"])
def test_calibration_takes_the_extremes_of_the_float_net(quantizer: str) -> None:
    net, x = small_net(), torch.randn(8, 2, 5, 5)
    inside = net[:3](x).detach()
    quantised(net, weight_bits=2, activation_bits=6, quantizer=quantizer)
    net.eval()
    fake.calibrate(net, lambda: net(x), "minmax")
    _, learned = fake.release(net)
    step = float(x.max() - x.min()) / 63
    assert learned["0"].input_range == pytest.approx((float(x.min()), float(x.max())), abs=step / 2)
    assert learned["3"].input_range == pytest.approx((0.0, float(inside.max())), rel=1e-6)
    largest = net[3].weight.detach().abs().amax(1).numpy()
    np.testing.assert_allclose(learned["3"].weight_scale, largest, rtol=1e-6)
    assert all(layer.quantizing and layer.input_quantizer.watch is None for _, layer in fake.layers(net))  # type: ignore[union-attr]


def test_calibration_by_square_error_clips() -> None:
    net, x = small_net(), torch.randn(64, 2, 5, 5)
    quantised(net, weight_bits=3, activation_bits=3)
    fake.calibrate(net, lambda: net(x), "mse")
    _, learned = fake.release(net)
    low, high = learned["0"].input_range  # type: ignore[misc]
    assert high - low < 0.8 * float(x.max() - x.min())
    rows = net[3].weight.detach().flatten(1).numpy()
    np.testing.assert_allclose(learned["3"].weight_scale, weight_scales(rows, 3, search=True), rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------- a net


def test_a_net_keeps_its_paths_and_is_released() -> None:
    net, x = small_net(), torch.randn(8, 2, 5, 5)
    names = [name for name, _ in net.named_modules()]
    assert not fake.is_quantized(net)
    before = copy.deepcopy(net.state_dict())
    quantised(net, activation_bits=None, weight_bits=4)
    assert fake.is_quantized(net) and set(names) < {name for name, _ in net.named_modules()}
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    plain, learned = fake.release(net)
    assert not fake.is_quantized(plain) and fake.is_quantized(net) and list(learned) == ["0", "3"]
    assert [name for name, _ in plain.named_modules()] == names
    assert {type(m) for m in plain} == {nn.Conv2d, nn.ReLU, nn.Flatten, nn.Linear}
    assert torch.equal(plain(x), net(x)) and not torch.equal(plain(x), small_net()(x))
    assert plain.state_dict().keys() == before.keys()


def test_state_travels_to_a_net_that_is_built_anew() -> None:
    for quantizer in ("lsq", "plain"):
        net, x = small_net(), torch.randn(8, 2, 5, 5)
        quantised(net, weight_bits=3, activation_bits=4, quantizer=quantizer)
        fake.calibrate(net, lambda net=net, x=x: net(x), "mse")  # type: ignore[misc]
        other = quantised(small_net(), weight_bits=3, activation_bits=4, quantizer=quantizer).eval()
        assert not torch.equal(other(x), net(x))
        other.load_state_dict(net.state_dict())
        assert torch.equal(other(x), net(x))


@pytest.mark.parametrize(
    ("layer", "arguments", "error"),
    [
        (nn.ReLU(), {}, TypeError),
        (nn.ConvTranspose2d(1, 1, 1), {}, TypeError),
        (fake.wrap(nn.Linear(1, 1)), {}, TypeError),
        (nn.Linear(1, 1), {"weight_bits": 1}, ValueError),
        (nn.Linear(1, 1), {"activation_bits": 9}, ValueError),
        (nn.Linear(1, 1), {"quantizer": "best"}, ValueError),
    ],
)
def test_what_cannot_be_wrapped_is_refused(layer: nn.Module, arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        fake.wrap(layer, **arguments)


def test_a_layer_works_where_it_is_called_as_the_plain_one_is() -> None:
    """With padding by other values than zeros, the padded numbers are rounded ones."""
    layer = nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect")
    made: Any = fake.wrap(layer, activation_bits=3)
    made.input_quantizer.set_range(-1.0, 1.0)
    x = torch.randn(1, 1, 4, 4)
    padded = F.pad(made.rounded_input(x), (1, 1, 1, 1), mode="reflect")
    torch.testing.assert_close(made(x), F.conv2d(padded, made.rounded_weight(), layer.bias))
