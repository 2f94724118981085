"""HTTP for the simulated exchange, server and client. The only file that imports aiohttp."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from backtest_kit.errors import Outcome, RetryLater, UserError

_TIMEOUT_S: Final = 30.0


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A request as received."""

    method: str
    path: str
    query: str
    """Still encoded, as sent: signatures are made of it."""
    body: bytes
    api_key: str


class Answer(msgspec.Struct, frozen=True):
    """The response: `value` as JSON."""

    value: Any
    status: int = 200
    headers: dict[str, str] = {}


Handler = Callable[[Request], Awaitable[Answer | None]]
"""None breaks the connection without an answer. Cancelled when the client is gone."""


class HttpServer:
    """Serves on loopback until it is stopped."""

    def __init__(self, handler: Handler, port: int = 0, host: str = "127.0.0.1") -> None:
        self._handler = handler
        self._host = host
        self._port = port
        self._runner: Any = None

    @property
    def url(self) -> str:
        return f"http://{self._host}:{self._port}"

    async def start(self) -> None:
        """Listen.

        Raises:
            UserError: the port is taken, or aiohttp is not installed.
        """
        web = _aiohttp().web
        application = web.Application(client_max_size=64 * 2**20)
        application.router.add_route("*", "/{path:.*}", self._serve)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, self._host, self._port)
        try:
            await site.start()
        except OSError as error:
            await runner.cleanup()
            raise UserError(f"port {self._port} cannot be used ({error.strerror}): give another port") from None
        self._runner = runner
        self._port = runner.addresses[0][1]

    async def stop(self) -> None:
        """Stop listening and close all connections. Idempotent."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def _serve(self, incoming: Any) -> Any:
        web = _aiohttp().web
        answer = await self._handler(
            Request(
                method=incoming.method,
                path=incoming.path,
                query=incoming.rel_url.raw_query_string,
                body=await incoming.read(),
                api_key=incoming.headers.get("X-MBX-APIKEY", ""),
            )
        )
        if answer is None:
            if incoming.transport is not None:
                incoming.transport.abort()
            return web.Response()  # goes nowhere
        return web.Response(
            body=msgspec.json.encode(answer.value),
            status=answer.status,
            headers=answer.headers,
            content_type="application/json",
        )


class HttpClient:
    """Requests JSON from a server. It keeps no connection open between two requests."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    async def ask(
        self, method: str, path: str, value: Any = None, *, timeout_s: float | None = _TIMEOUT_S
    ) -> tuple[int, bytes]:
        """Status and body of the response.

        Raises:
            RetryLater: no response; `outcome` says whether the request may have been received.
        """
        aiohttp = _aiohttp()
        limits = aiohttp.ClientTimeout(total=timeout_s, sock_connect=_TIMEOUT_S)
        body = None if value is None else msgspec.json.encode(value)
        try:
            # On a reused connection that breaks, aiohttp repeats the request by itself.
            async with (
                aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True), timeout=limits) as session,
                session.request(method, self.url + path, data=body) as response,
            ):
                return response.status, await response.read()
        except aiohttp.ClientConnectorError as error:
            raise RetryLater(f"no venue answers at {self.url}: {error.os_error.strerror or error}") from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise RetryLater(
                f"the venue at {self.url} broke the connection of {method} {path}: {type(error).__name__}",
                outcome=Outcome.UNKNOWN,
            ) from None


def _aiohttp() -> Any:
    try:
        import aiohttp
        import aiohttp.web
    except ImportError:
        raise UserError("the simulated exchange needs aiohttp: pip install 'backtest-kit[ccxt]'") from None
    return aiohttp
