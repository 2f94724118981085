"""What `pip install backtest-kit` brings, and that it is enough."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import Distribution, distribution
from pathlib import Path

ROOT = Path(__file__).parent.parent


def core() -> dict[str, Distribution]:
    """The distributions that the core depends on, and what those depend on, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, Distribution] = {}
    pending: list[str] = list(project["dependencies"])
    while pending:
        requirement, _, marker = pending.pop().partition(";")
        matched = re.match(r"[\w.-]+", requirement)
        assert matched is not None
        if "extra ==" in marker or "win32" in marker or "Windows" in marker or matched[0] in found:
            continue
        found[matched[0]] = distribution(matched[0])
        pending += found[matched[0]].requires or []
    return found


def test_the_core_is_small() -> None:
    files = [file for each in core().values() for file in each.files or []]
    size = sum(Path(str(file.locate())).stat().st_size for file in files if Path(str(file.locate())).exists())
    assert size < 150e6, f"{size / 1e6:.0f} MB: {', '.join(core())}"


def test_the_core_is_enough_for_a_backtest_with_its_report(tmp_path: Path) -> None:
    """In an environment that has nothing else."""
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "backtest_kit").symlink_to(ROOT / "src/backtest_kit")
    for each in core().values():
        for top in {file.parts[0] for file in each.files or [] if ".." not in file.parts}:
            target = Path(str(each.locate_file(top)))
            if target.exists() and not (packages / top).exists():
                (packages / top).symlink_to(target)
    assert not (packages / "pyarrow").exists()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        program = "from backtest_kit.cli import main; main()"
        strategy = str(ROOT / "examples/trend.py")
        return subprocess.run(
            [sys.executable, "-S", "-c", program, "backtest", strategy, "--symbol", "BTCUSDT", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(packages)},
            capture_output=True,
            text=True,
        )

    done = run()
    assert done.returncode == 0, done.stderr
    assert "BTCUSDT" in done.stdout
    assert "lightweight-charts" in (tmp_path / "dump/backtest/trend.html").read_text(encoding="utf-8")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    done = run("--candles", "x.parquet")
    assert done.returncode == 2
    assert "x.parquet needs pyarrow: pip install 'backtest-kit[arrow]'" in " ".join(done.stderr.split())
