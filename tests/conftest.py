"""Settings of all tests."""

from __future__ import annotations

import importlib
import os
import pkgutil
import shutil
import signal
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from tests.samples import PROVING, SEED, size

import backtest_kit.engine
import backtest_kit.persist

pytest.register_assert_rewrite("backtest_kit.persist.testing")

# A law does not break because the machine is busy or coverage slows it: time is for benchmarks.
hypothesis.settings.register_profile("untimed", deadline=None, max_examples=size(50, 200))
hypothesis.settings.load_profile("untimed")

# A shell has its jobs in the background ignore it, and what tests start and interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

DISK = os.environ.setdefault("TESTS_DISK", tempfile.gettempdir())
"""Where temporary files lie on this machine; the workers of a run inherit it, with a TMPDIR that may be in memory."""
MEMORY = Path("/dev/shm")  # noqa: S108
LEAST_FREE = 4 << 30
TESTS = Path(__file__).parent
MEASURED = frozenset(("conformance", "crash", "engine", "mongo", "persist"))

# Temporary files lie in memory where there is room: a SIGKILL leaves the page cache alone, so a disk would make its
# tests only slower. What is about the disk itself asks for the fixture `disk`.
if "TMPDIR" not in os.environ and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= LEAST_FREE:
    os.environ["TMPDIR"] = tempfile.tempdir = str(MEMORY)


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: a third of a run is waiting for servers, clocks and killed processes."""
    return (os.cpu_count() or 1) + 1


def pytest_report_header() -> str:
    return f"everything, seed {SEED}" if PROVING else f"samples of seed {SEED}: SEED={SEED} draws them again"


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Before Hypothesis reads its own option."""
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = SEED


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Measure the imports of what is measured, and not those of the tests: they would take twice their time."""
    plugin: Any = session.config.pluginmanager.getplugin("_cov")
    if plugin is None or plugin.cov_controller is None:
        return (yield)
    for package in (backtest_kit.engine, backtest_kit.persist):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    plugin.cov_controller.pause()
    try:
        return (yield)
    finally:
        plugin.cov_controller.resume()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Measure the coverage of `persist` and `engine` by their own tests: measuring takes a test twice its time.

    What repeats one law many times passes the same lines, so that it is left out as well.
    """
    for item in items:
        repeats = any(item.get_closest_marker(name) for name in ("hypothesis", "slow"))
        if repeats or item.path.relative_to(TESTS).parts[0] not in MEASURED:
            item.add_marker("no_cover")


@pytest.fixture
def disk() -> Iterator[Path]:
    """A directory on the disk, for tests to which memory would be something else."""
    with tempfile.TemporaryDirectory(prefix="backtest-kit-", dir=DISK) as directory:
        yield Path(directory)


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Locks of accounts are kept in the home of the user: here in one of the tests."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


pytest_plugins = ("tests.servers",)
