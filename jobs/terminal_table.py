"""Rows for people: a table on a terminal.

Enters: cells as text. Leaves: lines on stdout, as wide as the terminal; what does not fit is folded. Names
of images, categories and models are others': what is an order to a terminal, or markup, is shown as text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def print_table(
    columns: Sequence[str] | None, rows: Iterable[Sequence[str]], *, numbers: bool = False
) -> None:
    """Print rows below their column names.

    Args:
        columns: None: no head, the first cell of a row is its name.
        rows: as many cells each as there are columns; a line break in a cell is no line break.
        numbers: cells after the first of a row are numbers, and end below each other.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [[Text(printable(cell)) for cell in row] for row in rows]
    table = Table(box=None, pad_edge=False, show_header=columns is not None)
    for number, name in enumerate(columns or [""] * len(cells[0] if cells else ())):
        table.add_column(
            Text(printable(name)),
            justify="right" if numbers and number else "left",
            style="bold" if columns is None and not number else "",
            overflow="fold",
        )
    for row in cells:
        table.add_row(*row)
    Console().print(table)


def printable(text: str) -> str:
    """Each character that is none to see, line breaks too, as U+FFFD."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
