"""SIGKILL: nothing that was acknowledged is lost, and of what was only said at most the last 50 ms."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.records.conftest import kit_on

pytestmark = pytest.mark.crash

PROGRAM = Path(__file__).with_name("said_and_killed.py")
PROMISE_NS = 100_000_000
"""The 50 ms after which a group is written, and as much for its writing where other processes have the processor."""
MOST_NS = 5_000_000
"""What may pass between two things said while the program runs."""


def sure(spoken: list[tuple[str, int]], killed_ns: int) -> list[str]:
    """What was said so long before the kill that it is kept, counted in the time in which the program could run.

    It says something every millisecond; where a longer time passes, other processes had the processor.
    """
    names, run_ns, later_ns = [], 0, killed_ns
    for name, at_ns in reversed(spoken):
        run_ns += min(later_ns - at_ns, MOST_NS)
        later_ns = at_ns
        if run_ns > PROMISE_NS:
            names.append(name)
    return names


async def test_what_is_acknowledged_stays_and_what_is_said_soon_does(shared_address: str, tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    kept: list[str] = []
    said: list[str] = []
    for life in range(5):
        with subprocess.Popen(
            [sys.executable, PROGRAM, shared_address, tmp_path, str(life)],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
        ) as child:
            assert child.stdout is not None
            told = [child.stdout.readline() for _ in range(random.randrange(100, 300))]  # noqa: S311
            killed_ns = time.monotonic_ns()
            child.send_signal(signal.SIGKILL)
            # What is in the pipe was done before the kill; its last line may be cut short.
            told += [line for line in child.stdout.read().splitlines(keepends=True) if line.endswith(b"\n")]
        spoken = []
        for kind, name, at_ns in (line.decode().split() for line in told):
            if kind == "kept":
                kept.append(name)
            else:
                spoken.append((name, int(at_ns)))
        said += sure(spoken, killed_ns)
    kit = kit_on(shared_address, tmp_path)
    stored = {each.signal_id for each in await kit.records.storage.list()}
    heard = {each.signal_id for each in await kit.records.notification.list()}
    assert set(kept) <= stored
    assert set(kept) <= heard
    for name in kept:
        where: Any = {"strategy_name": "trend", "exchange_name": "binance", "symbol": f"S{name}"}
        assert await kit.persistence.signal.read(**where) == {"id": name}
    lines = [line.message for line in reversed(await kit.records.log.list(limit=None))]
    for life in range(5):
        numbers = [int(line.partition("-")[2]) for line in lines if line.startswith(f"{life}-")]
        assert numbers == list(range(len(numbers))), "each once, in their order, and nothing between them is lost"
    if not shared_address.startswith("mongodb"):  # the log lies in files; a server answers when it does
        assert set(said) <= set(lines)
        assert len(said) > 5
    assert len(kept) > 5
    await kit.close()
