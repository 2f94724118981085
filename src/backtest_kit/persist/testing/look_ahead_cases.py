"""Cases of the front door over the store: no record from the future, and whatever Python value comes back."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any

from backtest_kit.persist.adapters import ContractAdapter, snake
from backtest_kit.persist.binding import Persistence
from backtest_kit.persist.contracts import Contract
from backtest_kit.persist.store import Capability, Store
from backtest_kit.persist.testing.harness import Harness, each, each_contract, has, sample_part

PYTHON_VALUES = {
    "infinity": math.inf,
    "negative infinity": -math.inf,
    "datetime": datetime(2022, 1, 31, 10, 0, 0, 123456, tzinfo=UTC),
    "zone": datetime.fromisoformat("2022-03-27T01:30:00+05:30"),
    "bytes": b"\0\xff bytes",
    "200 bits": 1 << 200,
    "negative 64 bits": -(1 << 64),
    "nested": {"hold": [math.inf, {"until": datetime(2022, 1, 1, tzinfo=UTC)}], "@float": "mine"},
}


def door(store: Store, contract: Contract) -> tuple[ContractAdapter, dict[str, Any]]:
    persistence = Persistence()
    persistence.bind(contract.name, store)
    key: dict[str, Any] = {snake(field): sample_part(field) for field in contract.key_fields}
    return persistence.adapters[contract.name], key


class LookAheadCases(Harness):
    @each_contract
    async def test_record_of_the_future_is_not_there(self, store: Store, contract: Contract) -> None:
        adapter, key = door(store, contract)
        now = datetime(2022, 1, 31, 10, 0, tzinfo=UTC)
        await adapter.write("known", when=now, **key)
        if not self.expect_kept(await adapter.read(**key)):
            return
        step = timedelta(milliseconds=1)
        seen = [await adapter.read(when=when, **key) for when in (now - step, now, now + step, None)]
        assert seen == [None, "known", "known", "known"]
        if has(store, Capability.ORDERED_SCAN):
            listed = [[value async for _, value in adapter.list(when=when)] for when in (now - step, now, None)]
            assert listed == [[], ["known"], ["known"]]

    @each("value", PYTHON_VALUES)
    async def test_python_value_comes_back(self, store: Store, value: object) -> None:
        persistence = Persistence()
        persistence.bind("state", store)
        await persistence.state.write(value, signal_id="signal-1", bucket_name="notes")
        found = await persistence.state.read(signal_id="signal-1", bucket_name="notes")
        if self.expect_kept(found):
            assert found == value
            assert type(found) is type(value)
