"""Tables at a terminal. What stands in them is text that others wrote: nothing in it is obeyed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from pokestrator.telemetry import one_line

PIPED_WIDTH = 200
NUMBERS = ("version", "runs", "success", "p50", "mean cost")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on stdout. The last column is cut to what is left of the line."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    shown = [[one_line(cell, 200) for cell in row] for row in rows]
    for number, column in enumerate(columns):
        is_last = number == len(columns) - 1
        # No other column is ever cut: a name must be one that can be typed.
        width = None if is_last else max(map(len, [column, *(row[number] for row in shown)]))
        table.add_column(column, no_wrap=True, justify="right" if column in NUMBERS else "left", min_width=width)
    for row in shown:
        table.add_row(*map(Text, row))
    width = None if sys.stdout.isatty() else PIPED_WIDTH
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    console.print(table)


def share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def dollars(value: float | None) -> str:
    return "-" if value is None else f"${value:.4f}"


def utc(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
