"""Sinks over real sockets: in order, at least once, across restarts, and never a secret in sight."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.records.conftest import NOON_MS, kit_on, run_of
from tests.records.happenings import IDENTITY, closed, observe, opened
from tests.records.receiver import SECRET, Receiver, hook

import backtest_kit as bk
from backtest_kit.errors import UserError
from backtest_kit.records import attempt, outbox, sinks
from backtest_kit.records.attempt import Attempts
from backtest_kit.records.notification import Notification, notification_of


async def test_notifications_arrive_once_and_in_order(kit: bk.Kit, receiver: Receiver) -> None:
    kit.records.notification.sink(hook(receiver))
    for number in range(20):
        await observe(kit, [opened(f"s-{number}", number)])
    await observe(kit, [opened("s-3", 3)])
    await kit.close()
    told = await kit.records.notification.list()
    assert receiver.ids == [each.notification_id for each in reversed(told)]
    assert len(set(receiver.ids)) == 20
    assert receiver.got[0]["key"] == receiver.ids[0]
    assert receiver.got[0]["text"].endswith("opened long 50 from 100, take profit 110, stop loss 90")


async def test_what_was_told_before_a_sink_was_there_is_not_for_it(kit: bk.Kit, receiver: Receiver) -> None:
    await observe(kit, [opened("early")])
    await asyncio.sleep(0.002)  # the clock has milliseconds
    kit.records.notification.sink(hook(receiver), kinds=["closed"])
    await observe(kit, [opened("late", 1), closed("late", 2)])
    await kit.close()
    assert [each["signalId"] for each in receiver.got] == ["late"]
    assert receiver.got[0]["kind"] == "closed"


@pytest.mark.usefixtures("short_drain")
async def test_a_dead_receiver_loses_nothing_over_a_restart(
    shared_address: str, tmp_path: Path, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    receiver.status = lambda body: 503
    kit = kit_on(shared_address, tmp_path)
    kit.records.notification.sink(hook(receiver))
    for number in range(5):
        await observe(kit, [opened(f"s-{number}", number)])
    await receiver.until(lambda: receiver.asked > 3)
    await kit.close()
    assert receiver.got == []
    receiver.status = lambda body: 200
    kit = kit_on(shared_address, tmp_path)
    kit.records.notification.sink(hook(receiver))
    await kit.records.begin("live")
    await receiver.until(lambda: len(receiver.got) == 5)
    await observe(kit, [opened("s-9", 9)])
    await kit.close()
    assert [each["signalId"] for each in receiver.got] == [*(f"s-{number}" for number in range(5)), "s-9"]
    said = [record.getMessage() for record in caplog.records]
    assert any("127.0.0.1 answered with status 503" in message for message in said)
    assert not any(SECRET in message for message in said)


async def test_a_dead_receiver_keeps_nothing_in_memory(
    kit: bk.Kit, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "CHUNK", 8)
    receiver.status = lambda body: 500
    kit.records.notification.sink(hook(receiver))
    for number in range(100):
        await observe(kit, [opened(f"s-{number:03d}", number)])
    await receiver.until(lambda: receiver.asked > 2)
    receiver.status = lambda body: 200
    await receiver.until(lambda: len(receiver.got) == 100)
    assert [each["signalId"] for each in receiver.got] == [f"s-{number:03d}" for number in range(100)]
    await kit.close()


async def test_a_refusal_for_good_does_not_stop_the_rest(
    kit: bk.Kit, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.status = lambda body: 422 if body["signalId"] == "s-1" else 200
    kit.records.notification.sink(hook(receiver))
    await observe(kit, [opened(f"s-{number}", number) for number in range(3)])
    await kit.close()
    assert [each["signalId"] for each in receiver.got] == ["s-0", "s-2"]
    assert "refused permanently" in caplog.text


@pytest.mark.usefixtures("short_drain")
async def test_a_receiver_that_hangs_stops_neither_the_trading_nor_the_closing(
    kit: bk.Kit, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    held = asyncio.Event()

    async def hang(notification: Notification) -> None:
        await held.wait()

    kit.records.notification.sink(hang, name="hanging")
    kit.records.notification.sink(hook(receiver))
    async with asyncio.timeout(60):
        await observe(kit, [opened("s-1")])
        await receiver.until(lambda: len(receiver.got) == 1)
        await kit.close()
    assert "sink hanging: not everything was delivered" in caplog.text


class Leaving:
    """A sink of the user's own whose end is not a good one."""

    name = "leaving"

    def __init__(self, leave: Callable[[], Any]) -> None:
        self.close: Any = leave

    async def deliver(self, notification: Notification) -> None:
        return


