"""The person's door: `python -m pokestrator …`.

Exit codes: 0 done, 1 failed, 2 not accepted (settings, arguments, task), 3 no database, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import NoReturn

import click

from pokestrator import __version__, bootstrap
from pokestrator.bootstrap import Application
from pokestrator.demo.story import DemoFailed, follow, run_demo
from pokestrator.errors import InvalidTask, LeaseLost, SettingsError, StoreUnavailable
from pokestrator.jobs import Channel, Job, JobState, NewJob, Outcome, new_job
from pokestrator.settings import process_settings
from pokestrator.store.templates import TEMPLATES_FOLDER, load_templates
from pokestrator.telemetry import configure_logging

ROOT = Path(__file__).parents[1]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pokestrator")
def main() -> None:
    """Gives Poke abilities that grow while people use it."""


@main.command()
def serve() -> None:
    """Serve Poke over MCP, under gunicorn, on HOST and PORT."""
    # exec: signals reach gunicorn itself. It reads and checks the settings.
    os.execv(sys.executable, [sys.executable, "-m", "gunicorn", "-c", str(ROOT / "gunicorn.conf.py")])


@main.command()
@click.option("--task", help="Send this task in place of the story's three.")
def demo(task: str | None) -> None:
    """Watch tasks go in and results come back, in a temporary folder. Without a key, Claude is scripted."""
    configure_logging("ERROR")
    try:
        run_demo(click.echo, task)
    except (DemoFailed, ValueError) as error:
        _fail(1, f"demo failed: {error}")
    click.echo("\nAll went as it should.")


@main.command()
@click.argument("task")
def run(task: str) -> None:
    """Do one TASK here and now ("-" reads it from standard input). Result on stdout, progress on stderr."""
    try:
        settings = process_settings().model_copy(update={"inline": True})
        wanted = new_job(sys.stdin.read() if task == "-" else task, channel=Channel.NONE)
    except SettingsError as error:
        _fail(2, "\n".join(f"cannot start: {problem}" for problem in error.problems))
    except InvalidTask as error:
        _fail(2, str(error))
    configure_logging("DEBUG" if settings.log_level == "DEBUG" else "ERROR")
    try:
        application = bootstrap.build(settings, bootstrap.database_url(settings))
        application.start()
    except StoreUnavailable as error:
        _fail(3, f"database init failed: {error}")
    try:
        outcome = _run_here(application, wanted)
    except StoreUnavailable as error:
        _fail(3, f"the database went away: {error}")
    finally:
        application.close()
        bootstrap.leave_embedded_database(settings)
    if outcome.state is JobState.SUCCEEDED:
        click.echo(outcome.text)
        return
    _fail(130 if outcome.state is JobState.CANCELLED else 1, f"{outcome.text}\n{outcome.detail}".strip())


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
    if problems:
        sys.exit(1)


def _run_here(application: Application, wanted: NewJob) -> Outcome:
    job = application.claim_here(wanted)
    # The job has the thread, the person has this one: Ctrl-C is heard here.
    worker = threading.Thread(target=_run_job, args=(application, job), name="job")
    worker.start()
    try:
        return follow(application.jobs, job.id, lambda kind, text: click.echo(f"{kind:<9} {text}", err=True))
    except KeyboardInterrupt:
        cancelled = Outcome(JobState.CANCELLED, "Interrupted.")
        application.jobs.finish(job, cancelled)
        application.claude.close()
        return cancelled
    finally:
        worker.join()


def _run_job(application: Application, job: Job) -> None:
    try:
        application.service.run_job(job)
    except LeaseLost as error:  # interrupted above
        click.echo(str(error), err=True)


def _fail(code: int, text: str) -> NoReturn:
    click.echo(text, err=True)
    sys.exit(code)
