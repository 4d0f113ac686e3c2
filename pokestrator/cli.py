"""The person's door: `python -m pokestrator …`.

Exit codes: 0 done, 1 failed, 2 not accepted (settings, arguments, task), 3 no database, 130 interrupted (by SIGTERM
143, by SIGHUP 129).
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import click

from pokestrator import __version__
from pokestrator.cli_credentials import credentials
from pokestrator.cli_feedback import feedback
from pokestrator.cli_route import route
from pokestrator.cli_subagents import subagents
from pokestrator.environ import process_redactor, process_settings, server_environment
from pokestrator.errors import InvalidTask, LeaseLost, SettingsError, StoreUnavailable
from pokestrator.intake import new_job
from pokestrator.jobs import CallbackState, Channel, Job, JobState, NewJob, Outcome
from pokestrator.settings import Settings
from pokestrator.store.templates import TEMPLATES_FOLDER, load_templates
from pokestrator.telemetry import configure_logging, one_line
from pokestrator.terminal import accepted_settings, application_here, fail, interruptible, line_to_database, refuse

if TYPE_CHECKING:
    from pokestrator.bootstrap import Application
    from pokestrator.store.callbacks import Callbacks

# A command imports what it needs when it is called: MCP's and PostgreSQL's libraries take a second that `serve`, which
# only hands over to gunicorn, would spend for nothing.

ROOT = Path(__file__).parents[1]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pokestrator")
def main() -> None:
    """Gives Poke abilities that grow while people use it."""


main.add_command(credentials)
main.add_command(subagents)
main.add_command(feedback)
main.add_command(route)


@main.command()
def serve() -> None:
    """Serve Poke over MCP, under gunicorn, on HOST and PORT."""
    try:
        environment = server_environment()
    except SettingsError as error:
        refuse(error)
    # exec: signals reach gunicorn itself.
    os.execve(sys.executable, [sys.executable, "-m", "gunicorn", "-c", str(ROOT / "gunicorn.conf.py")], environment)


@main.command()
@click.option("--task", help="Send this task in place of the story's three.")
def demo(task: str | None) -> None:
    """Watch tasks go in and results come back, in a temporary folder. Without a key, Claude is scripted."""
    from pokestrator.demo.story import DemoFailed, run_demo

    configure_logging("ERROR")
    try:
        with interruptible():
            run_demo(click.echo, task)
    except (DemoFailed, ValueError) as error:
        fail(1, f"demo failed: {error}")
    click.echo("\nAll went as it should.")


@main.command()
@click.argument("task")
def run(task: str) -> None:
    """Do one TASK here and now ("-" reads it from standard input). Result on stdout, progress on stderr."""
    from pokestrator import bootstrap

    try:
        # Nothing is sent for a task from a terminal, so that no key of Poke's is missed.
        settings = process_settings().model_copy(update={"inline": True, "poke_dry_run": True})
        wanted = new_job(sys.stdin.read() if task == "-" else task, channel=Channel.NONE)
    except SettingsError as error:
        refuse(error)
    except InvalidTask as error:
        fail(2, str(error))
    configure_logging("DEBUG" if settings.log_level == "DEBUG" else "ERROR", redact=process_redactor())
    for notice in bootstrap.notices(settings):
        click.echo(notice, err=True)
    with interruptible():
        outcome = _run_here(settings, wanted)
    if outcome is None:
        fail(1, f"request {wanted.id} was given up before it had a result")
    if outcome.state is not JobState.SUCCEEDED:
        fail(1, f"{outcome.text}\n{outcome.detail}".strip())
    click.echo(outcome.text)


@main.group()
def templates() -> None:
    """Subagents that are shipped as files."""


@templates.command()
@click.argument("folder", type=click.Path(path_type=Path), default=TEMPLATES_FOLDER)
def check(folder: Path) -> None:
    """Check all templates in FOLDER (default: the shipped ones)."""
    good, problems = load_templates(folder)
    for template in good:
        click.echo(f"ok      {template.name}")
    for problem in problems:
        click.echo(f"broken  {problem.file}: {problem.reason}", err=True)
    if not good and not problems:
        click.echo(f"no template in {folder}", err=True)
    if problems or not good:
        sys.exit(1)


@main.group()
def callbacks() -> None:
    """Dead letters: results that could not be delivered. They are kept until they are replayed or discarded."""


@callbacks.command("list")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(min=1), help="How many at most.")
def list_dead_letters(limit: int) -> None:
    """List the dead letters, newest first: request_id, when, tries, last status, reason, and how the text begins."""
    with _outbox() as outbox:
        found = outbox.dead_letters(limit + 1)
    for letter in found[:limit]:
        at = letter.at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        what = f"{one_line(letter.reason, 200)}  {one_line(letter.content, 60)}"
        click.echo(f"{letter.request_id}  {at}  {letter.tries:>2} tries  {letter.status or '-':>3}  {what}")
    if not found:
        click.echo("There are no dead letters.", err=True)
    if len(found) > limit:
        click.echo(f"There are more than these {limit}; --limit shows them.", err=True)


@callbacks.command()
@click.argument("wanted", metavar="ID", type=click.UUID, required=False)
@click.option("--dead", is_flag=True, help="All dead letters.")
def replay(wanted: UUID | None, dead: bool) -> None:
    """Send the dead letter of the request with this ID again, or all of them with --dead."""
    number = _one_or_all(
        wanted, dead, lambda outbox, callback: outbox.replay(callback), lambda outbox: outbox.replay_dead()
    )
    click.echo(f"{_counted(number)} will be sent by the running service.")


@callbacks.command()
@click.argument("wanted", metavar="ID", type=click.UUID, required=False)
@click.option("--dead", is_flag=True, help="All dead letters.")
def discard(wanted: UUID | None, dead: bool) -> None:
    """Delete the dead letter of the request with this ID for good, or all of them with --dead."""
    number = _one_or_all(
        wanted, dead, lambda outbox, callback: outbox.discard(callback), lambda outbox: outbox.discard_dead()
    )
    click.echo(f"{_counted(number)} deleted for good.")


@contextmanager
def _outbox() -> Iterator[Callbacks]:
    from pokestrator.store.callbacks import Callbacks

    with line_to_database(accepted_settings()) as line:
        yield Callbacks(line)


def _one_or_all(
    wanted: UUID | None,
    dead: bool,
    one: Callable[[Callbacks, UUID], CallbackState | None],
    every: Callable[[Callbacks], int],
) -> int:
    """Do something to the dead letter that is wanted, or to every one; to how many it was done."""
    if (wanted is None) != dead:
        raise click.UsageError("give either the ID of a request or --dead")
    with _outbox() as outbox:
        if wanted is None:
            return every(outbox)
        state = one(outbox, wanted)
    if state is None:
        fail(1, f"there is no callback of a request {wanted}")
    if state is not CallbackState.DEAD:
        fail(1, f"the callback of {wanted} is {state} already")
    return 1


def _counted(number: int) -> str:
    return "1 callback" if number == 1 else f"{number} callbacks"


def _run_here(settings: Settings, wanted: NewJob) -> Outcome | None:
    """Run a job to its end in this process, and leave nothing behind."""
    with application_here(settings) as application:
        return _follow_here(application, application.claim_here(wanted))


def _follow_here(application: Application, job: Job) -> Outcome | None:
    from pokestrator.dispatcher import HEARTBEAT_SECONDS
    from pokestrator.following import Timeline

    # The job has the thread, the person has this one: Ctrl-C is heard here.
    worker = threading.Thread(target=_run_job, args=(application, job), name="job")
    renew_at = time.monotonic() + HEARTBEAT_SECONDS

    def is_given_up() -> bool:
        nonlocal renew_at
        if worker.is_alive() and time.monotonic() >= renew_at:
            renew_at = time.monotonic() + HEARTBEAT_SECONDS
            if not application.renew(job):  # lost, while this process was stopped; or just finished
                application.abort_runs()
        return not worker.is_alive()

    worker.start()
    try:
        timeline = Timeline(application.history, job.id, lambda kind, text: click.echo(f"{kind:<9} {text}", err=True))
        return timeline.follow(is_given_up)
    except KeyboardInterrupt:
        _cancel(application, job)
        raise
    finally:
        application.abort_runs()  # when it has finished, there is none
        worker.join()


def _cancel(application: Application, job: Job) -> None:
    try:
        application.jobs.finish(job, Outcome(JobState.CANCELLED, "Interrupted."))
    except (LeaseLost, StoreUnavailable) as error:  # it has just ended; or its lease runs out
        click.echo(str(error), err=True)


def _run_job(application: Application, job: Job) -> None:
    try:
        application.service.run_job(job)
    except (LeaseLost, StoreUnavailable) as error:  # interrupted or aborted above
        click.echo(str(error), err=True)
