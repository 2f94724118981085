"""What an operator is shown of a store: findings, quarantine, readings; and what may be forgotten at all."""

from __future__ import annotations

from enum import Enum
from typing import Any, Final

import msgspec

from backtest_kit.errors import UserError
from backtest_kit.persist.contracts import Contract, Durability

SAMPLES: Final = 15
"""How often something is measured for one median."""


class Finding(msgspec.Struct, frozen=True):
    """One thing that is wrong with a store, in plain words."""

    path: str
    """Where it is: relative to the root of the files, or as the quarantine names it."""
    problem: str
    blocks: bool = True
    """Whether something that was stored cannot be read for it; otherwise it is only worth knowing."""


class Quarantined(msgspec.Struct, frozen=True, rename="camel"):
    """What is known of one thing in quarantine."""

    path: str
    """Where it was found, relative to the root; its name in every operation on the quarantine."""
    contract: str
    key: list[Any]
    """As much of the key as was known from the place; the whole of it for a record file."""
    reason: str
    found_at: int
    """Wall clock, epoch ms."""
    blocks: bool = True
    """False for evidence that is only kept: its key has a sound record."""


class Status(Enum):
    """What follows from a reading."""

    OK = "ok"
    NEW = "new"
    """There is nothing yet; the first run makes it."""
    WARNING = "warning"
    """Works, and could be better."""
    DEGRADED = "degraded"
    """Something that was asked for is out of order; everything is as right without it, and slower."""
    WEAK = "weak"
    """Good enough to replay. What a live position needs is not promised."""
    FAULT = "fault"
    """Does not work, or will not for long."""


class Reading(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """One thing that was looked at."""

    subject: str
    status: Status
    detail: str
    remedy: str = ""
    """What to do about it: a command where there is one."""
    median_ms: float | None = None
    """How long it takes, where that was measured."""


def require_prunable(contract: Contract) -> None:
    """Raise `UserError` if nothing of this contract may be forgotten."""
    if contract.durability is Durability.MONEY:
        raise UserError(f"{contract.name} is of money class: its records are never forgotten, write an empty value")


def require_namespace(inside: bool) -> None:
    """Raise `UserError` unless this is a namespace of a store."""
    if not inside:
        raise UserError("only a namespace can be forgotten as a whole, such as store.namespace('backtest-1')")
