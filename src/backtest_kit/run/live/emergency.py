"""A file that is allocated before the disk is full: it takes the state that the store rejects.

Its blocks are allocated when it is created, and it is only overwritten in place. Two halves take turns, each with a
number and a checksum, so a crash in the middle of a write leaves the previous one.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from struct import Struct
from typing import Final

from backtest_kit.errors import Outcome, OutOfSpace
from backtest_kit.persist.crashpoints import crashpoint
from backtest_kit.persist.files import Disk, disk_error

SIZE: Final = 64 * 1024
_HALF: Final = SIZE // 2
_HEAD: Final = Struct("<8sQII")
_MAGIC: Final = b"bkemerg1"
ROOM: Final = _HALF - _HEAD.size
"""The most bytes of one write."""


class EmergencyFile:
    """The emergency file of one position. Every method blocks: call it in a thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._number = 0

    def open(self) -> None:
        """Create or open it, with all blocks allocated.

        Raises:
            OutOfSpace, RetryLater: the system refuses.
        """
        if self._fd >= 0:
            return
        disk, fd = Disk(), -1
        try:
            disk.make_directories(str(self._path.absolute().parent), sync=True)
            disk.make_file(str(self._path))
            fd = disk.open_for_update(str(self._path))
            if os.fstat(fd).st_size < SIZE:
                _allocate(fd)
                os.fsync(fd)
                disk.sync_directory(str(self._path.absolute().parent))
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise disk_error(error, "reserve", self._path) from error
        self._fd = fd
        self._number = max(number for number, _ in (self._half(0), self._half(1)))

    def close(self) -> None:
        """Close it. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def write(self, data: bytes) -> None:
        """Write `data`; it is on the disk when this returns.

        Raises:
            OutOfSpace: `data` is larger than a half.
            RetryLater: the system refuses, or it is not open.
        """
        if len(data) > ROOM:
            raise OutOfSpace(f"{self._path} takes {ROOM:,} bytes, not {len(data):,}")
        number = self._number + 1
        head = _HEAD.pack(_MAGIC, number, len(data), zlib.crc32(data, number & 0xFFFFFFFF))
        try:
            self.open()
            view, offset = memoryview(head + data), number % 2 * _HALF
            while view:
                written = os.pwrite(self._fd, view, offset)
                view, offset = view[written:], offset + written
            os.fdatasync(self._fd)
        except OSError as error:
            # Never sync this descriptor again: it may report data that never reached the disk.
            self.close()
            raise disk_error(error, "write", self._path, Outcome.UNKNOWN) from error
        self._number = number
        crashpoint("live.emergency.after_write")

    def read(self) -> bytes | None:
        """The last data, or None."""
        number, data = max((self._half(0), self._half(1)), key=lambda half: half[0])
        return data if number else None

    def _half(self, which: int) -> tuple[int, bytes]:
        raw = os.pread(self._fd, _HALF, which * _HALF)
        if len(raw) < _HEAD.size:
            return 0, b""
        magic, number, length, checksum = _HEAD.unpack_from(raw)
        data = raw[_HEAD.size : _HEAD.size + length]
        if magic != _MAGIC or len(data) != length or zlib.crc32(data, number & 0xFFFFFFFF) != checksum:
            return 0, b""
        return number, data


def _allocate(fd: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, SIZE)
    else:  # macOS
        os.pwrite(fd, bytes(SIZE), 0)
