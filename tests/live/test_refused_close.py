"""Killed between the refusal of an exit and the next minute: the book is the same, and the id is never used again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.live.rig import START, Rig, written
from tests.live.scenario import prepared

import backtest_kit as bk
from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.run.live.known_records import KnownRecords
from backtest_kit.run.live.position_store import read_position_state

pytestmark = pytest.mark.crash

PROGRAM = Path(__file__).with_name("refused_and_killed.py")


async def test_a_refused_exit_is_remembered_by_who_comes_after_a_kill(tmp_path: Path) -> None:
    root = str(PROGRAM.parents[2])
    child = subprocess.run(
        [sys.executable, PROGRAM, tmp_path], env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    rig = prepared(Rig(tmp_path, bk.FileStore(tmp_path / "store")))
    rig.now_ms = START + 8 * MINUTE_MS
    records = KnownRecords(rig.kit(None).persistence, "live")
    found = await read_position_state(records, ("trend", "demo", "BTCUSDT"))
    assert repr(found) == child.stdout
    assert found.intent is not None
    assert found.intent.refused
    refused = written(found.intent.order)
    await rig.trade(3)
    (again,) = {order_id for _, order_id, _ in rig.venue.sent("close")}
    assert again != refused
    assert len(rig.trades()) == 1
