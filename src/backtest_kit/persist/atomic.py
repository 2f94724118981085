"""One file replaced as a whole: a reader sees the old bytes or the new ones, never a mixture."""

from __future__ import annotations

from pathlib import Path

from backtest_kit.errors import Outcome
from backtest_kit.persist.files import Disk, disk_error


def write_atomic(path: Path, data: bytes, *, durable: bool = True, disk: Disk | None = None) -> None:
    """Make `data` the content of `path`, creating its directories. Blocks: call it in a thread.

    For what people read: the umask decides who else may. `durable` also makes it survive a loss of power: the
    file, its directory and every directory made for it are synced before the return. `disk` is where tests put
    one that fails.

    Raises:
        OutOfSpace: the disk or the quota is full.
        RetryLater: any other refusal of the system; `outcome` says whether the new bytes may be in place.
    """
    disk = disk or Disk(private=False)
    directory = str(path.absolute().parent)
    outcome = Outcome.NOT_DONE
    try:
        disk.make_directories(directory, sync=durable)
        temp = disk.write_temp(directory, data, sync=durable)
        disk.rename(temp, str(path.absolute()))
        outcome = Outcome.UNKNOWN
        if durable:
            disk.sync_directory(directory)
    except OSError as error:
        raise disk_error(error, "write", path, outcome) from error
