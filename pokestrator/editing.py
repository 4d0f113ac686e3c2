"""A definition in the owner's editor. What was typed is never lost: until it is stored, it is in a file."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from pokestrator.environ import names_editor
from pokestrator.errors import InvalidDefinition
from pokestrator.subagent_files import read_form
from pokestrator.subagents import Definition, Subagent
from pokestrator.telemetry import many_lines


@contextmanager
def sheet_of(name: str, text: str) -> Iterator[Path]:
    """A file to edit. If it was changed and the block fails, for whatever reason, it is left there, and it says so."""
    with tempfile.NamedTemporaryFile("w", prefix=f"{name}-", suffix=".txt", encoding="utf-8", delete=False) as file:
        file.write(text)
    path = Path(file.name)
    try:
        yield path
    except BaseException:
        if path.read_bytes() == text.encode():
            path.unlink()
        else:
            again = f"`python -m pokestrator subagents edit {name} --from {path}`"
            click.echo(f"Nothing is changed. The text is kept in {path}: {again} takes it.", err=True)
        raise
    path.unlink()


def edited(
    sheet: Path, text: str, subagent: Subagent, check: Callable[[Subagent, Definition], None]
) -> tuple[int, Definition]:
    """What the owner makes of `sheet`, which holds `text`, once `check` accepts it, and the version it is made from.

    Raises InvalidDefinition when they give up, or cannot be asked.
    """
    if not sys.stdin.isatty() and not names_editor():
        raise InvalidDefinition(["edit: there is no terminal to edit at, and neither VISUAL nor EDITOR is set"])
    while True:
        click.edit(filename=str(sheet))
        try:
            written = text_in(sheet)
            if written == text:
                return subagent.version, subagent.definition
            based_on, definition = read_form(written)
            check(subagent, definition)
            return based_on, definition
        except InvalidDefinition as error:
            if not sys.stdin.isatty():
                raise
            click.echo(listed(error), err=True)
            if not click.confirm("Edit it again?", default=True, err=True):
                raise


def text_in(path: Path) -> str:
    """A file's text. Raises InvalidDefinition."""
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise InvalidDefinition([f"file: cannot be read ({error.strerror})"]) from error
    except UnicodeDecodeError as error:
        raise InvalidDefinition([f"file: is not UTF-8 (byte {error.start})"]) from error


def listed(error: InvalidDefinition) -> str:
    """Its problems, a line for each."""
    return "\n".join(f"not accepted: {many_lines(problem)}" for problem in error.problems)
