"""The catalogue: tables, names of the user's own, signatures from source, and what is loaded and created."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from kdctl import registry
from kdctl.errors import ConfigError, MissingError
from kdctl.registry import Component, catalogue, create, find, load, signature

GROUPS = list(registry.GROUPS)


# --------------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("group", GROUPS)
def test_every_entry_of_every_table_has_a_readable_class(group):
    for component in catalogue(group).values():
        found = signature(component)
        assert component.summary and found.doc, component
        assert not found.accepts_any, component
        assert not set(component.preset) & set(found.parameters)
        for parameter in found.arguments.values():
            assert parameter.required or parameter.has_default, f"{component.target}: {parameter.name} is no literal"
            assert parameter.annotation != "Any", f"{component.target}: {parameter.name} has no type"


@pytest.mark.parametrize("group", GROUPS)
def test_presets_are_arguments_of_the_class(group):
    for component in catalogue(group).values():
        plain = signature(Component(group, component.name, component.target))
        assert set(component.preset) <= set(plain.parameters), component


@pytest.mark.parametrize("group", GROUPS)
def test_what_is_read_from_source_is_what_python_sees(group):
    import inspect

    for component in catalogue(group).values():
        everything = inspect.signature(load(component)).parameters
        seen = {n: p for n, p in everything.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        parameters = signature(component).parameters
        assert set(parameters) | set(component.preset) == set(seen), component
        for name, parameter in parameters.items():
            if parameter.has_default:
                assert parameter.default == seen[name].default
            assert parameter.required == (seen[name].default is inspect.Parameter.empty)


@pytest.mark.parametrize("group", GROUPS)
def test_aliases_stand_for_names(group):
    for alias, name in registry.aliases(group).items():
        assert alias not in catalogue(group) and find(group, alias).name == name == registry.canonical(group, alias)


def test_a_component_of_a_table():
    resnet = find("models", "resnet20")
    assert (
        resnet.is_builtin and resnet.target == "kdctl.models.resnet_cifar:CifarResNet" and resnet.preset["depth"] == 20
    )
    arguments = signature(resnet).arguments
    assert "shortcut" in arguments and not {"depth", "num_classes", "in_channels"} & set(arguments)
    assert signature(resnet).parameters["num_classes"].given


def test_listing_and_signatures_import_no_torch():
    code = (
        "import sys; from kdctl import registry\n"
        "for g in registry.GROUPS:\n"
        "    for c in registry.catalogue(g).values(): registry.signature(c)\n"
        "registry.signature(registry.find('optimizers', 'RMSprop'))\n"
        "print([m for m in ('torch', 'numpy', 'torchvision', 'timm', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


# ---------------------------------------------------------------------------------------------------------- other names


def test_classes_of_torch_optim():
    found = find("optimizers", "Adagrad")
    arguments = signature(found).arguments
    assert arguments["lr"].default == 0.01 and "params" not in arguments
    assert signature(found).parameters["params"].given
    with pytest.raises(ConfigError, match="did you mean 'Adagrad'"):
        find("optimizers", "adagrad")
    with pytest.raises(ConfigError):
        find("losses", "Adagrad")
    with pytest.raises(ConfigError):
        find("optimizers", "Optimizer")


@pytest.mark.parametrize(
    ("kind", "name"), [("torchvision:resnet18", "TorchvisionModel"), ("timm:resnet18", "TimmModel")]
)
def test_zoo_models(kind, name):
    found = find("models", kind)
    assert found.target.endswith(name) and found.preset == {"name": "resnet18"} and signature(found).accepts_any


def test_an_unknown_kind_lists_what_there_is():
    with pytest.raises(ConfigError, match="no schedule 'cosin'; allowed: one of constant, cosine") as caught:
        find("schedules", "cosin")
    assert caught.value.problems[0].hint == "did you mean 'cosine'?"


OWN = '''
"""A user's file."""
from dataclasses import dataclass
from kdctl.losses.base import Loss
from kdctl.losses.kd import KD as Base
from torch import nn

