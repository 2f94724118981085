"""The tutorial is followed word for word, with servers of the test's own in place of the containers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pymongo
import pytest
from tests.servers import mongo_server, redis_server, running

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/tutorial-mongo.md"
UP, DOWN = "docker compose up -d --wait", "docker compose down"
BOT = [{"role": "readWrite", "db": "backtest-kit"}]


class Reader:
    """Somebody who types what the page says, in one shell."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.commands = 0
        self._servers = ExitStack()
        self._state = place / ".shell"
        clean = {name: value for name, value in os.environ.items() if not name.startswith("CC_")}
        path = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
        self._environment = {**clean, "PATH": path, "COLUMNS": "200"}

    def save(self, name: str, program: str) -> None:
        (self.place / name).write_text(program)

    def type(self, command: str) -> str:
        self.commands += 1
        if command == UP:
            self._start_servers()
            return ""
        if command == DOWN:
            self._servers.close()
            return ""
        script = f"set -e; [ ! -e {self._state} ] || . {self._state}\n{command}\nexport -p > {self._state}"
        done = subprocess.run(
            ["bash", "-c", script], cwd=self.place, env=self._environment, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        assert done.stderr == "", f"{command}\n{done.stderr}"
        return done.stdout

    def leave(self) -> None:
        self._servers.close()

    def _start_servers(self) -> None:
        """What the containers are: a replica set that knows the user `bot`, and a Redis, with the passwords of .env."""
        env = (self.place / ".env").read_text()
        password = dict(re.findall(r"^(\w+_PASSWORD)=(\w+)$", env, re.MULTILINE))
        assert len(set(password.values())) == 3, "each server has a password of its own"
        mongo = mongo_server()
        self._servers.enter_context(running(mongo))
        with pymongo.MongoClient[dict[str, Any]]("127.0.0.1", mongo.port) as client:
            client["backtest-kit"].command("createUser", "bot", pwd=password["MONGO_BOT_PASSWORD"], roles=BOT)
            client["x"].get_collection("x", write_concern=pymongo.WriteConcern("majority", j=True)).insert_one({})
        mongo.kill()
        mongo.options = ["--auth"]
        mongo.start()
        policy = ("--maxmemory", "256mb", "--maxmemory-policy", "volatile-lru")
        redis = redis_server("--requirepass", password["REDIS_PASSWORD"], *policy)
        self._servers.enter_context(running(redis))
        env = env.replace("127.0.0.1:27017", f"127.0.0.1:{mongo.port}").replace("PORT=6379", f"PORT={redis.port}")
        (self.place / ".env").write_text(env)


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    shutil.copy(ROOT / ".env.example", tmp_path)
    reader = Reader(tmp_path)
    yield reader
    reader.leave()


def blocks() -> list[tuple[str, str, str]]:
    """Kind and text of every block of the page, with the line above it."""
    return re.findall(r"([^\n]*)\n\n```(\w+)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_page_does_what_it_says(reader: Reader) -> None:
    for above, kind, text in blocks():
        if kind == "python":
            name = re.search(r"save this as `(\w+\.py)`:$", above, re.IGNORECASE)
            assert name, f"no file name above {text[:40]!r}"
            reader.save(name[1], text)
            continue
        assert kind == "console", kind
        assert text.startswith("$ ")
        for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
            command, *promised = part.splitlines()
            said = reader.type(command)
            for line in promised:
                pattern = r".*".join(re.escape(piece.strip()) for piece in line.split(" ... "))
                assert re.search(pattern, said), f"$ {command}\npromises {line!r}, but says\n{said}"
            if command.startswith("cmp "):
                assert said == ""
    assert {path.name for path in reader.place.glob(".env*")} == {".env", ".env.example"}, "passwords were left"
    assert reader.commands == PAGE.read_text().count("\n$ ")
    shown = "".join(path.read_text(errors="replace") for path in reader.place.glob("*.json"))
    assert "PASSWORD" not in shown


def test_page_lacks_no_block() -> None:
    assert len(blocks()) == PAGE.read_text().count("```") // 2 >= 8
