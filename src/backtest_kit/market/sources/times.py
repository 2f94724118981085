"""Times of files, in any unit or notation, as epoch milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np

from backtest_kit.market.sources.rows import epoch_ms, number
from backtest_kit.model.candle import NO_TIME, TimeColumn

_EPOCH_UNITS: Final = (("s", 1e8, 1e11), ("ms", 1e11, 1e14), ("us", 1e14, 1e17), ("ns", 1e17, 1e19))
"""The unit of an epoch by its magnitude: each begins in 1973, where the smaller unit reaches year 5138."""
_PER_SECOND: Final = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
_ISO_SECONDS: Final = 19
"""Characters of `2022-01-01T00:00:00`."""
_ISO_MARKS: Final = [4, 7, 10, 13, 16]
"""Where it has no digit."""


def times_of(values: Any) -> TimeColumn:
    """A numpy column of times, of epochs or of ISO 8601 in bytes, or a list of texts; NO_TIME for an unreadable one."""
    if not isinstance(values, np.ndarray):
        return _of_texts(values)
    if values.dtype.kind == "M":
        missing = np.isnat(values)
        times = _to_ms(np.where(missing, 0, values.astype(np.int64)), np.datetime_data(values.dtype)[0])
        return np.where(missing, NO_TIME, times)
    return _epochs(values) if values.dtype.kind in "iuf" else _of_iso(values)


def time_of(text: Any) -> int:
    """The time in a cell, or NO_TIME."""
    epoch = number(text)
    return _iso_ms(text) if np.isnan(epoch) else int(_epochs(np.array([epoch]))[0])


def _epochs(values: Any) -> TimeColumn:
    """Epochs in ms. The magnitude of each shows its unit: joined files of one market may use different ones."""
    times = np.full(len(values), NO_TIME, dtype=np.int64)
    for unit, least, most in _EPOCH_UNITS:
        rows = (values >= least) & (values < most)
        times[rows] = _to_ms(values[rows], unit)
    return times


def _to_ms(values: Any, unit: str) -> TimeColumn:
    """Parts of a millisecond are moved up, so that nothing is known too early."""
    per_second = _PER_SECOND[unit]
    if values.dtype.kind == "f":
        # A float has no more than its microseconds right.
        return epoch_ms(np.round(values * (1000 / per_second), 3))
    whole: TimeColumn = values.astype(np.int64)
    return whole * (1000 // per_second) if per_second <= 1000 else -(-whole // (per_second // 1000))


def _of_texts(texts: Sequence[Any]) -> TimeColumn:
    return np.array([time_of(text) for text in texts], dtype=np.int64)


def _of_iso(texts: Any) -> TimeColumn:
    """Bytes in a numpy array. As one where only their seconds differ, as in a file that one program wrote."""
    letters = np.ascontiguousarray(texts).view(np.uint8).reshape(len(texts), -1)
    head, tail = letters[:, :_ISO_SECONDS], letters[:, _ISO_SECONDS:]
    digits = np.delete(head, _ISO_MARKS, axis=1) - ord("0")
    first = _iso_ms(texts[0].decode("latin-1"))
    alike = (tail == tail[0]).all() and (head[:, _ISO_MARKS] == head[0, _ISO_MARKS]).all() and (digits < 10).all()
    if first == NO_TIME or not alike:
        return _of_texts([text.decode("latin-1") for text in texts.tolist()])
    try:
        seconds = np.ascontiguousarray(head).view(f"S{_ISO_SECONDS}")[:, 0].astype("datetime64[s]").astype(np.int64)
    except ValueError:  # such as a month 13
        return _of_texts([text.decode("latin-1") for text in texts.tolist()])
    times: TimeColumn = first + (seconds - seconds[0]) * 1000
    return times


def _iso_ms(text: Any) -> int:
    try:
        moment = datetime.fromisoformat(str(text).strip())
    except ValueError:
        return NO_TIME
    return round((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)
