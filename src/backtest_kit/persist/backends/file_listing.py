"""What a scan of a file store is to read, in order of writing: few bytes for each of a million lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from backtest_kit.persist.backends.file_feed import Feed
from backtest_kit.persist.backends.file_paths import SUFFIX
from backtest_kit.persist.backends.file_root import Root
from backtest_kit.persist.backends.file_segments import Place, Places
from backtest_kit.persist.contracts import Contract, Kind
from backtest_kit.persist.files import disk_error
from backtest_kit.persist.keys import path_of
from backtest_kit.persist.store import Key


class Found(NamedTuple):
    """Something that a scan is to read."""

    tick: int
    path: str
    feed: Feed | None = None
    place: Place | None = None


class Listing:
    """What was found, in the order of a scan. Lines are looked up when they are asked for."""

    def __init__(self, files: Sequence[Found], feeds: Sequence[tuple[Feed, Places]], *, newest_first: bool) -> None:
        self._files = files
        self._feeds = feeds
        ticks = [np.array([found.tick for found in files], np.uint64)]
        ticks += [places.ticks for _, places in feeds]
        self._starts = np.cumsum([0, *(len(part) for part in ticks)])
        self._ticks: Any = np.concatenate(ticks)
        order = np.argsort(self._ticks, kind="stable")
        self._order: Any = order[::-1] if newest_first else order

    def __len__(self) -> int:
        return len(self._order)

    def part(self, start: int, stop: int) -> list[Found]:
        """What stands at `start` and after it, before `stop`."""
        return [self._found(int(index)) for index in self._order[start:stop]]

    def older_than(self, tick: int) -> int:
        """Where, of a listing with the newest first, what is older than `tick` begins."""
        return int(np.count_nonzero(self._ticks >= tick))

    def _found(self, index: int) -> Found:
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        if group == 0:
            return self._files[index]
        feed, places = self._feeds[group - 1]
        place = places[index - int(self._starts[group])]
        return Found(place.tick, feed.path, feed, place)


def list_records(
    root: Root, namespace: str, contract: Contract, prefix: Key, last: int | None = None, *, newest_first: bool
) -> Listing:
    """What is below `prefix`; of a feed that is alone there, no more than the `last`."""
    root.open()
    directory = namespace + "/".join((contract.name, *path_of(contract, prefix)))
    levels = len(contract.key_fields) - len(prefix) - 1
    try:
        below = _below(root, directory, levels)
        if contract.kind is not Kind.FEED:
            files = [
                Found(entry.stat().st_mtime_ns, f"{path}/{entry.name}")
                for path in below
                for entry in root.disk.entries(f"{root.path}/{path}")
                if entry.name.endswith(SUFFIX)
            ]
            return Listing(files, (), newest_first=newest_first)
        feeds = [root.feed(contract, path) for path in below if root.disk.exists(f"{root.path}/{path}")]
        found = [(feed, feed.places(last if len(feeds) == 1 else None)) for feed in feeds]
        return Listing((), found, newest_first=newest_first)
    except OSError as error:
        raise disk_error(error, "list", f"{root.path}/{directory}") from error


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
