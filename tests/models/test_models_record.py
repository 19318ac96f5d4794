"""The record: preprocessing, saving, loading, damage, code of the user's own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdctl.errors import ConfigError, KdctlError, MissingError
from kdctl.models.record import Model, ModelRecord, build_model, load_model, save_model

NORMALIZE = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}


def record(**changes: object) -> ModelRecord:
    values: dict[str, object] = {
        "kind": "resnet8", "arguments": {}, "num_classes": 3, "class_names": ["a", "b", "ü"],
        "image_shape": [3, 16, 16], "normalize": NORMALIZE, "input_size": None,
    }  # fmt: skip
    return ModelRecord(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    model = build_model(record())
    model(torch.rand(4, 3, 16, 16))  # moves the batch norms' statistics away from their start
    return model.eval()


@pytest.fixture
def stem(model: Model, tmp_path: Path) -> Path:
    save_model(model, tmp_path / "run" / "student")
    return tmp_path / "run" / "student"


def test_a_saved_model_comes_back_exactly(model: Model, stem: Path) -> None:
    images = torch.rand(2, 3, 16, 16)
    for path in (stem, stem.with_suffix(".json"), stem.with_suffix(".safetensors"), stem.parent):
        loaded = load_model(path)
        assert loaded.record == model.record
        assert not loaded.training
        assert torch.equal(loaded(images), model(images))
        assert loaded.net.state_dict().keys() == model.net.state_dict().keys()


def test_the_weights_are_the_bare_nets_in_fp32(model: Model, stem: Path) -> None:
    tensors = load_file(stem.with_suffix(".safetensors"))
    assert tensors.keys() == model.net.state_dict().keys()
    assert {str(t.dtype) for t in tensors.values()} == {"torch.float32", "torch.int64"}
    assert tensors["bn1.num_batches_tracked"] == 1


def test_lower_precision_is_stored_as_fp32(model: Model, tmp_path: Path) -> None:
    save_model(model.to(torch.bfloat16, memory_format=torch.channels_last), tmp_path / "m")
    assert load_file(tmp_path / "m.safetensors")["conv1.weight"].dtype == torch.float32


def test_the_state_of_a_model_holds_no_normalisation(model: Model) -> None:
    assert all(name.startswith("net.") for name in model.state_dict())


def test_a_stem_may_hold_dots_and_a_moved_directory_loads(model: Model, tmp_path: Path) -> None:
    save_model(model, tmp_path / "a" / "teacher-0.5")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert load_model(tmp_path / "b" / "teacher-0.5").record == model.record


def test_equal_models_give_equal_bytes(model: Model, stem: Path, tmp_path: Path) -> None:
    first = stem.with_suffix(".safetensors").read_bytes()
    for i in range(8):
        save_model(model, tmp_path / f"{i}")
        assert (tmp_path / f"{i}.safetensors").read_bytes() == first
    assert sorted(p.name for p in stem.parent.iterdir()) == ["student.json", "student.safetensors"]


def test_weights_alone_carry_their_record(model: Model, stem: Path) -> None:
    stem.with_suffix(".json").unlink()
    assert load_model(stem).record == model.record


def test_a_run_without_a_student_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"student\.safetensors"):
        load_model(tmp_path)


def test_weights_without_any_record_are_missing_one(tmp_path: Path, model: Model) -> None:
    from safetensors.torch import save_file

    save_file(dict(model.net.state_dict()), tmp_path / "student.safetensors")
    with pytest.raises(MissingError, match="no record"):
        load_model(tmp_path)


@pytest.mark.parametrize("place", [0, 9, 40, 5000, -1])
def test_a_flipped_byte_is_found(stem: Path, place: int) -> None:
    path = stem.with_suffix(".safetensors")
    data = bytearray(path.read_bytes())
    data[place] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"student\.safetensors"):
        load_model(stem)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 5000])
@pytest.mark.parametrize("beside", [True, False])
def test_a_truncated_file_is_an_error_of_the_user(stem: Path, keep: int, beside: bool) -> None:
    path = stem.with_suffix(".safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    if not beside:
        stem.with_suffix(".json").unlink()
    with pytest.raises(ConfigError, match=r"student\.safetensors"):
        load_model(stem)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": 1}', '{"format": 99}', "\x00\xff", "[" * 100_000, '{"format": NaN}'],
    ids=["empty", "cut", "list", "null", "bare", "newer", "binary", "deep", "nan"],
)
def test_a_damaged_record_is_an_error_of_the_user(stem: Path, text: str) -> None:
    stem.with_suffix(".json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"student\.json"):
        load_model(stem)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "resnet20"},
        {"kind": "wrn_16_1"},
        {"kind": "resnet9"},
        {"num_classes": 4},
        {"arguments": {"shortcut": "pad"}},
        {"arguments": {"depht": 8}},
        {"image_shape": [1, 16, 16]},
        {"image_shape": "wide"},
        {"class_names": None},
        {"normalize": {"mean": [0.5]}},
        {"normalize": {"mean": [0.5], "std": [0.0]}},
        {"normalize": {"mean": [0.5, 0.5], "std": [1.0, 1.0]}},
    ],
)
def test_a_record_of_another_model_is_refused(stem: Path, change: dict[str, object]) -> None:
    path = stem.with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(KdctlError):
        load_model(stem)


def test_normalisation_is_the_first_thing_a_model_does(model: Model) -> None:
    images = torch.rand(2, 3, 16, 16)
    mean, std = (torch.tensor(NORMALIZE[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    assert torch.equal(model(images), model.net((images - mean) / std))
    bare = build_model(record(normalize=None))
    bare.net.load_state_dict(model.net.state_dict())
    assert torch.equal(bare.eval()(images), model.net(images))
    assert not torch.equal(bare(images), model(images))


def test_one_statistic_serves_all_channels() -> None:
    assert build_model(record(normalize={"mean": [0.5], "std": [0.5]}))(torch.rand(2, 3, 16, 16)).shape == (2, 3)


def test_the_images_are_left_as_they_were(model: Model) -> None:
    images = torch.rand(2, 3, 16, 16)
    before = images.clone()
    model(images)
    assert torch.equal(images, before)


def test_images_are_resized_to_the_nets_input_size() -> None:
    small = build_model(record(input_size=8)).eval()
    seen = []
    small.net.conv1.register_forward_pre_hook(lambda m, i: seen.append(tuple(i[0].shape)))
    flat = torch.full((2, 3, 16, 16), 0.25)
    small(flat)
    assert seen == [(2, 3, 8, 8)]
    torch.testing.assert_close(small(flat), small(flat[:, :, :8, :8]))


def test_an_mlp_learns_the_size_of_its_images() -> None:
    net = build_model(record(kind="mlp", arguments={"hidden": []}, image_shape=[1, 16, 16], normalize=None)).net
    assert net.fc.in_features == 256
    resized = record(kind="mlp", arguments={"hidden": [5]}, image_shape=[1, 16, 16], normalize=None, input_size=8)
    assert build_model(resized).net.layer1.linear.in_features == 64


OWN = '''
import torch
from torch import nn

class Net(nn.Sequential):
    """Mine."""
    def __init__(self, *, units: int = 4, num_classes: int):
        super().__init__(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, units), nn.Linear(units, num_classes))

class Fixed(nn.Sequential):
    """Takes nothing."""
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(768, 3))

class Other:
    """No module."""
'''


def test_a_users_class_gets_only_what_its_signature_names(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    images = torch.rand(2, 3, 16, 16)
    assert build_model(record(kind="./mine.py:Net", arguments={"units": 6}), tmp_path)(images).shape == (2, 3)
    assert build_model(record(kind="./mine.py:Fixed"), tmp_path)(images).shape == (2, 3)
    with pytest.raises(ConfigError, match="not a model"):
        build_model(record(kind="./mine.py:Other"), tmp_path)


def test_a_users_class_travels_with_its_weights(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "mine.py").write_text(OWN)
    model = build_model(record(kind="./mine.py:Net"), tmp_path / "src").eval()
    save_model(model, tmp_path / "run" / "student")
    save_model(model, tmp_path / "run" / "teacher")
    assert [p.name for p in (tmp_path / "run" / "code").iterdir()] == ["mine.py"]
    images = torch.rand(2, 3, 16, 16)
    expected = model(images)
    shutil.rmtree(tmp_path / "src")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    loaded = load_model(tmp_path / "moved")
    assert torch.equal(loaded(images), expected)
    save_model(loaded, tmp_path / "third" / "model")
    assert torch.equal(load_model(tmp_path / "third" / "model")(images), expected)


def test_two_files_of_one_name_do_not_overwrite_each_other(tmp_path: Path) -> None:
    for folder, text in (("a", OWN), ("b", OWN.replace("units: int = 4", "units: int = 5"))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(text)
        save_model(build_model(record(kind="./mine.py:Net"), tmp_path / folder), tmp_path / "run" / folder)
    assert load_model(tmp_path / "run" / "a").net[2].out_features == 4
    assert load_model(tmp_path / "run" / "b").net[2].out_features == 5


def test_a_failed_save_leaves_the_old_model(model: Model, stem: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in stem.parent.iterdir()}
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_model(build_model(record()), stem)
    assert {p.name: p.read_bytes() for p in stem.parent.iterdir()} == before


def test_the_weights_load_in_plain_pytorch(stem: Path) -> None:
    code = f"""
import sys
from safetensors.torch import load_file
from kdctl.models.resnet_cifar import CifarResNet
net = CifarResNet(depth=8, num_classes=3)
net.load_state_dict(load_file({str(stem.with_suffix(".safetensors"))!r}))
assert "torchvision" not in sys.modules and "timm" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_example_is_always_the_same_and_of_the_shape_that_is_asked_for() -> None:
    record = ModelRecord("digits_cnn", {"width": 4}, 10, [str(i) for i in range(10)], [1, 8, 8])
    example = record.example(2)
    assert example.shape == (2, 1, 8, 8) and 0 <= example.min() and example.max() <= 1
    assert torch.equal(example, record.example(2)) and record.example(3, [1, 4, 6]).shape == (3, 1, 4, 6)
