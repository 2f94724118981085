"""Settings of all tests."""

from __future__ import annotations

import os
import signal

import hypothesis
import pytest

# A law does not break because the machine is busy or coverage slows it: time is for benchmarks.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# A shell has its jobs in the background ignore it, and what tests start and interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Locks of accounts are kept in the home of the user: here in one of the tests."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


pytest_plugins = ("tests.servers",)
