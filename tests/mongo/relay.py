"""A relay in front of a MongoDB: it hangs up at a chosen byte, or keeps a request back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Literal

Side = Literal["request", "answer"]

_HANDSHAKE = b"hello"


class Relay:
    """Relays whole messages. What monitors the server and makes connections is never disturbed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._tasks: set[asyncio.Task[None]] = set()
        self._cut: tuple[Side, int] | None = None
        self._times = 0
        self._left = 0
        self.cuts = 0
        """How often it has hung up."""
        self.sent = {"request": 0, "answer": 0}
        """Bytes relayed since it was last told what to do."""
        self.keep = b""
        """The next request with this in it is kept back, until `release`."""
        self.is_kept = asyncio.Event()
        self._kept = b""
        self.lose = b""
        """The answer to the next request with this in it is lost: it hangs up, once `meanwhile` is done."""
        self.meanwhile: Callable[[], Awaitable[None]] = _nothing
        self.connections = 0
        """How many are open."""

    async def __aenter__(self) -> Relay:
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self, side: Side, after: int, times: int = 1) -> None:
        """Hang up once `after` bytes of that side have passed, and so again, `times` in all."""
        self._cut, self._left, self._times = (side, after), after, times
        self.cuts, self.sent = 0, {"request": 0, "answer": 0}

    def mend(self) -> None:
        """Hang up no more."""
        self._cut = None
        self.sent = {"request": 0, "answer": 0}

    async def release(self) -> bytes:
        """Deliver what was kept, though whoever sent it is gone, and return what the server says to it."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(self._kept)
        answer = await _message(reader)
        writer.close()
        await writer.wait_closed()
        return answer

    def _passing(self, side: Side, data: bytes) -> tuple[bytes, bool]:
        """What of it passes, and whether the line is cut then."""
        self.sent[side] += len(data)
        if self._cut is None or self._cut[0] != side:
            return data, False
        if len(data) <= self._left:
            self._left -= len(data)
            return data, False
        passing = data[: self._left]
        self.cuts += 1
        self._left = self._cut[1]
        if self.cuts == self._times:
            self._cut = None
        return passing, True

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        writers = [writer]
        ways: list[asyncio.Future[None]] = []
        try:
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self._port)
            writers.append(to_server)
            line = _Line(self, reader, writer, from_server, to_server)
            ways = [asyncio.ensure_future(line.requests()), asyncio.ensure_future(line.answers())]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for each in writers:
                # What the kernel has not sent yet is dropped, as when a machine goes away.
                each.transport.abort()
            self.connections -= 1
            self._tasks.discard(task)

    def _loses(self, message: bytes) -> bool:
        if not self.lose or self.lose not in message:
            return False
        self.lose = b""
        return True

    def _keeps(self, message: bytes) -> bool:
        if not self.keep or self.keep not in message:
            return False
        self.keep, self._kept = b"", message
        self.is_kept.set()
        return True


class _Line:
    def __init__(
        self,
        relay: Relay,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        from_server: asyncio.StreamReader,
        to_server: asyncio.StreamWriter,
    ) -> None:
        self._relay, self._reader, self._writer = relay, reader, writer
        self._from_server, self._to_server = from_server, to_server
        self._is_counted = False
        self._is_lost = False

    async def requests(self) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                message = await _message(self._reader)
                self._is_counted = _HANDSHAKE not in message[:200] and b"isMaster" not in message[:200]
                if self._relay._keeps(message):
                    continue
                self._is_lost = self._relay._loses(message)
                is_cut = False
                if self._is_counted:
                    message, is_cut = self._relay._passing("request", message)
                self._to_server.write(message)
                await self._to_server.drain()
                if is_cut:
                    return

    async def answers(self) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                message = await _message(self._from_server)
                if self._is_lost:
                    await self._relay.meanwhile()
                    return
                is_cut = False
                if self._is_counted:
                    message, is_cut = self._relay._passing("answer", message)
                self._writer.write(message)
                await self._writer.drain()
                if is_cut:
                    return


async def _nothing() -> None:
    """Between a lost answer and the end of its connection."""


async def _message(reader: asyncio.StreamReader) -> bytes:
    length = await reader.readexactly(4)
    return length + await reader.readexactly(int.from_bytes(length, "little") - 4)
