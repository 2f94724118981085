"""A user's async function behind a decorator: the name it is stored under, and the arguments and time of its calls."""

from __future__ import annotations

import hashlib
import inspect
import json
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from types import CodeType, MethodType
from typing import Any, Final, Generic, Protocol, TypeVar, runtime_checkable
from urllib.parse import quote

import msgspec

from backtest_kit.errors import LookAhead, UserError
from backtest_kit.model.identity import Identity, Mode
from backtest_kit.model.interval import iso, to_ms
from backtest_kit.persist.codec import encode
from backtest_kit.persist.store import Plain
from backtest_kit.records.scope import Scope, Scopes, check_texts

R = TypeVar("R")

_READABLE: Final = 150


@runtime_checkable
class RunContext(Protocol):
    """A minute of a run: the part of a context that decorated functions use."""

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
    def frame_name(self) -> str: ...
    @property
    def symbol(self) -> str: ...


class Call(msgspec.Struct, frozen=True):
    """One call of the function."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    moment: RunContext | None
    when_ms: int | None
    """The time that the call is about: that of `when`, else that of the context."""

    @property
    def now_ms(self) -> int | None:
        """The time of the caller: records are read and written as of this moment."""
        return self.when_ms if self.moment is None else self.moment.when_ms


class Function(Generic[R]):
    """An async function under a name that stays the same across restarts, regardless of what else is defined."""

    def __init__(
        self,
        what: str,
        function: Callable[..., Awaitable[R]],
        name: str | None,
        version: str | None,
        *,
        hashed: bool,
    ) -> None:
        """`what` names the decorator in messages; if `hashed`, the source is the version by default.

        Raises:
            UserError: it is not an async function, or its name or version is missing or wrong.
        """
        given: object = function
        if not inspect.iscoroutinefunction(given):
            raise UserError(f"{what} got {given!r}: put it on an `async def` function")
        self.function = function
        self.what = what
        self.title = given.__qualname__
        self.is_named = name is not None
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
        self._source = _source_of(given)

    @property
    def whereabouts(self) -> str:
        """Where it is defined, for messages."""
        code = inspect.unwrap(self.function).__code__
        return f"{self.title} ({code.co_filename}:{code.co_firstlineno})"

    def is_same(self, other: Function[Any], *, whatever_defaults: bool) -> bool:
        """Whether this is `other`, defined again at the same place, or moved by an edit.

        Two functions that were given the same name count as the same.
        """
        if self.is_named and other.is_named:
            return True
        one, two = self._source, other._source
        if one.place != two.place:
            return False
        if one.code == two.code:
            return whatever_defaults or all(map(_is_equal, one.defaults, two.defaults))
        return one.text is None or one.text != two.text

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """A call as it was written; `ctx=` and `when=` are removed if the function has no such parameter.

        Raises:
            UserError: the function takes other arguments, `ctx` or `when` has the wrong type, or two contexts differ.
            LookAhead: `when` is later than the context.
        """
        names = self._signature.parameters
        context, when = kwargs.get("ctx"), kwargs.get("when")
        passed = {name: value for name, value in kwargs.items() if name in names or name not in ("ctx", "when")}
        try:
            bound = self._signature.bind(*args, **passed)
        except TypeError as error:
            raise UserError(f"{self.title} was called with arguments that it does not take: {error}") from None
        if context is not None and not isinstance(context, RunContext):
            raise UserError(f"ctx of {self.title} is {context!r}: give the context of the strategy")
        moment = self._moment(([] if context is None else [context]) + list(_contexts(bound)))
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
            UserError: one of them cannot be stored.
        """
        bound = self._signature.bind(*call.args, **call.kwargs)
        bound.apply_defaults()
        try:
            return encode(dict(_without_contexts(bound)), f"{self.title}()")
        except UserError as error:
            raise UserError(f"{error}; or give key=... to distinguish calls") from None

    def _moment(self, contexts: Iterable[RunContext]) -> RunContext | None:
        """The one context of a call: its time, run and symbol."""
        places = {_place(each): each for each in contexts}
        if len(places) > 1:
            listed = ", ".join(f"{place[-1]} at {iso(each.when_ms)}" for place, each in places.items())
            raise UserError(
                f"{self.title} is called with {len(places)} contexts ({listed}), and its result belongs to one: "
                "pass one context, and only values of the others"
            )
        return next(iter(places.values()), None)

    async def __call__(self, call: Call) -> R:
        return await self.function(*call.args, **call.kwargs)


