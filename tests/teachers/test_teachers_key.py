"""The content key: what it depends on, and how a change of it is told."""

from __future__ import annotations

import re

import pytest
import torch
from made_stores import CONTENTS, made_key, put
from torch import nn

from kdctl.errors import ConfigError
from kdctl.teachers.contents import Contents
from kdctl.teachers.key import base_folder, class_code, default_folder, differences, key_hash, nearest, weights_hash
from kdctl.teachers.store import Store

CROP2 = [{"kind": "random_crop", "padding": 2}, {"kind": "horizontal_flip"}]
RECORD = {"format": 1, "kind": "resnet56", "arguments": {"width": 16}, "class_names": ["a", "b"]}
CHANGES = [
    ({"augment": CROP2}, "augment.random_crop.padding was 4, now 2"),
    ({"augment": CROP2[1:]}, "augment was [random_crop, horizontal_flip], now [horizontal_flip]"),
    ({"weights": "v" * 64}, "the teacher's weights changed"),
    ({"code": "c"}, "the code of the teacher's class changed"),
    ({"record": RECORD | {"kind": "resnet20"}}, "teacher.kind was resnet56, now resnet20"),
    ({"record": RECORD | {"arguments": {"width": 8}}}, "teacher.arguments.width was 16, now 8"),
    ({"data": "e"}, "the data changed (images, labels, or how they are split)"),
    ({"augment_seed": 1}, "data.augment_seed was 0, now 1"),
    ({"enumerated": True}, "data.views: all was false, now true"),
    ({"precision": "bf16"}, "train.precision was fp32, now bf16"),
    ({"stored": CONTENTS.to_dict() | {"taps": ["layer1"]}}, "the taps was [], now [layer1]"),
    ({"stored": CONTENTS.to_dict() | {"dtype": "fp32"}}, "teacher_cache.dtype was fp16, now fp32"),
    ({"stored": CONTENTS.to_dict() | {"top_k": 3}}, "teacher_cache.top_k was none, now 3"),
]


@pytest.mark.parametrize(("changed", "said"), CHANGES)
def test_every_part_of_a_key_counts_and_is_named(changed, said):
    old, new = made_key(), made_key(**changed)
    assert differences(old, new) == [said]
    assert key_hash(old) != key_hash(new)


def test_a_new_format_is_named():
    assert differences(made_key() | {"format": 0}, made_key()) == ["the store's format was 0, now 1"]


def test_operations_of_one_kind_are_told_apart():
    old, new = ([{"kind": "erase", "size": 1}, {"kind": "erase", "size": size}] for size in (2, 3))
    assert differences(made_key(augment=old), made_key(augment=new)) == ["augment.erase (2).size was 2, now 3"]


def test_equal_keys_are_equal_in_any_order():
    key = made_key()
    assert key_hash(dict(reversed(key.items()))) == key_hash(key)


@pytest.mark.parametrize(("changed", "said"), CHANGES)
def test_a_named_folder_of_another_key_is_refused(open_store, changed, said):
    store = open_store()
    put(store, [0])
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        open_store(**changed)
    assert caught.value.problems[0].key == "teacher_cache.dir"


def test_all_that_changed_is_named_at_once(open_store):
    put(open_store(), [0])
    with pytest.raises(ConfigError, match=r"weights changed; .*precision was fp32, now bf16"):
        open_store(weights="v", precision="bf16")


def test_weights_hash_sees_values_alone():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = weights_hash(net)
    assert weights_hash(net.to(memory_format=torch.channels_last)) == before
    assert weights_hash(net.eval().requires_grad_(False)) == before
    net[1].running_mean[2] += 1e-6
    assert weights_hash(net) != before


def test_folders_of_keys(monkeypatch, tmp_path):
    monkeypatch.delenv("KDCTL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert base_folder() == tmp_path / "x/kdctl/teachers"
    monkeypatch.setenv("KDCTL_CACHE", str(tmp_path / "k"))
    key = made_key()
    assert default_folder(key) == tmp_path / "k/teachers" / f"resnet56-{key_hash(key)[:16]}"
    own = made_key(record=RECORD | {"kind": "net.py:Net"})
    assert default_folder(own).name.startswith("net_py_Net-")


def test_the_nearest_store_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("KDCTL_CACHE", str(tmp_path))
    assert nearest(made_key()) is None
    sizes = {"train": 40}
    far = made_key(augment=CROP2, precision="bf16")
    near = made_key(augment=CROP2)
    unlike = made_key(weights="other", data="other")
    for key in (far, near, unlike):
        put(Store(default_folder(key), key, CONTENTS, sizes), [0])
    (base_folder() / "broken").mkdir()
    (base_folder() / "broken/key.json").write_text("{")
    assert nearest(made_key()) == (default_folder(near), ["augment.random_crop.padding was 2, now 4"])


def test_what_is_kept_is_in_the_key():
    both = Contents(True, 2, ("b",), "fp32", 5)
    assert both.to_dict() == {"logits": True, "top_k": 2, "taps": ["b"], "dtype": "fp32"}


def test_a_class_of_an_installed_package_is_known_by_its_code(monkeypatch, tmp_path):
    file = tmp_path / "their_nets.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    codes = []
    for factor in (1, 2):
        file.write_text(f"class Net:\n    factor = {factor}\n")
        codes.append(class_code("models", "their_nets:Net"))
    assert codes[0][0] == codes[1][0] == "their_nets:Net"
    assert None not in (codes[0][1], codes[1][1]) and codes[0][1] != codes[1][1]
    assert class_code("models", "resnet20") == ("resnet20", None)
    assert str(class_code("models", "torchvision:resnet18")[1]).startswith("torchvision ")
