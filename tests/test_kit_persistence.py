"""A kit and its stores: files by default, an address in the environment, front doors for each contract."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import backtest_kit as bk
from backtest_kit.persist.contracts import CONTRACTS

KEY: dict[str, Any] = {"strategy_name": "trend", "exchange_name": "binance", "symbol": "BTCUSDT"}


async def test_files_are_the_default_and_can_be_read_with_an_editor(tmp_path: Path) -> None:
    kit = bk.Kit(tmp_path)
    await kit.persistence.signal.write({"id": "s-1"}, **KEY)
    await kit.close()
    text = (tmp_path / "signal/trend/binance/BTCUSDT.json").read_text()
    assert '"s-1"' in text
    assert text.count("\n") > 3
    again = bk.Kit(tmp_path)
    assert await again.persistence.signal.read(**KEY) == {"id": "s-1"}
    await again.close()


async def test_one_sqlite_file_instead(tmp_path: Path) -> None:
    kit = bk.Kit(tmp_path)
    kit.persistence.bind("*", bk.SqliteStore(tmp_path / "bot.db"))
    await kit.persistence.signal.write({"id": "s-1"}, **KEY)
    await kit.close()
    assert (tmp_path / "bot.db").exists()
    assert not (tmp_path / "signal").exists()


@pytest.mark.parametrize("url", ["file:./here", "sqlite:bot.db", "memory:"])
def test_the_environment_chooses_the_store_of_a_backtest(url: str, tmp_path: Path) -> None:
    code = """
        import os
        import backtest_kit as bk
        bk.add_exchange_schema("demo", source=bk.sources.synthetic())
        bk.add_frame_schema("day", start_date="2024-06-01", end_date="2024-06-02")
        bk.add_strategy_schema("idle", get_signal=lambda ctx: None, interval="1h")
        where = dict(strategy_name="idle", exchange_name="demo", frame_name="day")
        print(bk.Backtest.run_sync("BTCUSDT", **where).candles_fetched)
        print(bk.Backtest.run_sync("BTCUSDT", **where).candles_fetched)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        env={"CC_STORE": url, "PATH": ""},
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1445", "0"]
    assert not (tmp_path / "dump" / "candle").exists()


def test_a_bad_address_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import backtest_kit as bk; bk.PersistSignalAdapter"],
        cwd=tmp_path,
        env={"CC_STORE": "oracle:x", "PATH": ""},
        text=True,
        capture_output=True,
        check=False,
    )
    assert "UserError: the store 'oracle:x' has no known backend: write one of file:./dump" in done.stderr


def test_the_reference_s_adapter_works_for_every_contract_of_the_default_kit(tmp_path: Path) -> None:
    """In a process of its own: it binds stores in the default kit."""
    code = """
        import asyncio
        import backtest_kit as bk
        from backtest_kit.persist.contracts import CONTRACTS

        made = []

        class MemoryAdapter:
            def __init__(self):
                self._store = {}
                made.append(self)
            async def read_value(self, entity_id):
                return self._store.get(entity_id)
            async def write_value(self, entity_id, entity):
                self._store[entity_id] = entity

        sample = {"timestamp": 1717200000000, "backtest": False}

        async def main():
            for name, row in CONTRACTS.items():
                door = getattr(bk, f"Persist{name.capitalize()}Adapter")
                getattr(door, f"use_persist_{name}_adapter")(MemoryAdapter)
                if name == "candle":
                    series = dict(exchange_name="x", symbol="B", interval="1m")
                    await door.write_candles(bk.CandleSeries([1717200000000], [1], [1], [1], [1], [1]), **series)
                    found = await door.read_candles(1717200000000, 1717200060000, **series)
                    assert len(found) == 1
                    continue
                names = door._fields
                key = {each: sample.get(field, f"{field}!") for each, field in names.items()}
                await door.write({"payload": [1, float("inf")]}, **key)
                assert await door.read(**key) == {"payload": [1, float("inf")]}, name
            await bk.default_kit.close()

        asyncio.run(main())
        assert len(made) == 16 and all(each._store for each in made)
        print("sixteen")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, text=True, capture_output=True, check=False
    )
    assert done.stdout.strip() == "sixteen", done.stderr
    assert len(CONTRACTS) == 16


def test_the_dump_stays_where_files_are_in_use(tmp_path: Path) -> None:
    kit = bk.Kit(tmp_path / "a")
    kit.persistence.file_store()
    with pytest.raises(bk.UserError, match="files are already in use in"):
        kit.dump = tmp_path / "b"
