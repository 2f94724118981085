"""Whether a store, and the place that it lies in, can be trusted with a live position.

A backend measures what only it knows (`Store.examine`); what holds for every store is added here. Looking changes
nothing, however often.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

import numpy as np

from backtest_kit.errors import BacktestKitError, UserError
from backtest_kit.persist.lease import owners
from backtest_kit.persist.store import Capability, Store
from backtest_kit.persist.upkeep import SAMPLES, Reading, Status

_LIVE_GRADE: Final = (Capability.DURABLE, Capability.SHARED, Capability.COMPARE_AND_SET, Capability.ORDERED_SCAN)
"""What a live position needs. Without atomic batches it is written in an order that every crash can be recovered from,
and what only an operator needs is not a condition."""

CLOCKS_APART_MS: Final = 1_000
"""Clocks of a server and this host that are further apart are reported."""


async def examine(store: Store, *, samples: int = SAMPLES) -> list[Reading]:
    """Everything known about `store`, which may not exist yet. Times are the median of `samples`."""
    measured = await store.examine(samples=samples)
    # Afterwards: what a server can do is known once it has answered.
    readings = [*_promises(store), *measured]
    if not {Status.FAULT, Status.NEW} & {reading.status for reading in readings}:
        readings += await _contents(store)
    return readings


async def require_live_grade(store: Store, *, allow_weak: bool = False) -> list[Reading]:
    """What `examine` says of `store`, if a live position may be trusted to it. To be called before the first one is.

    Raises:
        UserError: it is weak, which `allow_weak` lets pass, or at fault; the message has every reason and its remedy.
    """
    readings = await examine(store, samples=1)
    stops = {Status.FAULT} if allow_weak else {Status.FAULT, Status.WEAK}
    reasons = [reading for reading in readings if reading.status in stops]
    if reasons:
        listed = "; ".join(f"{each.subject}: {each.detail}{each.remedy and f' - {each.remedy}'}" for each in reasons)
        weak = any(each.status is Status.WEAK for each in reasons)
        raise UserError(
            f"the store is not fit for live trading: {listed}. `backtest-kit doctor --live` shows all of it"
            + (", and --allow-weak accepts what is only weak" if weak else "")
        )
    return readings


def fails(readings: Iterable[Reading], *, live: bool = False, allow_weak: bool = False) -> bool:
    """Whether something has to be done about them."""
    bad = {Status.FAULT, Status.DEGRADED} | ({Status.WEAK} if live and not allow_weak else set())
    return any(reading.status in bad for reading in readings)


async def median_ms(call: Callable[[], Awaitable[object]], samples: int) -> float:
    """How long `call` takes, in the median of some, after one that is not counted."""
    if samples > 1:
        await call()
    spent = []
    for _ in range(samples):
        started = time.perf_counter()
        await call()
        spent.append(time.perf_counter() - started)
    return round(float(np.median(spent)) * 1000, 3)


def clock_reading(subject: str, server_seconds: float, asked: float, answered: float) -> Reading:
    """How far the clock of a server is from that of this host, given when it was `asked` and when it `answered`."""
    apart_ms = round((server_seconds - (asked + answered) / 2) * 1000)
    uncertain_ms = (answered - asked) * 1000 / 2
    says = f"{apart_ms:+,} ms from this host's, known to {max(1, uncertain_ms):,.0f} ms"
    if abs(apart_ms) - uncertain_ms <= CLOCKS_APART_MS:
        return Reading(subject, Status.OK, says)
    remedy = "let both follow a time server (timedatectl set-ntp true): candles close by the clock of this host"
    return Reading(subject, Status.WARNING, says, remedy)


def _promises(store: Store) -> list[Reading]:
    missing = [each for each in Capability if each not in store.capabilities]
    name = type(store).__name__
    if not missing:
        return [Reading("promises", Status.OK, f"{name}: " + ", ".join(each.value for each in Capability))]
    weak = any(each in _LIVE_GRADE for each in missing)
    remedy = "keep live positions in file:DIR, sqlite:FILE or mongodb://HOST/NAME"
    detail = f"{name} does not promise: {', '.join(each.value for each in missing)}"
    return [Reading("promises", Status.WEAK if weak else Status.WARNING, detail, remedy if weak else "")]


async def _contents(store: Store) -> list[Reading]:
    """What is in the store that an operator has to know of."""
    readings = []
    try:
        if Capability.QUARANTINE in store.capabilities:
            readings.append(await _quarantine(store))
        if Capability.ORDERED_SCAN in store.capabilities:
            held = [str(holder) for _, holder in await owners(store)]
            says = f"{len(held)} owned: {'; '.join(held[:3])}{'; ...' * (len(held) > 3)}" if held else "none owned"
            readings.append(Reading("positions", Status.OK, says))
    except BacktestKitError as error:
        readings.append(Reading("records", Status.FAULT, str(error)))
    return readings


async def _quarantine(store: Store) -> Reading:
    kept = await store.quarantined()
    if not kept:
        return Reading("quarantine", Status.OK, "empty")
    blocking = [each for each in kept if each.blocks]
    paths = ", ".join(each.path for each in (blocking or kept)[:3]) + ", ..." * (len(blocking or kept) > 3)
    if not blocking:
        # Such as what a loss of power left of a write that was never synced: no caller relied on it.
        says = f"{len(kept):,} kept as evidence, no key is blocked: {paths}"
        return Reading("quarantine", Status.WARNING, says, "drop it when you have seen it")
    remedy = "backtest-kit store quarantine list shows why; restore or drop decides, and frees the keys"
    return Reading("quarantine", Status.FAULT, f"{len(blocking):,} could not be read: {paths}", remedy)
