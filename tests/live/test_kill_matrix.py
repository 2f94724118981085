"""Killed at every live crash point, whatever the exchange made of the order: it ends as the run that nobody killed.

A bot trades the story of `scripts` on a venue's socket. For every crash point and every fate of an order it dies
there by SIGKILL, starts again, dies there once more, and goes on to the end. Then position, cash, orders, fills,
books and trades are those of a run with the same fate and no death, no order was sent again that the venue had
carried out, and nobody has heard of anything twice.

`make test` plays a sample of the matrix, `make prove` the whole.
"""

from __future__ import annotations

import asyncio
import zlib
from pathlib import Path
from typing import Any, Final

import pymongo
import pytest
from tests.live.scripts import START, STORY_MINUTES
from tests.live.stage import Forks, differences, forking, stage
from tests.samples import sample, size
from tests.servers import address_of

from backtest_kit.model.interval import MINUTE_MS
from backtest_kit.persist.crashpoints import CRASHPOINTS
from backtest_kit.venue.exchange import ClientIds, Terms
from backtest_kit.venue.faults import Fault

pytestmark = pytest.mark.crash

POINTS: Final = tuple(point for point in CRASHPOINTS if point.startswith("live."))
KINDS: Final = tuple(dict.fromkeys(point.split(".")[1] for point in POINTS if point.endswith(".after_intent")))
FATES: Final[dict[str, dict[str, Any] | None]] = {
    "not_received": {"kind": "lose_request"},
    "answer_lost": {"kind": "lose_response"},
    "filled": None,
    "partly_filled": {"kind": "partial", "fraction": "0.4"},
    "filled_in_part_only": {"kind": "partial", "fraction": "0.4", "rest_expires": True},
    "rejected": {"kind": "reject"},
}
"""What becomes of the first order of a kind."""
REQUESTS: Final = {"move_take": ("move", 0), "breakeven": ("move", 1), "move_stop": ("move", 2)}
"""Operation of the broker for a kind, where it is another one, and how many of them come before."""
AT_ONCE: Final = (
    ("open", "not_received"),
    ("close", "not_received"),
    ("close", "rejected"),
    ("close", "filled_in_part_only"),
)
"""What is sent again by each start, and next minute by who was not killed: with a start more it goes through in the
minute of the decision, as if nothing had been wrong."""
SEATS: Final = 4
"""Bots that trade at the same time."""
SAMPLE: Final = 2
"""Cells that `make test` plays of each fate, and on each kind of store and exchange."""
Cell = tuple[str, str, str]
"""A crash point, the kind of order whose fate it is, and that fate."""


def impossible(kind: str, fate: str) -> str:
    """Why a venue cannot treat an order of this kind so; empty where it can."""
    if fate in ("partly_filled", "filled_in_part_only") and kind in ("move_take", "move_stop", "breakeven", "cancel"):
        return "it buys and sells nothing"
    if fate == "rejected" and kind == "activate":
        return "it sends no order: the entry was taken when it was placed"
    return ""


def cells() -> list[Cell]:
    found = []
    for point in POINTS:
        kind = point.split(".")[1]
        struck = [kind] if kind in KINDS else ["close"] if kind in ("minute", "emergency") else ["open", "close"]
        found += [(point, each, fate) for each in struck for fate in FATES if not impossible(each, fate)]
    return found


def faults_of(kind: str, fate: str) -> list[Fault]:
    fault = FATES[fate]
    if fault is None:
        return []
    operation, skip = REQUESTS.get(kind, (kind, 0))
    if kind == "activate" and fault["kind"] == "partial":
        operation = "place"  # what is activated later is filled as the entry was taken
    return [Fault.convert({**fault, "endpoint": f"POST /broker/{operation}", "skip": skip})]


def schedule(cell: Cell) -> tuple[list[str], dict[str, Any]]:
    """Where to die one life after the other, and what else is wrong in the first."""
    point, kind, _ = cell
    if point.startswith("live.start."):
        return [f"live.{kind}.after_intent", point, point], {}
    if point.startswith("live.emergency."):
        return [point], {"full_from_ms": START + 7 * MINUTE_MS}
    return [point, point], {}


