"""A forgotten `await` is an error that says so: the command behind it would silently not be carried out."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import Any

import pytest

import backtest_kit as bk

MakeKit = Callable[..., bk.Kit]
WHERE: dict[str, Any] = {"strategy_name": "trend", "exchange_name": "demo", "frame_name": "day"}
# Python says it too, where the coroutine is dropped.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")


def long(ctx: bk.Context) -> bk.Signal:
    return bk.Signal.bracket("long", price=ctx.price, take_profit_pct=15, stop_loss_pct=15, minutes=60)


def used(ctx: bk.Context) -> bk.Signal | None:
    return None if ctx.candles("15m", 50).close[-1] > 0 else long(ctx)  # type: ignore[index]


def kept(ctx: bk.Context) -> bk.Signal | None:
    candles = ctx.candles("15m", 50)
    return None if candles.high.max() > 0 else long(ctx)  # type: ignore[attr-defined]


def counted(ctx: bk.Context) -> bk.Signal | None:
    return long(ctx) if ctx.state("n").get(0) + 1 else None  # type: ignore[operator]


@pytest.mark.parametrize(
    ("get_signal", "call"), [(used, "candles()"), (kept, "candles()"), (counted, "get()")], ids=["used", "kept", "sum"]
)
def test_what_was_not_awaited_and_is_used(make_kit: MakeKit, get_signal: object, call: str) -> None:
    with pytest.raises(bk.UserError) as raised:
        make_kit(get_signal).backtest.run_sync("BTCUSDT", **WHERE)
    message = str(raised.value)
    assert message.startswith("get_signal of strategy 'trend' for BTCUSDT at 2024-06-01T00:00Z used the answer of")
    assert f"{call} (test_forgotten_await.py, line" in message
    assert "write `await` before the call" in message
    assert isinstance(raised.value.__cause__, AttributeError | TypeError), "with the user's own traceback"
    # The traceback holds the coroutine: let Python complain of it now, where that is expected.
    del raised
    gc.collect()


DROPPED: list[tuple[str, Callable[[bk.Context], object]]] = [
    ("close()", lambda ctx: ctx.position and ctx.position.close()),
    ("move_stop()", lambda ctx: ctx.position and ctx.position.move_stop(1.0)),
    ("set()", lambda ctx: ctx.session.set(1)),
    ("update()", lambda ctx: ctx.state("n").update(lambda n: n + 1, 0)),
    ("write()", lambda ctx: ctx.memory("notes").write("a", 1)),
]


@pytest.mark.parametrize(("call", "dropped"), DROPPED, ids=[call for call, _ in DROPPED])
def test_what_was_not_awaited_and_is_dropped(
    make_kit: MakeKit, call: str, dropped: Callable[[bk.Context], object]
) -> None:
    async def manage(ctx: bk.Context) -> None:
        dropped(ctx)

    with pytest.raises(bk.UserError) as raised:
        make_kit(long, manage=manage).backtest.run_sync("BTCUSDT", **WHERE)
    message = str(raised.value)
    assert message.startswith("manage of strategy 'trend' for BTCUSDT at 2024-06-01T00:00Z did not await")
    assert call in message
    assert "test_forgotten_await.py, line" in message


def test_a_handler_that_drops_a_command_is_told(make_kit: MakeKit) -> None:
    async def handler(event: bk.PositionOpened, ctx: bk.Context) -> None:
        assert ctx.position is not None
        ctx.position.close()  # type: ignore[unused-coroutine]

    kit = make_kit(long)
    kit.on(bk.PositionOpened, handler)
    with pytest.raises(bk.UserError, match=r"did not await close\(\)"):
        kit.backtest.run_sync("BTCUSDT", **WHERE)


def test_a_call_that_another_task_will_await_is_no_mistake(make_kit: MakeKit) -> None:
    awaited: list[int] = []
    tasks: list[asyncio.Task[None]] = []

    async def get_signal(ctx: bk.Context) -> bk.Signal | None:
        if tasks:
            await tasks[-1]
            awaited.append(len(tasks))
        if len(tasks) < 3:
            tasks.append(asyncio.create_task(ctx.session.set(len(tasks))))
        return None

    assert make_kit(get_signal, interval="1h").backtest.run_sync("BTCUSDT", **WHERE).trades == ()
    assert awaited[:3] == [1, 2, 3]


def test_a_type_error_of_the_users_own_stays_what_it_is(make_kit: MakeKit) -> None:
    def get_signal(ctx: bk.Context) -> bk.Signal | None:
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        make_kit(get_signal).backtest.run_sync("BTCUSDT", **WHERE)
