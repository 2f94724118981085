"""A strategy that asks a language model: every prompt is paid for once, and what was reasoned is found again.

backtest-kit backtest examples/llm_strategy.py --symbol BTCUSDT,ETHUSDT

A second run of the same command asks the model nothing. The model is a small server in this file, so that it runs
offline; MODEL_URL=https://... in the environment asks another one that speaks the chat completions API.
"""

import asyncio
import json
import os
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import Request, urlopen

import backtest_kit as bk

bk.add_exchange_schema("synthetic", source=bk.sources.synthetic(seed=7))
bk.add_frame_schema("fortnight", start_date="2024-06-01", end_date="2024-06-15")
bk.PersistStorageAdapter.use_file(mode="backtest")  # signals of a backtest too, for `backtest-kit records ls storage`

SYSTEM = 'You trade on hourly closes. Answer with JSON: {"answer": "long" or "wait", "why": "..."}.'
requests: Counter[str] = Counter()
runs: dict[str, str | None] = {}


class Model(BaseHTTPRequestHandler):
    """Plays the model: it reads the last close and the mean out of the prompt, and follows the trend."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        close, mean = map(float, re.findall(r"is (\d+)", body["messages"][-1]["content"])[:2])
        opinion = {"answer": "long" if close > mean else "wait", "why": f"{close:.0f} against a mean of {mean:.0f}"}
        message = {"role": "assistant", "content": json.dumps(opinion)}
        answer = json.dumps({"choices": [{"message": message}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        """Not a line for each request."""


def model_url() -> str:
    if url := os.environ.get("MODEL_URL"):
        return url
    server = ThreadingHTTPServer(("127.0.0.1", 0), Model)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/v1/chat/completions"


URL = model_url()


@bk.measure.cached(key=lambda ctx, prompt: (SYSTEM, prompt), name="model", version="1")
async def ask_model(ctx: bk.Context, prompt: str) -> dict[str, str]:
    """The model's opinion. The same prompt is asked once, by whichever run comes first."""
    requests[ctx.symbol] += 1
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}]
    body = json.dumps({"model": "small", "messages": messages}).encode()
    request = Request(URL, body, {"Content-Type": "application/json"})  # noqa: S310
    answer = await asyncio.to_thread(lambda: json.load(urlopen(request, timeout=60)))  # noqa: S310
    opinion: dict[str, str] = json.loads(answer["choices"][0]["message"]["content"])
    return opinion


async def opinion_now(ctx: bk.Context) -> dict[str, str]:
    """What the model thinks of the chart, and of what was learned from trades like the one it may propose."""
    close = (await ctx.candles("1h", 48)).close
    lessons = await ctx.memory("lessons", shared=True).search("long closed by stop loss", k=2)
    learned = " ".join(lesson.content for lesson in lessons) or "Nothing was learned yet."
    return await ask_model(ctx, f"{ctx.symbol} is {close[-1]:.0f}, its mean is {close.mean():.0f}. {learned}")


@bk.interval.once("1d")
async def daily_review(ctx: bk.Context) -> None:
    """Once a day, whatever happens."""
    close = (await ctx.candles("1d", 3)).close
    text = f"three days moved {(close[-1] / close[0] - 1) * 100:+.1f} %"
    await ctx.memory("days", shared=True).write(f"{ctx.when:%Y-%m-%d}", text)


async def get_signal(ctx: bk.Context) -> bk.Signal | None:
    runs[ctx.symbol] = ctx.run_id
    await daily_review(ctx)
    opinion = await opinion_now(ctx)
    ctx.log.info(f"the model says {opinion['answer']}", why=opinion["why"])
    if opinion["answer"] != "long":
        return None
    await ctx.memory("reasoning").write("thesis", opinion["why"], role="assistant")
    await ctx.state("plan").set({"why": opinion["why"], "reviews": 0})
    return bk.Signal.bracket("long", price=ctx.price, take_profit_pct=4, stop_loss_pct=2, minutes=24 * 60)


async def manage(ctx: bk.Context) -> None:
    """Every four hours: does what was thought at the entry still hold?"""
    if ctx.position is None or not ctx.position.minutes_open or ctx.position.minutes_open % 240:
        return
    opinion = await opinion_now(ctx)
    plan = await ctx.state("plan").update(lambda plan: {**plan, "reviews": plan["reviews"] + 1})
    await ctx.memory("reasoning").write(f"review {plan['reviews']}", opinion["why"], role="assistant")
    ctx.log.info("reviewed", review=plan["reviews"], says=opinion["answer"], pnl_pct=round(ctx.position.pnl_pct, 2))
    if opinion["answer"] == "wait" and ctx.position.pnl_pct > 0:
        await ctx.position.close(f"no longer holds: {plan['why']}")


async def learn(event: bk.PositionClosed, ctx: bk.Context) -> None:
    """A lesson that outlives the position."""
    trade = event.trade
    noted = await ctx.state("plan").get()  # by get_signal, and still the position's own unless that changed it
    plan = await ctx.state("plan", signal_id=trade.signal_id).get(noted)
    reason = trade.close_reason.replace("_", " ")
    lesson = f"A {trade.side} because of {plan['why']} was closed by {reason}: {trade.pnl_pct:+.1f} %."
    await ctx.memory("lessons", shared=True).write(trade.signal_id, lesson)
    ctx.log.info("learned", lesson=lesson)


def done(event: bk.RunDone) -> None:
    print(f"{event.symbol}: the model was asked {requests[event.symbol]} times, run {runs[event.symbol]}")


bk.on(bk.PositionClosed, learn)
bk.on(bk.RunDone, done)
bk.add_strategy_schema("llm", interval="1h", get_signal=get_signal, manage=manage)