async def _raise() -> None:
    raise RuntimeError(f"connection to {SECRET} already gone")


async def _hang() -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("leave", "said"), [(_raise, "RuntimeError"), (_hang, "TimeoutError"), (lambda: None, "TypeError")]
)
async def test_a_sink_that_cannot_be_closed_costs_no_line_of_the_log(
    tmp_path: Path,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    leave: Callable[[], Any],
    said: str,
) -> None:
    monkeypatch.setattr(attempt, "GRACE_S", 0.01)
    kit = kit_on("file:{place}/dump", tmp_path)
    kit.records.notification.sink(Leaving(leave))
    kit.records.notification.sink(hook(receiver))
    await observe(kit, [opened("s-1")])
    for number in range(500):
        run_of(kit).log(NOON_MS).info(str(number))
    async with asyncio.timeout(20):
        await kit.close()
    assert len(receiver.got) == 1
    assert f"sink leaving: it could not be closed: {said}" in caplog.text
    assert SECRET not in caplog.text
    kit = kit_on("file:{place}/dump", tmp_path)
    assert len(await kit.records.log.list(limit=None)) == 500
    await kit.close()


async def test_a_step_of_leaving_that_fails_keeps_no_other_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = kit_on("file:{place}/dump", tmp_path)
    run_of(kit).log(NOON_MS).info("the last word")

    async def fail() -> None:
        raise OSError("no more threads")

    monkeypatch.setattr(kit.records._deliveries, "close", fail)
    with pytest.raises(OSError, match="no more threads"):
        await kit.close()
    kit = kit_on("file:{place}/dump", tmp_path)
    assert [line.message for line in await kit.records.log.list()] == ["the last word"]
    await kit.close()


