"""Which store keeps what, and the life of the stores behind a program."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from backtest_kit.errors import Conflict, RetryLater, UserError
from backtest_kit.model.identity import Mode
from backtest_kit.persist.backends.dummy import DummyStore
from backtest_kit.persist.backends.memory import MemoryStore
from backtest_kit.persist.backends.sqlite import SqliteStore
from backtest_kit.persist.binding import MODES, Persistence, home_of
from backtest_kit.persist.contracts import CONTRACTS, Home
from backtest_kit.persist.store import ABSENT, Write
from backtest_kit.persist.urls import store_at

KEY: dict[str, Any] = {"symbol": "BTCUSDT", "strategy_name": "trend", "exchange_name": "binance"}
SIGNAL, STRATEGY = CONTRACTS["signal"], CONTRACTS["strategy"]
POSITION = ("trend", "binance", "BTCUSDT")


class Watched(MemoryStore):
    """A memory store that counts how often it was opened and closed."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = 0
        self.closed = 0

    async def open(self) -> None:
        self.opened += 1

    async def close(self) -> None:
        self.closed += 1


class Failing(Watched):
    async def close(self) -> None:
        await super().close()
        raise RetryLater("the disk is away")


@pytest.fixture
def files() -> Watched:
    return Watched()


@pytest.fixture
def persistence(files: Watched) -> Persistence:
    return Persistence(files=lambda: files)


PROFILE = {
    "live": dict.fromkeys(CONTRACTS, Home.BOUND) | {"log": Home.FILE},
    "paper": dict.fromkeys(CONTRACTS, Home.BOUND) | {"log": Home.FILE},
    "backtest": {
        "candle": Home.BOUND,
        "signal": Home.MEMORY,
        "schedule": Home.MEMORY,
        "strategy": Home.MEMORY,
        "risk": Home.MEMORY,
        "partial": Home.MEMORY,
        "breakeven": Home.MEMORY,
        "storage": Home.MEMORY,
        "notification": Home.MEMORY,
        "log": Home.FILE,
        "measure": Home.BOUND,
        "interval": Home.BOUND,
        "memory": Home.FILE,
        "recent": Home.MEMORY,
        "state": Home.FILE,
        "session": Home.FILE,
    },
}


@pytest.mark.parametrize("mode", MODES)
def test_default_profile_is_the_documented_one(mode: Mode) -> None:
    assert {name: home_of(row, mode) for name, row in CONTRACTS.items()} == PROFILE[mode]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CONTRACTS)
def test_profile_leads_to_its_store(persistence: Persistence, files: Watched, name: str, mode: Mode) -> None:
    bound = MemoryStore()
    persistence.bind("*", bound)
    namespace = "" if mode == "live" or name in ("candle", "measure") else {"paper": "paper"}.get(mode, "backtest-7")
    store = persistence.store_for(CONTRACTS[name], mode, "7")
    expected = {Home.BOUND: bound, Home.FILE: files}.get(PROFILE[mode][name])
    if expected is None:
        assert isinstance(store, MemoryStore)
        assert store is not bound.namespace(namespace)
        assert store is not files.namespace(namespace)
    else:
        assert store is expected.namespace(namespace)


def test_bound_store_is_files_until_somebody_says_otherwise(persistence: Persistence, files: Watched) -> None:
    assert persistence.store_for(SIGNAL, "live") is files
    other = MemoryStore()
    persistence.bind("*", other)
    assert persistence.store_for(SIGNAL, "live") is other


def test_nothing_is_made_before_it_is_needed() -> None:
    def make() -> MemoryStore:
        raise AssertionError("nobody asked for files")

    persistence = Persistence(files=make)
    persistence.bind("*", MemoryStore())
    persistence.store_for(SIGNAL, "live")


def test_most_specific_binding_wins(persistence: Persistence) -> None:
    everything, live, signal, live_signal = (MemoryStore() for _ in range(4))
    persistence.bind("*", everything)
    persistence.bind("*", live, mode="live")
    assert persistence.store_for(CONTRACTS["log"], "live") is live
    assert persistence.store_for(SIGNAL, "paper") is everything.namespace("paper")
    persistence.bind("signal", signal)
    assert persistence.store_for(SIGNAL, "live") is signal
    assert persistence.store_for(SIGNAL, "backtest", "7") is signal.namespace("backtest-7")
    persistence.bind("signal", live_signal, mode="live")
    assert persistence.store_for(SIGNAL, "live") is live_signal
    assert persistence.store_for(STRATEGY, "live") is live


def test_bad_names_are_refused_with_the_good_ones(persistence: Persistence) -> None:
    with pytest.raises(UserError, match=r"signals.*candle, signal"):
        persistence.bind("signals", MemoryStore())
    with pytest.raises(UserError, match=r"demo.*live, paper, backtest"):
        persistence.bind("*", MemoryStore(), mode="demo")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="live, paper, backtest"):
        persistence.store_for(SIGNAL, "demo")  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="signal"):
        persistence.signals  # noqa: B018


