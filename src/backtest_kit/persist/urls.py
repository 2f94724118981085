"""Stores by address: one line of text, such as `CC_STORE`, chooses a backend."""

from __future__ import annotations

from importlib import import_module
from typing import Final, cast

from backtest_kit.errors import UserError
from backtest_kit.persist.store import Store

_BACKENDS: Final = {
    "file": ("backtest_kit.persist.backends.file", "FileStore", "./dump"),
    "sqlite": ("backtest_kit.persist.backends.sqlite", "SqliteStore", "bot.db"),
    "memory": ("backtest_kit.persist.backends.memory", "MemoryStore", ""),
    "dummy": ("backtest_kit.persist.backends.dummy", "DummyStore", ""),
}
"""Scheme: the module, which is imported when it is asked for, the class, and an example of its path."""


def store_at(url: str, *, existing: bool = False) -> Store:
    """The store that `url` names, not open yet: `file:./dump`, `sqlite:bot.db`, `memory:` or `dummy:`.

    With `existing` it is opened to look at it: nothing is made, and what is no store is refused.

    Raises:
        UserError: no backend is called so, or its path is missing or superfluous.
    """
    scheme, _, path = url.partition(":")
    if scheme not in _BACKENDS:
        forms = ", ".join(f"{name}:{example}" for name, (_, _, example) in _BACKENDS.items())
        raise UserError(f"the store {url!r} has no known backend: write one of {forms}")
    module, name, example = _BACKENDS[scheme]
    if bool(path) != bool(example):
        raise UserError(f"the store {url!r} is not complete or says too much: write {scheme}:{example}")
    make = getattr(import_module(module), name)
    return cast(Store, make(path, existing=existing) if example else make())
