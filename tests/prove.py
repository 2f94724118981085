"""Runs what `make test` only samples, whole, and keeps what it said: `make prove`.

The last output is in `.prove/last.txt`, with the commit and the seed above it.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / ".prove" / "last.txt"


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def main() -> int:
    os.environ["PROVE"] = "1"
    sys.path.insert(0, str(ROOT))
    from tests.samples import SEED

    suites = {
        "every fault, kill, state and law of which `make test` draws a sample": [
            "-m", "pytest", "-n", "auto", "--dist", "worksteal", "-m", "sampled or hypothesis", *sys.argv[1:],
        ],
    }  # fmt: skip
    missing = "" if shutil.which("go") else "FerretDB was left out: Go, which builds it, is not installed."
    if not missing:
        suites["MongoDB's tests on FerretDB"] = ["tests/ferretdb.py"]
    OUTPUT.parent.mkdir(exist_ok=True)
    failed = False
    with OUTPUT.open("w") as kept:

        def tell(line: str) -> None:
            print(line, flush=True)
            kept.write(f"{line}\n")
            kept.flush()

        tell(f"commit {git('rev-parse', 'HEAD')}{' and what is not committed' if git('status', '--porcelain') else ''}")
        tell(f"seed {SEED}")
        tell(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, Python {platform.python_version()}, {platform.platform()}")
        for title, arguments in suites.items():
            tell(f"\n{title}")
            program = subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            assert program.stdout is not None
            for line in program.stdout:
                tell(line.rstrip("\n"))
            failed |= program.wait() != 0
        tell(f"\n{missing or 'Nothing was left out.'} {'FAILED' if failed else 'Passed'}.")
    print(f"This is kept in {OUTPUT}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