async def test_modes_and_runs_do_not_see_each_other(persistence: Persistence) -> None:
    session: dict[str, Any] = {**KEY, "frame_name": "", "backtest": False}
    places: list[tuple[Mode, str | None]] = [("live", None), ("paper", None), ("backtest", None)]
    places += [("backtest", "1"), ("backtest", "2")]
    for number, (mode, run) in enumerate(places):
        assert await persistence.session.read(mode=mode, run=run, **session) is None
        await persistence.session.write(number, mode=mode, run=run, **session)
    found = [await persistence.session.read(mode=mode, run=run, **session) for mode, run in places]
    assert found == list(range(5))


async def test_store_from_the_environment(tmp_path: Path) -> None:
    persistence = Persistence(environ={"CC_STORE": f"sqlite:{tmp_path / 'bot.db'}"})
    await persistence.signal.write("value", **KEY)
    await persistence.close()
    assert isinstance(persistence.store_for(SIGNAL, "live"), SqliteStore)
    again = Persistence(environ={"CC_STORE": f"sqlite:{tmp_path / 'bot.db'}"})
    assert await again.signal.read(**KEY) == "value"
    await again.close()


async def test_a_root_from_the_environment_keeps_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    persistence = Persistence(environ={"CC_STORE": f"file:{tmp_path / 'root'}"})
    await persistence.signal.write(1, **KEY)
    await persistence.log.write(1, entry_id="a")
    await persistence.state.write(1, signal_id="s", bucket_name="b", mode="backtest")
    await persistence.close()
    assert [path.name for path in tmp_path.iterdir()] == ["root"]
    assert persistence.file_store() is persistence.store_for(SIGNAL, "live")


@pytest.mark.parametrize("url", ["", "nothing", "redis:localhost", "sqlite:", "memory:x", "/tmp/dump"])  # noqa: S108
def test_bad_address_names_the_good_forms(url: str) -> None:
    with pytest.raises(UserError, match=r"sqlite:bot\.db|memory:"):
        store_at(url)


def test_addresses() -> None:
    assert isinstance(store_at("memory:"), MemoryStore)
    assert isinstance(store_at("dummy:"), DummyStore)
    sqlite = store_at("sqlite:bot.db")
    assert isinstance(sqlite, SqliteStore)
    assert sqlite.path == Path("bot.db").absolute()


async def test_opening_opens_what_the_mode_uses(persistence: Persistence, files: Watched) -> None:
    bound, other = Watched(), Watched()
    persistence.bind("*", bound)
    persistence.bind("signal", other, mode="paper")
    await persistence.open()
    assert (bound.opened, files.opened, other.opened) == (1, 1, 0)


async def test_closing_closes_every_store_exactly_once(persistence: Persistence, files: Watched) -> None:
    bound = Watched()
    persistence.bind("*", bound)
    for name in ("signal", "strategy", "log", "state"):
        for mode in MODES:
            persistence.store_for(CONTRACTS[name], mode, "1")
    await persistence.close()
    assert (bound.closed, files.closed) == (1, 1)


async def test_replaced_store_is_closed_as_well(persistence: Persistence) -> None:
    first, second = Watched(), Watched()
    persistence.bind("*", first)
    await persistence.signal.write(1, **KEY)
    persistence.bind("*", second)
    assert await persistence.signal.read(**KEY) is None
    await persistence.close()
    assert (first.closed, second.closed) == (1, 1)


async def test_failing_close_does_not_keep_the_others_open(persistence: Persistence, files: Watched) -> None:
    persistence.bind("*", Failing())
    persistence.store_for(CONTRACTS["log"], "live")
    with pytest.raises(RetryLater, match="disk is away"):
        await persistence.close()
    assert files.closed == 1


async def test_batch_in_one_store_is_all_or_nothing(persistence: Persistence, files: Watched) -> None:
    writes = [Write(STRATEGY, POSITION, 1), Write(SIGNAL, POSITION, 1, expect=7)]
    with pytest.raises(Conflict):
        await persistence.batch(writes, mode="live")
    assert await files.get(STRATEGY, POSITION) is None


async def test_batch_over_stores_keeps_its_order(persistence: Persistence) -> None:
    signals = MemoryStore()
    persistence.bind("signal", signals)
    writes = [Write(STRATEGY, POSITION, 1), Write(SIGNAL, POSITION, 1, expect=7), Write(STRATEGY, POSITION, 2)]
    with pytest.raises(Conflict):
        await persistence.batch(writes, mode="live")
    found = await persistence.store_for(STRATEGY, "live").get(STRATEGY, POSITION)
    assert found is not None
    assert found.value == 1
    await persistence.batch([Write(STRATEGY, POSITION, 3), Write(SIGNAL, POSITION, 3, expect=ABSENT)], mode="live")
    assert await persistence.signal.read(**KEY) == 3


async def test_two_programs_never_see_each_other() -> None:
    one, two = Persistence(environ={"CC_STORE": "memory:"}), Persistence(environ={"CC_STORE": "memory:"})
    await asyncio.gather(one.signal.write(1, **KEY), two.signal.write(2, **KEY))
    assert (await one.signal.read(**KEY), await two.signal.read(**KEY)) == (1, 2)
