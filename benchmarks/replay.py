"""A month of nine symbols, replayed by Backtest Kit, vectorbt and backtesting.py on the same candles.

    python benchmarks/replay.py [--rounds 5]
    python benchmarks/replay.py --store mongo

The workload stands in `peers/workload.py`. Each peer is installed, once, into a virtual environment of its
own under `benchmarks/.venvs`. Every system is one process that is warm before the first round counts; rounds
go from system to system, three runs each, so that drift hits all alike; figures are medians.

Backtest Kit is measured as a whole (candles read from
the file cache, checked, replayed, results made) and without what it takes to load the candles.

With `--store` it is Backtest Kit alone, with everything of the backtest in that store against everything in files:
candles, signals, notifications. The two take turns in one process; the first replay, which reads the candles, is shown
apart from those in which they are warm. For `mongo` servers of MongoDB and Redis are started, unless
CC_MONGO_CONNECTION_STRING and CC_REDIS_HOST name others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import venv
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
PEERS = {"vectorbt": "vectorbt==1.2.0", "backtesting": "backtesting==0.6.6"}
OURS, LOADING = "Backtest Kit", "loading alone"
VISIT = 3
SIMULATED_S = 9 * 30 * 24 * 3600


class Run(NamedTuple):
    seconds: float
    with_statistics: float
    trades: int
    peak_mb: float


class System:
    """A process that runs the workload once for every line it is sent."""

    def __init__(self, python: Path, script: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [python, HERE / "peers" / script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self) -> Run:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self._process.args} ended with {self._process.wait()}")
        return Run(**json.loads(answer))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def environment(name: str, requirement: str) -> Path:
    """The python of the peer's environment, made if it is not there."""
    home = HERE / ".venvs" / name
    python, ready = home / "bin" / "python", home / "ready"
    if not ready.exists() or ready.read_text() != requirement:
        print(f"installing {requirement} into {home}", flush=True)
        venv.create(home, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", requirement], check=True)
        ready.write_text(requirement)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help=f"measured rounds of {VISIT} runs each, at least 5")
    parser.add_argument("--store", choices=["sqlite", "mongo"], help="compare this store with files, and no peers")
    arguments = parser.parse_args()
    rounds = max(arguments.rounds, 5)
    if arguments.store:
        # Servers and drivers are of no use to the peers.
        sys.path[:0] = [str(HERE.parent), str(HERE / "peers")]
        from benchmarks.replay_stores import compare

        compare(arguments.store, rounds)
        return
    pythons = {name: environment(name, requirement) for name, requirement in PEERS.items()}
    this = Path(sys.executable)
    systems = {
        OURS: System(this, "run_backtest_kit.py"),
        LOADING: System(this, "run_backtest_kit.py", "load"),
        PEERS["vectorbt"]: System(pythons["vectorbt"], "run_vectorbt.py"),
        PEERS["backtesting"]: System(pythons["backtesting"], "run_backtesting.py"),
    }
    for system in systems.values():
        system.run()  # all are warm before the first round counts
    runs: dict[str, list[Run]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, system in systems.items():
            runs[name] += [system.run() for _ in range(VISIT)]
    for system in systems.values():
        system.close()
    report(runs)


def report(runs: dict[str, list[Run]]) -> None:
    loading = runs.pop(LOADING)
    alone = [
        whole._replace(
            seconds=whole.seconds - load.seconds, with_statistics=whole.with_statistics - load.with_statistics
        )
        for whole, load in zip(runs[OURS], loading, strict=True)
    ]
    rows = {f"{OURS}, candles loaded": alone, **runs}
    vectorbt = runs[PEERS["vectorbt"]]
    for part in ("seconds", "with_statistics"):
        base = statistics.median(getattr(run, part) for run in vectorbt)
        print("\nto the last trade" if part == "seconds" else "\nwith the statistics of each symbol")
        print(f"{'':30} {'wall s':>8} {'x real time':>12} {'trades':>7} {'peak MB':>8} {'speed of vectorbt':>18}")
        for name, each in rows.items():
            wall = statistics.median(getattr(run, part) for run in each)
            print(
                f"{name:30} {wall:8.3f} {SIMULATED_S / wall / 1e6:10.1f} M {each[-1].trades:7,d} "
                f"{each[-1].peak_mb:8.0f} {base / wall:16.2f} x"
                + ("  SLOWER THAN VECTORBT" if name.startswith(OURS) and wall > base else "")
            )


if __name__ == "__main__":
    main()
