"""A disk that is really full: nothing is opened, what is open closes, and all is in the store once there is room."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.live.rig import START, WHERE, Rig, UntilClock
from tests.live.scenario import prepared

import backtest_kit as bk
from backtest_kit.model.interval import MINUTE_MS


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let a test mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as file:
        for size in (65536, 4096, 1):
            while True:
                try:
                    file.write(bytes(size))
                except OSError:
                    break
    return filler


@pytest.mark.parametrize("restart", [False, True])
async def test_a_position_closes_on_a_full_disk(disk: Path, restart: bool) -> None:
    rig = prepared(Rig(disk, bk.FileStore(disk / "store")))
    rig.strategy["manage"] = None
    rig.strategy["get_signal"] = lambda ctx: bk.Signal.bracket(
        "long", price=ctx.price, take_profit_pct=0.55, stop_loss_pct=5
    )
    rig.settings["CC_MIN_TAKEPROFIT_DISTANCE_PERCENT"] = 0
    clock = UntilClock(START, START + (10 if restart else 14) * MINUTE_MS)
    kit = rig.kit(clock)
    kit.on(bk.PositionOpened, lambda event: fill(disk), once=True)
    handle = kit.live.background("BTCUSDT", **WHERE)
    while clock.now_ms() < START + 10 * MINUTE_MS and not handle.done():
        await asyncio.sleep(0)
    if restart:
        await clock.over.wait()
    assert len(rig.trades()) == 1
    assert handle.status.position is None
    assert "No space left" in handle.status.degraded
    assert rig.of(bk.StoreDegraded)[-1].kept
    assert len(rig.venue.sent("open")) == 1
    (disk / "filler").unlink()
    if not restart:
        await clock.over.wait()
        assert not handle.status.degraded
        assert [type(event) for event in rig.of(bk.StoreDegraded, bk.StoreRecovered)] == [
            bk.StoreDegraded,
            bk.StoreRecovered,
        ]
    handle.cancel()
    await asyncio.wait({handle.task})
    await rig.store.close()
    if restart:
        rig.store, rig.now_ms = bk.FileStore(disk / "store"), clock.now_ms()
        end = await rig.trade(3)
        assert "recovered the latest state from the emergency file" in rig.of(bk.Recovered)[-1].steps
        assert not end.status.degraded
        await rig.store.close()
    assert len(rig.venue.sent("open")) == 2
    assert set(rig.venue.times_done.values()) == {1}
