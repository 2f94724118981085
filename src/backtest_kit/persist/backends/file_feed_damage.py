"""`FeedDamage`: the lines of a feed that are in quarantine, and how one gets there."""

from __future__ import annotations

import logging

from backtest_kit.errors import Damaged
from backtest_kit.persist.backends.file_segments import Unsound, hash_in, key_in
from backtest_kit.persist.contracts import Contract
from backtest_kit.persist.files import Disk, has_lost_blocks
from backtest_kit.persist.quarantine import Quarantine

_log = logging.getLogger(__name__)


class FeedDamage:
    """Methods block. Not safe for threads."""

    def __init__(
        self, root: str, path: str, contract: Contract, disk: Disk, quarantine: Quarantine, *, read_only: bool
    ) -> None:
        self._directory = f"{root}/{path}"
        self._path = path
        self._contract = contract
        self._disk = disk
        self._quarantine = quarantine
        self._read_only = read_only
        self._unreported: dict[str, Damaged] = {}
        self._blocked: dict[str, int | None] = {}
        """What is in quarantine, and the hash of its key, or None where it may be any key of the feed."""

    @property
    def found(self) -> bool:
        """Whether anything is in quarantine."""
        return bool(self._blocked)

    def load(self) -> None:
        """Find out what is in quarantine."""
        paths = [f"{self._path}/{name}" for name in sorted(self._quarantine.names(self._path))]
        reasons = ((path, self._quarantine.reason(path)) for path in paths)
        # Without its reason nobody knows what the bytes belong to.
        self._blocked = {path: item.hash if item else None for path, item in reasons if item is None or item.blocks}

    def blocked(self) -> set[int | None]:
        """The hashes of the keys that are blocked now.

        Raises:
            Damaged: it may be any key, or a line that was put aside has not been told of yet. It is told once.
        """
        blocked = {known for path, known in self._blocked.items() if self._quarantine.holds(path)}
        if None in blocked:
            self.refuse(None)
        if self._unreported:
            raise self._unreported.popitem()[1]
        return blocked

    def undecided(self) -> Damaged | None:
        """What to say, behind all that a listing has, of what is in quarantine; None if nothing is."""
        try:
            for path in self._blocked:
                self._quarantine.refuse_blocked(path)
        except Damaged as error:
            return error
        return None

    def told(self, path: str) -> Damaged:
        """What to say of the line that was put aside under `path`, which then is told."""
        return self._unreported.pop(path)

    def refuse(self, wanted: int | None) -> None:
        """Do nothing if the keys of that hash are free.

        Raises:
            Damaged: a line of such a key is in quarantine, or one of which nobody knows the key.
        """
        for path, known in self._blocked.items():
            if known in (None, wanted):
                self._unreported.pop(path, None)
                self._quarantine.refuse_blocked(path)

    def put_aside(self, unsound: Unsound, *, blocks: bool = True) -> str:
        """Move a damaged line into quarantine, under the name that is returned.

        Blanks stay in its place, so that no offset changes. Without `blocks` it is only kept as evidence.
        """
        if self._read_only:
            where = f"{self._directory}/{unsound.segment} at byte {unsound.offset}"
            raise Damaged(f"{where}: {unsound.reason}; it stays where it is, the root is read-only")
        key = key_in(unsound.line, self._contract, unsound.hash)
        reason = unsound.reason
        if not blocks:
            reason = "it was written shortly before the power failed and never synced"
            _log.warning("%s/%s at byte %d: %s", self._directory, unsound.segment, unsound.offset, reason)
        elif unsound.hash is None:
            reason += "; it may be of any key, so the whole feed is blocked"
        path, error = self._quarantine.keep(
            self._contract,
            key,
            f"{self._path}/{unsound.segment}.{unsound.offset}",
            unsound.line,
            reason,
            blocks=blocks,
            hash=unsound.hash,
        )
        if blocks:
            self._blocked[path], self._unreported[path] = unsound.hash, error
        fd = self._disk.open_for_update(f"{self._directory}/{unsound.segment}")
        try:
            self._disk.overwrite(fd, unsound.offset, b" " * (len(unsound.line) - 1) + b"\n")
            self._disk.fsync(fd)
        finally:
            self._disk.close(fd)
        return path

    def cut_torn_end(self, segment: str, offset: int, torn: bytes) -> int:
        """Cut off the end of a line whose write did not get through: it was never acknowledged as durable.

        Returns how many bytes of it stay.
        """
        known = hash_in(torn)
        if known is not None and not has_lost_blocks(
            torn, offset
        ):  # A write that was cut short is shorter than its line.
            self.put_aside(Unsound(segment, offset, torn, "the end of the line was changed on the disk", known))
            return len(torn)
        if torn:
            path, reason = f"{self._path}/{segment}.{offset}.torn", "the write of the line was cut short"
            self._quarantine.keep(self._contract, (), path, torn, reason, blocks=False)
            fd = self._disk.open_for_update(f"{self._directory}/{segment}")
            try:
                self._disk.truncate(fd, offset)
            finally:
                self._disk.close(fd)
        return 0
