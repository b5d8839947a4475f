"""Tiny random models, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_rewards import tiny_clip_folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip_folder(tmp_path_factory.mktemp("clip"))
