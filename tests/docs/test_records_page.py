"""The commands on the page about records, in their order, answer as the page shows."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.commands import run_command

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "records.md"
RUN_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}")
WALL_CLOCK = re.compile(r'("entryId":"|"saidAtMs":|revision \d+ at )[-0-9a-fTZ:]+')


def session() -> list[tuple[str, str]]:
    """Commands and what the page says that they print."""
    blocks = re.findall(r"^```console\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    parts = re.split(r"^\$ (.+)\n", "".join(blocks), flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def plain(text: str) -> list[str]:
    return [line.rstrip() for line in WALL_CLOCK.sub(r"\1...", text).splitlines() if line.strip()]


def renamed(text: str, names: dict[str, str]) -> str:
    return RUN_ID.sub(lambda found: names.get(found[0], found[0]), text)


def typed(command: str, place: Path) -> subprocess.CompletedProcess[str]:
    """What a command prints; a shell is started for those that need one."""
    words = shlex.split(command)
    if words[0] == "backtest-kit" and "|" not in words:
        return run_command(*words[1:], cwd=place)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CC_")} | {"PATH": path}
    return subprocess.run(  # noqa: S602  # the page is typed into a shell
        command, shell=True, cwd=place, env=clean, capture_output=True, text=True, check=False
    )


def test_the_page_shows_what_its_commands_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MODEL_")]:
        monkeypatch.delenv(name)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    assert len(session()) > 5
    real: dict[str, str] = {}
    for command, expected in session():
        done = typed(renamed(command, real), tmp_path)
        assert done.returncode == 0, done.stderr
        real |= dict(zip(RUN_ID.findall(expected), RUN_ID.findall(done.stdout), strict=False))
        assert plain(renamed(done.stdout, {ours: shown for shown, ours in real.items()})) == plain(expected), command