class Mine(Loss):
    """My own loss.

    More text.
    """
    needs_teacher = False
    ALIASES = {"s": "sharpness", "gone": "nothing"}

    def __init__(self, *, sharpness: float, table: tuple[int, ...] = (1, 2), name=None):
        super().__init__()
        self.sharpness, self.table = sharpness, table

class Child(Mine):
    pass

class Hands(Base):
    def __init__(self, *, extra: int = 1, **rest):
        super().__init__(**rest)
        self.extra = extra

class Open(Loss):
    def __init__(self, **anything):
        super().__init__()

@dataclass
class Made:
    a: int = 3
    def load(self): ...

class Source:
    def __init__(self, *, size: int = 3): self.size = size
    def load(self): return self.size

class Net(nn.Module):
    def __init__(self, num_classes, width=8):
        super().__init__()
        if width < 0:
            raise ValueError("width must not be negative")
        self.head = nn.Linear(width, num_classes)
'''


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


def test_a_class_in_a_file_is_read_without_running_it(own):
    (own / "own.py").write_text(OWN + "\nraise SystemExit('ran')\n")
    component = find("losses", "./own.py:Mine", own)
    assert component.target == f"{own}/own.py:Mine" and component.summary == "My own loss."
    found = signature(component)
    assert {n: (p.annotation, p.default, p.required) for n, p in found.parameters.items()} == {
        "sharpness": ("float", None, True), "table": ("tuple[int, ...]", (1, 2), False), "name": ("Any", None, False),
    }  # fmt: skip
    assert found.aliases == {"s": "sharpness"} and found.attributes["needs_teacher"] is False


def test_an_inherited_init_and_attributes(own):
    child = signature(find("losses", "./own.py:Child", own))
    assert list(child.parameters) == ["sharpness", "table", "name"] and child.attributes["needs_teacher"] is False
    hands = signature(find("losses", "./own.py:Hands", own))
    assert list(hands.parameters) == ["extra", "temperature", "standardize"] and not hands.accepts_any
    assert hands.aliases == {"T": "temperature"} and hands.attributes["needs_teacher"] is True
    assert signature(find("losses", "./own.py:Open", own)).accepts_any
    assert signature(find("data", "./own.py:Made", own)).accepts_any


def test_a_class_by_dotted_path(own, monkeypatch):
    monkeypatch.syspath_prepend(own)
    assert "temperature" in signature(find("losses", "own:Hands")).arguments
    assert find("losses", "kdctl.losses.kd:KD").target == "kdctl.losses.kd:KD"
    for kind, words in [
        ("own:Nothing", "no class 'Nothing'"),
        ("own.inner:X", "no module"),
        ("not_there:X", "no module"),
    ]:
        with pytest.raises(ConfigError, match=words):
            find("losses", kind)


def test_only_the_groups_own_kind_of_class_is_loaded(own):
    assert load(find("losses", "./own.py:Mine", own)).__name__ == "Mine"
    assert load(find("data", "./own.py:Source", own)).__name__ == "Source"
    for group, name, words in [
        ("losses", "Net", "does not derive from kdctl.losses.base.Loss"),
        ("models", "Source", "torch.nn.Module"),
        ("data", "Net", "no method load"),
    ]:
        with pytest.raises(ConfigError, match=words):
            load(find(group, f"./own.py:{name}", own))


def test_a_file_is_imported_once(own):
    first = load(find("losses", "./own.py:Mine", own))
    assert load(find("losses", f"{own}/own.py:Mine")) is first


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [("1 / 0\n", ConfigError, "ZeroDivisionError"), ("import not_there_at_all\n", MissingError, "not_there_at_all")],
)
def test_a_file_that_fails_to_import(own, text, error, words):
    (own / "bad.py").write_text(text + "class Mine: ...\n")
    with pytest.raises(error, match=words):
        load(find("losses", "./bad.py:Mine", own))


# --------------------------------------------------------------------------------------------------------------- create


def test_a_module_beside_a_users_file_is_not_found(own):
    """A run has a copy of the file alone, so an import that works here would not there."""
    (own / "helper.py").write_text("x = 1\n")
    (own / "own.py").write_text(OWN + "\nimport helper\n")
    with pytest.raises(MissingError, match="No module named 'helper'") as told:
        load(find("losses", "./own.py:Mine", own))
    assert "copies the file alone" in told.value.problems[0].hint
    (own / "own.py").write_text(OWN + "\nimport kdctl_not_there\n")
    with pytest.raises(MissingError, match="kdctl_not_there") as told:
        load(find("losses", "./own.py:Mine", own))
    assert told.value.problems[0].hint is None


def test_a_kind_is_shown_without_its_folder():
    assert registry.shown_kind("/else/where/own.py:Mine") == registry.shown_kind("./code/own.py:Mine") == "own.py:Mine"
    kinds = ["kd", "timm:mixer_b16_224", "pkg.own:Mine"]
    assert [registry.shown_kind(kind) for kind in kinds] == kinds


def test_create_calls_with_preset_arguments_and_what_is_given(own):
    net = create("models", "resnet8", {"shortcut": "pad"}, num_classes=3, in_channels=1)
    assert net(__import__("torch").zeros(2, 1, 16, 16)).shape == (2, 3)
    assert create("losses", "./own.py:Mine", {"sharpness": 2, "table": [1, 2]}, base=own).table == (1, 2)


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("./own.py:Net", {"depth": 3}, "depth"),
        ("./own.py:Net", {"width": -1}, "must not be negative"),
        ("./own.py:Net", {"num_classes": 4}, "set by kdctl"),
        ("resnet8", {"depth": 14}, "set by kdctl"),
        ("resnet8", {"shortcutt": "pad"}, "has no argument 'shortcutt'"),
    ],
)
def test_arguments_that_do_not_fit_are_the_users_to_mend(own, kind, arguments, words):
    with pytest.raises(ConfigError, match=words):
        create("models", kind, arguments, base=own, num_classes=3)


# ------------------------------------------------------------------------------------------------------------- plug-ins


@pytest.fixture
def plugin(monkeypatch):
    """Installs entry points: group -> [(name, value, distribution)]."""

    def call(group, *points):
        listed = [SimpleNamespace(name=n, value=v, dist=SimpleNamespace(name=d)) for n, v, d in points]
        monkeypatch.setattr(registry, "_entry_points", lambda: {g: listed if g == group else [] for g in GROUPS})

    return call


def test_a_plugin_is_listed_and_checked(plugin, own, monkeypatch):
    monkeypatch.syspath_prepend(own)
    plugin("losses", ("theirs", "own:Mine", "kdctl-more"), ("wrong", "own:Net", "kdctl-more"))
    assert catalogue("losses")["theirs"].source == "kdctl-more" and "kd" in catalogue("losses")
    assert "sharpness" in signature(find("losses", "theirs")).arguments
    with pytest.raises(ConfigError, match="does not derive"):
        load(find("losses", "wrong"))


def test_a_plugin_that_clashes_is_an_error(plugin):
    plugin("losses", ("kd", "x:Y", "kdctl-more"))
    with pytest.raises(ConfigError, match="'kdctl-more' offers the loss 'kd'"):
        find("losses", "kd")
    plugin("losses", ("x", "x:Y", "one"), ("x", "x:Y", "two"))
    with pytest.raises(ConfigError, match="'one' and 'two'"):
        catalogue("losses")


def test_a_plugin_is_found_where_packages_are_installed(tmp_path, monkeypatch):
    """By what pip writes beside a package; without any, nothing of it is read."""
    monkeypatch.setattr(registry.sys, "path", [str(tmp_path)])
    for name, group in (("other", "console_scripts"), ("kdctl_more", "kdctl.losses")):
        registry._entry_points.cache_clear()
        assert registry._entry_points()["losses"] == []
        place = tmp_path / f"{name}-1.0.dist-info"
        place.mkdir()
        (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (place / "entry_points.txt").write_text(f"[{group}]\ntheirs = kdctl.own:Mine\n")
    registry._entry_points.cache_clear()
    assert [point.name for point in registry._entry_points()["losses"]] == ["theirs"]
    registry._entry_points.cache_clear()
