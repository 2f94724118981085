"""Tables of a report for a rich console, and as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from backtest_kit.report.tables import Table

_WIDTH: Final = 120


def rich_table(content: Table, title: Sequence[str], *, texts: int = 1, below: Sequence[str] = ()) -> RichTable:
    """`content` under `title` and above `below`. The first columns, `texts` of them, are left-aligned."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(
        title=Text("\n".join(title)),
        title_justify="left",
        caption=Text("\n".join(below)) if below else None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_footer=content.total is not None,
        collapse_padding=True,
        pad_edge=False,
    )
    for column, label in enumerate(content.header):
        text = column < texts
        footer = Text(content.total[column] if content.total else "")
        table.add_column(Text(label), footer, justify="left" if text else "right", no_wrap=text)
    for row in content.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def plain_text(table: RichTable) -> str:
    """The table in ASCII lines: a terminal or a redirected file may not support box-drawing characters."""
    from rich import box
    from rich.console import Console

    table.box = box.ASCII2
    console = Console(file=StringIO(), width=_WIDTH, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip("\n")
