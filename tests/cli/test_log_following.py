"""What `backtest-kit log --follow` takes for news: lines in order of writing, whose ids are in that of saying."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.records.stores import STORES

from backtest_kit.cli.log import news_of
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.store import Store, Write
from backtest_kit.persist.urls import store_at

LOG = CONTRACTS["log"]


@pytest_asyncio.fixture(params=STORES.values(), ids=STORES)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    store = store_at(request.param.format(place=tmp_path))
    yield store
    await store.close()


async def say(store: Store, *ids: str) -> None:
    for each in ids:
        await store.put(Write(LOG, (each,), {"message": each}))


async def news(store: Store, known: deque[str]) -> list[str]:
    return [str(record.key[0]) for record in await news_of(store, known, set())]


async def test_a_line_that_is_written_late_is_shown(store: Store) -> None:
    await say(store, "10-a", "20-a")
    known = deque(["20-a"])
    await say(store, "30-a", "15-b", "05-c", "40-a")
    assert await news(store, known) == ["30-a", "15-b", "05-c", "40-a"]
    assert await news(store, known) == []
    await say(store, "01-b")
    assert await news(store, known) == ["01-b"]


async def test_a_line_that_comes_in_behind_one_that_was_shown_is_shown(store: Store) -> None:
    await say(store, "10-a", "20-b", "30-a")
    known = deque(["10-a", "30-a"])
    assert await news(store, known) == ["20-b"]
    assert await news(store, known) == []


async def test_of_an_empty_log_all_is_news(store: Store) -> None:
    known: deque[str] = deque()
    assert await news(store, known) == []
    await say(store, "20-a", "10-b")
    assert await news(store, known) == ["20-a", "10-b"]
    assert await news(store, known) == []


async def test_where_all_that_was_known_is_forgotten_nothing_older_is_shown_again(store: Store) -> None:
    await say(store, "10-a", "15-b", "30-a")
    known = deque(["20-a", "25-a"])
    assert await news(store, known) == ["30-a"]
    await say(store, "12-c")
    assert await news(store, known) == ["12-c"], "known is what is there now"


async def test_it_does_not_go_back_through_all_that_is_there(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backtest_kit.cli.log._KNOWN", 3)
    await say(store, *(f"{number:02}-a" for number in range(40)))
    known = deque(["35-b"], maxlen=3)
    assert await news(store, known) == ["36-a", "37-a", "38-a", "39-a"]
    assert list(known) == ["37-a", "38-a", "39-a"]
