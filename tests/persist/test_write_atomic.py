from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from backtest_kit.errors import BacktestKitError, Outcome, OutOfSpace, RetryLater
from backtest_kit.persist.atomic import write_atomic
from backtest_kit.persist.files import Disk
from backtest_kit.persist.testing.faults import FaultFS


@pytest.mark.parametrize("durable", [True, False])
def test_creates_directories_and_replaces_the_content(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "a" / "b" / "file.json"
    write_atomic(path, b"old and longer", durable=durable)
    write_atomic(path, b"new", durable=durable)
    assert path.read_bytes() == b"new"
    assert [file.name for file in path.parent.iterdir()] == ["file.json"]


def test_empty_content_makes_an_empty_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "empty", b"")
    assert (tmp_path / "empty").read_bytes() == b""


@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.ENOSPC, OutOfSpace), (errno.EDQUOT, OutOfSpace), (errno.EIO, RetryLater), (errno.EROFS, RetryLater)],
)
def test_a_failed_sync_leaves_the_old_content_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: type[BacktestKitError]
) -> None:
    path = tmp_path / "file.json"
    write_atomic(path, b"old")

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(expected, match=r"file\.json") as raised:
        write_atomic(path, b"new")
    assert raised.value.outcome is Outcome.NOT_DONE
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["file.json"]


@pytest.mark.skipif(os.name == "nt", reason="Windows syncs no directory")
def test_a_failed_sync_of_the_directory_says_that_the_write_may_have_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.json"
    write_atomic(path, b"old")
    real, calls = os.fsync, []

    def refuse_second(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.EIO, "I/O error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_second)
    with pytest.raises(RetryLater) as raised:
        write_atomic(path, b"new")
    assert raised.value.outcome is Outcome.UNKNOWN
    assert path.read_bytes() == b"new"


def test_a_file_in_the_place_of_a_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(RetryLater, match="deep"):
        write_atomic(tmp_path / "file" / "deep", b"y")
    assert (tmp_path / "file").read_bytes() == b"x"


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace", "close"])
def test_no_space_leaves_no_litter_and_the_old_content(tmp_path: Path, call: str) -> None:
    path, faults = tmp_path / "file", FaultFS()
    write_atomic(path, b"old", disk=Disk(faults))
    faults.inject(call, errno.ENOSPC)
    with pytest.raises(OutOfSpace, match="file"):
        write_atomic(path, b"new", disk=Disk(faults))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    assert faults.opened == {}


@pytest.mark.skipif(os.name == "nt", reason="Windows syncs no directory")
def test_directories_that_it_makes_are_durable_in_those_above(tmp_path: Path) -> None:
    faults = FaultFS()
    write_atomic(tmp_path / "a" / "b" / "report.md", b"new", disk=Disk(faults))
    synced = [path for call, path in faults.history if call == "fsync"]
    assert synced[:2] == [str(tmp_path), str(tmp_path / "a")]
    assert synced[-1] == str(tmp_path / "a" / "b")
    faults.history.clear()
    write_atomic(tmp_path / "c" / "cache.json", b"new", durable=False, disk=Disk(faults))
    assert "fsync" not in {call for call, _ in faults.history}
