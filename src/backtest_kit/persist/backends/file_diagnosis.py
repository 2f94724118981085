"""How the root of a file store is: its place on the disk, its schema, its locks, its feeds."""

from __future__ import annotations

import time
from pathlib import Path

from backtest_kit.errors import BacktestKitError
from backtest_kit.persist.backends.disk_diagnosis import (
    LOCK_PATIENCE_SECONDS,
    examine_directory,
    examine_permissions,
    user,
)
from backtest_kit.persist.backends.file_paths import MARKER, OWN_DIRECTORY
from backtest_kit.persist.backends.file_root import Root, is_part_of_store
from backtest_kit.persist.codec import SCHEMA_VERSION
from backtest_kit.persist.files import Disk
from backtest_kit.persist.locks import try_lock, unlock
from backtest_kit.persist.upkeep import Reading, Status


def examine_root(root: Root, samples: int) -> list[Reading]:
    """The directory of a file store. Blocks."""
    readings = examine_directory(Path(root.path), samples, root.disk)
    own = Path(root.path, OWN_DIRECTORY)
    if any(reading.status is Status.FAULT for reading in readings):
        return readings
    if not own.exists():
        return [*readings, Reading("schema", Status.NEW, f"{root.path} is not a store yet: the first run makes it")]
    try:
        is_marked = root.check_marker()
    except BacktestKitError as error:
        return [*readings, Reading("schema", Status.FAULT, str(error))]
    says = f"version {SCHEMA_VERSION}" if is_marked else f"{own / MARKER} is missing: the next run writes it"
    schema = Reading("schema", Status.OK if is_marked else Status.WARNING, says)
    # The root itself may be open: reports in it are for others to read.
    parts = [path for path in Path(root.path).iterdir() if is_part_of_store(path.name)]
    feeds = filter(None, [root.feeds.examine()])
    return [*readings, schema, examine_permissions(parts), _locks(own, root.disk), *feeds]


def _locks(own: Path, disk: Disk) -> Reading:
    """Whether a process keeps one of the locks for longer than any write takes."""
    held = []
    deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
    for path in sorted([*own.glob("locks/*.lock"), *own.glob("recovery/*.lock")]):
        try:
            fd = disk.open_for_reading(str(path))
        except OSError as error:
            return Reading("locks", Status.FAULT, f"{path} cannot be opened: {error.strerror}", f"chown {user()} it")
        try:
            while not (is_free := try_lock(fd)) and time.monotonic() < deadline:
                time.sleep(0.001)
            if is_free:
                unlock(fd)
            else:
                held.append(str(path))
        finally:
            disk.close(fd)
    if held:
        remedy = f"see which process it is (lsof {held[0]}) and whether it is stopped"
        return Reading("locks", Status.FAULT, f"held for {LOCK_PATIENCE_SECONDS:g} s: {', '.join(held)}", remedy)
    return Reading("locks", Status.OK, "free")
