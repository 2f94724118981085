"""The conformance kit itself: it stands alone, it is large enough, and it finds who breaks a promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from backtest_kit.persist.testing import StoreConformance

HERE = Path(__file__).parent
SCOPE = "asyncio_default_fixture_loop_scope=function"
"""Or pytest-asyncio itself warns."""

THIRD_PARTY = """
from backtest_kit.persist.backends.memory import MemoryStore
from backtest_kit.persist.testing import StoreConformance

class TestMine(StoreConformance):
    def make_store(self, place):
        return MemoryStore()
"""


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Pytest as somebody else would run it: without our configuration."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_kit_needs_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(THIRD_PARTY)
    done = run(tmp_path, "-q", "-W", "error", "-o", "asyncio_mode=strict", "-o", SCOPE)
    assert done.returncode == 0, done.stdout[-3000:]
    count = re.search(r"(\d+) passed", done.stdout)
    assert count is not None
    assert int(count[1]) > 80
    done = run(tmp_path, "-q", "-W", "error", "-o", "asyncio_mode=auto", "-o", SCOPE, "-k", "limit or record")
    assert done.returncode == 0, done.stdout[-3000:]


def test_failure_shows_what_was_compared_and_with_which_value(tmp_path: Path) -> None:
    broken = THIRD_PARTY.replace("return MemoryStore()", "return Broken()") + (
        "\nclass Broken(MemoryStore):\n    async def get(self, contract, key):\n"
        "        return None if contract.name == 'risk' else await super().get(contract, key)\n"
    )
    (tmp_path / "test_mine.py").write_text(broken)
    done = run(tmp_path, "-q", "-k", "test_record_comes_back_as_written")
    assert "assert None == Record(" in done.stdout
    assert "with contract 'risk'" in done.stdout


def test_every_broken_promise_is_found_by_its_case() -> None:
    source = (HERE / "liars.py").read_text()
    caught_by = dict(re.findall(r"^    (\w+): \"(test_\w+)\",$", source, re.MULTILINE))
    liars = {name for name in re.findall(r"^class (\w+)\(", source, re.MULTILINE) if not name.startswith("_")}
    assert set(caught_by) == liars
    assert len(liars) > 20
    nodes = [f"liars.py::Test{liar}::{case}" for liar, case in caught_by.items()]
    honest = [f"liars.py::TestMemoryStore::{case}" for case in sorted(set(caught_by.values()))]
    done = run(HERE, "-q", "--tb=no", "-rf", "-o", "asyncio_mode=auto", *nodes, *honest)
    found = set(re.findall(r"^FAILED liars\.py::Test(\w+)::", done.stdout, re.MULTILINE))
    assert found == liars, done.stdout[-3000:]


def test_every_case_is_async_so_that_both_modes_run_it() -> None:
    cases = [name for name in dir(StoreConformance) if name.startswith("test_")]
    assert len(cases) > 60
    for name in cases:
        assert getattr(StoreConformance, name).__code__.co_flags & 0x80, name
