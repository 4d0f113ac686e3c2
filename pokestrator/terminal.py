"""What all commands share at a terminal: settings, the database, signals, and how a command fails.

Their exit codes: 0 done, 1 failed, 2 not accepted (settings, arguments, task), 3 no database, 130 interrupted (by
SIGTERM 143, by SIGHUP 129).
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NoReturn

import click

from pokestrator.environ import process_redactor, process_settings
from pokestrator.errors import SettingsError, StoreUnavailable
from pokestrator.settings import Settings
from pokestrator.telemetry import configure_logging

if TYPE_CHECKING:
    from pokestrator.bootstrap import Application
    from pokestrator.store.pool import Line


def accepted_settings() -> Settings:
    """This process's settings; exits with 2 when they are not accepted."""
    try:
        return process_settings()
    except SettingsError as error:
        refuse(error)


@contextmanager
def database_url_at_hand(settings: Settings) -> Iterator[str]:
    """The URL of the settings' database; one that is embedded is joined, and left running if others use it.

    Exits with 3 when the database is not there, or goes away within the block.
    """
    from pokestrator import bootstrap
    from pokestrator.store.migrate import MigrationChanged

    configure_logging("ERROR", redact=process_redactor())
    with interruptible(), ExitStack() as stack:
        try:
            url = bootstrap.database_url(settings)
            stack.callback(bootstrap.leave_embedded_database, settings)
            yield url
        except (StoreUnavailable, MigrationChanged) as error:
            fail(3, f"no database: {error}")


@contextmanager
def application_here(settings: Settings) -> Iterator[Application]:
    """A started application in this process, for settings that say `inline`; nothing is left behind of it.

    Exits with 3 when it cannot start for want of its database, or when that goes away within the block.
    """
    from pokestrator import bootstrap

    with ExitStack() as stack:
        try:
            url = bootstrap.database_url(settings)
            stack.callback(bootstrap.leave_embedded_database, settings)
            application = bootstrap.build(settings, url, redactor=process_redactor())
            stack.callback(application.close)
            application.start()
        except StoreUnavailable as error:
            fail(3, f"database init failed: {error}")
        try:
            yield application
        except StoreUnavailable as error:
            fail(3, f"the database went away: {error}")


@contextmanager
def line_to_database(settings: Settings, *, prepare: bool = False) -> Iterator[Line]:
    """A connection to the settings' database; one that is embedded is joined, and left running if others use it.

    `prepare`: bring its tables up to date first. Exits with 3 when the database is not there.
    """
    from pokestrator.store.migrate import migrate
    from pokestrator.store.pool import Database

    with database_url_at_hand(settings) as url:
        database = Database(url)
        if prepare:
            migrate(database)
        line = database.line()
        try:
            yield line
        finally:
            line.close()


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, by KeyboardInterrupt, so that it cleans up after itself;
    then exit with 128 + the signal's number."""
    code = 128 + signal.SIGINT

    def interrupt(number: int, _frame: object) -> None:
        nonlocal code
        for caught in before:  # a second one must not interrupt the cleaning up
            signal.signal(caught, lambda *_: None)
        code = 128 + number
        raise KeyboardInterrupt

    # What is ignored already, as SIGHUP is by nohup, stays ignored.
    wanted = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is not signal.SIG_IGN]
    before = {each: signal.signal(each, interrupt) for each in wanted}
    try:
        yield
    except KeyboardInterrupt:
        fail(code, "Interrupted.")
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def refuse(error: SettingsError) -> NoReturn:
    fail(2, "\n".join(f"cannot start: {problem}" for problem in error.problems))


def fail(code: int, text: str) -> NoReturn:
    click.echo(text, err=True)
    sys.exit(code)
