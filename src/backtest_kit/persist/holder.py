"""`Holder`: the process that has a lease, and whether it is gone."""

from __future__ import annotations

import os
import socket
import uuid
from pathlib import Path
from typing import Final

import msgspec
import psutil

from backtest_kit.model.interval import iso
from backtest_kit.seams import SYSTEM, Seams

_IS_LINUX: Final = bool(psutil.LINUX)
_SAME_START_SECONDS: Final = 2.0
"""Nearer than this two start times are one: they are rounded, and read through a clock that may be set."""


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
    """Where equal and not empty, `pid` names a process that can be looked for."""
    started: float
    """When the process started, in seconds: tells it from a later one of the same pid."""
    released: bool = False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {iso(self.since // 1000 * 1000)}"


def this_process(ttl_ms: int, seams: Seams = SYSTEM) -> Holder:
    """This process as a new owner."""
    return Holder(
        owner=seams.random_hex(32),
        pid=os.getpid(),
        host=socket.gethostname(),
        since=seams.wall_ms(),
        ttl_ms=ttl_ms,
        machine=_machine(),
        started=_start_of(psutil.Process()),
    )


def is_gone(holder: Holder) -> bool:
    """Whether the owner is a process of this machine that has ended. In doubt it lives."""
    if not holder.machine or holder.machine != _machine():
        return False
    if not _exists(holder.pid):
        return True
    try:
        process = psutil.Process(holder.pid)
        ended = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        return ended or abs(_start_of(process) - holder.started) > _SAME_START_SECONDS
    except psutil.ZombieProcess:
        return True
    except psutil.Error:
        return False


def is_neighbour(holder: Holder) -> bool:
    """Whether the owner is another process of this machine, so that `is_gone` notices its end."""
    return bool(holder.machine) and holder.machine == _machine() and holder.pid != os.getpid()


def _exists(pid: int) -> bool:
    if psutil.WINDOWS:
        return bool(psutil.pid_exists(pid))
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # of another user, and psutil may not see it (hidepid)
    return True


def _machine() -> str:
    if _IS_LINUX:
        # A pid means another process in another container, and after the next boot. psutil has a word for neither.
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
        except OSError:
            return ""
    return f"{socket.gethostname()} {uuid.getnode():012x}"


def _start_of(process: psutil.Process) -> float:
    """When a process started: on Linux since the boot, because its wall clock time moves with the clock."""
    started = float(process.create_time())
    return started - float(psutil.boot_time()) if _IS_LINUX else started
