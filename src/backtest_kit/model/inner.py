"""`Inner`: a value of a part, read as if it were the whole's own."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, TypeVar

T_co = TypeVar("T_co", covariant=True)


class Inner(property, Generic[T_co]):
    """A read-only property at a dotted path: `symbol = Inner[str]("identity.symbol")`.

    Values are composed, so that a field exists once; this reads it where people look for it. It is a property, whose
    getter runs in C: it is read for every position at every minute.
    """

    def __init__(self, path: str) -> None:
        super().__init__(attrgetter(path))

    if TYPE_CHECKING:
        # A property knows no type of its value.
        def __get__(self, whole: Any, kind: type | None = None, /) -> T_co: ...  # type: ignore[override]
