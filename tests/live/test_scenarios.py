"""The table of scenarios names every one of them, and tests that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
SCENARIOS = 83


def rows() -> dict[int, str]:
    table = (TESTS / "live" / "SCENARIOS.md").read_text()
    return {int(number): proof for number, proof in re.findall(r"^\| (\d+) \|.*\| ([^|]+) \|$", table, re.MULTILINE)}


def names_in(path: Path) -> set[str]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, functions)}


def test_every_scenario_is_proven_or_impossible() -> None:
    assert sorted(rows()) == list(range(1, SCENARIOS + 1))
    for number, proof in rows().items():
        if proof.startswith("impossible: "):
            assert len(proof) > 30, number
            continue
        for test in proof.split(", "):
            path, _, name = test.partition("::")
            assert name.startswith("test_"), (number, test)
            assert name in names_in(TESTS / path), (number, test)


def test_most_scenarios_are_proven() -> None:
    assert sum(proof.startswith("impossible: ") for proof in rows().values()) <= 10