def _contexts(bound: inspect.BoundArguments) -> Iterator[RunContext]:
    """The contexts among the arguments, however they were passed."""
    for name, value in bound.arguments.items():
        match bound.signature.parameters[name].kind:
            case inspect.Parameter.VAR_POSITIONAL:
                given = value
            case inspect.Parameter.VAR_KEYWORD:
                given = value.values()
            case _:
                given = (value,)
        yield from (each for each in given if isinstance(each, RunContext))


def _without_contexts(bound: inspect.BoundArguments) -> Iterator[tuple[str, Any]]:
    for name, value in bound.arguments.items():
        match bound.signature.parameters[name].kind:
            case inspect.Parameter.VAR_POSITIONAL:
                yield name, [each for each in value if not isinstance(each, RunContext)]
            case inspect.Parameter.VAR_KEYWORD:
                yield name, {key: each for key, each in value.items() if not isinstance(each, RunContext)}
            case _ if not isinstance(value, RunContext):
                yield name, value


def _place(moment: RunContext) -> tuple[object, ...]:
    run = (moment.mode, moment.run_id, moment.when_ms)
    return (*run, moment.exchange_name, moment.strategy_name, moment.symbol)


class Decorated(ABC, Generic[R]):
    """A function behind a decorator. Called like the function, also as a method."""

    def __init__(self, scopes: Scopes, function: Function[R], key: Callable[..., Any] | None) -> None:
        self._scopes = scopes
        self._function = function
        self._key = key
        self.__wrapped__ = function.function
        self.__doc__ = function.function.__doc__

    @property
    def bucket(self) -> str:
        """The key that its records are stored under: name and version."""
        return self._function.bucket

    @abstractmethod
    async def __call__(self, *args: Any, **kwargs: Any) -> R | None: ...

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else MethodType(self, instance)


class Names:
    """The functions of a program by name: one per name, because functions of one name share their records."""

    def __init__(self) -> None:
        self._functions: dict[str, Function[Any]] = {}

    def claim(self, function: Function[Any], *, whatever_defaults: bool = False) -> None:
        """Register `function` under its name. A function that is defined again replaces itself.

        With `whatever_defaults`, the same code with other defaults is the same function.

        Raises:
            UserError: another function has this name; the message names both places.
        """
        known = self._functions.get(function.bucket)
        if known is not None and not function.is_same(known, whatever_defaults=whatever_defaults):
            raise UserError(
                f"{function.what}: {known.whereabouts} and {function.whereabouts} are two functions with the name "
                f"{function.bucket} and would share their records: give each its own name "
                "(name=...), or give both the same name to share them"
            )
        self._functions[function.bucket] = function


def scope_of(scopes: Scopes, call: Call) -> Scope:
    """The records of the run that makes the call, at its moment; outside of a run those of live."""
    if call.moment is None:
        return scopes("live", None, call.now_ms)
    run = call.moment
    identity = Identity(run.symbol, run.strategy_name, run.exchange_name, run.frame_name, run.mode)
    return scopes(run.mode, run.run_id, call.now_ms, identity)


def key_text(value: Plain) -> str:
    """A value as readable text, or as a hash if it is long. Different values have different texts, "1" and 1 too."""
    is_clear = isinstance(value, str) and not _is_json(value)
    text = str(value) if is_clear else json.dumps(value, ensure_ascii=False, sort_keys=True)
    return text if len(text) <= _READABLE else hashlib.sha256(text.encode()).hexdigest()


class _Source(msgspec.Struct, frozen=True):
    """Where a function is defined."""

    place: str
    """Its file, or its module if there is no file, as in a notebook."""
    text: int | None
    """When the file was last changed; None if there is no file."""
    code: CodeType
    defaults: tuple[object, object]


def _source_of(function: Any) -> _Source:
    code, defaults = function.__code__, (function.__defaults__, function.__kwdefaults__)
    path = Path(inspect.unwrap(function).__code__.co_filename)
    try:
        return _Source(str(path.resolve()), path.stat().st_mtime_ns, code, defaults)
    except OSError:
        return _Source(str(function.__module__), None, code, defaults)


def _is_equal(one: object, two: object) -> bool:
    """Whether two defaults are the same, as far as that can be determined: `==` may raise, and 1 == True."""
    try:
        return one is two or json.dumps(encode(one)) == json.dumps(encode(two))
    except UserError:
        return False


def _is_json(text: str) -> bool:
    """Whether a text could be mistaken for a value in its stored form."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _source_version(what: str, function: Callable[..., object]) -> str:
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        raise UserError(
            f"{what}: the source of {function.__qualname__} was not found, so a change of it would not be "
            "noticed: give a version (version='1') and raise it with every change"
        ) from None
    return hashlib.sha256(source.encode()).hexdigest()[:12]
