"""Where notifications go. An address can be a secret: no message, repr or log shows it."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable
from urllib.parse import urlsplit

import msgspec

from backtest_kit.errors import BacktestKitError, RetryLater, UserError
from backtest_kit.records.notification import Notification

if TYPE_CHECKING:
    import httpx

Deliver = Callable[[Notification], object]
"""Hands a notification over; called in a thread if it is not async."""

_TIMEOUT_S: Final = 10.0
_TRIED_AGAIN: Final = frozenset((401, 403, 404, 408, 425, 429))
"""Statuses that are not about the notification: a token or an address gets corrected, a limit passes."""

_MOST_LETTERS: Final = 2000
"""Of a Telegram message, which takes 4096 UTF-16 units: up to two for each letter."""

_QUIET: Final[ContextVar[bool]] = ContextVar("backtest_kit_quiet", default=False)
"""Set while apprise works for a sink."""
_LOGGERS: Final = ("apprise", "urllib3.connectionpool")
"""They log whole URLs."""


class Refused(BacktestKitError):
    """A sink will never take this notification: the next one is delivered instead."""


@runtime_checkable
class Sink(Protocol):
    """Where notifications go.

    A sink whose `name` does not identify the receiver also has a `destination`: a text that is the same in every
    process that sends to the same receiver, and no secret. Sinks of one name and destination are one to the store.
    """

    @property
    def name(self) -> str: ...

    def deliver(self, notification: Notification) -> object:
        """Hand it over; raise if that failed and has to be tried again, `Refused` if not. May be async.

        It is cancelled, and tried again, after `CC_MAX_NOTIFICATION_DELIVERY_SECONDS`.
        """
        ...

    async def close(self) -> None:
        """Close connections. The sink may be used again afterwards."""
        ...


class HttpSink:
    """Sends each notification as one POST of JSON."""

    tried_again = _TRIED_AGAIN

    def __init__(self, name: str, url: str, headers: dict[str, str], timeout_s: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"the address of sink {name!r} is not a URL: give https://host/path")
        self.name = name
        self.destination = _digest(url)
        self._host = parts.hostname
        self._url = url
        self._headers = headers
        self._timeout_s = timeout_s
        self._transport: tuple[asyncio.AbstractEventLoop, httpx.AsyncHTTPTransport] | None = None

    def body(self, notification: Notification) -> Any:
        """What is sent, as JSON."""
        return notification

    async def deliver(self, notification: Notification) -> None:
        """Send it.

        Raises:
            RetryLater: there was no answer, or it says that a later attempt can succeed.
            Refused: the receiver rejects this notification.
        """
        httpx = _httpx()
        request = httpx.Request(
            "POST",
            self._url,
            headers={"Content-Type": "application/json", "Idempotency-Key": notification.notification_id}
            | self._headers,
            content=msgspec.json.encode(self.body(notification)),
        )
        try:
            # The transport and not a client: a client logs the whole address of every request.
            async with asyncio.timeout(self._timeout_s):
                response = await self._open().handle_async_request(request)
                try:
                    await response.aread()
                finally:
                    await response.aclose()
        except (httpx.HTTPError, TimeoutError, OSError) as error:
            await self.close()
            raise RetryLater(f"{self._host} did not answer ({type(error).__name__}): it is tried again") from None
        self._judge(response.status_code)

    async def close(self) -> None:
        """Close the connection. The next delivery opens another one."""
        transport, self._transport = self._transport, None
        if transport is not None and transport[0] is asyncio.get_running_loop():
            await transport[1].aclose()

    def _open(self) -> httpx.AsyncHTTPTransport:
        loop = asyncio.get_running_loop()
        if self._transport is None or self._transport[0] is not loop:
            self._transport = loop, _httpx().AsyncHTTPTransport()
        return self._transport[1]

    def _judge(self, status: int) -> None:
        if status < 300:
            return
        if 400 <= status < 500 and status not in self.tried_again:
            raise Refused(f"{self._host} answered with status {status}")
        raise RetryLater(f"{self._host} answered with status {status}: it is tried again")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self._host!r})"


class Telegram(HttpSink):
    """Sends the text of each notification to a chat."""

    tried_again = _TRIED_AGAIN | {400}
    """A plain text that is short enough is never at fault: the chat is unknown, or was turned into another one."""

    def __init__(self, name: str, token: str, chat_id: int | str, base_url: str, timeout_s: float) -> None:
        super().__init__(name, f"{base_url}/bot{token}/sendMessage", {}, timeout_s)
        self._chat_id = chat_id
        self.destination = _digest(base_url, token.partition(":")[0], str(chat_id))

    def body(self, notification: Notification) -> Any:
        return {"chat_id": self._chat_id, "text": _shortened(notification.text)}


class AppriseSink:
    """Sends the text of each notification to a service that apprise knows."""

    def __init__(self, url: str, name: str | None) -> None:
        self._apprise = _apprise()
        scheme, separator, _ = url.partition("://")
        self.name = name or (scheme.lower() if separator else "apprise")
        self.destination = _digest(url)
        self._types = {"info": "info", "warning": "warning", "alarm": "failure"}
        self._service = self._quietly(lambda: self._apprise.Apprise.instantiate(url))
        if self._service is None:
            raise UserError(
                f"apprise cannot use the address of sink {self.name!r}: https://github.com/caronc/apprise/wiki shows "
                "how to write it for each service, such as discord://ID/TOKEN"
            )

    def deliver(self, notification: Notification) -> None:
        """Send it. Blocks.

        Raises:
            RetryLater: the service did not take it. Apprise does not say why.
        """
        kind = self._apprise.NotifyType(self._types[notification.severity])
        if not self._quietly(lambda: self._service.notify(body=notification.text, notify_type=kind)):
            raise RetryLater(f"{self._service.service_name} did not take it: it is tried again")

    async def close(self) -> None:
        """Does nothing: there is no open connection."""

    def _quietly(self, work: Callable[[], Any]) -> Any:
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(_is_loud)  # of one function, however often
        token = _QUIET.set(True)
        try:
            return work()
        finally:
            _QUIET.reset(token)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


def webhook(
    url: str, *, headers: dict[str, str] | None = None, name: str = "webhook", timeout_s: float = _TIMEOUT_S
) -> HttpSink:
    """A sink that posts each notification as JSON to `url`. Needs the extra `notify`.

    The header `Idempotency-Key` is the id of the notification: a receiver that got it before can ignore it.

    Raises:
        UserError: `url` is not a URL, or httpx is not installed.
    """
    _httpx()
    return HttpSink(name, url, headers or {}, timeout_s)


def telegram(
    token: str,
    chat_id: int | str,
    *,
    name: str = "telegram",
    base_url: str = "https://api.telegram.org",
    timeout_s: float = _TIMEOUT_S,
) -> HttpSink:
    """A sink that sends each notification as a message of a Telegram bot. Needs the extra `notify`.

    Raises:
        UserError: a token or a chat is missing, or httpx is not installed.
    """
    _httpx()
    if not token or chat_id in ("", 0):
        raise UserError(f"sink {name!r} needs the token of a bot and the id of a chat: @BotFather makes a bot")
    return Telegram(name, token, chat_id, base_url, timeout_s)


def apprise(url: str, *, name: str | None = None) -> AppriseSink:
    """A sink for any service that apprise knows: "discord://...", "mailto://...", "ntfy://...".

    Needs the extra `notify`.
    Its name is the beginning of `url` ("discord") unless you give another one.

    Raises:
        UserError: apprise cannot use `url`, or is not installed.
    """
    return AppriseSink(url, name)


def _is_loud(record: logging.LogRecord) -> bool:
    return not _QUIET.get()


def _digest(*parts: str) -> str:
    """A text that differs for each destination without revealing it."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_LETTERS else text[: _MOST_LETTERS - 1] + "…"


def _httpx() -> Any:
    try:
        import httpx
    except ImportError:
        raise UserError("this sink needs httpx: pip install backtest-kit[notify]") from None
    return httpx


def _apprise() -> Any:
    try:
        import apprise
    except ImportError:
        raise UserError("this sink needs apprise: pip install backtest-kit[notify]") from None
    return apprise
