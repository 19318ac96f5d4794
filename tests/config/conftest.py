"""Files to read, and a small valid experiment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

VALID = """\
data: {kind: digits}
student: {kind: digits_cnn, width: 4}
teacher: {kind: digits_cnn, width: 32, train: {epochs: 3}}
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file into the test's folder; bytes or text."""

    def call(text: str | bytes, name: str = "exp.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return call


@pytest.fixture
def valid() -> str:
    return VALID
