from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def tmp_path(disk: Path) -> Path:
    """On the disk: a store in memory is not fit for live."""
    return disk
