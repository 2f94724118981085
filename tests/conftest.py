"""Settings of all tests."""

from __future__ import annotations

import hypothesis

# A law does not break because the machine is busy or coverage slows it: time is for benchmarks.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

pytest_plugins = ("tests.servers",)
