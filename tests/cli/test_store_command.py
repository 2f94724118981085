"""`backtest-kit store` as an operator uses it, on files and on SQLite."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.commands import run_command

from backtest_kit.cli import migrate
from backtest_kit.errors import Conflict
from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.backends.sqlite import SqliteStore
from backtest_kit.persist.binding import Persistence
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.persist.migration import Migration, migrate_store
from backtest_kit.persist.store import Key, Store, Write
from backtest_kit.persist.store_id import claim_store_id
from backtest_kit.persist.urls import store_at

COMMAND = [str(Path(sys.executable).with_name("backtest-kit")), "store"]
KEY: dict[str, Any] = {"strategy_name": "trend", "exchange_name": "binance", "symbol": "BTCUSDT"}


def run(*arguments: str | Path, cwd: Path, code: int = 0) -> str:
    done = run_command("store", *arguments, cwd=cwd)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture(params=["file:./dump", "sqlite:bot.db"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store with a position, a resting entry, three notes and a paper position in it."""
    monkeypatch.chdir(tmp_path)
    address: str = request.param

    async def fill() -> None:
        persistence = Persistence(environ={"CC_STORE": address})
        await persistence.signal.write({"id": "s-1", "minutes": float("inf")}, **KEY)
        await persistence.signal.write({"id": "s-2"}, **KEY)
        await persistence.schedule.write(None, **KEY)
        await persistence.signal.write({"id": "on paper"}, mode="paper", **KEY)
        for n in range(3):
            note: dict[str, Any] = {"signal_id": "s-2", "bucket_name": "notes", "memory_id": str(n)}
            await persistence.memory.write({"text": f"note {n}"}, when=1_717_200_000_000 + n, **note)
        await persistence.memory.remove(signal_id="s-2", bucket_name="notes", memory_id="1")
        await persistence.close()

    asyncio.run(fill())
    return address


def test_ls_get_and_du_show_what_is_there(url: str, tmp_path: Path) -> None:
    listed = run("ls", "signal", "--store", url, cwd=tmp_path)
    assert "BTCUSDT" in listed
    assert "s-2" in listed
    assert "paper" not in listed
    shown = json.loads(run("get", "signal", "trend/binance/BTCUSDT", "--store", url, cwd=tmp_path))
    assert (shown["rev"], shown["value"]) == (2, {"id": "s-2"})
    assert shown["key"] == {"strategyName": "trend", "exchangeName": "binance", "symbol": "BTCUSDT"}
    on_paper = run("get", "signal", "trend/binance/BTCUSDT", "--store", url, "--namespace", "paper", cwd=tmp_path)
    assert "on paper" in on_paper
    notes = run("ls", "memory", "s-2/notes", "--store", url, cwd=tmp_path)
    assert [f"note {n}" in notes for n in range(3)] == [True, False, True]
    assert "note 1" in run("ls", "memory", "s-2", "--removed", "--store", url, cwd=tmp_path)
    usage = run("du", "--store", url, cwd=tmp_path)
    assert "memory" in usage
    assert "paper" in usage


def test_keys_that_look_like_markup_are_shown_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    note: dict[str, Any] = {"signal_id": "[/b]", "bucket_name": "[red]x", "memory_id": ":smile:"}

    async def fill() -> None:
        persistence = Persistence()
        await persistence.memory.write("[/i] :smile:", **note)
        await persistence.close()

    asyncio.run(fill())
    (file,) = (tmp_path / "dump/memory").rglob("*.json")
    name = file.relative_to(tmp_path / "dump").as_posix()
    key = name.removeprefix("memory/").removesuffix(".json")
    listed = run("ls", "memory", cwd=tmp_path)
    assert key in listed
    assert "[/i] :smile:" in listed
    file.write_bytes(b"?")
    assert name in run("check", cwd=tmp_path, code=1)
    run("get", "memory", key, cwd=tmp_path, code=1)
    assert "]" in run("quarantine", "list", cwd=tmp_path)
    assert name in run("quarantine", "drop", name, cwd=tmp_path)


def test_bad_names_are_explained(url: str, tmp_path: Path) -> None:
    assert "no contract is called 'signals'" in run("ls", "signals", "--store", url, cwd=tmp_path, code=2)
    assert "has no record 'trend/binance/ETHUSDT'" in run(
        "get", "signal", "trend/binance/ETHUSDT", "--store", url, cwd=tmp_path, code=2
    )
    assert "components too many" in run("get", "signal", "a/b/c/d", "--store", url, cwd=tmp_path, code=2)
    assert "does not exist" in run("du", "--store", "file:./nowhere", cwd=tmp_path, code=2)
    assert "no known backend" in run("du", "--store", "redis:x", cwd=tmp_path, code=2)


