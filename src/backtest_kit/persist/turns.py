"""Turns at names: first come, first served, at one name or at several."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable, Iterable
from contextlib import asynccontextmanager


class Turns:
    """Turns of the tasks of one event loop."""

    def __init__(self) -> None:
        self._last: dict[Hashable, asyncio.Future[None]] = {}

    @asynccontextmanager
    async def hold(self, names: Iterable[Hashable]) -> AsyncIterator[None]:
        """Wait for every earlier caller of one of `names`, then hold them all for the body.

        The place in the queue is that of the moment of entering, for all names at once, so that two who hold
        several names never wait for each other.
        """
        names = set(names)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        before = {self._last[name] for name in names if name in self._last}
        self._last |= dict.fromkeys(names, done)

        def leave(_: object) -> None:
            done.set_result(None)
            for name in names:
                if self._last.get(name) is done:
                    del self._last[name]

        try:
            if before:
                await asyncio.wait(before)
            yield
        finally:
            # Who gives up waiting must not let the next one pass those who were there before.
            if waiting := [each for each in before if not each.done()]:
                asyncio.ensure_future(asyncio.wait(waiting)).add_done_callback(leave)
            else:
                leave(None)
