"""What a command imports, imported: a process that has begun with this forks commands that start at once."""

from __future__ import annotations

import importlib
import pkgutil

import numpy.ma
import pyarrow.parquet
import rich.live
import rich.markdown
import rich.progress
import rich.table
import typer.main

import backtest_kit
import backtest_kit.cli
from backtest_kit.cli.app import app

for name in backtest_kit.__all__:
    getattr(backtest_kit, name)
for module in pkgutil.iter_modules(backtest_kit.cli.__path__, "backtest_kit.cli."):
    importlib.import_module(module.name)
typer.main.get_command(app)

__all__ = ["numpy", "pyarrow", "rich"]
