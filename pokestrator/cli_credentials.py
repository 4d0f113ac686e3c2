"""`python -m pokestrator credentials …`: what subagents need to reach providers, such as STRIPE_API_KEY.

A value is read from a hidden prompt or from standard input. As an argument it would be in the shell's history and in
the list of processes: it is refused, and never shown again, wherever on the command line it stands.
"""

from __future__ import annotations

import getpass
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from pokestrator.credential_names import check_credential_name
from pokestrator.setting_checks import MAKE_SECRET_KEY
from pokestrator.terminal import accepted_settings, fail, interruptible, line_to_database

if TYPE_CHECKING:
    from pokestrator.store.credentials import Credentials

MAX_VALUE_BYTES = 32 * 1024  # Linux takes four times as much in one variable
LEAST_HIDDEN = 8  # characters; shorter values are not looked for in what an agent says: they are in ordinary words
CANNOT_STORE = (
    f"cannot store: POKESTRATOR_SECRET_KEY is not set. `{MAKE_SECRET_KEY}` prints a key: give it to the service and to "
    "this command, and keep it: what it encrypts cannot be read without it"
)
IN_ARGUMENTS = (
    "the value is never an argument: it would stay in the shell's history and be seen in the list of processes. Run "
    "`credentials set NAME` alone and type it when asked, or send it to standard input. If this was a real secret, "
    "replace it at its provider"
)


@click.group()
def credentials() -> None:
    """What subagents need to reach providers. Values are encrypted, and never shown."""


# Whatever else stands on the line may be the value: click's own errors would repeat it.
@credentials.command("set", context_settings={"ignore_unknown_options": True})
@click.argument("name")
@click.argument("rest", nargs=-1, type=click.UNPROCESSED, metavar="")
def set_(name: str, rest: tuple[str, ...]) -> None:
    """Store a credential under NAME, as a template names it. Asks for the value, or reads it from standard input."""
    if rest:
        fail(2, IN_ARGUMENTS)
    _check(name)
    from pokestrator.errors import StoreUnavailable
    from pokestrator.parts import make_vault

    settings = accepted_settings()
    try:
        if not make_vault(settings).can_store:
            fail(2, CANNOT_STORE)
    except StoreUnavailable as error:
        fail(3, str(error))
    value = _read_value(name)
    with _stored() as stored:
        is_new = stored.set(name, value)
    click.echo(f"{name} is stored." if is_new else f"{name} is stored; the value it had is overwritten.")
    if len(value) < LEAST_HIDDEN:
        click.echo(
            f"It is shorter than {LEAST_HIDDEN} characters: too short to be kept out of what agents say.", err=True
        )


@credentials.command("list")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def list_(as_json: bool) -> None:
    """List the stored credentials: name, when it was stored, when it was last changed."""
    with _stored() as stored:
        found = stored.list()
    if as_json:
        fields = [
            {"name": each.name, "created_at": _utc(each.created_at), "updated_at": _utc(each.updated_at)}
            | ({"problem": each.problem} if each.problem else {})
            for each in found
        ]
        click.echo(json.dumps(fields, indent=2))
        return
    for each in found:
        click.echo(f"{each.name}  {_utc(each.created_at)}  {_utc(each.updated_at)}  {each.problem}".rstrip())
    if not found:
        click.echo("There are no credentials.", err=True)


@credentials.command()
@click.argument("name")
def remove(name: str) -> None:
    """Delete the credential NAME; runs that need it end, and say so, from then on."""
    with _stored() as stored:
        if not stored.remove(name):
            fail(1, "there is no credential of this name")
    click.echo(f"{name} is removed.")


@credentials.command("new-key")
def new_key() -> None:
    """Print a new key for POKESTRATOR_SECRET_KEY."""
    from pokestrator.store import secrets

    click.echo(secrets.new_key())


@contextmanager
def _stored() -> Iterator[Credentials]:
    """The credentials in the settings' database, whose tables are made if no service has run on it yet."""
    from pokestrator.parts import make_vault
    from pokestrator.store.credentials import Credentials

    settings = accepted_settings()
    with line_to_database(settings, prepare=True) as line:
        yield Credentials(line, make_vault(settings))


def _check(name: str) -> None:
    try:
        check_credential_name(name)
    except ValueError as error:
        fail(2, str(error))


def _read_value(name: str) -> str:
    """The value from a hidden prompt, or all of standard input; without the line's end. Exits with 2 if it is none."""
    try:
        if sys.stdin.isatty():
            with interruptible():
                value = getpass.getpass(f"Value of {name} (it is not shown): ")
        else:
            value = sys.stdin.buffer.read(MAX_VALUE_BYTES + 2).decode()
    except EOFError:
        value = ""
    except UnicodeDecodeError:
        fail(2, "the value is no text in UTF-8")
    value = value.removesuffix("\n").removesuffix("\r")
    if not value.strip():
        fail(2, "the value is empty")
    if "\0" in value or len(value.encode(errors="replace")) > MAX_VALUE_BYTES:
        fail(2, f"the value holds a NUL character, or more than {MAX_VALUE_BYTES // 1024} KB")
    return value


def _utc(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
