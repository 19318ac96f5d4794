"""Foreign weights files: wrappers, prefixes, mappings, what does not fit, and what must never be executed."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from kdctl import registry
from kdctl.errors import ConfigError, MissingError
from kdctl.models.weights import load_weights

NOISE = random.Random(0).randbytes(4000)


def make(classes: int = 10, seed: int = 0, **arguments: Any) -> nn.Module:
    torch.manual_seed(seed)
    net = registry.create("models", "resnet8", arguments, num_classes=classes, in_channels=3)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if "running" in name:
                value.uniform_(0.5, 1.5)
    return net


@pytest.fixture
def source() -> nn.Module:
    return make(seed=1)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def prefixed(prefix: str, net: nn.Module) -> dict[str, torch.Tensor]:
    return {prefix + k: v for k, v in net.state_dict().items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda n: n.state_dict(),
        lambda n: {"best_prec1": 91.7, "state_dict": prefixed("module.", n)},
        lambda n: {"model": n.state_dict(), "epoch": 3, "optimizer": {"state": {}, "param_groups": []}},
        lambda n: {"net": prefixed("_orig_mod.module.", n)},
        lambda n: {"state_dict": {"model": prefixed("net.", n)}},
        lambda n: n.state_dict() | {"epoch": 12},
    ],
    ids=["bare", "module", "model", "compiled", "nested", "beside"],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_wrappers_and_prefixes_are_unwrapped(source: nn.Module, tmp_path: Path, wrap: Any, legacy: bool) -> None:
    path = tmp_path / "weights.th"
    torch.save(wrap(source), path, _use_new_zipfile_serialization=not legacy)
    net = make()
    assert not equal(net, source)
    load_weights(net, path, {})
    assert equal(net, source)


def test_safetensors_and_run_directories(source: nn.Module, tmp_path: Path) -> None:
    save_file(prefixed("module.", source), tmp_path / "student.safetensors")
    for path in (tmp_path / "student.safetensors", tmp_path):
        net = make()
        load_weights(net, path)
        assert equal(net, source)


def test_half_precision_is_widened(source: nn.Module, tmp_path: Path) -> None:
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in source.state_dict().items()}, tmp_path / "w.pt")
    net = make()
    load_weights(net, tmp_path / "w.pt")
    assert net.fc.weight.dtype == torch.float32
    torch.testing.assert_close(net.fc.weight, source.fc.weight, atol=1e-3, rtol=1e-2)


def test_names_are_mapped_in_full_and_by_prefix(source: nn.Module, tmp_path: Path) -> None:
    names = {"fc.weight": "head.w", "fc.bias": "head.b", "layer3.0.": "stage.last.", "layer": "stage.first"}
    state = {}
    for name, value in source.state_dict().items():
        old = next((o for o in names if name.startswith(o)), None)
        state[f"module.{name}" if old is None else "module." + names[old] + name[len(old) :]] = value
    torch.save(state, tmp_path / "w.pth")
    net = make()
    mapping = {
        "head.w": "fc.weight", "head.b": "fc.bias", "stage.last.": "layer3.0.",
        "stage.first1.": "layer1.", "stage.first2.": "layer2.",
    }  # fmt: skip
    load_weights(net, tmp_path / "w.pth", mapping)
    assert equal(net, source)


def test_the_longest_prefix_counts(source: nn.Module, tmp_path: Path) -> None:
    torch.save({k.replace("layer", "x.", 1).replace("fc.", "x.y."): v for k, v in source.state_dict().items()},
               tmp_path / "w.pth")  # fmt: skip
    net = make()
    mapping = {"x.y.": "fc.", "x.1.": "layer1.", "x.2.": "layer2.", "x.": "nowhere.", "x.3.": "layer3."}
    with pytest.raises(ConfigError, match=r"nothing named 'x\.'"):
        load_weights(net, tmp_path / "w.pth", mapping)
    del mapping["x."]
    load_weights(net, tmp_path / "w.pth", mapping)
    assert equal(net, source)


def test_a_mapping_of_nothing_says_what_there_is(source: nn.Module, tmp_path: Path) -> None:
    torch.save(source.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"did you mean 'layer1\.0\.conv1\.'"):
        load_weights(make(), tmp_path / "w.pth", {"layer1.0.konv1.": "x."})
    with pytest.raises(ConfigError, match=r"both become 'fc\.bias'"):
        load_weights(make(), tmp_path / "w.pth", {"bn1.bias": "fc.bias"})


@pytest.mark.parametrize("order", [list, sorted])
def test_other_names_are_mapped_in_the_hint(order: Any, source: nn.Module, tmp_path: Path) -> None:
    """The mapping that the hint names makes the file fit; where shapes differ, there is none to name."""
    state = {k.replace("layer1.0.", "a.b.").replace("fc.", "head."): v for k, v in source.state_dict().items()}
    state = {name: state[name] for name in order(state)}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ConfigError) as raised:
        load_weights(make(), tmp_path / "w.pth")
    hint = raised.value.problems[0].hint or ""
    assert "a.b.: layer1.0." in hint and "head.: fc." in hint
    net = make()
    load_weights(net, tmp_path / "w.pth", yaml.safe_load(hint.partition("mapping: ")[2]))
    assert equal(net, source)
    torch.save(state | {"head.bias": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="other names go through `mapping"):
        load_weights(make(), tmp_path / "w.pth")


def test_what_does_not_fit_is_listed_and_nothing_is_loaded(source: nn.Module, tmp_path: Path) -> None:
    state = {k: v for k, v in source.state_dict().items() if not k.startswith("bn1.")}
    state["extra.weight"] = torch.zeros(2)
    state["fc.weight"] = torch.zeros(5, 64)
    state["layer1.0.bn1.weight"] = torch.full_like(state["layer1.0.bn1.weight"], float("nan"))
    torch.save(state, tmp_path / "w.pth")
    net, untouched = make(), make()
    with pytest.raises(ConfigError) as raised:
        load_weights(net, tmp_path / "w.pth")
    missing, unexpected, shapes, broken = (p.message for p in raised.value.problems)
    assert "lacks bn1.weight, bn1.bias, bn1.running_mean, bn1.running_var" in missing
    assert "extra.weight" in unexpected
    assert "fc.weight (5, 64) instead of (10, 64)" in shapes
    assert "layer1.0.bn1.weight" in broken
    assert "mapping" in str(raised.value)
    assert equal(net, untouched)


def test_long_lists_are_cut(source: nn.Module, tmp_path: Path) -> None:
    torch.save({"fc.bias": source.fc.bias}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"conv1\.weight, .* and \d+ more"):
        load_weights(make(), tmp_path / "w.pth")


def test_files_without_batch_counters_load(source: nn.Module, tmp_path: Path) -> None:
    torch.save({k: v for k, v in source.state_dict().items() if "num_batches" not in k}, tmp_path / "w.pth")
    load_weights(make(), tmp_path / "w.pth")


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("suffix", [".pth", ".th", ".bin"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickled_object_is_never_executed(source: nn.Module, tmp_path: Path, suffix: str, legacy: bool) -> None:
    path, trace = tmp_path / f"w{suffix}", tmp_path / "executed"
    torch.save({"x": Malicious(trace), "state_dict": source.state_dict()}, path,
               _use_new_zipfile_serialization=not legacy)  # fmt: skip
    with pytest.raises(ConfigError, match=r"more than tensors \(posix.mkdir\)|more than tensors"):
        load_weights(make(), path)
    assert not trace.exists()


def test_a_whole_pickled_module_is_refused(source: nn.Module, tmp_path: Path) -> None:
    torch.save(source, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="state_dict"):
        load_weights(make(), tmp_path / "w.pth")


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {}, {"state_dict": {}}, 3.0])
def test_a_file_without_a_state_dict_says_what_it_has(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="holds no state dict"):
        load_weights(make(), tmp_path / "w.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02", NOISE], ids=["empty", "text", "head", "noise"])
def test_what_is_no_weights_file_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    (tmp_path / f"w{suffix}").write_bytes(content)
    with pytest.raises(ConfigError, match=f"w{suffix}"):
        load_weights(make(), tmp_path / f"w{suffix}")


@pytest.mark.parametrize("keep", [10, 1000, 200_000])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_truncated_file_is_refused(source: nn.Module, tmp_path: Path, suffix: str, keep: int) -> None:
    path = tmp_path / f"w{suffix}"
    save_file(source.state_dict(), path) if suffix == ".safetensors" else torch.save(source.state_dict(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConfigError, match="damaged"):
        load_weights(make(), path)


def test_a_missing_file_suggests_its_neighbour(source: nn.Module, tmp_path: Path) -> None:
    torch.save(source.state_dict(), tmp_path / "resnet8.pth")
    with pytest.raises(MissingError, match=r"did you mean 'resnet8\.pth'"):
        load_weights(make(), tmp_path / "resnet_8.pth")
    with pytest.raises(MissingError, match="no weights file"):
        load_weights(make(), tmp_path / "nowhere" / "resnet8.pth")


def test_our_own_nets_have_no_published_weights() -> None:
    with pytest.raises(ConfigError, match="no pretrained weights"):
        load_weights(make(), "pretrained")


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "none.safetensors")
    with pytest.raises(ConfigError):
        load_weights(make(), tmp_path / "none.safetensors", {})
