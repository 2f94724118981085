"""Real processes, killed by SIGKILL: nothing acknowledged is lost, nothing appears that nobody wrote."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from tests.samples import PROVING, dice, size

from backtest_kit.persist.crashpoints import CRASHPOINTS
from backtest_kit.persist.testing.driver import Outcome

pytestmark = pytest.mark.crash

PASSAGES = 3
"""At how many passages of each crash point `make test` kills."""
HOUSEKEEPING = Path(__file__).with_name("housekeeping.py")
STORES = {"file": "file:{place}/dump", "sqlite": "sqlite:{place}/bot.db"}
"""Address of each store that promises to survive a kill."""


def run(*command: str) -> Outcome:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, *command], capture_output=True, env=environment, check=False, timeout=300)
    assert done.stdout, done.stderr.decode()
    return msgspec.json.decode(done.stdout, type=Outcome)


def require_sound(outcome: Outcome) -> None:
    said = f"seed {outcome.seed}: {outcome}"
    assert outcome.acknowledged > 0, said
    assert (outcome.lost, outcome.phantom, outcome.unreadable, outcome.torn) == ([], [], [], []), said


@pytest.mark.sampled
@pytest.mark.parametrize("store", STORES)
def test_kills_at_random_moments(tmp_path: Path, store: str) -> None:
    seed, kills = dice(f"kills {store}").randrange(1 << 30), size(40, 500)
    outcome = run(
        "-m", "backtest_kit.persist.testing.driver", "--kills", str(kills), "--seed", str(seed),
        "--store", STORES[store].format(place=tmp_path),
    )  # fmt: skip
    require_sound(outcome)
    assert outcome.kills == kills
    assert outcome.recovered > 0, "no write was stored and not acknowledged: the kills come at the wrong moments"


@pytest.mark.parametrize("store", STORES)
def test_kills_at_random_moments_on_the_disk(disk: Path, store: str) -> None:
    seed = dice(f"kills on the disk {store}").randrange(1 << 30)
    outcome = run(
        "-m", "backtest_kit.persist.testing.driver", "--kills", "20", "--seed", str(seed), "--patience", "10",
        "--store", STORES[store].format(place=disk),
    )  # fmt: skip
    require_sound(outcome)


def passages(name: str) -> list[str]:
    """The option that kills at a few passages of each point, or at all of them."""
    seed = dice(f"passages {name}").randrange(1 << 30)
    return ["--seed", str(seed)] if PROVING else ["--seed", str(seed), "--most", str(PASSAGES)]


def test_lives_get_longer_until_one_has_written_something(tmp_path: Path) -> None:
    outcome = run(
        "-m", "backtest_kit.persist.testing.driver", "--kills", "30", "--seed", "1", "--patience", "0.0001",
        "--store", STORES["file"].format(place=tmp_path),
    )  # fmt: skip
    require_sound(outcome)


@pytest.mark.sampled
def test_kills_at_every_crash_point_of_files(tmp_path: Path) -> None:
    reached: set[str] = set()
    for command in (("-m", "backtest_kit.persist.testing.driver", "--points"), (str(HOUSEKEEPING),)):
        outcome = run(*command, *passages(command[-1]), "--store", f"file:{tmp_path}/dump")
        require_sound(outcome)
        assert outcome.kills > size(len(outcome.points), 50)
        reached |= set(outcome.points)
    # The others have tests of their own; those of SQLite are passed by the feeds.
    own = {point for point in CRASHPOINTS if point.startswith(("file.", "journal.", "log.", "sqlite."))}
    assert reached == own


@pytest.mark.sampled
def test_kills_at_every_crash_point_of_sqlite(tmp_path: Path) -> None:
    outcome = run(
        "-m", "backtest_kit.persist.testing.driver", "--points", *passages("sqlite"),
        "--store", f"sqlite:{tmp_path}/bot.db",
    )  # fmt: skip
    require_sound(outcome)
    assert outcome.kills > size(len(outcome.points), 50)
    own = {point for point in CRASHPOINTS if point.startswith("sqlite.")}
    candles = {f"file.after_{step}" for step in ("mkdir", "create", "write", "fsync", "rename")}
    assert own | candles <= set(outcome.points)


@pytest.mark.parametrize("point", [point for point in CRASHPOINTS if point.startswith("quarantine.")])
def test_kill_while_damage_is_put_aside(tmp_path: Path, point: str) -> None:
    program = (
        "import asyncio, sys\n"
        "from backtest_kit.persist.backends.file import FileStore\n"
        "from backtest_kit.persist.contracts import CONTRACTS\n"
        "from backtest_kit.persist.store import Write\n"
        "async def main():\n"
        "    store = FileStore(sys.argv[1])\n"
        "    try:\n"
        "        print(await store.get(CONTRACTS['signal'], ('s', 'e', 'P')))\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__)\n"
        "    await store.close()\n"
        "asyncio.run(main())\n"
    )
    record = tmp_path / "signal/s/e/P.json"
    record.parent.mkdir(parents=True)
    record.write_bytes(b"damaged")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", program, str(tmp_path)]
    killed = subprocess.run(command, env={**environment, "BACKTEST_KIT_CRASH": point}, check=False, capture_output=True)
    assert killed.returncode == -9
    kept = tmp_path / "quarantine/signal/s/e/P.json"
    assert [path.read_bytes() for path in (record, kept) if path.exists()] == [b"damaged"]
    after = subprocess.run(command, env=environment, check=True, capture_output=True)
    assert after.stdout.strip() == b"Damaged"
    assert [path.read_bytes() for path in (record, kept) if path.exists()] == [b"damaged"]


def test_an_unknown_crash_point_is_refused() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "BACKTEST_KIT_CRASH": "nowhere"}
    command = [sys.executable, "-c", "import backtest_kit.persist.crashpoints"]
    done = subprocess.run(command, env=environment, check=False, capture_output=True)
    assert b"file.after_rename" in done.stderr
