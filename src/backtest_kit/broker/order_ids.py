"""Client order ids on a venue: which id an order of the engine has there, and whose an order found there is."""

from __future__ import annotations

import re
from hashlib import sha256
from typing import Final

MAX_LENGTH: Final = 36
"""Binance takes 36 characters, and so do most; a venue that takes fewer says so in `Ids`."""
_TAKEN_EVERYWHERE: Final = re.compile(r"[A-Za-z0-9_-]+")
_SUFFIX: Final = re.compile(r"-[a-z][0-9]{0,10}")
_STOP: Final = re.compile(r"-p[0-9]+")
_HASH_LENGTH: Final = 22


class SignalIds:
    """The ids of all orders of one signal.

    An id is taken as it is where the venue takes it. A longer one, or one with letters that venues refuse,
    has the signal id in it replaced by its hash: always the same, so that it is found again after a crash.
    """

    def __init__(self, signal_id: str, max_length: int = MAX_LENGTH) -> None:
        self._signal_id, self._max_length = signal_id, max_length
        self._short = "h" + sha256(signal_id.encode()).hexdigest()[:_HASH_LENGTH]

    @classmethod
    def of_order(cls, client_order_id: str, *, opens: bool, max_length: int = MAX_LENGTH) -> SignalIds:
        """Those of the signal that an order belongs to: `client_order_id` without its suffix, if it has one."""
        if opens:
            return cls(client_order_id, max_length)
        stem, dash, rest = client_order_id.rpartition("-")
        signal_id = stem if dash and _SUFFIX.fullmatch(dash + rest) else client_order_id
        return cls(signal_id, max_length)

    @property
    def entry(self) -> str:
        return self._venue_id("")

    def stop(self, number: int) -> str:
        """Of the protective stop that was placed after `number` others."""
        return self._venue_id(f"-p{number}")

    def exit(self, number: int) -> str:
        """Of a market order that leaves a position which cannot be protected."""
        return self._venue_id(f"-x{number}")

    def of(self, client_order_id: str, part: int = 0) -> str:
        """Of an order of the engine; `part` counts from 0 where one order of the engine takes several."""
        suffix = client_order_id.removeprefix(self._signal_id)
        return self._venue_id(suffix + (f"_{part}" if part else ""))

    def suffix(self, venue_id: str | None) -> str | None:
        """What an id has after the signal: "" for the entry, None where it is of something else."""
        for stem in (self._signal_id, self._short):
            if venue_id is not None and venue_id.startswith(stem):
                suffix = venue_id[len(stem) :]
                if not suffix or _SUFFIX.fullmatch(suffix.partition("_")[0]):
                    return suffix
        return None

    def stop_number(self, venue_id: str | None) -> int | None:
        """Which protective stop an id is of; None where it is of something else."""
        suffix = self.suffix(venue_id)
        return int(suffix[2:]) if suffix and _STOP.fullmatch(suffix) else None

    def _venue_id(self, suffix: str) -> str:
        whole = self._signal_id + suffix
        if len(whole) <= self._max_length and _TAKEN_EVERYWHERE.fullmatch(whole):
            return whole
        return self._short + suffix


def signal_of_stop(venue_id: str) -> str:
    """The signal id under which the orders beside a protective stop are found."""
    return re.sub(_STOP.pattern + "$", "", venue_id)


def is_stop(venue_id: str | None) -> bool:
    """Whether an id is that of a protective stop of any signal."""
    return venue_id is not None and re.search(_STOP.pattern + "$", venue_id) is not None
