"""Real processes, killed by SIGKILL: no record that was acknowledged is lost, and no window is used twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from tests.records.killed import Outcome
from tests.records.stores import SHARED
from tests.samples import dice, size

pytestmark = pytest.mark.crash

PROGRAM = Path(__file__).with_name("killed.py")


@pytest.mark.sampled
@pytest.mark.parametrize("store", SHARED)
def test_kills_at_random_moments(tmp_path: Path, store: str) -> None:
    seed = dice(f"record kills {store}").randrange(1 << 30)
    kills = size(15, 60)
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    command: list[str | Path] = [
        sys.executable,
        PROGRAM,
        "--store",
        SHARED[store],
        "--place",
        tmp_path,
        "--kills",
        str(kills),
    ]
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
    assert outcome.kills == kills
    assert outcome.acknowledged > kills, f"seed {seed}: the kills come before there is anything to lose"
    assert outcome.windows > kills, f"seed {seed}"
