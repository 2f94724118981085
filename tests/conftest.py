"""Settings of all tests."""

from __future__ import annotations

import signal

import hypothesis

# A law does not break because the machine is busy or coverage slows it: time is for benchmarks.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# A shell has its jobs in the background ignore it, and what tests start and interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ("tests.servers",)
