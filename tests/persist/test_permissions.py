"""What a store makes is closed to other users whatever the umask; what people are to read follows the umask."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from backtest_kit.errors import Damaged
from backtest_kit.model.candle import CandleSeries
from backtest_kit.persist.atomic import write_atomic
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.backends.sqlite import SqliteStore
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.lease import acquire
from backtest_kit.persist.store import SeriesKey, Store, Write
from backtest_kit.run.live.emergency import EmergencyFile
from backtest_kit.venue.exchange import Terms
from backtest_kit.venue.journal import Head, Journal

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="permissions there are not those of a umask")

SIGNAL, SCHEDULE, STATE, MEASURE, STORAGE, LOG = (
    CONTRACTS[name] for name in ("signal", "schedule", "state", "measure", "storage", "log")
)
STORES: dict[str, Callable[[Path], Store]] = {
    "file": lambda place: FileStore(place / "dump"),
    "sqlite": lambda place: SqliteStore(place / "new/bot.db"),
}
CANDLES = CandleSeries(np.array([1_640_995_200_000]), *(np.array([1.0]) for _ in range(5)))


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=["umask 000", "umask 022", "umask 077"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(place: Path) -> dict[str, int]:
    """The permissions of everything below a directory, by path."""
    return {str(path.relative_to(place)): stat.S_IMODE(path.lstat().st_mode) for path in place.rglob("*")}


def require_private(place: Path) -> None:
    found = modes(place)
    assert found
    wanted = {path: 0o700 if (place / path).is_dir() else 0o600 for path in found}
    assert found == wanted


async def live(store: Store) -> None:
    """Everything that makes a file: slots, buckets, feeds, a batch, a lease, candles, a namespace."""
    for row, key in (
        (SIGNAL, ("s", "e", "A")),
        (STATE, ("s", "b")),
        (MEASURE, ("b", "k")),
        (STORAGE, (True, "id")),
        (LOG, ("entry",)),
    ):
        await store.put(Write(row, key, "value"))
    await store.batch([Write(row, ("s", "e", "B"), "value") for row in (SIGNAL, SCHEDULE)])
    await store.candles.write(SeriesKey("e", "A", "1m"), CANDLES)
    lease = await acquire(lambda _: store, ("s", "e", "A"))
    await store.namespace("paper").put(Write(SIGNAL, ("s", "e", "A"), "value"))
    await lease.release()


@pytest.mark.parametrize("name", STORES)
async def test_a_store_is_private_after_a_life(tmp_path: Path, name: str, umask: int) -> None:
    store = STORES[name](tmp_path)
    await live(store)
    require_private(tmp_path)  # while its journal, log and shared memory are there
    await store.close()
    require_private(tmp_path)
    again = STORES[name](tmp_path)
    await live(again)
    await again.close()
    require_private(tmp_path)


async def test_what_is_in_quarantine_is_private(tmp_path: Path, umask: int) -> None:
    store = FileStore(tmp_path / "dump")
    await live(store)
    await store.close()
    (tmp_path / "dump/signal/s/e/A.json").write_bytes(b"damaged")
    (file,) = (tmp_path / "dump/log").glob("*.jsonl")
    with file.open("ab") as log:
        log.write(b"torn")
    again = FileStore(tmp_path / "dump")
    with pytest.raises(Damaged):
        await again.get(SIGNAL, ("s", "e", "A"))
    await again.put(Write(LOG, ("another",), "value"))
    assert len(await again.quarantined()) == 2
    await again.close()
    require_private(tmp_path)


def test_state_files_are_private(tmp_path: Path, umask: int) -> None:
    emergency = EmergencyFile(tmp_path / "emergency/s.bin")
    emergency.open()
    emergency.write(b"kept")
    emergency.close()
    journal = Journal(tmp_path / "venue.jsonl")
    journal.open(Head(candles="", start_ms=0, markets=(), terms=Terms()))
    journal.close()
    require_private(tmp_path)


async def test_reports_follow_the_umask(tmp_path: Path, umask: int) -> None:
    write_atomic(tmp_path / "reports/trend.md", b"report")
    store = FileStore(tmp_path / "dump")
    await store.put(Write(SIGNAL, ("s", "e", "A"), "value"))
    await store.close()
    assert modes(tmp_path / "reports") == {"trend.md": 0o666 & ~umask}
    assert modes(tmp_path)["reports"] == 0o777 & ~umask
