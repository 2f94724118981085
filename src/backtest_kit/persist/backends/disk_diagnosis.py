"""How a directory, and the disk below it, serve a store: writable, synced, local, with space, not locked up."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import numpy as np
import psutil

from backtest_kit.persist.files import Disk
from backtest_kit.persist.upkeep import Reading, Status

LOCK_PATIENCE_SECONDS: Final = 2.0
_SLOW_SYNC_MS: Final = 50.0
_FULL_BYTES: Final = 64 << 20
_TIGHT_BYTES: Final = 1 << 30
_TIGHT_FILES: Final = 10_000

_OVER_THE_NETWORK: Final = re.compile(
    r"nfs4?|cifs|smb\w*|9p|afs|ceph|glusterfs|lustre|beegfs|gpfs|davfs|fuse\.(sshfs|s3fs|rclone|gcsfuse|glusterfs)"
)
_IN_MEMORY: Final = frozenset(("tmpfs", "ramfs", "devtmpfs"))
_OF_A_CONTAINER: Final = frozenset(("overlay", "aufs"))


def examine_directory(directory: Path, samples: int, disk: Disk) -> list[Reading]:
    """`directory`, or the one above it in which it would be made. Blocks."""
    place = next(level for level in (directory, *directory.parents) if level.exists())
    if not place.is_dir():
        return [Reading("directory", Status.FAULT, f"{place} is a file, not a directory", "name another path")]
    return [_kind(place), *_space(place), _writing(place, directory, samples, disk)]


def examine_permissions(paths: Iterable[Path]) -> Reading:
    """Whether other users can read the files and directories of a store. Its permissions are never changed."""
    open_to_others = [path for path in sorted(paths) if sys.platform != "win32" and path.stat().st_mode & 0o077]
    if not open_to_others:
        return Reading("permissions", Status.OK, "closed to other users")
    listed = " ".join(shlex.quote(str(path)) for path in open_to_others)
    says = f"other users of this machine can read {', '.join(map(str, open_to_others))}"
    return Reading("permissions", Status.WARNING, says, f"close it, unless you mean to share it: chmod -R go= {listed}")


def _writing(place: Path, directory: Path, samples: int, disk: Disk) -> Reading:
    spent = []
    try:
        for _ in range(samples):
            started = time.perf_counter()
            temp = disk.write_temp(str(place), b"\0" * 1024, sync=True)
            disk.sync_directory(str(place))
            spent.append(time.perf_counter() - started)
            disk.discard(temp)
    except OSError as error:
        remedy = f"make it writable for this user ({user()}), or name another place"
        return Reading("disk", Status.FAULT, f"{place} cannot be written to: {error.strerror}", remedy)
    median = round(float(np.median(spent)) * 1000, 3)
    made = "" if place == directory else f" (where {directory} will be made)"
    says = f"{place}{made}: 1 KiB is synced in {median:g} ms"
    if median > _SLOW_SYNC_MS:
        remedy = "every change of a position waits for this: take an SSD with power-loss protection, or SQLite"
        return Reading("disk", Status.WARNING, says, remedy, median)
    return Reading("disk", Status.OK, says, median_ms=median)


def _kind(place: Path) -> Reading:
    kind = file_system(place)
    if kind is None:
        return Reading("file system", Status.OK, "of a kind that this system does not tell")
    local = "name a directory on a local disk"
    if _OVER_THE_NETWORK.fullmatch(kind):
        says = f"{kind}, over the network: locks and syncs hold only as far as its server and mount options say"
        return Reading("file system", Status.WEAK, says, f"{local}; for several machines take mongodb://")
    if kind in _IN_MEMORY:
        return Reading("file system", Status.WEAK, f"{kind}: everything is lost when the machine stops", local)
    if kind in _OF_A_CONTAINER:
        says = f"{kind}, the layer of a container: it goes with the container"
        return Reading("file system", Status.WARNING, says, "mount a volume there (docker run -v ...)")
    return Reading("file system", Status.OK, kind)


def file_system(place: Path) -> str | None:
    """The type of the file system of an existing path, where the system tells."""
    where = place.resolve()
    best: tuple[int, str] | None = None
    for mount in psutil.disk_partitions(all=True):
        point = Path(mount.mountpoint)
        # Of two on one point, the later one covers the earlier.
        if where.is_relative_to(point) and (best is None or len(point.parts) >= best[0]):
            is_remote = "remote" in mount.opts.split(",")  # a network drive of Windows, whatever its type
            best = len(point.parts), "smb" if is_remote else mount.fstype
    return (best and best[1]) or None


def _space(place: Path) -> list[Reading]:
    free = shutil.disk_usage(place).free
    says = f"{free / (1 << 30):,.1f} GiB free"
    remedy = "free some, or name a larger disk; a year of one symbol's minutes takes 25 MB"
    if free < _FULL_BYTES:
        return [Reading("space", Status.FAULT, says, remedy)]
    readings = [Reading("space", Status.WARNING if free < _TIGHT_BYTES else Status.OK, says)]
    if readings[0].status is Status.WARNING:
        readings = [Reading("space", Status.WARNING, says, remedy)]
    if sys.platform != "win32":
        found = os.statvfs(place)
        if found.f_files and found.f_favail < _TIGHT_FILES:
            few = f"room for only {found.f_favail:,} more files"
            readings.append(Reading("space", Status.WARNING, few, "free some inodes; sqlite:FILE needs few files"))
    return readings


def user() -> str:
    return str(os.getuid()) if sys.platform != "win32" else os.environ.get("USERNAME", "this user")
