"""A file of a user's own components, as text."""

from __future__ import annotations

OWN = '''
from torch import nn

from kdctl.losses.adapters import FeatureLoss


class Net(nn.Module):
    """A net of mine."""

    def __init__(self, *, num_classes: int, width: int = 4) -> None: ...


class Mine(FeatureLoss):
    """A loss of mine."""

    def __init__(self, *, sharpness: float = 2.0) -> None: ...


class Odd: ...
'''
