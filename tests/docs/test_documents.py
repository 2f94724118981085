"""What the documents show is run: every Python block of every page, and the names they promise."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.commands import run_command, run_program

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def programs(page: Path) -> list[str]:
    """The Python of a page: a block that begins with an import is a program, the others go on with the one before."""
    found: list[str] = []
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        if block.startswith(("import ", "from ")) or not found:
            found.append(block)
        else:
            found[-1] += block
    return found


PROGRAMS = [
    pytest.param(program, id=f"{page.stem}-{number}")
    for page in PAGES
    if page.stem != "tutorial-mongo"  # it wants servers, and is followed in a test of its own
    for number, program in enumerate(programs(page), 1)
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_python_of_a_page_runs(program: str, tmp_path: Path) -> None:
    done = run_program(program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


EXAMPLES = {
    path: re.search(r"^ *backtest-kit (.+)$", path.read_text(), re.MULTILINE)
    for path in sorted((ROOT / "examples").glob("*.py"))
}


def test_every_example_says_how_to_run_it() -> None:
    assert [path.name for path, found in EXAMPLES.items() if not found] == []


@pytest.mark.parametrize(
    "arguments",
    # What trades on paper never comes to an end by itself: it is run where the commands of live trading are.
    [
        pytest.param(found[1], id=path.name)
        for path, found in EXAMPLES.items()
        if found and not found[1].startswith("paper ")
    ],
)
def test_the_command_line_of_an_example_runs(arguments: str, tmp_path: Path) -> None:
    done = run_command(*arguments.split(), "--dump", tmp_path, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Charts: " in done.stdout


def test_the_package_s_docstring_runs(tmp_path: Path) -> None:
    import backtest_kit

    block = re.search(r"```python\n(.*?)```", backtest_kit.__doc__ or "", re.DOTALL)
    assert block
    done = run_program(block[1], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "BTCUSDT" in done.stdout
