"""Runs the tests of the Mongo store on FerretDB, a second server that speaks MongoDB's protocol: `make ferretdb`.

It is built once, with Go, into `$XDG_CACHE_HOME/backtest-kit` (`~/.cache` without it), and keeps its data in SQLite.
What it has not cannot pass: transactions, sessions and the commands that those tests use.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pymongo
from pymongo.errors import PyMongoError

VERSION = "v1.24.0"
MODULE = f"github.com/FerretDB/FerretDB@{VERSION}"
START_SECONDS = 60.0


def built() -> Path:
    """The program, built if it is not there yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "backtest-kit" / f"ferretdb-{VERSION}"
    program = cache / "ferretdb"
    if program.exists():
        return program
    if shutil.which("go") is None:
        sys.exit("FerretDB is built with Go, which is not installed: see https://go.dev/dl")
    told = subprocess.run(["go", "mod", "download", "-json", MODULE], check=True, capture_output=True, cwd="/")
    source = cache / "source"
    shutil.rmtree(source, ignore_errors=True)
    # A copy, because the module has an empty file where its program insists on a version.
    shutil.copytree(json.loads(told.stdout)["Dir"], source)
    for path in (source, *source.rglob("*")):
        path.chmod(path.stat().st_mode | 0o200)
    (source / "build" / "version" / "version.txt").write_text(f"{VERSION}\n")
    build = ["go", "build", "-tags", "ferretdb_no_postgresql", "-o", str(program), "./cmd/ferretdb"]
    subprocess.run(build, check=True, cwd=source)
    return program


def main() -> int:
    program = built()
    with tempfile.TemporaryDirectory(prefix="backtest-kit-ferretdb-") as place:
        data, port = Path(place) / "data", os.environ.get("FERRETDB_PORT", "27917")
        data.mkdir()
        address = f"mongodb://127.0.0.1:{port}/"
        options = [f"--sqlite-url=file:{data}/", f"--listen-addr=127.0.0.1:{port}", f"--state-dir={place}"]
        quiet = ["--handler=sqlite", "--telemetry=disable", "--debug-addr=-", "--log-level=error"]
        server = subprocess.Popen([program, *quiet, *options])
        try:
            wait_for(address, server)
            environment = {**os.environ, "CC_MONGO_CONNECTION_STRING": address}
            tests = sys.argv[1:] or ["tests/mongo"]
            return subprocess.run(
                [sys.executable, "-m", "pytest", "-q", *tests], env=environment, check=False
            ).returncode
        finally:
            server.terminate()
            server.wait()


def wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    with pymongo.MongoClient[dict[str, object]](address, serverSelectionTimeoutMS=200) as client:
        while True:
            try:
                client.admin.command("ping")
                return
            except PyMongoError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise


if __name__ == "__main__":
    sys.exit(main())
