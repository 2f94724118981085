"""The names that answers are stored under: apart for different functions, the same over restarts."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import backtest_kit as bk
from backtest_kit.persist.contracts import CONTRACTS
from backtest_kit.records.measure import Cached

SOURCE = """
import backtest_kit as bk
from backtest_kit.records.measure import Measure

def define(measure):
    @measure.cached()
    async def first(prompt: str) -> str:
        return "first " + prompt

    @measure.cached()
    async def second(prompt: str) -> str:
        return "second " + prompt

    return first, second
"""


def module_of(path: Path, source: str) -> ModuleType:
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def started_again(kit: bk.Kit) -> bk.Kit:
    """Another start of the program, on the same store."""
    again = bk.Kit()
    again.persistence.bind("*", kit.persistence.store_for(CONTRACTS["measure"], "live"))
    return again


async def test_a_bucket_is_a_name_and_a_source_and_no_order(kit: bk.Kit, tmp_path: Path) -> None:
    first, second = module_of(tmp_path / "one.py", SOURCE).define(kit.records.measure)
    assert (await first("a"), await second("a")) == ("first a", "second a")
    head, _, tail = SOURCE.partition("    @measure.cached()\n    async def second")
    swapped = (
        head.split("    @measure")[0]
        + "    @measure.cached()\n    async def second"
        + tail.replace("    return first", head[head.index("    @measure") :] + "    return first")
    )
    moved = module_of(tmp_path / "two.py", swapped).define(started_again(kit).records.measure)
    assert [each.bucket for each in moved] == [first.bucket, second.bucket]
    assert await moved[0]("a") == "first a"
    edited = module_of(tmp_path / "three.py", SOURCE.replace('"first "', '"new "'))
    changed = edited.define(started_again(kit).records.measure)
    assert changed[0].bucket != first.bucket
    assert changed[1].bucket == second.bucket
    assert await changed[0]("a") == "new a"


MODELS = """
MODEL = "{model}"

def define(measure, **options):
    @measure.cached(**options)
    async def ask(prompt: str = "hi") -> str:
        return MODEL + " says " + prompt

    return ask
"""


async def test_functions_of_one_source_in_two_files_do_not_share_answers_unasked(kit: bk.Kit, tmp_path: Path) -> None:
    one, two = (module_of(tmp_path / f"{model}.py", MODELS.format(model=model)) for model in ("large", "small"))
    assert await one.define(kit.records.measure)() == "large says hi"
    with pytest.raises(bk.UserError, match=r"large\.py:\d+\) and .*small\.py:\d+\) are two functions with the name"):
        two.define(kit.records.measure)
    own = two.define(kit.records.measure, name="ask the small one")
    assert await own() == "small says hi"
    assert await one.define(kit.records.measure, name="ask", version="1")() == "large says hi"
    assert await two.define(kit.records.measure, name="ask", version="1")() == "large says hi", "it was said so"


async def test_other_defaults_are_other_arguments(kit: bk.Kit) -> None:
    def defined(coin: str, **options: Any) -> Cached[Any]:
        @kit.records.measure.cached(**options)
        async def ask(coin: str = coin) -> str:
            return coin

        return ask

    assert [await defined(coin)() for coin in ("BTC", "ETH")] == ["BTC", "ETH"]
    one_for_all = {"key": lambda coin="": "everything"}
    assert await defined("BTC", **one_for_all, version="1")() == "BTC"
    with pytest.raises(bk.UserError, match="two functions with the name"):
        defined("ETH", **one_for_all, version="1")


async def test_keys_of_two_types_are_two_keys(kit: bk.Kit) -> None:
    values = [1, "1", 1.0, "1.0", True, "true", None, "null", "", '""', '"1"', [1], "[1]", {"a": 1}, '{"a": 1}',
              b"1", "NaN", float("nan"), "[" * 10_000]  # fmt: skip
    calls: list[Any] = []

    async def ask(value: Any) -> int:
        calls.append(value)
        return len(calls)

    by_key = kit.records.measure.cached(key=lambda value: value, name="by key")(ask)
    by_arguments = kit.records.measure.cached(name="by arguments")(ask)
    for cached in (by_key, by_arguments):
        calls.clear()
        assert [await cached(value) for value in values] == list(range(1, len(values) + 1))
        assert [await cached(value) for value in values] == list(range(1, len(values) + 1))


def test_functions_that_cannot_be_told_apart_need_a_name(kit: bk.Kit) -> None:
    model = "large"
    cached = kit.records.measure.cached

    async def ask(prompt: str) -> str:
        return model + prompt

    with pytest.raises(bk.UserError, match="uses model of the function around it"):
        cached()(ask)
    assert cached(name="large")(ask).bucket.startswith("large@")
    scope: dict[str, Any] = {}
    exec("async def unseen(prompt): return prompt", scope)  # noqa: S102
    with pytest.raises(bk.UserError, match="source of unseen was not found"):
        cached(name="unseen")(scope["unseen"])
    assert cached(version="2")(scope["unseen"]).bucket == "unseen@2"
    with pytest.raises(bk.UserError, match="async def"):
        cached()(lambda prompt: prompt)
    with pytest.raises(bk.UserError, match="interval is '7m'"):
        cached("7m")
    with pytest.raises(bk.UserError, match="version is 2"):
        cached(version=2)(ask)  # type: ignore[arg-type]
