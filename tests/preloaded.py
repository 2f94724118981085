"""What a command imports, imported: a process that has begun with this forks commands that start at once."""

from __future__ import annotations

import contextlib
import importlib
import io
import pkgutil

import numpy.ma
import pyarrow.parquet
import redis.asyncio
import rich.live
import rich.markdown
import rich.pretty
import rich.progress
import rich.table

import backtest_kit
import backtest_kit.cli
import backtest_kit.persist.backends.mongo.store
from backtest_kit.cli.app import app

for name in backtest_kit.__all__:
    getattr(backtest_kit, name)
for module in pkgutil.iter_modules(backtest_kit.cli.__path__, "backtest_kit.cli."):
    importlib.import_module(module.name)
# The pages of help and of a mistake import what they show themselves with.
for words in ("store ls --help", "store ls --limit x"):
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere), contextlib.suppress(SystemExit):
        app(words.split())

__all__ = ["numpy", "pyarrow", "redis", "rich"]
