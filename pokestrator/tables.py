"""Tables at a terminal, and what stands in those of subagents: text that others wrote, none of which is obeyed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from pokestrator.telemetry import one_line

if TYPE_CHECKING:
    from pokestrator.store.versions import Figures, Judged, Version
    from pokestrator.subagents import Subagent

PIPED_WIDTH = 200  # where there is no terminal
LEAST_WIDTH = 20  # of the last column
GAP = 2
FIGURES = ("runs", "success", "p50", "mean cost")
NUMBERS = ("version", *FIGURES)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on stdout. The last column is cut to what is left of the line; the others never are."""
    from rich.box import SIMPLE_HEAD
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = [[Text(one_line(cell, 500)) for cell in row] for row in rows]
    widths = [
        max(cell_len(column), *(each[number].cell_len for each in shown), 0)
        for number, column in enumerate(columns[:-1])
    ]
    before = sum(widths) + GAP * len(widths)
    line = Console().width if sys.stdout.isatty() else PIPED_WIDTH
    left = max(LEAST_WIDTH, line - before)
    table = Table(box=SIMPLE_HEAD, padding=(0, GAP - 1, 0, 0), pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True, justify="right" if column in NUMBERS else "left")
    for row in shown:
        row[-1].truncate(left, overflow="ellipsis")
        table.add_row(*row)
    Console(width=before + left, markup=False, emoji=False, highlight=False).print(table)


def row_of(subagent: Subagent, version: Version) -> tuple[str, ...]:
    """A subagent with its current version, as the table of all shows it."""
    figures, said = cells_of(version.figures), version.definition.description
    return subagent.name, subagent.state, str(version.number), version.author, *figures, said


def print_history(examples: Sequence[tuple[str, str]], versions: Sequence[Version], verdicts: Sequence[Judged]) -> None:
    """Print what a subagent has learned, what it has said, and what people said of its results."""
    click.echo(f"{len(examples)} examples")
    for task, author in examples:
        click.echo(f"  {author:<8}  {one_line(task)}")
    if versions:
        rows = ((str(v.number), v.author, utc(v.at), *cells_of(v.figures), v.note) for v in versions)
        click.echo()
        print_table(("version", "author", "at", *FIGURES, "note"), rows)
    if verdicts:
        said = ((v.verdict, str(v.version), utc(v.at), str(v.request_id), v.note) for v in verdicts)
        click.echo()
        print_table(("verdict", "version", "at", "request", "note"), said)


def cells_of(figures: Figures) -> tuple[str, ...]:
    """What stands in the columns FIGURES."""
    if figures.success_share is None or figures.mean_cost_usd is None:
        return str(figures.runs), "-", "-", "-"
    p50 = "-" if figures.p50_seconds is None else f"{figures.p50_seconds:.1f} s"
    return str(figures.runs), f"{100 * figures.success_share:.0f} %", p50, f"${figures.mean_cost_usd:.4f}"


def fields_of(version: Version) -> dict[str, Any]:
    """A version and its figures, for JSON."""
    fields = {"version": version.number, "author": version.author, "at": utc(version.at), "note": version.note}
    return {**fields, **vars(version.figures)}


def judged_fields(judged: Judged) -> dict[str, Any]:
    """A verdict, for JSON."""
    return {**vars(judged), "request_id": str(judged.request_id), "at": utc(judged.at)}


def utc(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
