"""One store at a time trades a symbol of an account on this machine.

A lease decides between processes of one store. Two stores do not know each other, and both would trade. So a live run
holds a file, locked by the kernel, in a directory of the user outside of any store: processes of one store share the
symbol, another store is refused. The lock ends with its process.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec

from backtest_kit.errors import Conflict, RetryLater
from backtest_kit.persist.holder import Holder, this_process
from backtest_kit.persist.locks import in_children, try_lock
from backtest_kit.persist.store import Store
from backtest_kit.persist.store_id import place_of

_log = logging.getLogger("backtest_kit")
_PATIENCE_S: Final = 10.0
"""How long to wait for the guard of a symbol, which a process holds for a few writes only."""
_GUARD: Final = "guard"
_UNREADABLE: Final = b"\n"
"""The byte that is locked: Windows lets no other process read it."""
_LARGEST_NOTE: Final = 65_536


class _Note(msgspec.Struct, frozen=True, rename="camel"):
    """The content of a lock file: its holder."""

    store_id: str
    place: str
    """Where the store lies: a copy has the id of its original and lies elsewhere."""
    holder: Holder
    strategy_name: str


class AccountLock:
    """The right of one store to trade a symbol of an account from this machine, until `release` or the process ends."""

    def __init__(
        self, account: str, symbol: str, *, store_id: str, place: str, strategy_name: str, directory: Path | None = None
    ) -> None:
        """
        Args:
            account: identifies the account and its market; only a digest of it is stored.
            symbol: in any spelling; BTCUSDT, BTC/USDT and BTC/USDT:USDT are one.
            store_id: of the store that wants to trade.
            place: where that store lies, for people.
            strategy_name: for people.
            directory: where the locks of this user are, `lock_directory()` by default.
        """
        name = hashlib.sha256(f"{account}\0{plain_symbol(symbol)}".encode()).hexdigest()[:32]
        self._symbol = symbol
        self._place = (lock_directory() if directory is None else directory) / name
        self._note = _Note(store_id, place, this_process(0), strategy_name)
        self._file: Path | None = None
        self._fd: int | None = None
        self._released = False
        self._mutex = threading.Lock()
        in_children(self._let_go)

    def acquire(self) -> None:
        """Take it. May block for some seconds; does nothing after `release`.

        Raises:
            Conflict: another store has it; the message names its process and the ways out.
            RetryLater: a suspended process holds the guard.
            OSError: the directory cannot be written.
        """
        with self._mutex:
            if self._released:
                return
            for directory in (self._place.parent.parent, self._place.parent, self._place):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _alone(self._place / _GUARD):
                self._refuse_others()
                self._file = self._place / secrets.token_hex(8)
                try:
                    self._fd = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
                    try_lock(self._fd)
                    os.write(self._fd, _UNREADABLE + msgspec.json.encode(self._note))
                except OSError:
                    self._give_back()
                    raise

    def release(self) -> None:
        """Give it back. Idempotent."""
        with self._mutex:
            self._released = True
            self._give_back()

    def _give_back(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.unlink()
        self._let_go()

    def _refuse_others(self) -> None:
        for file in sorted(self._place.iterdir()):
            if file.name == _GUARD:
                continue
            # A process that releases a lock does not wait for the guard: its file may go at any moment.
            with suppress(FileNotFoundError):
                self._refuse_other(file)

    def _refuse_other(self, file: Path) -> None:
        fd = os.open(file, os.O_RDWR)
        try:
            if try_lock(fd):
                file.unlink()  # its process is gone
                return
            os.lseek(fd, len(_UNREADABLE), os.SEEK_SET)
            note = msgspec.json.decode(os.read(fd, _LARGEST_NOTE), type=_Note)
        except msgspec.DecodeError:
            raise Conflict(
                f"{self._symbol} of this account is traded by another process, from an unknown store: find the one "
                f"that has {file} open (lsof), and stop it"
            ) from None
        finally:
            os.close(fd)
        if (note.store_id, note.place) != (self._note.store_id, self._note.place):
            raise Conflict(
                f"{self._symbol} of this account is traded from another store: {note.holder}, strategy "
                f"{note.strategy_name}, store {note.store_id} at {note.place}. This is store "
                f"{self._note.store_id} at {self._note.place}. Two stores would trade one position twice: stop "
                "that process, or start this one with its store (CC_STORE, or from its directory), or give this "
                "one an account of its own"
            )

    def _let_go(self) -> None:
        fd, self._fd, self._file = self._fd, None, None
        if fd is not None:
            os.close(fd)


@asynccontextmanager
async def account_locked(
    account: str, symbol: str, *, store: Store, store_id: str, strategy_name: str
) -> AsyncIterator[None]:
    """Hold the lock of a symbol while the block runs; nothing where `account` is empty.

    Raises:
        Conflict, RetryLater: as `AccountLock.acquire`.
    """
    if not account:
        yield
        return
    lock = AccountLock(account, symbol, store_id=store_id, place=await place_of(store), strategy_name=strategy_name)
    try:
        try:
            await asyncio.to_thread(lock.acquire)
        except OSError as error:
            _log.warning("another store on this machine could also trade %s of this account: %s", symbol, error)
        yield
    finally:
        # In a thread, because a cancelled attempt may still run in another one.
        await asyncio.to_thread(lock.release)


def lock_directory(environ: Mapping[str, str] = os.environ, home: Callable[[], Path] = Path.home) -> Path:
    """Where the locks of this user are: the same for a shell, cron and a service, so not $XDG_RUNTIME_DIR, which only
    a login has."""
    state = environ.get("XDG_STATE_HOME")
    with suppress(RuntimeError):
        base = Path(state) if state else home() / ".local" / "state"
        if os.access(_existing(base), os.W_OK):
            return base / "backtest-kit" / "accounts"
    # A user without a home: every one has a directory of its own.
    return Path(tempfile.gettempdir()) / f"backtest-kit-{getattr(os, 'getuid', lambda: 0)()}" / "accounts"


def _existing(path: Path) -> Path:
    return path if path.exists() or path.parent == path else _existing(path.parent)


@contextmanager
def _alone(guard: Path) -> Iterator[None]:
    """Lock a symbol's files against all other processes and threads."""
    fd = os.open(guard, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + _PATIENCE_S
        while not try_lock(fd):
            if time.monotonic() > deadline:
                raise RetryLater(
                    f"another process has held {guard} for {_PATIENCE_S:g} s: find it (lsof) and see whether it is "
                    "suspended, then try again"
                )
            time.sleep(0.01)  # the kernel's locks have no time limit to wait with
        yield
    finally:
        os.close(fd)


def plain_symbol(symbol: str) -> str:
    """The symbol without separators: the same for all spellings of a market."""
    return "".join(letter for letter in symbol.partition(":")[0] if letter.isalnum()).upper()
