"""`Receiver`: a server that takes what sinks send, as the tests tell it to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from backtest_kit.records import sinks

SECRET = "s3cr3t"  # noqa: S105


class Receiver:
    """A server that answers as it is told, and keeps what it accepted."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.asked = 0
        self.status: Callable[[dict[str, Any]], int] = lambda body: 200
        self.before: Callable[[dict[str, Any]], Awaitable[None]] | None = None
        self.port = 0

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked += 1
        if self.before is not None:
            await self.before(body)
        status = self.status(body)
        if status == 200:
            self.got.append(body | {"path": request.path_qs, "key": request.headers.get("Idempotency-Key")})
        return web.Response(status=status)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ids(self) -> list[str]:
        return [str(each["notificationId"]) for each in self.got]

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not true():
                await asyncio.sleep(0.002)


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    """A server on a free port."""
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/{tail:.*}", receiver.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)  # a log would tell the whole address
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    receiver.port = runner.addresses[0][1]
    yield receiver
    await runner.cleanup()


def hook(receiver: Receiver, **options: Any) -> sinks.HttpSink:
    return sinks.webhook(f"{receiver.url}/hook?token={SECRET}", **options)
