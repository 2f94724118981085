"""Faults between a bot and an exchange, injected and repeatable."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import Final, Literal, get_args

import msgspec

from backtest_kit.errors import UserError

FaultKind = Literal[
    "latency", "lose_request", "lose_response", "duplicate", "outage", "error", "rate_limit", "reject", "partial"
]


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One fault.

    - `latency`: the request is handled `latency_ms` later.
    - `lose_request`: the connection breaks before the request is carried out.
    - `lose_response`: it is carried out, and the connection breaks before the answer.
    - `duplicate`: it is carried out twice, and the second answer is sent.
    - `outage`: for `seconds` from the first request it hits, or for `count` requests, nothing is done and the
      connection breaks.
    - `error`: nothing is done; the answer is `status` with `code` and `message`.
    - `rate_limit`: nothing is done; the answer is 429, or 418 with `status`.
    - `reject`: a new order is refused.
    - `partial`: a new order is filled by no more than `fraction` of its quantity each time it meets the market;
      with `rest_expires` the rest expires, otherwise it stays open for the following minutes.
    """

    kind: FaultKind
    endpoint: str = "*"
    """A pattern for method and path, such as `POST */order`."""
    skip: int = 0
    """How many matching requests succeed first."""
    count: int = 1
    """How many it hits then; 0 for all."""
    chance: float = 1.0
    """The part of them that it hits."""
    latency_ms: int = 0
    """The delay, in real time; for every kind."""
    seconds: float = 0.0
    """How long an outage lasts, in real time."""
    status: int = 0
    code: int = -1000
    message: str = "An unknown error occurred while processing the request."
    fraction: Decimal = Decimal("0.5")
    rest_expires: bool = False

    @classmethod
    def parse(cls, text: str) -> Fault:
        """From `KIND` or `KIND,field=value,...`, such as `lose_response,endpoint=POST */order,count=2`.

        Raises:
            UserError: a kind, field or value that does not exist.
        """
        kind, *pairs = text.split(",")
        fields = dict(pair.partition("=")[::2] for pair in pairs)
        return cls.convert({"kind": kind, **fields})

    @classmethod
    def convert(cls, fields: object) -> Fault:
        """From plain fields, texts or not.

        Raises:
            UserError: as `parse`.
        """
        try:
            fault = msgspec.convert(fields, cls, strict=False)
        except msgspec.ValidationError as error:
            raise UserError(
                f"fault {fields!r:.200}: {error}: its kind is one of {', '.join(get_args(FaultKind))}, "
                f"its fields are {', '.join(field for field in cls.__struct_fields__ if field != 'kind')}"
            ) from None
        if not (0 < fault.fraction <= 1 and 0 <= fault.chance <= 1 and fault.skip >= 0 and fault.count >= 0):
            raise UserError(f"fault {fields!r:.200}: fraction and chance are up to 1, skip and count 0 or above")
        return fault


class Strike(msgspec.Struct, frozen=True):
    """The faults of one request."""

    faults: tuple[Fault, ...] = ()

    def of(self, *kinds: FaultKind) -> Fault | None:
        return next((fault for fault in self.faults if fault.kind in kinds), None)

    @property
    def latency_s(self) -> float:
        return sum(fault.latency_ms for fault in self.faults) / 1000


class Faults:
    """The faults that are set, and how often each has struck. Randomness comes from `seed`."""

    def __init__(self, seed: int = 7, *, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._chance: Final = random.Random(seed)  # noqa: S311  # repeatable, not secret
        self._monotonic_s = monotonic_s
        self._set: list[_Counted] = []

    def add(self, fault: Fault) -> None:
        self._set.append(_Counted(fault))

    def clear(self) -> None:
        self._set.clear()

    def listed(self) -> list[dict[str, object]]:
        """Each fault with the number of requests it has met and hit."""
        return [{**msgspec.to_builtins(each.fault), "met": each.met, "hit": each.hit} for each in self._set]

    def strike(self, method: str, path: str) -> Strike:
        """The faults of this request."""
        return Strike(tuple(each.fault for each in self._set if self._hits(each, f"{method} {path}")))

    def _hits(self, each: _Counted, request: str) -> bool:
        fault = each.fault
        if not fnmatchcase(request, fault.endpoint):
            return False
        each.met += 1
        if each.met <= fault.skip:
            return False
        if fault.kind == "outage" and fault.seconds:
            each.until_s = each.until_s or self._monotonic_s() + fault.seconds
            if self._monotonic_s() > each.until_s:
                return False
        elif fault.count and each.hit >= fault.count:
            return False
        if fault.chance < 1 and self._chance.random() >= fault.chance:
            return False
        each.hit += 1
        return True


class _Counted:
    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.met = 0
        self.hit = 0
        self.until_s = 0.0
