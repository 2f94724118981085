"""The command as a person runs it: a process, its output and its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.servers import FORKS

TIMEOUT_S = 120


def run_command(
    *arguments: str | Path, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `backtest-kit` in a process of its own, forked from one that has imported it: most of a run is imports.

    Settings of the caller's environment are left out.
    """
    words = [str(each) for each in arguments]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CC_")}
    with tempfile.TemporaryDirectory(prefix="backtest-kit-") as place:
        outputs = (f"{place}/stdout", f"{place}/stderr")
        process = FORKS.Process(
            target=_run, args=(words, str(cwd or Path.cwd()), {**clean, **(environment or {})}, *outputs)
        )
        process.start()
        try:
            process.join(TIMEOUT_S)
            if process.exitcode is None:
                raise subprocess.TimeoutExpired(words, TIMEOUT_S)
        finally:
            process.kill()
            process.join()
        stdout, stderr = (Path(output).read_text() for output in outputs)
    assert process.exitcode is not None
    return subprocess.CompletedProcess(words, process.exitcode, stdout, stderr)


def _run(arguments: list[str], cwd: str, environment: dict[str, str], stdout: str, stderr: str) -> None:
    from backtest_kit.cli import main

    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate((os.devnull, stdout, stderr)):
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    sys.argv = ["backtest-kit", *arguments]
    main()
