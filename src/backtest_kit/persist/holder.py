"""`Holder`: the process that has a lease, and whether it is gone."""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path

import msgspec

from backtest_kit.model.interval import iso
from backtest_kit.persist.writing import now_ms


class Holder(msgspec.Struct, frozen=True, rename="camel"):
    """What is stored of an owner."""

    owner: str
    """Random, so that no two acquisitions are ever the same."""
    pid: int
    host: str
    since: int
    """Wall clock of the acquisition, epoch ms, for people."""
    ttl_ms: int
    machine: str
    """Boot and process namespace: where equal and not empty, `pid` names a process that can be looked for."""
    started: str
    """When the process started, in the words of its kernel: tells it from a later one of the same pid."""
    released: bool = False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {iso(self.since // 1000 * 1000)}"


def this_process(ttl_ms: int) -> Holder:
    """This process as a new owner."""
    return Holder(
        owner=secrets.token_hex(16),
        pid=os.getpid(),
        host=socket.gethostname(),
        since=now_ms(),
        ttl_ms=ttl_ms,
        machine=_machine(),
        started=_state_of(os.getpid())[1],
    )


def is_gone(holder: Holder) -> bool:
    """Whether the owner is a process of this machine that has ended."""
    if not holder.machine or holder.machine != _machine():
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    state, started = _state_of(holder.pid)
    return bool(state) and (state in "ZX" or started != holder.started)


def is_neighbour(holder: Holder) -> bool:
    """Whether the owner is another process of this machine, so that `is_gone` tells of its end."""
    return bool(holder.machine) and holder.machine == _machine() and holder.pid != os.getpid()


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _state_of(pid: int) -> tuple[str, str]:
    """State letter and start time of a process; both empty where the kernel does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]
