"""The stores that every test of a record runs on."""

from __future__ import annotations

STORES = {"memory": "memory:", "file": "file:{place}/dump", "sqlite": "sqlite:{place}/bot.db"}
"""Address by name; `place` is a directory of the test's own."""

SHARED = {name: address for name, address in STORES.items() if name != "memory"}
"""Those that several processes may have open at once."""
