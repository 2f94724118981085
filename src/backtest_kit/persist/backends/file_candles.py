"""`FileCandleStore`: candles as files of one month each, read by mapping them into memory.

A month is `candle/{exchangeName}/{symbol}/{interval}/2022-01.candles`; `columns` has its bytes. Mapped pages are shared
by all processes that read them.
"""

from __future__ import annotations

import asyncio
import itertools
import mmap
import os
import threading
from collections import OrderedDict
from typing import Any, Final

import msgspec
import numpy as np

from backtest_kit.errors import Damaged, UserError
from backtest_kit.model.candle import CandleSeries, merge
from backtest_kit.model.interval import iso
from backtest_kit.persist.backends.columns import CONTRACT, SUFFIX, pack, series_in, unpack
from backtest_kit.persist.codec import NewerSchema
from backtest_kit.persist.files import Disk, absolute_root, disk_error
from backtest_kit.persist.keys import check_key, path_of, unescape
from backtest_kit.persist.locks import LockSet
from backtest_kit.persist.quarantine import Quarantine
from backtest_kit.persist.store import CandleStore, SeriesKey

_KEPT_MONTHS: Final = 256
"""Mapped months that are kept at hand: 20 years of one series, or a month of 256 symbols."""

_Signature = tuple[int, int, int]


