"""Cut the power of a real file system, on a loop device, and look what is left: `make power`, as root.

    python tests/crash/power.py --file-system ext4 --rounds 10
    python tests/crash/power.py --file-system xfs --options logbsize=32k

A writer works on a fresh file system and says what it was promised. At some moment it is stopped, another program
syncs a file of its own, and what the device has by then is copied: that is the disk after a loss of power. The copy is
mounted, the store opened, and every promise checked. What only the page cache had is not in the copy.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backtest_kit.persist.backends.file import FileStore
from backtest_kit.persist.contracts import CONTRACTS, Contract
from backtest_kit.persist.store import Key, Write

RECORD_SECONDS = 0.05
"""After so long a record is durable. What was written less than that ago may be lost."""

MONEY: tuple[Contract, Key] = (CONTRACTS["signal"], ("s", "e", "A"))
BATCH: tuple[tuple[Contract, Key], ...] = tuple((CONTRACTS[name], ("s", "e", "B")) for name in ("signal", "schedule"))
STATE, LOG = CONTRACTS["state"], CONTRACTS["log"]


async def write(root: Path) -> None:
    """Write versions and print, for each, when it began, was acknowledged, and is to be durable."""
    store = FileStore(root)
    number = 0
    while True:
        number += 1
        text = f"{number}:" + "x" * random.randrange(6000)  # noqa: S311
        for name, work in (
            ("money", lambda: store.put(Write(*MONEY, text))),  # noqa: B023
            ("batch", lambda: store.batch([Write(*place, text) for place in BATCH])),  # noqa: B023
            ("state", lambda: store.put(Write(STATE, ("s", "b"), text))),  # noqa: B023
            ("fresh", lambda: store.put(Write(STATE, (f"s{number}", "b"), text))),  # noqa: B023
            ("log", lambda: store.put(Write(LOG, (f"{number:06d}",), text))),  # noqa: B023
        ):
            print("began", name, number, flush=True)
            await work()
            print("acknowledged", name, number, time.monotonic(), flush=True)


class Promised:
    """The least and the greatest number that may be there, by name."""

    def __init__(self, lines: list[str], stopped_at: float) -> None:
        self.least: dict[str, int] = {}
        self.greatest: dict[str, int] = {}
        for line in lines:
            kind, name, number, *at = line.split()
            if kind == "began":
                self.greatest[name] = int(number)
            # A second more than the promise: the machine may have been too busy to sync within it.
            elif name in ("money", "batch") or float(at[0]) < stopped_at - 2 * RECORD_SECONDS - 1:
                self.least[name] = int(number)

    def broken(self, name: str, found: int) -> bool:
        return not self.least.get(name, 0) <= found <= self.greatest.get(name, 0)


async def problems(root: Path, promised: Promised) -> list[str]:
    """What is not as it was promised."""
    store = FileStore(root)
    found: list[str] = []

    async def number(row: Contract, key: Key) -> int:
        record = await store.get(row, key)
        return 0 if record is None else int(str(record.value).partition(":")[0])

    batch = {await number(*place) for place in BATCH}
    if len(batch) != 1:
        found.append(f"a batch is torn: {batch}")
    for name, value in (
        ("money", await number(*MONEY)),
        ("batch", min(batch)),
        ("state", await number(STATE, ("s", "b"))),
    ):
        if promised.broken(name, value):
            found.append(f"{name} is {value}, not {promised.least.get(name, 0)} to {promised.greatest.get(name, 0)}")
    lines = {int(str(record.value).partition(":")[0]) async for record in store.scan(LOG)}
    fresh = {int(str(record.value).partition(":")[0]) async for record in store.scan(STATE) if record.key[0] != "s"}
    for name, values in (("log", lines), ("fresh", fresh)):
        if missing := {*range(1, promised.least.get(name, 0) + 1)} - values:
            found.append(f"of {name} {sorted(missing)} are missing")
    found += [f"{item.path} is blocked: {item.reason}" for item in await store.quarantined() if item.blocks]
    await store.close()
    return found


@contextmanager
def mounted(image: Path, place: Path, options: str) -> Iterator[None]:
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", options, str(image), str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def cut_once(work: Path, file_system: str, options: str) -> list[str]:
    image, copy = work / "disk.img", work / "after.img"
    image.unlink(missing_ok=True)
    with image.open("wb") as disk:
        disk.truncate(320 << 20)
    force = "-f" if file_system == "xfs" else "-F"
    subprocess.run([f"mkfs.{file_system}", "-q", force, str(image)], check=True)
    with mounted(image, work / "before", ",".join(filter(None, ("loop", options)))):
        command = [sys.executable, __file__, "--write", str(work / "before/dump")]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        lines: list[str] = []
        until = random.randrange(5, 400)  # noqa: S311
        while len(lines) < until:
            lines.append(writer.stdout.readline())
        os.kill(writer.pid, signal.SIGSTOP)
        os.waitpid(writer.pid, os.WUNTRACED)
        stopped_at = time.monotonic()
        other = os.open(work / "before/other", os.O_CREAT | os.O_WRONLY, 0o600)
        os.write(other, b"x")
        os.fsync(other)
        os.close(other)
        subprocess.run(["cp", "--sparse=always", str(image), str(copy)], check=True)
        writer.kill()
        lines += writer.stdout.read().splitlines()  # said before it was stopped, and not read yet
        writer.wait()
    promised = Promised([line for line in lines if line.strip()], stopped_at)
    extra = "nouuid" if file_system == "xfs" else ""
    with mounted(copy, work / "after", ",".join(filter(None, ("loop", extra)))):
        return asyncio.run(problems(work / "after/dump", promised))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file-system", default="ext4", help="ext4, xfs, ...: needs mkfs.NAME")
    parser.add_argument("--options", default="", help="mount options, such as data=writeback")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.write is not None:
        asyncio.run(write(asked.write))
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists():
        print("skipped: cutting the power of a loop device needs root and /dev/loop-control")
        return 0
    if shutil.which(f"mkfs.{asked.file_system}") is None:
        print(f"skipped: there is no mkfs.{asked.file_system}, install it or name another --file-system")
        return 0
    broken = 0
    for number in range(1, asked.rounds + 1):
        with tempfile.TemporaryDirectory(prefix="backtest-kit-power-") as place:
            found = cut_once(Path(place), asked.file_system, asked.options)
        broken += bool(found)
        print(
            f"{asked.file_system} {asked.options} round {number}: {'; '.join(found) or 'every promise kept'}",
            flush=True,
        )
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
