"""The id of a store: made once, moved by a migration, never in two stores that trade."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from backtest_kit.errors import Conflict, Damaged, RetryLater, UserError
from backtest_kit.persist import store_id
from backtest_kit.persist.backends.dummy import DummyStore
from backtest_kit.persist.backends.memory import MemoryStore
from backtest_kit.persist.contracts import CONTRACTS, STORE_ID, STORE_ID_KEY
from backtest_kit.persist.migration import migrate_store
from backtest_kit.persist.store import Record, Store, Write
from backtest_kit.persist.store_id import claim_store_id, read_store_id, reclaim_store_id
from backtest_kit.persist.urls import store_at

SIGNAL = CONTRACTS["signal"]
KEY = ("trend", "binance", "BTCUSDT")
URLS = ["file:{}/dump", "sqlite:{}/bot.db"]


def at(url: str, place: Path) -> Store:
    place.mkdir(exist_ok=True)
    return store_at(url.format(place))


async def held(store: Store) -> None:
    await store.put(Write(SIGNAL, KEY, {"signalId": "s1"}, when=1))


@pytest.mark.parametrize("url", URLS)
async def test_the_id_is_made_once_and_stays(url: str, tmp_path: Path) -> None:
    first = at(url, tmp_path)
    made = await claim_store_id(first)
    assert re.fullmatch("[0-9a-f]{6}", made)
    assert made != "000000"
    await first.close()
    again = at(url, tmp_path)
    assert await claim_store_id(again) == made
    await again.close()
    other = at(url, tmp_path / "other")
    assert await read_store_id(other) is None
    await other.close()


@pytest.mark.parametrize("url", URLS)
async def test_processes_that_start_at_once_agree_on_one_id(url: str, tmp_path: Path) -> None:
    stores = [at(url, tmp_path) for _ in range(6)]
    ids = await asyncio.gather(*(claim_store_id(store) for store in stores))
    assert len(set(ids)) == 1
    for store in stores:
        await store.close()


async def test_a_store_that_keeps_nothing_has_an_id_for_this_run() -> None:
    assert re.fullmatch("[0-9a-f]{6}", await claim_store_id(DummyStore()))


async def test_an_id_that_cannot_be_read_is_not_replaced() -> None:
    store = MemoryStore()
    await store.put(Write(STORE_ID, STORE_ID_KEY, {"id": 5}))
    with pytest.raises(Damaged, match="id cannot be read"):
        await claim_store_id(store)


@pytest.mark.parametrize(("source_url", "target_url"), [(URLS[0], URLS[1]), (URLS[1], URLS[0])])
async def test_a_migration_moves_the_id_and_the_source_refuses_live_starts(
    source_url: str, target_url: str, tmp_path: Path
) -> None:
    source, target = at(source_url, tmp_path / "a"), at(target_url, tmp_path / "b")
    await held(source)
    own = await claim_store_id(source)
    await migrate_store(source, target, target_name="the new one")
    assert await claim_store_id(target) == own
    with pytest.raises(Conflict, match=r"was moved to the new one, .*stop using the other and run `backtest-kit store"):
        await claim_store_id(source)
    with pytest.raises(UserError, match="the source was moved to the new one already"):
        await migrate_store(source, MemoryStore())
    assert await reclaim_store_id(source) == "the new one"
    assert await claim_store_id(source) == own
    with pytest.raises(UserError, match="was not moved"):
        await reclaim_store_id(source)
    await source.close()
    await target.close()


async def test_the_id_comes_back_with_what_is_moved_back() -> None:
    first, second = MemoryStore(), MemoryStore()
    await held(first)
    own = await claim_store_id(first)
    await migrate_store(first, second, target_name="second")
    await migrate_store(second, first, target_name="first")
    assert await claim_store_id(first) == own
    with pytest.raises(Conflict, match="was moved to first"):
        await claim_store_id(second)


async def test_a_source_that_never_traded_live_is_not_given_up(tmp_path: Path) -> None:
    source, target = MemoryStore(), MemoryStore()
    await held(source)
    await migrate_store(source, target)
    assert await read_store_id(source) is None
    assert await read_store_id(target) is None


async def test_two_stores_that_have_traded_live_are_not_poured_together() -> None:
    source, target = MemoryStore(), MemoryStore()
    await held(source)
    mine, theirs = await claim_store_id(source), await claim_store_id(target)
    with pytest.raises(UserError, match=f"as store {theirs}, and the source as store {mine}"):
        await migrate_store(source, target)
    assert await target.get(SIGNAL, KEY) is None


class Failing(MemoryStore):
    """Refuses so many writes of the id, as a process that is killed before them does."""

    refused = 0

    async def put(self, write: Write) -> Record:
        if write.contract is STORE_ID and self.refused:
            self.refused -= 1
            raise RetryLater("the disk is away")
        return await super().put(write)


@pytest.mark.parametrize("side", ["target", "source"])
async def test_a_migration_that_ends_while_it_moves_the_id_goes_on(side: str) -> None:
    source, target = Failing(), Failing()
    await held(source)
    own = await claim_store_id(source)
    (target if side == "target" else source).refused = 1
    with pytest.raises(RetryLater, match="--resume"):
        await migrate_store(source, target, target_name="b")
    assert await claim_store_id(source) == own, "until the end it may be traded from"
    await migrate_store(source, target, resume=True, target_name="b")
    assert await claim_store_id(target) == own
    with pytest.raises(Conflict, match="moved to b"):
        await claim_store_id(source)


async def test_a_store_is_named_by_its_place(tmp_path: Path) -> None:
    store = at(URLS[0], tmp_path)
    assert await store_id.place_of(store) == f"file:{tmp_path}/dump"
    assert await store_id.place_of(MemoryStore()) == "MemoryStore"
    await store.close()
