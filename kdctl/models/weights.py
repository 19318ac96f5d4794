"""Weights files, kdctl's own and foreign: read without executing anything, renamed, checked and loaded."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from kdctl.errors import ConfigError, MissingError, Problem, did_you_mean

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "student", "network", "weights", "params", "module")
"""Keys under which other programs keep a state dict, in the order they are looked for."""
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
"""What DataParallel, torch.compile and wrapping modules put before every name."""
_LISTED = 8
_COUNTER = "num_batches_tracked"
"""Counters of batches came late to PyTorch; they play no part in any of our nets."""


def load_weights(net: nn.Module, path: Path | Literal["pretrained"], mapping: Mapping[str, str] | None = None) -> None:
    """Loads a weights file into a net, in place; every tensor of the net must be there and nothing else.

    path: `.safetensors`, a file of torch.save (`.pth`, `.th`, `.pt`, ...), a run directory (its student), or
    `pretrained` for the published weights of a torchvision, timm or huggingface net. State dicts inside wrappers
    (`state_dict: ...`) and names behind prefixes (`module.`) are found.
    mapping: names in the file -> names in the net; a name that ends in `.` is a prefix, and the longest one counts.

    Raises MissingError where there is no such file, ConfigError where it holds anything but tensors, is damaged, or
    does not fit: then all missing, unexpected and differently shaped names are listed.
    """
    if path == "pretrained":
        source = getattr(net, "pretrained_weights", None)
        if source is None:
            hint = "only torchvision:, timm: and huggingface: models have some; give the path of a file"
            raise ConfigError(Problem("there are no pretrained weights for this model", key="weights", hint=hint))
        assign(net, source(net), "the file of published weights")
        return
    path = Path(path)
    folder = getattr(net, "weights_of_folder", None)
    if path.is_dir() and folder is not None and not mapping:
        assign(net, folder(net, path), str(path))
        return
    if path.is_dir():
        published = path / "model.safetensors"  # the folder of a published encoder
        path = published if published.is_file() else path / "student.safetensors"
    state = _rename(_strip_prefixes(read_tensors(path), net), dict(mapping or {}), path)
    adopt = getattr(net, "adopt", None)
    assign(net, state if adopt is None else adopt(state), str(path), has_mapping=bool(mapping))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, on the CPU. Raises MissingError or ConfigError as `load_weights` does."""
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir() if p.is_file()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, siblings) or "paths are read against the file they stand in"
        raise MissingError(Problem(f"there is no weights file {path}", key="weights", hint=hint))
    try:
        if path.suffix == ".safetensors":
            return parse_safetensors(path.read_bytes(), path)
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise MissingError(Problem(f"{path} cannot be read: {error.strerror}", key="weights")) from None
    except pickle.UnpicklingError as error:
        raise ConfigError(_not_tensors(path, str(error))) from None
    except Exception as error:  # torch.load raises whatever its damaged input leads to
        message = f"{path} is damaged or not a weights file: {str(error).splitlines()[0] if str(error) else error!r}"
        raise ConfigError(Problem(message, key="weights")) from None
    return _unwrap(content, path)


