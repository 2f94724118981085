"""Damaged bytes are kept here, unchanged, until an operator decides.

A damaged file `signal/a/b/C.json` is moved to `quarantine/signal/a/b/C.json`, with the reason next to it in
`C.json.reason`. While it is there its key is blocked, for every process and after every restart.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final

import msgspec

from backtest_kit.errors import Damaged, UserError
from backtest_kit.persist.contracts import Contract
from backtest_kit.persist.crashpoints import crashpoint
from backtest_kit.persist.files import Disk, disk_error
from backtest_kit.persist.upkeep import Quarantined
from backtest_kit.persist.writing import now_ms

DIRECTORY: Final = "quarantine"
REASON_SUFFIX: Final = ".reason"


class Quarantine:
    """The quarantine of one root. Methods block; the caller holds the lock of the path."""

    def __init__(self, root: str, disk: Disk) -> None:
        self._root = root
        self._disk = disk

    def refuse_blocked(self, path: str) -> None:
        """Do nothing if `path` is free.

        Raises:
            Damaged: its file is in quarantine.
        """
        place = self.place(path)
        try:
            blocked = self._disk.exists(place)
        except OSError as error:
            raise disk_error(error, "look up", place) from error
        if blocked:
            found = self.reason(path)
            if found is None or found.blocks:
                raise self._blocked(path, "its bytes are in quarantine" if found is None else found.reason)

    def take(self, contract: Contract, key: Sequence[object], path: str, reason: str) -> Damaged:
        """Move the file at `path` into quarantine and return the error to raise.

        If quarantine already has a file of that name, it stays where it is, which blocks the key as well.
        """
        place = self.place(path)
        try:
            if self._disk.exists(place):
                return Damaged(
                    f"{self._root}/{path}: {reason}. It stays where it is, because an earlier one is in {place}: "
                    f"deal with that one first, with `backtest-kit store quarantine drop {path}`, or move it away"
                )
            self._keep_reason(Quarantined(path, contract.name, list(key), reason, now_ms()))
            self._disk.sync_file(f"{self._root}/{path}")
            self._disk.move(f"{self._root}/{path}", place)
            crashpoint("quarantine.after_move")
            self._disk.sync_directory(place.rpartition("/")[0])
            self._disk.sync_directory(f"{self._root}/{path}".rpartition("/")[0])
        except OSError as error:
            # It stays where it is: every read refuses it, which blocks the key as well.
            return Damaged(f"{self._root}/{path}: {reason}; it could not be moved to {place}: {error.strerror}")
        return self._blocked(path, reason)

    def keep(
        self,
        contract: Contract,
        key: Sequence[object],
        path: str,
        data: bytes,
        reason: str,
        *,
        blocks: bool,
    ) -> tuple[str, Damaged]:
        """Keep `data`, a part of a file that is about to be replaced; return its name there and the error.

        The name is `path`, followed by a number if other bytes already have that name.
        """
        name = path
        for number in itertools.count(2):
            if not self._disk.exists(self.place(name)):
                break
            if self.read(name) == data:  # from a process that was killed before it replaced the file
                return name, self._blocked(name, reason)
            name = f"{path}.{number}"
        place = self.place(name)
        directory = place.rpartition("/")[0]
        self._keep_reason(Quarantined(name, contract.name, list(key), reason, now_ms(), blocks))
        self._disk.rename(self._disk.write_temp(directory, data, sync=True), place)
        self._disk.sync_directory(directory)
        return name, self._blocked(name, reason)

    def holds(self, path: str) -> bool:
        return self._disk.exists(self.place(path))

    def list(self) -> list[Quarantined]:
        """Everything in quarantine, by path."""
        found = []
        pending = [f"{self._root}/{DIRECTORY}"]
        while pending:
            for entry in self._disk.entries(pending.pop()):
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                elif not entry.name.endswith(REASON_SUFFIX):
                    path = entry.path.removeprefix(f"{self._root}/{DIRECTORY}/")
                    unknown = Quarantined(path, path.partition("/")[0], [], "no reason was recorded", 0)
                    found.append(self.reason(path) or unknown)
        return sorted(found, key=lambda item: item.path)

    def names(self, directory: str) -> set[str]:
        """The files in quarantine for the directory `directory` of the root, by name."""
        entries = self._disk.entries(self.place(directory))
        return {entry.name for entry in entries if not entry.name.endswith(REASON_SUFFIX)}

    def find(self, path: str) -> Quarantined:
        """The entry in quarantine for `path`.

        Raises:
            UserError: nothing in quarantine has this path.
        """
        for item in self.list():
            if item.path == path:
                return item
        raise UserError(f"nothing in quarantine has the path {path!r}: see `backtest-kit store quarantine list`")

    def read(self, path: str) -> bytes:
        return self._disk.read(self.place(path))

    def release(self, path: str) -> None:
        """Delete the file at `path` from quarantine: the key is free again."""
        place = self.place(path)
        self._disk.remove(place)
        self._disk.discard(place + REASON_SUFFIX)
        self._disk.sync_directory(place.rpartition("/")[0])

    def put_back(self, path: str) -> None:
        """Move the file at `path` back to where it was found."""
        place, target = self.place(path), f"{self._root}/{path}"
        self._disk.sync_file(place)  # the operator may just have repaired it
        self._disk.move(place, target)
        self._disk.sync_directory(target.rpartition("/")[0])
        self._disk.discard(place + REASON_SUFFIX)
        self._disk.sync_directory(place.rpartition("/")[0])

    def place(self, path: str) -> str:
        return f"{self._root}/{DIRECTORY}/{path}"

    def reason(self, path: str) -> Quarantined | None:
        try:
            return msgspec.json.decode(self._disk.read(self.place(path) + REASON_SUFFIX), type=Quarantined)
        except (OSError, msgspec.MsgspecError, ValueError):
            return None  # only the bytes next to it decide whether the key is blocked

    def _keep_reason(self, item: Quarantined) -> None:
        place = self.place(item.path)
        directory = place.rpartition("/")[0]
        self._disk.make_directories(directory, sync=True)
        text = msgspec.json.format(msgspec.json.encode(item), indent=2) + b"\n"
        self._disk.rename(self._disk.write_temp(directory, text, sync=True), place + REASON_SUFFIX)
        crashpoint("quarantine.after_reason")

    def _blocked(self, path: str, reason: str) -> Damaged:
        return Damaged(
            f"{self._root}/{path}: {reason}. The bytes are in {self.place(path)} and the key is blocked: repair "
            f"it there and run `backtest-kit store quarantine restore {path}`, or delete it with `... drop {path}`"
        )