def test_check_finds_nothing_in_a_sound_store(url: str, tmp_path: Path) -> None:
    assert "every record is intact" in run("check", "--store", url, cwd=tmp_path)
    assert "every record is intact" in run("check", "--deep", "--store", url, cwd=tmp_path)


@pytest.mark.parametrize(
    ("url", "contract", "file"),
    [
        ("sqlite:bot.db", "signal", "bot.db"),
        ("file:dump", "storage", "dump/feeds.db"),
    ],
)
def test_a_loss_is_found_and_accepted(tmp_path: Path, url: str, contract: str, file: str) -> None:
    kind, _, name = url.partition(":")
    key: Key = (False, "signal-1") if contract == "storage" else ("trend", "binance", "BTCUSDT")
    text = "live/signal-1" if contract == "storage" else "trend/binance/BTCUSDT"

    async def write() -> None:
        store: Store = SqliteStore(tmp_path / name) if kind == "sqlite" else FileStore(tmp_path / name)
        await store.put(Write(CONTRACTS[contract], key, "kept"))
        await store.close()

    asyncio.run(write())
    older = (tmp_path / file).read_bytes()
    asyncio.run(write())
    (tmp_path / file).write_bytes(older)
    assert "has lost commit 2" in run("check", "--store", url, cwd=tmp_path, code=1)
    assert "has lost commit 2" in run("get", contract, text, "--store", url, cwd=tmp_path, code=1)
    told = run("check", "--accept-loss", "--store", url, cwd=tmp_path)
    assert "accepted: " in told
    assert "every record is intact" in told
    assert "no acknowledged write is missing" in run("check", "--accept-loss", "--store", url, cwd=tmp_path)
    assert '"rev": 1' in run("get", contract, text, "--store", url, cwd=tmp_path)


@pytest.mark.parametrize("url", ["sqlite:bot.db", "file:."])
def test_no_loss_is_accepted_of_what_is_not_a_store(tmp_path: Path, url: str) -> None:
    (tmp_path / "bot.db").touch()
    refused = run("check", "--accept-loss", "--store", url, cwd=tmp_path, code=2)
    assert "is not a store of this program" in refused
    assert "no acknowledged write is missing" not in refused


def test_damage_is_found_kept_and_decided_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    async def fill() -> None:
        persistence = Persistence()
        for symbol in ("BTCUSDT", "ETHUSDT"):
            await persistence.signal.write({"id": symbol}, **{**KEY, "symbol": symbol})
        await persistence.close()

    asyncio.run(fill())
    sound = tmp_path / "dump/signal/trend/binance/BTCUSDT.json"
    assert "BTCUSDT" in sound.read_text()
    before = sound.read_bytes()
    sound.write_bytes(before.replace(b'"id"', b'"ix"'))
    found = run("check", cwd=tmp_path, code=1)
    assert "signal/trend/binance/BTCUSDT.json" in found
    assert "1 problem found" in found
    assert sound.exists()
    blocked = run("get", "signal", "trend/binance/BTCUSDT", cwd=tmp_path, code=1)
    assert "quarantine" in blocked
    assert not sound.exists()
    assert "ETHUSDT" in run("get", "signal", "trend/binance/ETHUSDT", cwd=tmp_path)
    listed = run("quarantine", "list", cwd=tmp_path)
    assert "signal/trend/binance/BTCUSDT.json" in listed
    assert "nothing" in run("quarantine", "drop", "signal/else.json", cwd=tmp_path, code=2)
    run("quarantine", "drop", "signal/trend/binance/BTCUSDT.json", cwd=tmp_path)
    assert "has no record" in run("get", "signal", "trend/binance/BTCUSDT", cwd=tmp_path, code=2)
    run("check", cwd=tmp_path)


def test_help_names_every_verb(tmp_path: Path) -> None:
    page = run("--help", cwd=tmp_path)
    for verb in ("ls", "get", "du", "check", "migrate", "reclaim", "quarantine"):
        assert verb in page
    assert "restore" in run("quarantine", "--help", cwd=tmp_path)


@pytest.mark.parametrize("verb", [("ls", "signal"), ("du",), ("check",), ("quarantine", "list")])
def test_looking_at_what_is_no_store_changes_nothing(tmp_path: Path, verb: tuple[str, ...]) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/.tmp-notes.txt").write_text("mine")
    (tmp_path / "empty.db").write_bytes(b"")
    before = sorted(tmp_path.rglob("*"))
    for url in ("file:home", "file:empty.db", "sqlite:empty.db"):
        told = run(*verb, "--store", url, cwd=tmp_path, code=2)
        assert "store of this program" in told or "is a file" in told
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "empty.db").stat().st_size == 0