def parse_safetensors(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors in the bytes of a safetensors file. Raises ConfigError, naming `path`, where they are damaged."""
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ConfigError(Problem(f"{path} is damaged: {error}", key="weights")) from None


def assign(net: nn.Module, state: Mapping[str, Tensor], place: str, has_mapping: bool = True) -> None:
    """Copies tensors into a net whose names and shapes they must match. Raises ConfigError that lists what does not."""
    wanted = {k: v for k, v in net.state_dict().items() if isinstance(v, Tensor)}
    missing = [k for k in wanted if k not in state and not k.endswith(_COUNTER)]
    unexpected = [k for k in state if k not in wanted]
    shapes = {k: (v.shape, wanted[k].shape) for k, v in state.items() if k in wanted and v.shape != wanted[k].shape}
    hint = None if has_mapping else _hint_of_names(state, wanted)
    problems = []
    if missing:
        problems.append(Problem(f"{place} lacks {_names(missing)}", key="weights", hint=hint))
    if unexpected:
        problems.append(Problem(f"{place} has what the model has not: {_names(unexpected)}", key="weights", hint=hint))
    if shapes:
        listed = _names(f"{k} {tuple(theirs)} instead of {tuple(ours)}" for k, (theirs, ours) in shapes.items())
        hint = "do the model's kind and arguments and the number of classes fit these weights?"
        problems.append(Problem(f"{place} has other shapes: {listed}", key="weights", hint=hint))
    broken = [k for k, v in state.items() if v.is_floating_point() and not v.float().isfinite().all()]
    if broken:
        problems.append(Problem(f"{place} has numbers that are not finite in {_names(broken)}", key="weights"))
    if problems:
        raise ConfigError(*problems)
    net.load_state_dict(dict(state), strict=False)


def _hint_of_names(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> str:
    """How other names are mapped: with a mapping that the shapes allow, where there is one."""
    left, right = (
        {name: tensor.shape for name, tensor in one.items() if name not in other and not name.endswith(_COUNTER)}
        for one, other in ((theirs, ours), (ours, theirs))
    )
    found: dict[str, str] = {}
    for their, our in _paired(left, right):
        old, new = _differing(their, our)
        if found.setdefault(old, new) != new:  # two layers of one prefix go to two places
            found[their] = our
    if not 0 < len(found) <= _LISTED:
        return "other names go through `mapping: {name_in_file: ours, prefix_in_file.: ours.}`"
    listed = ", ".join(f"{old}: {new}" for old, new in found.items())
    return f"names differ and shapes fit: try mapping: {{{listed}}}"


def _paired(left: Mapping[str, torch.Size], right: Mapping[str, torch.Size]) -> list[tuple[str, str]]:
    """Names of equal shapes: in their order if all shapes agree in it, else by the last parts that only two share."""
    if list(left.values()) == list(right.values()):
        return list(zip(left, right, strict=True))
    pairs = []
    for their, shape in left.items():
        shared = {our: len(_differing(their, our)[0]) for our, other in right.items() if other == shape}
        best = [our for our, rest in shared.items() if rest == min(shared.values())]
        pairs += [(their, best[0])] if len(best) == 1 else []
    return pairs if len({our for _, our in pairs}) == len(left) == len(right) else []


def _differing(old: str, new: str) -> tuple[str, str]:
    """Two names without the last parts that they share: `a.0.bias` and `b.0.bias` are `a.` and `b.`."""
    one, other = old.split("."), new.split(".")
    while len(one) > 1 and len(other) > 1 and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    ends = "." if (len(one), len(other)) != (old.count(".") + 1, new.count(".") + 1) else ""
    return ".".join(one) + ends, ".".join(other) + ends


def _names(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return ", ".join(listed[:_LISTED]) + more


def _not_tensors(path: Path, error: str) -> Problem:
    found = re.search(r"GLOBAL (\S+)", error)
    held = f" ({found[1]})" if found else ""
    message = f"{path} is damaged or holds more than tensors{held}; such files are not executed"
    return Problem(message, key="weights", hint="save `model.state_dict()` alone, with torch.save or safetensors")


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in what a file holds: the outermost mapping with tensors in it."""
    keys = ", ".join(str(k) for k in list(content)[:_LISTED]) if isinstance(content, Mapping) else ""
    while isinstance(content, Mapping):
        wrapped = next((content[k] for k in WRAPPERS if isinstance(content.get(k), Mapping) and content[k]), None)
        if wrapped is None:
            tensors = {str(k): v.detach() for k, v in content.items() if isinstance(v, Tensor)}
            if tensors:
                return tensors
            break
        content = wrapped
    found = f"it has: {keys}" if keys else f"it holds a {type(content).__name__}"
    raise ConfigError(Problem(f"{path} holds no state dict; {found}", key="weights"))


def _strip_prefixes(state: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    children = {f"{name}." for name, _ in net.named_children()}
    while True:
        prefix = next((p for p in PREFIXES if p not in children and all(k.startswith(p) for k in state)), None)
        if prefix is None or not state:
            return state
        state = {k.removeprefix(prefix): v for k, v in state.items()}


def _rename(state: dict[str, Tensor], mapping: dict[str, str], path: Path) -> dict[str, Tensor]:
    prefixes = sorted((k for k in mapping if k.endswith(".")), key=len, reverse=True)
    used: set[str | None] = set()
    renamed: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for name, value in state.items():
        rule = name if name in mapping else next((p for p in prefixes if name.startswith(p)), None)
        new = name if rule is None else mapping[rule] + name[len(rule) :]
        used.add(rule)
        if new in renamed:
            message = f"'{origin[new]}' and '{name}' of {path} both become '{new}'"
            raise ConfigError(Problem(message, key="mapping"))
        renamed[new], origin[new] = value, name
    unused = [rule for rule in mapping if rule not in used]
    if unused:
        places = {*state, *(f"{k.rpartition('.')[0]}." for k in state)}
        hint = did_you_mean(unused[0], places) or f"it has {_names(state)}"
        raise ConfigError(Problem(f"{path} has nothing named '{unused[0]}'", key="mapping", hint=hint))
    return renamed
