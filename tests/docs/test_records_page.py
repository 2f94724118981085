"""The commands on the page about records, in their order, answer as the page shows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

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


def test_the_page_shows_what_its_commands_print(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CC_", "MODEL_"))}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    assert len(session()) > 5
    real: dict[str, str] = {}
    for command, expected in session():
        done = subprocess.run(  # noqa: S602  # the page is typed into a shell
            renamed(command, real),
            shell=True,
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        real |= dict(zip(RUN_ID.findall(expected), RUN_ID.findall(done.stdout), strict=False))
        assert plain(renamed(done.stdout, {ours: shown for shown, ours in real.items()})) == plain(expected), command
