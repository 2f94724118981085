"""A user's async function behind a decorator: the name it is known by, and what and when it is called for."""

from __future__ import annotations

import hashlib
import inspect
import json
import textwrap
from collections.abc import Awaitable, Callable
from typing import Any, Final, Generic, Protocol, TypeVar, runtime_checkable
from urllib.parse import quote

import msgspec

from backtest_kit.errors import LookAhead, UserError
from backtest_kit.model.event import Mode
from backtest_kit.model.interval import iso, to_ms
from backtest_kit.persist.codec import encode
from backtest_kit.persist.store import Plain
from backtest_kit.records.scope import Scope, Scopes, check_texts

R = TypeVar("R")

_READABLE: Final = 150


@runtime_checkable
class Moment(Protocol):
    """A minute of a run: what a context is to the functions that it is given to."""

    when_ms: int

    @property
    def mode(self) -> Mode: ...
    @property
    def run_id(self) -> str | None: ...
    @property
    def exchange_name(self) -> str: ...
    @property
    def strategy_name(self) -> str: ...
    @property
    def symbol(self) -> str: ...


class Call(msgspec.Struct, frozen=True):
    """One call of the function."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    moment: Moment | None
    when_ms: int | None
    """The time it is made for: that of `when`, else that of the context."""

    @property
    def now_ms(self) -> int | None:
        """The time it is made at: what it knows, and what comes of it, is of this moment."""
        return self.when_ms if self.moment is None else self.moment.when_ms


class Function(Generic[R]):
    """An async function under a name that stays the same from start to start, whatever else is defined."""

    def __init__(
        self,
        what: str,
        function: Callable[..., Awaitable[R]],
        name: str | None,
        version: str | None,
        *,
        hashed: bool,
    ) -> None:
        """`what` names the decorator in messages; if `hashed`, the source is the version where none is given.

        Raises:
            UserError: it is no async function, or its name or version is missing or wrong.
        """
        given: object = function
        if not inspect.iscoroutinefunction(given):
            raise UserError(f"{what} is given {given!r}: put it on an `async def` function")
        self.function = function
        self.title = given.__qualname__
        check_texts((key, value) for key, value in (("name", name), ("version", version)) if value is not None)
        captured = [each for each in given.__code__.co_freevars if each != "__class__"]
        if name is None and captured:
            raise UserError(
                f"{what}: {self.title} uses {', '.join(captured)} of the function around it, so that several functions "
                "of this name may differ: give each a name of its own (name=...)"
            )
        if version is None and hashed:
            version = _source_version(what, given)
        self.bucket: Final = "@".join(quote(part, safe="<>.") for part in (name or self.title, version) if part)
        self._signature = inspect.signature(given)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """A call as it was written; `ctx=` and `when=` are taken out where the function has no such parameter.

        Raises:
            UserError: the function takes other arguments, or `ctx` or `when` is none.
            LookAhead: `when` is later than the context.
        """
        names = self._signature.parameters
        context, when = kwargs.get("ctx"), kwargs.get("when")
        passed = {name: value for name, value in kwargs.items() if name in names or name not in ("ctx", "when")}
        try:
            self._signature.bind(*args, **passed)
        except TypeError as error:
            raise UserError(f"{self.title} is called with other arguments than it takes: {error}") from None
        if context is not None and not isinstance(context, Moment):
            raise UserError(f"ctx of {self.title} is {context!r}: give the context of the strategy")
        moment = context or next((each for each in args if isinstance(each, Moment)), None)
        when_ms = None if moment is None else moment.when_ms
        if when is not None:
            asked_ms = to_ms(when, what=f"when of {self.title}")
            if when_ms is not None and asked_ms > when_ms:
                raise LookAhead(f"when of {self.title} is {iso(asked_ms)}, later than the context's {iso(when_ms)}")
            when_ms = asked_ms
        return Call(args, passed, moment, when_ms)

    def arguments(self, call: Call) -> Plain:
        """The arguments by name, defaults included and contexts left out.

        Raises:
            UserError: one of them cannot be written down.
        """
        bound = self._signature.bind(*call.args, **call.kwargs)
        bound.apply_defaults()
        given = {name: value for name, value in bound.arguments.items() if not isinstance(value, Moment)}
        try:
            return encode(given, f"{self.title}()")
        except UserError as error:
            raise UserError(f"{error}; or say by key=... what tells one call from another") from None

    async def __call__(self, call: Call) -> R:
        return await self.function(*call.args, **call.kwargs)


def scope_of(scopes: Scopes, call: Call) -> Scope:
    """The records of the run that the call is made in, at its moment; outside of a run those of live."""
    if call.moment is None:
        return scopes("live", None, call.now_ms)
    return scopes(call.moment.mode, call.moment.run_id, call.now_ms)


def key_text(value: Plain) -> str:
    """A value as one readable text, or where it is long as a hash."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text if len(text) <= _READABLE else hashlib.sha256(text.encode()).hexdigest()


def _source_version(what: str, function: Callable[..., object]) -> str:
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        raise UserError(
            f"{what}: the source of {function.__qualname__} is not to be found, so a change of it would not be "
            "noticed: give a version (version='1') and count it up with every change"
        ) from None
    return hashlib.sha256(source.encode()).hexdigest()[:12]
