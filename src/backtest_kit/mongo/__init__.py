"""MongoDB + Redis as the storage of a program: one call, and no strategy changes.

    from backtest_kit.mongo import setup

    setup()     # from CC_MONGO_CONNECTION_STRING, CC_REDIS_HOST, ... in the environment

The functions act on the default kit; `MongoSetup(kit)` has the same ones for another. Nothing is connected
before the first read or write. Needs `pip install 'backtest-kit[mongo]'`.
"""

from __future__ import annotations

from backtest_kit.default import default_kit
from backtest_kit.mongo.program import PROFILE, MongoSetup
from backtest_kit.persist.backends.mongo.settings import MongoSettings

_default = MongoSetup(default_kit)

setup = _default.setup
install = _default.install
set_config = _default.set_config
get_config = _default.get_config
get_mongo = _default.get_mongo
get_redis = _default.get_redis
forget_ids = _default.forget_ids
set_logger = _default.set_logger

__all__ = [
    "PROFILE",
    "MongoSettings",
    "MongoSetup",
    "forget_ids",
    "get_config",
    "get_mongo",
    "get_redis",
    "install",
    "set_config",
    "set_logger",
    "setup",
]
