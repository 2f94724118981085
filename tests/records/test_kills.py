"""Real processes, killed by SIGKILL: no record that was acknowledged is lost, and no window is used twice."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from tests.records.killed import Outcome
from tests.records.stores import SHARED

pytestmark = pytest.mark.crash

PROGRAM = Path(__file__).with_name("killed.py")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: a kill leaves the page cache alone, and a disk is only slower."""
    memory = Path("/dev/shm")  # noqa: S108
    if os.access(memory, os.W_OK):
        with tempfile.TemporaryDirectory(prefix="backtest-kit-", dir=memory) as directory:
            yield Path(directory)
    else:
        yield tmp_path


@pytest.mark.parametrize("store", SHARED)
def test_kills_at_random_moments(place: Path, store: str) -> None:
    seed = random.randrange(1 << 30)  # noqa: S311
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    command: list[str | Path] = [sys.executable, PROGRAM, "--store", SHARED[store], "--place", place, "--kills", "60"]
    done = subprocess.run(
        [*command, "--seed", str(seed)],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
        timeout=120,
    )
    assert done.stdout, done.stderr.decode()
    outcome = msgspec.json.decode(done.stdout, type=Outcome)
    assert outcome.problems == [], f"seed {seed}"
    assert outcome.kills == 60
    assert outcome.acknowledged > 60, f"seed {seed}: the kills come before there is anything to lose"
    assert outcome.windows > 60, f"seed {seed}"