async def test_a_sink_that_never_answers_is_cancelled_and_tried_again(
    kit: bk.Kit, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    kit.set_config(CC_MAX_NOTIFICATION_DELIVERY_SECONDS=0.05)
    never, told, ended = asyncio.Event(), list[str](), list[str]()

    async def hang(notification: Notification) -> None:
        if len(ended) < 2:
            try:
                await never.wait()
            finally:
                await asyncio.sleep(0)
                ended.append(notification.signal_id)
        told.append(notification.signal_id)

    kit.records.notification.sink(hang, name="hanging")
    await observe(kit, [opened("s-1"), opened("s-2", 1)])
    await receiver.until(lambda: len(told) == 2)
    assert told == ["s-1", "s-2"]
    assert ended == ["s-1", "s-1"], "each try was awaited to its end before the next began"
    assert "sink hanging: attempt 1 failed: it has not answered within 0.05 s" in caplog.text
    await kit.close()
    assert not [task for task in asyncio.all_tasks() if "hanging" in task.get_name()]


@pytest.mark.usefixtures("short_drain")
async def test_a_sink_that_does_not_end_when_it_is_cancelled_is_not_begun_twice(
    kit: bk.Kit, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(attempt, "GRACE_S", 0.005)
    kit.set_config(CC_MAX_NOTIFICATION_DELIVERY_SECONDS=0.01)
    gate, begun, told = asyncio.Event(), list[str](), list[str]()

    async def stubborn(notification: Notification) -> None:
        begun.append(notification.signal_id)
        while not gate.is_set():
            try:
                await gate.wait()
            except asyncio.CancelledError:
                continue
        told.append(notification.signal_id)

    kit.records.notification.sink(stubborn, name="stubborn")
    await observe(kit, [opened("s-1")])
    await receiver.until(lambda: "still runs" in caplog.text)
    await asyncio.sleep(0.05)
    assert begun == ["s-1"]
    async with asyncio.timeout(5):
        await kit.close()
    gate.set()
    await receiver.until(lambda: told == ["s-1"])


async def test_a_sink_that_cancels_itself_is_tried_again(kit: bk.Kit, receiver: Receiver) -> None:
    tries: list[str] = []

    async def fickle(notification: Notification) -> None:
        tries.append(notification.signal_id)
        if len(tries) == 1:
            raise asyncio.CancelledError

    kit.records.notification.sink(fickle)
    await observe(kit, [opened("s-1")])
    await receiver.until(lambda: len(tries) == 2)
    await kit.close()


async def test_a_function_that_hangs_takes_one_thread_and_none_of_the_stores(kit: bk.Kit, receiver: Receiver) -> None:
    kit.set_config(CC_MAX_NOTIFICATION_DELIVERY_SECONDS=0.01)
    gate, calls, threads = threading.Event(), list[str](), set[str]()

    def hang(notification: Notification) -> None:
        calls.append(notification.signal_id)
        threads.add(threading.current_thread().name)
        assert gate.wait(20)

    kit.records.notification.sink(hang, name="hanging")
    await observe(kit, [opened("s-1"), opened("s-2", 1)])
    kit.records.of_run(IDENTITY, None).urge([opened("s-3", 2)])
    async with asyncio.timeout(20):
        for _ in range(50):  # many a try's time
            await asyncio.sleep(0.002)
            await asyncio.to_thread(int)
    assert len(calls) == 1
    assert not any(name.startswith("asyncio") for name in threads), "those are for the stores"
    gate.set()
    await receiver.until(lambda: {"s-1", "s-2", "s-3"} <= set(calls))
    await kit.close()
    assert calls.count("s-2") == 1


async def test_what_a_thread_has_done_after_it_was_given_up_is_done(kit: bk.Kit, receiver: Receiver) -> None:
    kit.set_config(CC_MAX_NOTIFICATION_DELIVERY_SECONDS=0.02)
    gate, calls = threading.Event(), list[str]()

    def slow(notification: Notification) -> None:
        calls.append(notification.signal_id)
        assert gate.wait(20)

    kit.records.notification.sink(slow)
    await observe(kit, [opened("s-1")])
    await receiver.until(lambda: calls == ["s-1"])
    await asyncio.sleep(0.05)
    kit.set_config(CC_MAX_NOTIFICATION_DELIVERY_SECONDS=15)
    gate.set()
    await observe(kit, [opened("s-2", 1)])
    await receiver.until(lambda: "s-2" in calls)
    await kit.close()
    assert calls == ["s-1", "s-2"]


async def test_what_a_thread_does_in_the_moment_in_which_it_is_given_up_is_done() -> None:
    gate, calls = threading.Event(), list[str]()

    def slow(notification: Notification) -> None:
        calls.append(notification.signal_id)
        assert gate.wait(20)

    attempts = Attempts(slow, "slow")
    notification = notification_of(opened("s-1"))
    assert notification is not None
    giving_up = asyncio.create_task(attempts.hand_over(notification, 20))
    while not calls:
        await asyncio.sleep(0.001)
    gate.set()
    for thread in threading.enumerate():
        if thread.name == "notification":
            thread.join()  # the loop hears of nothing meanwhile
    giving_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await giving_up
    await attempts.hand_over(notification, 20)
    assert calls == ["s-1"]


async def test_a_function_is_a_sink_and_its_errors_are_tried_again(
    kit: bk.Kit, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[str] = []

    def note(notification: Notification) -> None:
        calls.append(notification.signal_id)
        if len(calls) < 4:
            raise OSError(f"https://example.com/?token={SECRET}")

    kit.records.notification.sink(note)
    await observe(kit, [opened("s-1"), opened("s-2", 1)])
    await receiver.until(lambda: len(calls) == 5)
    await kit.close()
    assert calls == ["s-1"] * 4 + ["s-2"]
    assert "OSError" in caplog.text
    assert SECRET not in caplog.text


async def test_telegram_gets_the_text(kit: bk.Kit, receiver: Receiver) -> None:
    sink = sinks.telegram(SECRET, 42, base_url=receiver.url)
    assert SECRET not in repr(sink)
    kit.records.notification.sink(sink)
    await observe(kit, [closed("s-1")])
    await kit.close()
    (got,) = receiver.got
    assert (got["path"], got["chat_id"]) == (f"/bot{SECRET}/sendMessage", 42)
    assert "closed long at 110, take profit: +9.50 %" in got["text"]


async def test_telegram_gets_the_beginning_of_what_is_too_long_for_it(kit: bk.Kit, receiver: Receiver) -> None:
    receiver.status = lambda body: 200 if len(body["text"].encode("utf-16-le")) <= 2 * 4096 else 400
    kit.records.notification.sink(sinks.telegram(SECRET, 42, base_url=receiver.url))
    failed = bk.RunFailed(identity=IDENTITY, when_ms=NOON_MS, error=RuntimeError("no margin " + "\U0001f4c9" * 9000))
    await observe(kit, [failed])
    await receiver.until(lambda: receiver.asked > 0)
    await kit.close()
    (got,) = receiver.got
    assert "RuntimeError: no margin" in got["text"]


async def test_telegram_loses_nothing_while_its_chat_is_unknown(kit: bk.Kit, receiver: Receiver) -> None:
    receiver.status = lambda body: 400  # chat not found: nobody has spoken to the bot yet
    kit.records.notification.sink(sinks.telegram(SECRET, 42, base_url=receiver.url))
    await observe(kit, [opened("s-1"), closed("s-2")])
    await receiver.until(lambda: receiver.asked >= 3)
    receiver.status = lambda body: 200
    await receiver.until(lambda: len(receiver.got) == 2)
    await kit.close()


async def test_any_service_of_apprise_gets_the_text_and_no_log_its_address(
    kit: bk.Kit, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("", "apprise", "urllib3"):
        caplog.set_level(logging.DEBUG, logger=name)
    receiver.status = lambda body: 503 if receiver.asked < 3 else 200
    sink = sinks.apprise(f"json://user:{SECRET}@127.0.0.1:{receiver.port}/{SECRET}?token={SECRET}")
    assert repr(sink) == "AppriseSink('json')"
    kit.records.notification.sink(sink)
    failed = bk.RunFailed(identity=IDENTITY, when_ms=NOON_MS, error=RuntimeError("no margin"))
    await observe(kit, [opened("s-1"), failed])
    await receiver.until(lambda: len(receiver.got) == 2)
    await kit.close()
    assert [each["type"] for each in receiver.got] == ["info", "failure"]
    assert receiver.got[0]["message"].endswith("opened long 50 from 100, take profit 110, stop loss 90")
    assert "sink json: attempt 1 failed: JSON did not take it" in caplog.text
    assert SECRET not in caplog.text
    logging.getLogger("apprise").warning("of somebody else")
    assert "of somebody else" in caplog.text, "only what is logged for a sink is silenced"


async def test_a_function_that_blocks_stops_no_trading(kit: bk.Kit, receiver: Receiver) -> None:
    trading, told = threading.Event(), list[str]()

    def post(notification: Notification) -> None:
        assert trading.wait(20), "nobody trades while this waits"
        told.append(notification.signal_id)

    kit.records.notification.sink(post)
    await observe(kit, [opened("s-1")])
    async with asyncio.timeout(5):
        for _ in range(100):
            await asyncio.sleep(0.001)  # minutes of trading, in which the sink has long begun
    assert told == []
    trading.set()
    await receiver.until(lambda: told == ["s-1"])
    await kit.close()


async def test_backtests_disturb_nobody(kit: bk.Kit, backtest: Callable[..., Any], receiver: Receiver) -> None:
    def long(ctx: bk.Context) -> bk.Signal:
        return bk.Signal.bracket("long", price=ctx.price, take_profit_pct=1, stop_loss_pct=1)

    kit.records.notification.sink(hook(receiver))
    assert len((await backtest(long)).trades) > 0
    await kit.close()
    assert receiver.asked == 0


def test_what_is_no_sink_is_refused(tmp_path: Path) -> None:
    notifications = bk.Kit(tmp_path).records.notification
    with pytest.raises(UserError, match="give one of"):
        notifications.sink("https://example.com")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="address") as error:
        sinks.webhook(f"example.com/{SECRET}")
    assert SECRET not in str(error.value)
    with pytest.raises(UserError, match="chat"):
        sinks.telegram(SECRET, "")
    for address in (SECRET, f"nowhere://{SECRET}", f"discord://{SECRET}"):
        with pytest.raises(UserError, match="apprise cannot use the address of sink") as error:
            sinks.apprise(address)
        assert SECRET not in str(error.value)
    sink = sinks.webhook(f"https://user:{SECRET}@example.com/{SECRET}?token={SECRET}")
    assert repr(sink) == "HttpSink('webhook', 'example.com')"
    notifications.sink(sink)
    with pytest.raises(UserError, match="called 'webhook' already"):
        notifications.sink(sink)
