"""Faults of the candles that a simulated exchange publishes, repeatable by seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final, Literal

import msgspec

from backtest_kit.errors import RetryLater, UserError
from backtest_kit.model.candle import COLUMNS, CandleSeries
from backtest_kit.model.interval import INTERVAL_MS, MINUTE_MS, floor_ms, iso

Row = list[float | None]
"""Open time, open, high, low, close, volume, as they are served."""
Fate = Literal["", "missing", "late", "revised", "garbled"]

_WATCH_MS: Final = INTERVAL_MS["6h"]
"""A period with one outage or none."""
_REVISED: Final = 1.002
"""The error of the first version of a revised candle."""


class Publishing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How an exchange publishes its 1m candles. Orders are matched against the true market; only readers see faults.

    `missing`, `late`, `revised` and `garbled` are parts of all minutes, from 0 to 1 in sum.
    """

    seed: int = 7
    missing: float = 0.0
    """No candle is ever published."""
    late: float = 0.0
    """The candle is published 1 to `late_minutes` late."""
    late_minutes: int = 3
    revised: float = 0.0
    """The candle is published with other prices first, and corrected after two minutes."""
    garbled: float = 0.0
    """The row is served wrong, in one of the ways of `GARBLES`."""
    garbled_minutes: int = 0
    """Minutes after which a garbled row is corrected; 0 for never."""
    outages: float = 0.0
    """Chance, for each six hours of the market's time, that no candle is served for a while."""
    outage_minutes: int = 120
    """How long an outage lasts at most."""

    def __post_init__(self) -> None:
        parts = (self.missing, self.late, self.revised, self.garbled)
        if min(*parts, self.outages) < 0 or sum(parts) > 1 or self.outages > 1:
            raise ValueError("parts and chances are 0 or above, and 1 at most in sum")
        if min(self.late_minutes, self.outage_minutes) < 1 or self.garbled_minutes < 0:
            raise ValueError("late_minutes and outage_minutes are 1 or above, garbled_minutes 0 or above")
        if self.outage_minutes * MINUTE_MS > _WATCH_MS:
            raise ValueError(f"outage_minutes is {_WATCH_MS // MINUTE_MS} at most")

    @classmethod
    def parse(cls, text: str) -> Publishing:
        """From `field=value,...`, such as `seed=3,missing=0.05,outages=0.5`.

        Raises:
            UserError: a field or value that does not exist.
        """
        fields = dict(pair.partition("=")[::2] for pair in text.split(","))
        try:
            return msgspec.convert(fields, cls, strict=False)
        except msgspec.ValidationError as error:
            known = ", ".join(cls.__struct_fields__)
            raise UserError(f"publishing {text!r:.200}: {error}: its fields are {known}") from None

    def outage(self, when_ms: int) -> tuple[int, int]:
        """Begin and end of the outage in the six hours around a moment, in whole minutes; empty if there is none."""
        begin_ms = floor_ms(when_ms, _WATCH_MS)
        dice = self._dice(begin_ms, "outage")
        if dice.random() >= self.outages:
            return begin_ms, begin_ms
        length_ms = dice.randint(1, self.outage_minutes) * MINUTE_MS
        first_ms = begin_ms + dice.randint(0, (_WATCH_MS - length_ms) // MINUTE_MS) * MINUTE_MS
        return first_ms, first_ms + length_ms

    def fate(self, open_ms: int) -> tuple[Fate, str]:
        """The fate of the candle of a minute, and which of `GARBLES` if it is garbled."""
        dice = self._dice(open_ms, "fate")
        drawn, garble = dice.random(), dice.choice(list(GARBLES))
        parts: dict[Fate, float] = {
            "missing": self.missing, "late": self.late, "revised": self.revised, "garbled": self.garbled,
        }  # fmt: skip
        for fate, part in parts.items():
            if drawn < part:
                return fate, garble
            drawn -= part
        return "", garble

    def known(self, candle: Row, now_ms: int) -> Row | None:
        """The candle as the best reader knows it at a moment, or None while it is missing."""
        fate, garble = self.fate(open_ms := int(candle[0] or 0))
        late_ms = now_ms - open_ms - MINUTE_MS
        if fate == "missing" or (fate == "late" and late_ms < self._delay_ms(open_ms)):
            return None
        if fate == "garbled" and garble in LOST and self._is_garbled(late_ms):
            return None
        if fate == "revised" and late_ms < 2 * MINUTE_MS:
            return [candle[0], *(price * _REVISED for price in candle[1:5] if price is not None), candle[5]]
        return candle

    def rows(self, candles: CandleSeries, now_ms: int) -> list[Row]:
        """Closed 1m candles as they are served at a moment.

        Raises:
            RetryLater: there is an outage.
        """
        first_ms, end_ms = self.outage(now_ms)
        if first_ms <= now_ms < end_ms:
            raise RetryLater(f"no candles are served until {iso(end_ms)}")
        served: list[Row] = []
        for candle in plain_rows(candles):
            fate, garble = self.fate(open_ms := int(candle[0] or 0))
            known = self.known(candle, now_ms)
            if fate == "garbled" and self._is_garbled(now_ms - open_ms - MINUTE_MS):
                GARBLES[garble](served, candle)
            elif known is not None:
                served.append(known)
        return served

    def _is_garbled(self, late_ms: int) -> bool:
        return not self.garbled_minutes or late_ms < self.garbled_minutes * MINUTE_MS

    def _delay_ms(self, open_ms: int) -> int:
        return self._dice(open_ms, "delay").randint(1, self.late_minutes) * MINUTE_MS

    def _dice(self, when_ms: int, what: str) -> random.Random:
        return random.Random(f"{self.seed} {what} {when_ms}")  # noqa: S311  # repeatable, not secret


def plain_rows(candles: CandleSeries) -> list[Row]:
    """Candles as rows, without faults."""
    columns = [candles.columns()[name].tolist() for name in COLUMNS]
    return [list(row) for row in zip(*columns, strict=True)]


def _served(*changes: tuple[int, Callable[[Row], float | None]]) -> Callable[[list[Row], Row], None]:
    """Serve a row with some of its cells changed."""

    def serve(served: list[Row], row: Row) -> None:
        cells = dict(changes)
        served.append([cells[at](row) if at in cells else cell for at, cell in enumerate(row)])

    return serve


def _twice(served: list[Row], row: Row) -> None:
    served += [row, list(row)]


def _contradicted(served: list[Row], row: Row) -> None:
    served += [row, [row[0], *(None if price is None else price * _REVISED for price in row[1:5]), row[5]]]


def _out_of_order(served: list[Row], row: Row) -> None:
    served.insert(max(len(served) - 1, 0), row)


GARBLES: Final[dict[str, Callable[[list[Row], Row], None]]] = {
    "none": _served((4, lambda row: None)),
    "nan": _served(*((at, lambda row: float("nan")) for at in range(1, 5))),
    "crossed": _served((2, lambda row: (row[3] or 0) * 0.99)),
    "zero": _served((1, lambda row: 0.0), (3, lambda row: 0.0)),
    "twice": _twice,
    "contradicted": _contradicted,
    "early": _served((0, lambda row: (row[0] or 0) - 20_000)),
    "out_of_order": _out_of_order,
}
"""Ways to serve a candle wrong: a price that is missing or not a number, a high below the low, a price of 0; the row
twice, or followed by one that contradicts it; 20 seconds off the grid; before the row of the minute before."""
LOST: Final = frozenset({"none", "nan", "crossed", "zero"})
"""The kinds of `GARBLES` that no reader can turn into a candle."""