class FileCandleStore(CandleStore):
    """Candles in the directory `prefix` of `root`. Safe for any number of tasks, threads and processes at once."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        prefix: str = "",
        disk: Disk | None = None,
        locks: LockSet | None = None,
        quarantine: Quarantine | None = None,
    ) -> None:
        self._root = absolute_root(root)
        self._prefix = prefix
        self._disk = disk or Disk()
        self._locks = locks or LockSet(f"{self._root}/.backtest-kit/locks", self._disk)
        self._quarantine = quarantine or Quarantine(self._root, self._disk)
        self._months: OrderedDict[str, tuple[_Signature, CandleSeries]] = OrderedDict()
        self._guard = threading.Lock()

    async def read(self, series: SeriesKey, start_ms: int, stop_ms: int) -> CandleSeries:
        directory = self._directory(series)
        if start_ms >= stop_ms:
            return CandleSeries.empty()
        return await asyncio.to_thread(self._read, series, directory, start_ms, stop_ms)

    async def write(self, series: SeriesKey, candles: CandleSeries) -> int:
        directory = self._directory(series)
        if not len(candles):
            return 0
        order = np.diff(candles.timestamp)
        if (order <= 0).any():
            at = int(candles.timestamp[int(np.argmax(order <= 0)) + 1])
            raise UserError(f"candles of {series.symbol} are not ascending at {iso(at)}: sort them and drop duplicates")
        return await asyncio.to_thread(self._write, series, directory, candles)

    async def series(self) -> list[SeriesKey]:
        return await asyncio.to_thread(self._list_series)

    def _list_series(self) -> list[SeriesKey]:
        directories: list[tuple[str, ...]] = [()]
        top = f"{self._root}/{self._prefix}{CONTRACT.name}"
        for _ in range(3):
            directories = [
                (*above, entry.name)
                for above in directories
                for entry in self._disk.entries("/".join((top, *above)))
                if entry.is_dir()
            ]
        found = []
        for names in directories:
            parts = [unescape(name, field) for name, field in zip(names, CONTRACT.key_fields, strict=False)]
            if all(isinstance(part, str) for part in parts):
                found.append(SeriesKey(*map(str, parts)))
            else:
                found.append(self._named_inside("/".join((top, *names))))
        return sorted(found, key=msgspec.structs.astuple)

    def _named_inside(self, directory: str) -> SeriesKey:
        """The series of a directory whose name was cut, from one of its files."""
        for entry in self._disk.entries(directory):
            if entry.name.endswith(SUFFIX):
                return series_in(self._disk.read(entry.path))
        raise Damaged(f"{directory} has candles of a series whose name is in none of its files: remove the directory")

    def _directory(self, series: SeriesKey) -> str:
        key = check_key(CONTRACT, (series.exchange_name, series.symbol, series.interval), prefix=True)
        return self._prefix + "/".join((CONTRACT.name, *path_of(CONTRACT, key)))

    def _read(self, series: SeriesKey, directory: str, start_ms: int, stop_ms: int) -> CandleSeries:
        parts = []
        try:
            for name in self._stored_months(directory, start_ms, stop_ms):
                loaded = self._load(series, f"{directory}/{name}", locked=False)
                if loaded is not None:
                    parts.append(loaded.between(start_ms, stop_ms))
        except OSError as error:
            raise disk_error(error, "read", f"{self._root}/{directory}") from error
        return CandleSeries.concat(parts)

    def _stored_months(self, directory: str, start_ms: int, stop_ms: int) -> list[str]:
        """The files that may have candles of a range, oldest first; for a short range without a listing."""
        first, last = _month(start_ms), _month(stop_ms - 1)
        if last - first <= 1:
            return [_file(month) for month in range(first, last + 1)]
        names = {entry.name for entry in self._disk.entries(f"{self._root}/{directory}")}
        names |= self._quarantine.names(directory)
        months = sorted(month for month in map(_month_of_file, names) if month is not None)
        return [_file(month) for month in months if first <= month <= last]

    def _load(self, series: SeriesKey, path: str, *, locked: bool) -> CandleSeries | None:
        """The month at `path`, checked when this store sees the file for the first time."""
        try:
            data, signature = self._map(path)
        except FileNotFoundError:
            self._quarantine.refuse_blocked(path)
            return None
        known = self._known(path, signature)
        if known is not None:
            return known
        try:
            loaded = unpack(series, data)
        except NewerSchema as error:
            raise NewerSchema(f"{self._root}/{path}: {error}") from None
        except Damaged as error:
            if locked:
                key = (series.exchange_name, series.symbol, series.interval)
                raise self._quarantine.take(CONTRACT, key, path, str(error)) from None
            with self._locks.hold((path,)):
                return self._load(series, path, locked=True)
        self._keep(path, signature, loaded)
        return loaded

    def _map(self, path: str) -> tuple[Any, _Signature]:
        fd = self._disk.open_for_reading(f"{self._root}/{path}")
        try:
            status = self._disk.fstat(fd)
            data = mmap.mmap(fd, 0, access=mmap.ACCESS_READ) if status.st_size else b""
        finally:
            self._disk.close(fd)
        return data, (status.st_ino, status.st_mtime_ns, status.st_size)

    def _known(self, path: str, signature: _Signature) -> CandleSeries | None:
        with self._guard:
            known = self._months.get(path)
            if known is None or known[0] != signature:
                return None
            self._months.move_to_end(path)
            return known[1]

    def _keep(self, path: str, signature: _Signature, loaded: CandleSeries) -> None:
        with self._guard:
            self._months[path] = (signature, loaded)
            self._months.move_to_end(path)
            while len(self._months) > _KEPT_MONTHS:
                self._months.popitem(last=False)

    def _write(self, series: SeriesKey, directory: str, candles: CandleSeries) -> int:
        months = candles.timestamp.astype("datetime64[ms]").astype("datetime64[M]")
        starts = [0, *(np.flatnonzero(np.diff(months.astype(np.int64))) + 1).tolist(), len(candles)]
        added = 0
        for low, high in itertools.pairwise(starts):
            path = f"{directory}/{months[low]}{SUFFIX}"
            try:
                with self._locks.hold((path,)):
                    added += self._write_month(series, path, candles[low:high])
            except OSError as error:
                raise disk_error(error, "write", f"{self._root}/{path}") from error
        return added

    def _write_month(self, series: SeriesKey, path: str, candles: CandleSeries) -> int:
        stored = self._load(series, path, locked=True) or CandleSeries.empty()
        merged, added = merge(stored, candles)
        if added:
            parent = f"{self._root}/{path.rpartition('/')[0]}"
            self._disk.make_directories(parent, sync=False)
            # Synced although candles can be fetched again: a month that power loss leaves torn would
            # wait in quarantine for an operator.
            temp = self._disk.write_temp(parent, pack(series, merged), sync=True)
            self._disk.rename(temp, f"{self._root}/{path}")
        return added


def _month(moment_ms: int) -> int:
    """The month of a moment, counted from January 1970."""
    return int(np.datetime64(moment_ms, "ms").astype("datetime64[M]").astype(np.int64))


def _file(month: int) -> str:
    return f"{np.datetime64(month, 'M')}{SUFFIX}"


def _month_of_file(name: str) -> int | None:
    try:
        return int(np.datetime64(name.removesuffix(SUFFIX), "M").astype(np.int64)) if name.endswith(SUFFIX) else None
    except ValueError:
        return None
