"""The public name of the sources, in a process that has used nothing else of the package."""

from __future__ import annotations

import subprocess
import sys


def test_sources_may_be_the_first_name_that_is_used() -> None:
    program = "import backtest_kit as bk; bk.sources.synthetic(seed=7)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
