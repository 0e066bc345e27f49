"""Print tables on standard output, so that no cell is cut."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

MAX_WIDTH = 10_000
"""Characters per line in which every table of ours fits."""


def print_table(table: "Table") -> None:
    """Print ``table`` on standard output.

    On a terminal it has the terminal's width, and long cells continue on further lines. A file, a
    pipe or a log of CI has no width: there each row is one line, as wide as its cells.
    """
    from rich.console import Console

    needed = Console(width=MAX_WIDTH).measure(table)
    console = Console(width=None if sys.stdout.isatty() else needed.maximum)
    for column in table.columns:
        column.overflow = "fold"
        column.no_wrap = column.no_wrap and needed.minimum <= console.width
    console.print(table)
