"""Tables and lines on standard output: as wide as the terminal, in a file as wide as they need."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def console(width_in_files: int = 160) -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=width_in_files)


def table(*headings: str) -> Table:
    rows = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        rows.add_column(heading, overflow="fold")
    return rows


def add(rows: Table, *cells: str | Text) -> None:
    """Add a row literally: a key may contain what looks like rich markup."""
    rows.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells))


def say(line: str) -> None:
    console().print(Text(line), soft_wrap=True)