class Theatre:
    """Plays cells, a few at a time, and compares each with the run of its fate that nobody killed."""

    def __init__(self, forks: Forks, place: Path, mongo: str = "", rule: ClientIds = "open") -> None:
        self._forks = forks
        self._place = place
        self._mongo = mongo
        """Address of the server whose databases are the stores; without one, they are files."""
        self._venue = {"terms": Terms(client_ids=rule)}
        self._seats = asyncio.Semaphore(SEATS)
        self._oracles: dict[tuple[str, str], asyncio.Task[dict[str, Any]]] = {}
        self.kills = 0
        self.hit: set[str] = set()

    async def play(self, cell: Cell) -> list[str]:
        """What went wrong."""
        point, kind, fate = cell
        sooner = point == "live.start.after_resolve" and (kind, fate) in AT_ONCE
        expected = await self.oracle(kind, "filled" if sooner else fate)
        crashes, first = schedule(cell)
        async with self._seats, self.stage("-".join(cell), kind, fate) as here:
            await here.trade(crashes, **first)
            wrong = here.check()
            if here.kills:
                self.hit.add(point)
            else:
                wrong.append("it was never killed")
            self.kills += here.kills
            if sooner and fate == "filled_in_part_only":
                expected = {what: value for what, value in expected.items() if what not in ("orders", "fills")}
            wrong += differences(expected, here.outcome())
            return [f"{cell}: {each}" for each in wrong]

    async def oracle(self, kind: str, fate: str) -> dict[str, Any]:
        struck = ("", "filled") if fate == "filled" else (kind, fate)
        if struck not in self._oracles:
            self._oracles[struck] = asyncio.create_task(self._undisturbed(*struck))
        return await self._oracles[struck]

    async def _undisturbed(self, kind: str, fate: str) -> dict[str, Any]:
        async with self._seats, self.stage(f"oracle-{kind}-{fate}", kind, fate) as here:
            await here.trade()
            assert here.check() == [], (kind, fate)
            hits = [fault["hit"] for fault in here.faults.listed()]
            assert hits == [1] * len(hits), (kind, fate, hits)
            outcome: dict[str, Any] = here.outcome()
            return outcome

    def stage(self, name: str, kind: str, fate: str) -> Any:
        store: dict[str, Any] = {"store": address_of(self._mongo, database(name))} if self._mongo else {}
        return stage(
            self._forks,
            self._place / name,
            faults=faults_of(kind, fate),
            end_ms=START + STORY_MINUTES * MINUTE_MS,
            venue=self._venue,
            **store,
        )


def database(name: str) -> str:
    """A name for the database of a stage, short enough for a server."""
    return f"kill-{zlib.crc32(name.encode()):08x}"


async def play(
    cells: list[Cell], place: Path, mongo: str = "", rule: ClientIds = "open", **environment: str
) -> Theatre:
    async with forking(**environment) as forks:
        theatre = Theatre(forks, place, mongo, rule)
        wrong = [each for found in await asyncio.gather(*map(theatre.play, cells)) for each in found]
    assert not wrong, f"{len(wrong)} differences, the first are\n" + "\n".join(wrong[:20])
    return theatre


def test_the_matrix_is_whole() -> None:
    assert len(POINTS) >= 40
    assert len(cells()) >= 200
    assert {point for point, *_ in cells()} == set(POINTS)


@pytest.mark.sampled
@pytest.mark.slow
@pytest.mark.parametrize("fate", FATES)
async def test_killed_at_every_point_on_files(tmp_path: Path, fate: str) -> None:
    chosen = sample([cell for cell in cells() if cell[2] == fate], SAMPLE, f"killed {fate}")
    theatre = await play(chosen, tmp_path)
    assert theatre.hit == {point for point, *_ in chosen}
    assert theatre.kills >= size(len(chosen), int(len(chosen) * 1.5))  # some cells have several, and few may be drawn


@pytest.mark.sampled
@pytest.mark.slow
async def test_killed_where_client_ids_are_never_taken_again(tmp_path: Path) -> None:
    chosen = sample(cells(), SAMPLE, "ids are never taken again")
    theatre = await play(chosen, tmp_path, rule="ever")
    assert theatre.hit == {point for point, *_ in chosen}


@pytest.mark.sampled
@pytest.mark.slow
async def test_killed_on_mongo_and_redis(tmp_path: Path, mongo_address: str, redis_address: str) -> None:
    # The disk that is full is the one of the bot's own files.
    whole = [cell for cell in cells() if cell[0] != "live.emergency.after_write"]
    chosen = sample(whole, SAMPLE, "on MongoDB")
    try:
        theatre = await play(chosen, tmp_path, mongo_address, CC_REDIS_URL=redis_address, CC_REDIS_PREFIX="kill-matrix")
    finally:
        with pymongo.MongoClient[dict[str, Any]](mongo_address) as client:
            for name in client.list_database_names():
                if name.startswith("kill-"):
                    client.drop_database(name)
    assert theatre.hit == {point for point, *_ in chosen}


@pytest.mark.sampled
@pytest.mark.slow
@pytest.mark.parametrize("done", [False, True], ids=["before_it_is_done", "once_it_is_done"])
async def test_killed_while_the_answer_is_awaited(tmp_path: Path, done: bool) -> None:
    """The venue has the request, and who sent it is dead: before it is carried out, and before the answer is sent."""
    kinds = sample(KINDS, 3, f"the answer is awaited {done}")
    async with forking() as forks:
        theatre = Theatre(forks, tmp_path)

        async def play(kind: str) -> list[str]:
            operation, skip = REQUESTS.get(kind, (kind, 0))
            expected = await theatre.oracle("", "filled")
            async with theatre.stage(f"{kind}-{done}", "", "filled") as here:
                if not done:
                    here.faults.add(Fault(kind="lose_request", endpoint=f"POST /broker/{operation}", skip=skip))
                here.faults.deaths.append((operation, skip))
                await here.trade()
                wrong = here.check() + differences(expected, here.outcome())
                return [f"{kind}: {each}" for each in [*wrong, *["it was not killed"] * (here.kills != 1)]]

        wrong = [each for found in await asyncio.gather(*map(play, kinds)) for each in found]
    assert not wrong, "\n".join(wrong[:20])
