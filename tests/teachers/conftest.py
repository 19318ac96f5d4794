"""A store in the test's folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_stores import CONTENTS, SAMPLES, made_key

from kdctl.teachers.contents import Contents
from kdctl.teachers.store import Store


@pytest.fixture
def open_store(tmp_path: Path) -> Callable[..., Store]:
    """The store in one folder, opened anew at each call as by another process."""

    def call(contents: Contents = CONTENTS, folder: str = "store", used: Any = None, **changed: Any) -> Store:
        used = None if used is None else {"train": torch.as_tensor(used).numpy()}
        key = made_key(contents, **changed)
        return Store(tmp_path / folder, key, contents, {"train": SAMPLES, "val": SAMPLES}, used)

    return call
