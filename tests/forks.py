"""Processes that start in a fraction of the time: forked from one that has imported what they need.

A child imports the module of its function before it begins, so this one imports nothing that costs time.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Final

FORKS: Final = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "secantus.cli", "secantus.server", "tests.preloaded"])


def serve(arguments: Sequence[str], log: Path) -> None:
    """Run MongoDB in this process, to the end of either."""
    from secantus.cli import main

    os.chdir(log.parent)
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = ["secantusd-py", *arguments]
    sys.exit(main())


def command(arguments: Sequence[str], cwd: str, environment: Mapping[str, str], stdout: str, stderr: str) -> None:
    """Run `backtest-kit` in this process, with what it writes in files."""
    from backtest_kit.cli import main

    _become("backtest-kit", arguments, cwd, environment, stdout, stderr)
    main()


def program(
    code: str, arguments: Sequence[str], cwd: str, environment: Mapping[str, str], stdout: str, stderr: str
) -> None:
    """Run `code` in this process as Python would, with what it writes in files."""
    _become("-c", arguments, cwd, environment, stdout, stderr)
    sys.path.insert(0, "")
    main = sys.modules["__main__"] = ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), main.__dict__)  # noqa: S102


def _become(
    name: str, arguments: Sequence[str], cwd: str, environment: Mapping[str, str], stdout: str, stderr: str
) -> None:
    from backtest_kit.persist import crashpoints

    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    crashpoints.arm(os.environ.get(crashpoints.VARIABLE, ""))  # it has read the environment of its parent
    for number, path in enumerate((os.devnull, stdout, stderr)):
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    sys.argv = [name, *arguments]
