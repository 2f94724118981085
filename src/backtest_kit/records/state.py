"""`State`: values of any kind that a strategy stores, one under each bucket name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Final

from backtest_kit.persist.codec import decode, encode
from backtest_kit.persist.contracts import CONTRACTS, Contract
from backtest_kit.persist.store import Key, Plain, Record
from backtest_kit.records.scope import Scope
from backtest_kit.records.unawaited import must_await

STATE: Final = CONTRACTS["state"]


class Slot:
    """One stored value, which can be read, replaced and changed.

    The first of `keys` is the value's own; until it is set, it starts with the value of the next key.
    """

    def __init__(self, scope: Scope, row: Contract, keys: tuple[Key, ...]) -> None:
        self._scope = scope
        self._row = row
        self._keys = keys

    @must_await
    async def get(self, default: Any = None) -> Any:
        """The value, or `default` if there is none at this moment. What is returned is the caller's to change.

        Raises:
            Damaged: the stored record is damaged.
            RetryLater: the store does not answer.
        """
        return await self._begin(self._keys, default)

    @must_await
    async def set(self, value: Any) -> None:
        """Replace the value by anything that can be stored: text, numbers, None, datetimes, lists, dicts, structs.

        Raises:
            UserError: something in `value` cannot be stored; the message names it.
            LookAhead: the existing record is later than this context, which was kept from an earlier minute.
            Damaged, OutOfSpace, RetryLater: as `Store.put`.
        """
        await self._scope.write(self._row, self._keys[0], encode(value))

    @must_await
    async def update(self, change: Callable[[Any], Any], default: Any = None) -> Any:
        """Replace the value by the result of `change`, and return it: `update(lambda count: count + 1, 0)`.

        Updates do not overtake each other, in this process or in another one. `change` may be async; it is given
        `default` if there is no value, and is called again if another process was faster, so it should do
        nothing else than compute. None that it returns is stored like any other value.

        Raises:
            UserError: what `change` returns cannot be stored, or it updates the same value.
            Exception: what `change` raises; the value stays as it is.
            LookAhead: the existing record is later than this context, which was kept from an earlier minute.
            Damaged, OutOfSpace, RetryLater: as `Store.put`.
        """

        async def changed(found: Record | None) -> Plain:
            value = await self._begin(self._keys[1:], default) if found is None else decode(found.value)
            value = change(value)
            return encode(await value if inspect.isawaitable(value) else value)

        return decode((await self._scope.update(self._row, self._keys[0], changed)).value)

    async def _begin(self, keys: tuple[Key, ...], default: Any) -> Any:
        for key in keys:
            record = await self._scope.read(self._row, key)
            if record is not None:
                return decode(record.value)
        return default

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'/'.join(map(str, self._keys[0]))})"


class State(Slot):
    """A value under a bucket name. It belongs to a signal, or to a strategy on a symbol.

    In a position it begins as the strategy left it: what `get_signal` noted is there in `manage`. What is set
    in the position stays with the position.
    """

    def __init__(self, scope: Scope, bucket: str, owners: tuple[str, ...]) -> None:
        super().__init__(scope, STATE, tuple((owner, bucket) for owner in owners))
