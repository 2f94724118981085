"""`FaultFS`: the `os` of a `Disk`, failing on order."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import msgspec

CALLS: Final = (
    "open",
    "read",
    "write",
    "fsync",
    "close",
    "replace",
    "unlink",
    "mkdir",
    "stat",
    "fstat",
    "scandir",
    "ftruncate",
    "utime",
    "posix_fallocate",
    "lseek",
    "rmdir",
)


class Fault(msgspec.Struct):
    """The `nth` call from now on of the name `call` fails with `error`; with `lasting`, all after it too."""

    call: str
    error: int
    nth: int = 1
    lasting: bool = False
    path: str = ""
    """Only calls whose first argument has this text in it count (a descriptor has the path it was opened with)."""
    hits: int = 0


class FaultFS:
    """Behaves like the `os` module until told otherwise.

    `calls` counts every call by name and `history` has them in order with their path, `opened` are the
    descriptors that are open now, and `retried` are the paths on whose descriptor an fsync was tried again
    after it had failed. Without `sync` an fsync does nothing, for tests that have no use for it.
    """

    def __init__(self, *, sync: bool = True) -> None:
        self._sync = sync
        self.history: list[tuple[str, str]] = []
        self.observer: Callable[[str, str], None] = lambda call, path: None
        """Is told of every call before it is made."""
        self.calls: Counter[str] = Counter()
        self.opened: dict[int, str] = {}
        self.retried: list[str] = []
        self.write_limit: int | None = None
        """At most so many bytes per write."""
        self._faults: list[Fault] = []
        self._spoiled: set[int] = set()

    def inject(
        self, call: str, error: int = errno.EIO, *, nth: int = 1, lasting: bool = False, path: str = ""
    ) -> Fault:
        fault = Fault(call, error, nth, lasting, path)
        self._faults.append(fault)
        return fault

    def heal(self) -> None:
        self._faults.clear()
        self.write_limit = None

    def __getattr__(self, call: str) -> Any:
        if call not in CALLS:
            raise AttributeError(call)
        real = getattr(os, call)

        def perform(*args: Any, **named: Any) -> Any:
            self.calls[call] += 1
            path = self.opened.get(args[0], "") if isinstance(args[0], int) else str(args[0])
            self.history.append((call, path))
            self.observer(call, path)
            self._fail(call, path, args[0])
            if call == "fsync" and not self._sync:
                return None
            if call == "write" and self.write_limit is not None:
                args = (args[0], args[1][: self.write_limit])
            result = real(*args, **named)
            if call == "open":
                self.opened[result] = path
            elif call == "close":
                self.opened.pop(args[0], None)
                self._spoiled.discard(args[0])
            return result

        return perform

    def _fail(self, call: str, path: str, first: Any) -> None:
        if call == "fsync" and first in self._spoiled:
            self.retried.append(path)
        for fault in self._faults:
            if fault.call == call and fault.path in path:
                fault.nth -= 1
                if fault.nth == 0 or (fault.lasting and fault.nth < 0):
                    fault.hits += 1
                    if call == "fsync":
                        self._spoiled.add(first)
                    if call == "close":
                        os.close(first)  # as Linux does: the descriptor is gone although close failed
                        self.opened.pop(first, None)
                    raise OSError(fault.error, os.strerror(fault.error), path)