def test_migrate_moves_everything_and_proves_it(url: str, tmp_path: Path) -> None:
    other = "sqlite:other.db" if url.startswith("file") else "file:./other"
    told = run("migrate", url, other, "--verify", cwd=tmp_path)
    assert "Both stores have the same records, in the same order." in told
    assert [line.split() for line in told.splitlines() if line.strip().startswith("memory")] == [["memory", "3", "0"]]
    assert "paper" in told
    again = run("migrate", url, other, cwd=tmp_path)
    assert [line.split() for line in again.splitlines() if line.strip().startswith("memory")] == [["memory", "0", "3"]]
    run("migrate", other, "file:./third", "--verify", cwd=tmp_path)
    assert "on paper" in run(
        "get", "signal", "trend/binance/BTCUSDT", "--store", "file:./third", "--namespace", "paper", cwd=tmp_path
    )


def test_migrate_moves_the_id_and_reclaim_takes_it_back(url: str, tmp_path: Path) -> None:
    other = "sqlite:other.db" if url.startswith("file") else "file:./other"

    async def claimed(address: str) -> str:
        store = store_at(address)
        try:
            return await claim_store_id(store)
        finally:
            await store.close()

    own = asyncio.run(claimed(url))
    for _ in range(2):
        run("migrate", url, other, "--verify", cwd=tmp_path)
        assert asyncio.run(claimed(other)) == own
        with pytest.raises(Conflict, match=f"this store was moved to {other}, "):
            asyncio.run(claimed(url))
    assert f"{url} may trade live again. Never start {other} again" in run("reclaim", "--store", url, cwd=tmp_path)
    assert asyncio.run(claimed(url)) == own
    assert "this store was not moved" in run("reclaim", "--store", url, cwd=tmp_path, code=2)


def test_migrate_names_what_differs_and_what_to_do(url: str, tmp_path: Path) -> None:
    other = "sqlite:other.db" if url.startswith("file") else "file:./other"

    async def write(address: str, value: object) -> None:
        persistence = Persistence(environ={"CC_STORE": address})
        await persistence.signal.write(value, **KEY)
        await persistence.close()

    asyncio.run(write(other, {"id": "of another bot"}))
    refused = run("migrate", url, other, cwd=tmp_path, code=2)
    assert "nothing was written: the target has signal: trend/binance/BTCUSDT" in refused
    assert "schedule" not in run("du", "--store", other, cwd=tmp_path)
    for source, target, expected in (
        (url, url, "the same store"),
        (url, f"{url.partition(':')[0]}:{tmp_path}/{Path(url.partition(':')[2])}", "the same store"),
        (url, "memory:", "does not outlive this command"),
        ("file:./nowhere", other, "does not exist"),
    ):
        assert expected in run("migrate", source, target, cwd=tmp_path, code=2)


def test_migrate_goes_on_where_it_was_killed(url: str, tmp_path: Path) -> None:
    other = "sqlite:other.db" if url.startswith("file") else "file:./other"
    point = "sqlite.after_commit:4" if other.startswith("sqlite") else "journal.after_apply:1"
    command = [*COMMAND, "migrate", url, other]
    killed = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "BACKTEST_KIT_CRASH": point}, capture_output=True, check=False
    )
    assert killed.returncode == -9, killed.stderr
    assert "go on with --resume" in run("migrate", url, other, cwd=tmp_path, code=2)
    told = run("migrate", url, other, "--resume", "--verify", cwd=tmp_path)
    assert "Both stores have the same" in told


def test_migrate_ends_with_an_error_if_the_stores_differ(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = "sqlite:other.db" if url.startswith("file") else "file:./other"

    async def disturbed(source: Store, target: Store, **options: Any) -> Migration:
        moved = await migrate_store(source, target, **options)
        await target.put(Write(CONTRACTS["signal"], ("trend", "binance", "BTCUSDT"), "written by a bot meanwhile"))
        return moved

    monkeypatch.setattr(migrate, "migrate_store", disturbed)
    assert migrate.run_migrate(url, other, verify=True, resume=False) == 1
    told = capsys.readouterr().out
    assert "trend/binance/BTCUSDT has another content" in told
    assert "1 of them differ." in told


def test_migrate_draws_a_bar_on_a_terminal(url: str, tmp_path: Path) -> None:
    other = "sqlite:other.db" if url.startswith("file") else "file:./other"
    master, slave = pty.openpty()
    command = [*COMMAND, "migrate", url, other]
    done = subprocess.run(command, cwd=tmp_path, stdout=slave, stderr=slave, check=False)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # a terminal that nobody has open any more
        while data := os.read(master, 1 << 16):
            shown += data
    os.close(master)
    assert done.returncode == 0, shown
    assert b"a second" in shown
    assert b"Already there" in shown
