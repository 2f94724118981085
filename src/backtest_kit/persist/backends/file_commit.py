"""`Committer`: the one thread of a file store that writes.

Requests wait in a queue and are taken as a group. A lone money write follows the durable protocol: its
file and its directory are synced before the caller hears of it. Several money writes at once, and every
batch, go through the journal instead: one sync makes all of them durable, and their files are renamed
into place without one. Reading is done from anywhere and needs no lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Final, NamedTuple

from backtest_kit.errors import BacktestKitError, Outcome
from backtest_kit.persist.backends.file_promises import Promised, Target
from backtest_kit.persist.backends.file_root import Root
from backtest_kit.persist.backends.file_segments import Line
from backtest_kit.persist.codec import dump_record, dump_value, seal_text
from backtest_kit.persist.contracts import Durability, Kind
from backtest_kit.persist.crashpoints import crashpoint
from backtest_kit.persist.files import disk_error
from backtest_kit.persist.locks import Locked
from backtest_kit.persist.store import Record, Write
from backtest_kit.persist.writing import decide

GROUP_LIMIT: Final = 128
PATIENCE_SECONDS: Final = 2.0
"""How long a write waits for a lock that another process keeps."""
LINGER_SECONDS: Final = 0.0004
"""How long a group waits for those who wrote in the last one: far less than the sync it saves them."""


class Change(NamedTuple):
    """One write, ready to be decided on."""

    write: Write
    path: str
    """The file of a slot or bucket record, or the directory of a feed."""
    value: bytes

    @property
    def target(self) -> Target:
        return self.path, self.write.key if self.write.contract.kind is Kind.FEED else ()


class Waiter:
    """Whoever waits for some requests. `future` is done when each of them has its outcome."""

    def __init__(self, count: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[None] = self.loop.create_future()
        self._count = count

    def settle(self) -> None:
        """One more of them has its outcome."""
        self._count -= 1
        # Whoever was cancelled meanwhile does not wait any more: the write took place all the same.
        if not self._count and not self.future.done():
            self.future.set_result(None)


class Request:
    """What stands and falls together: all of `changes` or none."""

    def __init__(self, changes: Sequence[Change], waiter: Waiter) -> None:
        self.changes = changes
        self.waiter = waiter
        self.records: list[Record] = []
        self.error: BaseException | None = None
        self.paths = {change.path for change in changes}
        self.give_up_at = 0.0
        """When it has waited long enough for a lock; 0 if it has not had to wait."""


class _Staged(NamedTuple):
    """A record that was decided on and is not stored yet."""

    change: Change
    record: Record
    dumped: bytes
    tick: int


class Committer:
    """Takes requests in the order of `submit` and carries them out."""

    def __init__(self, root: Root) -> None:
        self._root = root
        # No SimpleQueue: up to Python 3.12 its get(timeout) waits for ever when the time runs out at the wrong moment.
        self._queue: deque[Sequence[Request] | Future[None]] = deque()
        self._arrival = threading.Condition()
        self._thread: threading.Thread | None = None
        self._last_size = 1
        self._parked: list[Request] = []

    def submit(self, requests: Sequence[Request]) -> None:
        self._root.check_process()
        self._enqueue(requests)

    def close(self) -> None:
        """Carry out what was submitted, close the root and end the thread; what is submitted later opens it again."""
        if self._root.is_inherited:
            return  # the thread, the files and what they owe the disk are those of the parent
        closing: Future[None] = Future()
        self._enqueue(closing)
        closing.result()

    def _enqueue(self, item: Sequence[Request] | Future[None]) -> None:
        with self._arrival:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="backtest-kit-write", daemon=True)
                self._thread.start()
            self._queue.append(item)
            self._arrival.notify()

    def _run(self) -> None:
        while True:
            group, closing = self._take()
            self._carry_out(group)
            while closing is not None and self._parked:
                self._carry_out([])
            if closing is not None and self._closed(closing):
                return

    def _closed(self, closing: Future[None]) -> bool:
        """Close the root; True if nobody has submitted anything since, and the thread is to end."""
        failure: BaseException | None = None
        try:
            self._root.close()
        except BaseException as error:  # it is for whoever closes to see
            failure = error
        with self._arrival:
            ended = not self._queue
            if ended:
                self._thread = None
        if failure is not None:
            closing.set_exception(failure)
        else:
            closing.set_result(None)
        return ended

    def _carry_out(self, group: list[Request]) -> None:
        """Commit `group`, behind those that wait for a lock, and answer whoever is not waiting afterwards."""
        group, self._parked = [*self._parked, *group], []
        if not group:
            return
        failure: BaseException | None = None
        try:
            self._root.open()
            self._commit(group)
        except OSError as error:
            failure = disk_error(error, "write below", self._root.path)
        except BaseException as error:  # the callers wait: whatever it is, it is theirs to see
            failure = error
        served = [request for request in group if request not in self._parked]
        for request in served:
            request.error = request.error or failure
        _answer(served)
        self._root.free_replaced()

    def _take(self) -> tuple[list[Request], Future[None] | None]:
        group: list[Request] = []
        closing: Future[None] | None = None
        deadline, size = 0.0, 0
        while len(group) < GROUP_LIMIT:
            patience: float | None = 0.0
            if not group and not self._parked:
                patience = None
            elif group and size < self._last_size:
                deadline = deadline or time.monotonic() + LINGER_SECONDS
                patience = max(0.0, deadline - time.monotonic())
            item = self._next(patience)
            if item is None:
                break
            if isinstance(item, Future):
                closing = item
                break
            if not item[0].waiter.future.cancelled():
                group += item
                size += 1
        self._last_size = size
        return group, closing

    def _next(self, patience: float | None) -> Sequence[Request] | Future[None] | None:
        """What has been submitted first; None if nothing is within `patience` seconds, if that is a number."""
        with self._arrival:
            if not self._queue and patience != 0:
                self._arrival.wait_for(lambda: self._queue, patience)
            return self._queue.popleft() if self._queue else None

    # -- a group -------------------------------------------------------------------------------------

    def _commit(self, group: list[Request]) -> None:
        group = self._free_to_go(group)
        if not group:
            return
        money = sum(1 for request in group if _is_money(request))
        whole = any(len(request.changes) > 1 for request in group)
        try:
            with self._root.locked({path for request in group for path in request.paths}, patient=False) as ticks:
                if money > 1 or whole:
                    self._commit_through_journal(group, ticks)
                else:
                    self._commit_lines([request for request in group if _is_line(request)], ticks)
                    for request in group:
                        if not _is_line(request):
                            with _failing(request):
                                self._commit_alone(request, ticks)
        except Locked as error:
            self._commit(self._free_to_go(group, error))
        except (BacktestKitError, OSError) as error:
            outcome = error.outcome if isinstance(error, BacktestKitError) else Outcome.NOT_DONE
            if len(group) == 1 or outcome is Outcome.UNKNOWN:
                raise
            for request in group:  # whatever it was, it shall not fail those whom it does not concern
                request.error, request.records = None, []
                with _failing(request):
                    self._commit([request])

    def _free_to_go(self, group: list[Request], stuck: Locked | None = None) -> list[Request]:
        """Those of `group` that need neither the lock that somebody keeps nor the turn of one that waits.

        The others wait for the next group, so that a lock held elsewhere does not stop writes of other keys;
        those that have waited too long fail, all at once.
        """
        waiting = {path for request in self._parked for path in request.paths}
        free = []
        for request in group:
            if request.paths.isdisjoint(waiting) and not (stuck and stuck.concerns(request.paths)):
                free.append(request)
                continue
            waiting |= request.paths
            now = time.monotonic()
            request.give_up_at = request.give_up_at or now + PATIENCE_SECONDS
            if stuck and now >= request.give_up_at:
                request.error = self._root.locks.timed_out(stuck.shard, PATIENCE_SECONDS)
            else:
                self._parked.append(request)
        return free

    def _commit_alone(self, request: Request, ticks: Iterator[int]) -> None:
        """Carry out a request of one change without the journal."""
        for change in request.changes:
            staged, record = self._decide(change, {}, set(), ticks)
            request.records.append(record)
            if staged is None:
                continue
            contract = change.write.contract
            if contract.durability is Durability.MONEY:
                self._root.writes.write_durably(change.path, seal_text(staged.dumped), staged.tick)
                crashpoint("file.after_acknowledge")
            elif contract.durability is Durability.RECORD:
                self._root.writes.write_successor(change.path, seal_text(staged.dumped), staged.tick)
            else:
                self._root.writes.write(change.path, seal_text(staged.dumped), staged.tick)

    def _commit_lines(self, group: list[Request], ticks: Iterator[int]) -> None:
        """Carry out requests of one line each, with one append to each feed."""
        feeds: dict[str, list[Request]] = {}
        for request in group:
            feeds.setdefault(request.changes[0].path, []).append(request)
        for requests in feeds.values():
            accepted, _ = self._decide_all(requests, ticks)
            lines = [item for items in accepted for item in items]
            try:
                self._append(lines)
            except OSError as error:
                for request in requests:
                    request.error = request.error or disk_error(error, "append to", request.changes[0].path)

    def _commit_through_journal(self, group: list[Request], ticks: Iterator[int]) -> None:
        accepted, staged = self._decide_all(group, ticks)
        if not staged:
            return
        slots = [item for item in staged.values() if item.change.write.contract.kind is not Kind.FEED]
        lines = [item for item in staged.values() if item.change.write.contract.kind is Kind.FEED]
        # A feed is in the order of its ticks, and a record that is written twice keeps its place in `staged`.
        lines.sort(key=lambda item: item.tick)
        temps = self._root.writes.write_temps([(item.change.path, seal_text(item.dumped), item.tick) for item in slots])
        try:
            promised = {
                item.change.target: Promised(item.change.write.contract, item.record, item.dumped, item.tick)
                for item in staged.values()
            }
            with self._root.journal([_entry(items) for items in accepted], promised):
                for path, temp in temps:
                    self._root.writes.put_in_place(temp, path)
                    crashpoint("journal.between_renames")
                for path in {item.change.path for item in lines}:
                    self._append([item for item in lines if item.change.path == path])
                crashpoint("journal.after_apply")
        except BaseException:
            self._root.writes.discard(temp for _, temp in temps)
            raise

    def _decide_all(
        self, group: list[Request], ticks: Iterator[int]
    ) -> tuple[list[list[_Staged]], dict[Target, _Staged]]:
        """What each request that holds changes, and the last state of every record that they change."""
        accepted: list[list[_Staged]] = []
        staged: dict[Target, _Staged] = {}
        absent = self._absent(group)
        for request in group:
            with _failing(request):
                records, items = [], []
                for change in request.changes:
                    item, record = self._decide(change, staged, absent, ticks)
                    records.append(record)
                    if item is not None:
                        items.append(item)
                request.records = records
                if items:
                    accepted.append(items)
                    staged.update({item.change.target: item for item in items})
        return accepted, staged

    def _absent(self, group: list[Request]) -> set[Target]:
        """Which lines are certainly not there yet, asked for all of the group at once."""
        feeds: dict[str, list[Change]] = {}
        for request in group:
            for change in request.changes:
                if change.write.contract.kind is Kind.FEED:
                    feeds.setdefault(change.path, []).append(change)
        found: set[Target] = set()
        for path, changes in feeds.items():
            keys = [change.write.key for change in changes]
            found |= {(path, key) for key in self._root.absent(changes[0].write.contract, path, keys)}
        return found

    def _decide(
        self, change: Change, staged: dict[Target, _Staged], absent: set[Target], ticks: Iterator[int]
    ) -> tuple[_Staged | None, Record]:
        write, target = change.write, change.target
        if target in staged:
            current: Record | None = staged[target].record
        elif target in absent:
            current = None
        else:
            current = self._root.load(write.contract, write.key, change.path, locked=True, head=True)
        record, changed = decide(write, current)
        if not changed:
            return None, record
        return _Staged(change, record, dump_record(write.contract, record, change.value), next(ticks)), record

    def _append(self, lines: list[_Staged]) -> None:
        """Append to the one feed of `lines`."""
        if not lines:
            return
        feed = self._root.feed(lines[0].change.write.contract, lines[0].change.path)
        if feed.append([Line(item.tick, item.record, item.dumped) for item in lines]):
            self._root.run_later(feed.compact)
        self._root.writes.sync_soon(f"{feed.path}/{feed.tail_name}")


def _entry(items: list[_Staged]) -> bytes:
    changes = b",".join(
        b'{"path":%b,"tick":%d,"record":%b}' % (dump_value(item.change.path), item.tick, item.dumped) for item in items
    )
    return b'{"changes":[%b]}' % changes


def _is_money(request: Request) -> bool:
    return any(change.write.contract.durability is Durability.MONEY for change in request.changes)


def _is_line(request: Request) -> bool:
    return len(request.changes) == 1 and request.changes[0].write.contract.kind is Kind.FEED


@contextlib.contextmanager
def _failing(request: Request) -> Iterator[None]:
    """What fails in the body fails this request, and no other."""
    try:
        yield
    except BacktestKitError as error:
        request.error = error
    except OSError as error:
        request.error = disk_error(error, "write", ", ".join(change.path for change in request.changes))


def _answer(group: list[Request]) -> None:
    """Wake the callers: one call for all that wait in one loop."""
    waiting: dict[Any, list[Request]] = {}
    for request in group:
        waiting.setdefault(request.waiter.loop, []).append(request)
    for loop, requests in waiting.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed, nobody waits
            loop.call_soon_threadsafe(_settle, requests)


def _settle(requests: list[Request]) -> None:
    for request in requests:
        request.waiter.settle()
