"""The command as a person runs it: a process, its output and its exit code."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.forks import FORKS, command, program

TIMEOUT_S = 120


def run_command(
    *arguments: str | Path, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `backtest-kit` in a process of its own, forked from one that has imported it: most of a run is imports.

    Settings of the caller's environment are left out.
    """
    return _run(command, (), arguments, cwd, environment)


def run_program(
    code: str, *arguments: str | Path, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a Python program as `run_command` runs the command. What it tests is not which modules it imports."""
    return _run(program, (code,), arguments, cwd, environment)


def _run(
    target: Callable[..., None],
    first: tuple[str, ...],
    arguments: Sequence[str | Path],
    cwd: Path | None,
    environment: Mapping[str, str] | None,
) -> subprocess.CompletedProcess[str]:
    words = [str(each) for each in arguments]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CC_")}
    with tempfile.TemporaryDirectory(prefix="backtest-kit-") as place:
        outputs = (f"{place}/stdout", f"{place}/stderr")
        process = FORKS.Process(
            target=target, args=(*first, words, str(cwd or Path.cwd()), {**clean, **(environment or {})}, *outputs)
        )
        process.start()
        try:
            process.join(TIMEOUT_S)
            if process.exitcode is None:
                raise subprocess.TimeoutExpired(words, TIMEOUT_S)
        finally:
            process.kill()
            process.join()
        stdout, stderr = (Path(output).read_text() if Path(output).exists() else "" for output in outputs)
    assert process.exitcode is not None
    return subprocess.CompletedProcess(words, process.exitcode, stdout, stderr)
