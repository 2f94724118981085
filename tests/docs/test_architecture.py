"""Whatever ARCHITECTURE.md and CONTRIBUTING.md name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACES = (ROOT, ROOT / "src" / "backtest_kit", *(p for p in (ROOT / "src" / "backtest_kit").rglob("*") if p.is_dir()))
NAMED = re.compile(r"`((?:[\w.]+/)*[\w.]+(?:/|\.(?:py|pyi|md|yml|toml)))`")
TREE = re.compile(r"^  (?:  )?([a-z_]+)/ +(.*(?:\n {15,}.*)*)", re.MULTILINE)


@pytest.mark.parametrize("document", ["ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_every_file_that_is_named_exists(document: str) -> None:
    named = set(NAMED.findall((ROOT / document).read_text(encoding="utf-8")))
    assert len(named) > 10
    missing = {name for name in named if not any((place / name).exists() for place in PLACES)}
    assert not missing


def test_every_room_of_the_tree_exists() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    tree = text[text.index("```\nsrc/") : text.index("tests/ ")]
    rooms = {room for room, _ in TREE.findall(tree)}
    have = {p.name for p in (ROOT / "src" / "backtest_kit").iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert have <= rooms
    assert all(any((place / room).is_dir() for place in PLACES) for room in rooms)
