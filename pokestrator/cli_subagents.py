"""`python -m pokestrator subagents …`: the owner looks at subagents, changes them and moves them.

With --json, what a command found or did is one JSON value on stdout; all else that is said goes to stderr.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pokestrator.editing import edited, listed, sheet_of, text_in
from pokestrator.errors import CannotChange, InvalidDefinition, UnknownSubagent
from pokestrator.store.templates import MAX_BYTES, TEMPLATES_FOLDER, load_templates, object_of, read_object
from pokestrator.subagent_files import (
    as_json,
    document_of,
    form_of,
    plain_text_of,
    read_file,
    read_form,
    template_file_of,
)
from pokestrator.tables import FIGURES, fields_of, judged_fields, print_history, print_table, row_of
from pokestrator.telemetry import many_lines
from pokestrator.terminal import accepted_settings, fail, line_to_database

if TYPE_CHECKING:
    from pokestrator.keeping import Keeper
    from pokestrator.store.pool import Line
    from pokestrator.store.versions import Version
    from pokestrator.subagents import Definition, Subagent

STDIN = "-"
VERDICTS_SHOWN = 20  # the latest


def answers(command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes --json, and whose refusals end it: with 1 as things are, with 2 for what breaks a rule."""

    @wraps(command)
    def answered(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except (UnknownSubagent, CannotChange) as error:
            fail(1, many_lines(str(error)))
        except InvalidDefinition as error:
            fail(2, listed(error))

    return click.option("--json", "wants_json", is_flag=True, help="As JSON.")(answered)


note_option = click.option("--note", default="", help="Why; it is kept with the version.")


@click.group()
def subagents() -> None:
    """What tasks are given to: look at them, change them, move them."""


@subagents.command("list")
@click.option("--all", "archived", is_flag=True, help="Those that are archived too.")
@click.option("--limit", default=1_000, show_default=True, type=click.IntRange(min=1), help="How many at most.")
@answers
def list_(archived: bool, limit: int, wants_json: bool) -> None:
    """List subagents by their names, with what their current versions did in the runs that are kept."""
    with _keeper() as keeper:
        found, unused = keeper.all(limit + 1, archived=archived), keeper.unused()
    if len(found) > limit:
        click.echo(f"There are more than these {limit}; --limit shows them.", err=True)
    if wants_json:
        click.echo(json.dumps([_summary(*each) for each in found[:limit]], indent=2))
        return
    columns = ("name", "state", "version", "author", *FIGURES, "description")
    print_table(columns, (row_of(*each) for each in found[:limit])) if found else click.echo(
        "There are none.", err=True
    )
    if unused:
        click.echo(f"Templates that no task has used yet: {', '.join(unused)}.", err=True)


@subagents.command()
@click.argument("name")
@click.option("--version", "number", type=click.IntRange(min=1), help="This version in place of the current one.")
@answers
def show(name: str, number: int | None, wants_json: bool) -> None:
    """Show all of the subagent NAME: what it says, its examples, its versions."""
    with _keeper() as keeper:
        subagent, versions, examples = keeper.get(name), keeper.versions(name), keeper.examples(name)
        verdicts = keeper.verdicts(name, VERDICTS_SHOWN)
        wanted = number or (subagent.version if subagent else None)
        shown = keeper.version(name, wanted) if wanted else None
        definition = shown.definition if shown else keeper.template(name).definition()
    if wants_json:
        fields = {
            "name": name,
            "state": subagent.state if subagent else "unused",
            "origin": subagent.origin if subagent else "template",
            "current_version": subagent.version if subagent else None,
            **(fields_of(shown) if shown else {"version": None}),
            "definition": definition.model_dump(mode="json"),
            "examples": [{"task": task, "author": author} for task, author in examples],
            "versions": [fields_of(version) for version in versions],
            "verdicts": [judged_fields(each) for each in verdicts],
        }
        click.echo(json.dumps(fields, indent=2))
        return
    is_what = f"{subagent.state}, {subagent.origin}" if subagent else "a template that no task has used yet"
    click.echo(f"{name}: {is_what}" + (f", version {shown.number} of {len(versions)}" if shown else ""))
    click.echo(many_lines(plain_text_of(definition)))
    print_history(examples, versions, verdicts)


@subagents.command()
@click.argument("name")
@click.argument("a", type=int, required=False)
@click.argument("b", type=int, required=False)
@answers
def diff(name: str, a: int | None, b: int | None, wants_json: bool) -> None:
    """Show what version B of NAME (default: the current one) changes in version A (default: the one before B)."""
    with _keeper() as keeper:
        subagent = keeper.get(name)
        new = b or (subagent.version if subagent else 1)
        old = new - 1 if a is None else a
        if old < 1:
            raise CannotChange(f"{name} has no version before version {new}")
        before, after = (plain_text_of(keeper.version(name, each).definition).split("\n") for each in (old, new))
    lines = list(difflib.unified_diff(before, after, f"{name} version {old}", f"{name} version {new}", lineterm=""))
    if wants_json:
        click.echo(json.dumps({"name": name, "from": old, "to": new, "diff": "\n".join(lines)}, indent=2))
        return
    for line in lines:
        click.secho(many_lines(line), fg={"+": "green", "-": "red"}.get(line[0]))
    if not lines:
        click.echo(f"Versions {old} and {new} of {name} say the same.", err=True)


@subagents.command()
@click.argument("name")
@note_option
@click.option(
    "--from", "source", type=click.Path(path_type=Path), help="Take this text, which an earlier edit has kept."
)
@answers
def edit(name: str, note: str, source: Path | None, wants_json: bool) -> None:
    """Edit the subagent NAME in $VISUAL or $EDITOR; what is saved there becomes its next version."""
    from pokestrator.keeping import checked_note

    checked_note(note)
    with _line() as (line, keeper):

        def check(subagent: Subagent, definition: Definition) -> None:
            line.close()  # it may have been dropped while the owner wrote; the next use opens it again
            keeper.check_edit(subagent, definition)

        now = keeper.as_it_is(name)
        if source is not None:
            based_on, definition = read_form(text_in(source))
            now = keeper.edit(name, definition, based_on=based_on, note=note)
        else:
            form = form_of(name, now.version, now.definition)
            with sheet_of(name, form) as sheet:
                based_on, definition = edited(sheet, form, now, check)
                if definition != now.definition:
                    now = keeper.edit(name, definition, based_on=based_on, note=note)
    changed = now.version != based_on
    said = f"{name} has version {now.version} now." if changed else "Nothing is changed."
    _tell(wants_json, {"name": name, "version": now.version, "changed": changed}, said)


@subagents.command()
@click.argument("name")
@click.option("--to", type=click.IntRange(min=1), help="The version to go back to; default: the one before.")
@answers
def rollback(name: str, to: int | None, wants_json: bool) -> None:
    """Have the subagent NAME say again what an earlier version said, by a new version.

    Where the description changes by that, tasks that it took up since are its examples no longer; yours stay.
    """
    with _keeper() as keeper:
        now, back_to = keeper.roll_back(name, to)
    fields = {"name": name, "version": now.version, "back_to": back_to}
    _tell(wants_json, fields, f"{name} is back to version {back_to}; that is its version {now.version} now.")


@subagents.command()
@click.argument("name")
@answers
def archive(name: str, wants_json: bool) -> None:
    """Give the subagent NAME no more tasks. All else of it is kept."""
    with _keeper() as keeper:
        now = keeper.archive(name)
    _tell(wants_json, {"name": name, "state": now.state}, f"{name} is archived.")


@subagents.command()
@click.argument("name")
@answers
def restore(name: str, wants_json: bool) -> None:
    """Bring the archived subagent NAME back."""
    with _keeper() as keeper:
        now, twins = keeper.restore(name), keeper.twins(name)
    if twins:
        click.echo(
            f"Tasks may now go to {' or '.join(twins)} as well, whose description says nearly the same.", err=True
        )
    state = "active" if now.state == "active" else f"on {now.state}"
    _tell(wants_json, {"name": name, "state": now.state}, f"{name} is {state} again.")


@subagents.command()
@click.argument("name")
@click.argument("new_name")
@answers
def rename(name: str, new_name: str, wants_json: bool) -> None:
    """Give the subagent NAME the name NEW_NAME."""
    with _keeper() as keeper:
        now = keeper.rename(name, new_name)
    _tell(wants_json, {"name": now.name, "renamed_from": name}, f"{name} is called {now.name} now.")


@subagents.command()
@click.argument("name")
@click.option("--as-template", is_flag=True, help="As a file for templates/.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write this file; in a folder: NAME.json.")
@click.option("--force", is_flag=True, help="Write over a file that is there.")
@click.option(
    "--learned/--not-learned", default=None, help="With or without tasks of people; default: not in a template."
)
@answers
def export(
    name: str, as_template: bool, output: Path | None, force: bool, learned: bool | None, wants_json: bool
) -> None:
    """Write the subagent NAME as JSON, to stdout or to a file, for `import` or as a template."""
    with _keeper() as keeper:
        moved = keeper.export(name, learned=not as_template if learned is None else learned)
    make = template_file_of if as_template else document_of
    text = as_json(make(moved.name, moved.definition, moved.examples))
    if moved.left_out:
        click.echo(f"Left out of its examples: {moved.left_out}.", err=True)
    if output is None:
        click.echo(text.encode())
        return
    path = output / f"{name}.json" if output.is_dir() else output
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(f"{text}\n")
    except FileExistsError:
        fail(1, f"{path} is there already; --force writes over it")
    except OSError as error:
        fail(1, f"{path} cannot be written ({error.strerror})")
    _tell(wants_json, {"name": name, "file": str(path)}, f"{name} is written to {path}.")


@subagents.command("import")
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--replace", is_flag=True, help="If there is one of this name, give it a new version.")
@note_option
@answers
def import_(file: Path, replace: bool, note: str, wants_json: bool) -> None:
    """Store the subagent in FILE ("-": standard input), which `export` wrote or which is a template."""
    is_stdin = str(file) == STDIN
    value = object_of(sys.stdin.buffer.read(MAX_BYTES + 1)) if is_stdin else read_object(file)
    name, definition, examples = read_file(value)
    with _keeper() as keeper:
        try:
            now, before = keeper.take_in(name, definition, examples, replace=replace, note=note or "imported")
        except CannotChange as error:
            raise error if replace else CannotChange(f"{error}: --replace does that") from error
    fields = {"name": name, "version": now.version, "state": now.state, "created": before is None}
    if before is None:
        said = f"{name} is stored, and active."
    elif now.version == before.version:
        said = f"{name} says this already: there is no new version. Examples that it did not know are added."
    else:
        said = f"{name} has version {now.version} now."
    if now.state == "archived":
        said += " It is archived: `subagents restore` brings it back."
    _tell(wants_json, fields, said)


@contextmanager
def _keeper() -> Iterator[Keeper]:
    with _line() as (_, keeper):
        yield keeper


@contextmanager
def _line() -> Iterator[tuple[Line, Keeper]]:
    """A line to the settings' database, whose tables are made if need be, and the owner's hand there."""
    from pokestrator.environ import process_redactor
    from pokestrator.keeping import Keeper
    from pokestrator.parts import make_vault
    from pokestrator.store.credentials import Credentials

    settings = accepted_settings()
    templates, _ = load_templates(TEMPLATES_FOLDER)
    with line_to_database(settings, prepare=True) as line:
        vault, redactor = make_vault(settings), process_redactor()
        redactor.learn([*vault.keys, *Credentials(line, vault).every_value()])
        yield line, Keeper(line, templates, redactor)


def _tell(wants_json: bool, fields: dict[str, Any], said: str) -> None:
    click.echo(json.dumps(fields, indent=2) if wants_json else said)


def _summary(subagent: Subagent, version: Version) -> dict[str, Any]:
    said = {"name": subagent.name, "state": subagent.state, "origin": subagent.origin}
    return {**said, **fields_of(version), "description": version.definition.description}
