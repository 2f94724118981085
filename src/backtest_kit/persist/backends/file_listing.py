"""What a scan of a file store is to read, in order of writing, found while it goes on.

What lies in quarantine is part of it: a file at its place in the order, which it keeps there, and lines of feeds
behind all others. Of a line the order is known no more when its segment was merged, and a feed is to be read to its
end although a line of it is damaged.
"""

from __future__ import annotations

import contextlib
import heapq
import os
from collections.abc import Iterator
from typing import NamedTuple

from backtest_kit.errors import Damaged
from backtest_kit.persist.backends.file_feed import Feed
from backtest_kit.persist.backends.file_paths import NEXT, SUFFIX
from backtest_kit.persist.backends.file_root import Root
from backtest_kit.persist.backends.file_segments import Place
from backtest_kit.persist.contracts import Contract, Durability, Kind
from backtest_kit.persist.files import disk_error
from backtest_kit.persist.keys import path_of
from backtest_kit.persist.quarantine import DIRECTORY as QUARANTINE
from backtest_kit.persist.store import Key


class Found(NamedTuple):
    """Something that a scan is to read, or why it cannot be."""

    tick: int
    path: str
    feed: Feed | None = None
    place: Place | None = None
    damage: Damaged | None = None


def list_records(
    root: Root, namespace: str, contract: Contract, prefix: Key, *, newest_first: bool, include_removed: bool
) -> Iterator[Found]:
    """What is below `prefix`. Removed records of feeds are left out, unless they are to be included."""
    root.open()
    directory = _directory(namespace, contract, prefix)
    try:
        if contract.kind is not Kind.FEED:
            levels = len(contract.key_fields) - len(prefix) - 1
            files = sorted(_files(root, contract, directory, levels), key=_tick)
            yield from files[::-1] if newest_first else files
            return
        feeds = _feeds(root, namespace, contract, prefix)
        found = [_lines(feed, newest_first=newest_first, include_removed=include_removed) for feed in feeds]
        yield from heapq.merge(*found, key=_tick, reverse=newest_first)
        for feed in feeds:
            if damage := feed.damage():
                yield Found(0, feed.path, damage=damage)
    except OSError as error:
        raise disk_error(error, "list", f"{root.path}/{directory}") from error


def count_lines(root: Root, namespace: str, contract: Contract) -> int:
    """How many records there are in the feeds of a contract, removed ones left out."""
    root.open()
    try:
        return sum(feed.count() for feed in _feeds(root, namespace, contract, ()))
    except OSError as error:
        raise disk_error(error, "count", f"{root.path}/{_directory(namespace, contract, ())}") from error


def _files(root: Root, contract: Contract, directory: str, levels: int) -> list[Found]:
    """The files `levels` below `directory`, and those that were moved from there into quarantine."""
    found = _files_in(root, directory, levels)
    if contract.durability is Durability.RECORD:
        # Twice: a listing can miss a file that gets another name meanwhile, and a record does that only once.
        found = {**found, **_files_in(root, directory, levels)}
    kept = _files_in(root, f"{QUARANTINE}/{directory}", levels)
    moved = {path.removeprefix(f"{QUARANTINE}/"): tick for path, tick in kept.items()}
    return [Found(tick, path) for path, tick in {**moved, **found}.items()]


def _files_in(root: Root, directory: str, levels: int) -> dict[str, int]:
    """The path of each record and its tick, which is that of its successor if it has one."""
    found: dict[str, int] = {}
    for path in _below(root, directory, levels):
        for entry in root.disk.entries(f"{root.path}/{path}"):
            name = entry.name.removesuffix(NEXT)
            if name.endswith(SUFFIX):
                record = f"{path}/{name}"
                found[record] = max(_tick_of(root, entry, record), found.get(record, 0))
    return found


def _tick_of(root: Root, entry: os.DirEntry[str], record: str) -> int:
    with contextlib.suppress(FileNotFoundError):
        return entry.stat().st_mtime_ns
    with contextlib.suppress(FileNotFoundError):  # a successor that has become the record meanwhile
        return root.disk.stat(f"{root.path}/{record}").st_mtime_ns
    return 0


def _feeds(root: Root, namespace: str, contract: Contract, prefix: Key) -> list[Feed]:
    """The feeds of a contract below `prefix`."""
    below = _below(root, _directory(namespace, contract, prefix), len(contract.key_fields) - len(prefix) - 1)
    return [root.feed(contract, path) for path in below if root.disk.exists(f"{root.path}/{path}")]


def _lines(feed: Feed, *, newest_first: bool, include_removed: bool) -> Iterator[Found]:
    for place in feed.places(newest_first=newest_first, include_removed=include_removed):
        yield Found(place.tick, feed.path, feed, place)


def _tick(found: Found) -> int:
    return found.tick


def _directory(namespace: str, contract: Contract, prefix: Key) -> str:
    return namespace + "/".join((contract.name, *path_of(contract, prefix)))


def _below(root: Root, directory: str, levels: int) -> list[str]:
    """The directories `levels` below `directory`."""
    directories = [directory]
    for _ in range(levels):
        directories = [
            f"{above}/{entry.name}"
            for above in directories
            for entry in root.disk.entries(f"{root.path}/{above}")
            if entry.is_dir()
        ]
    return directories
