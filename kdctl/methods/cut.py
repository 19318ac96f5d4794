"""Nets that are cut in two: sequential ones, at the name of a module."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from kdctl.errors import ConfigError, Problem
from kdctl.models.record import Model


def parts_of(model: Model, name: str, key: str) -> tuple[OrderedDict[str, nn.Module], OrderedDict[str, nn.Module]]:
    """The modules of a sequential net before `name`, and those from there on, by name.

    key: the argument that holds the name. Raises ConfigError for another form of net and for other names.
    """
    net, kind = model.net, model.record.kind
    if not isinstance(net, nn.Sequential) or type(net).forward is not nn.Sequential.forward:
        message = f"'{kind}' is no sequential net: where its parts begin and end cannot be told"
        hint = "most kinds of kdctl's own are (`kdctl list models`); one of yours derives from nn.Sequential"
        raise ConfigError(Problem(message, key="student", hint=hint))
    names = [child for child, _ in net.named_children()]
    if name not in names:
        hint = f"it is made of {', '.join(names)}"
        raise ConfigError(Problem(f"'{kind}' has no part '{name}' at its top level", key=key, hint=hint))
    at = names.index(name)
    children = list(net.named_children())
    return OrderedDict(children[:at]), OrderedDict(children[at:])
