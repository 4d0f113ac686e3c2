"""`python -m pokestrator route …`: who a task is for and why, without running anything; how well that is decided."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import click

from pokestrator.environ import process_redactor
from pokestrator.errors import InvalidDefinition, InvalidTask
from pokestrator.intake import new_job
from pokestrator.tables import print_table
from pokestrator.telemetry import configure_logging, one_line
from pokestrator.terminal import (
    accepted_settings,
    application_here,
    database_url_at_hand,
    fail,
    interruptible,
    line_to_database,
)

if TYPE_CHECKING:
    from pokestrator.evaluation import Figures

NO_KEY = (
    "words alone do not decide this, and Claude cannot be asked: neither ANTHROPIC_API_KEY nor CLAUDE_CODE_OAUTH_TOKEN "
    "is set. --no-question shows what words say"
)
SHOWN = 10  # candidates in the table


@click.command()
@click.argument("task", required=False)
@click.option("--no-question", is_flag=True, help="Decide by words alone; where they do not, say that Claude is asked.")
@click.option("--job", "request_id", type=click.UUID, help="Show the decision that was made for this request.")
@click.option(
    "--eval",
    "file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Measure on a JSON file {subagents, cases, nothing_fits}, in a schema of its own.",
)
@click.option(
    "--shots", type=click.IntRange(0, 50), help="With --eval: examples that each subagent knows; all, if unset."
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def route(
    task: str | None, no_question: bool, request_id: UUID | None, file: Path | None, shots: int | None, as_json: bool
) -> None:
    """Show which subagent TASK is for and why ("-" reads it from standard input). Nothing is run or stored.

    Where words alone do not decide, Claude is asked, as it is for a real task.
    """
    if sum(each is not None for each in (task, request_id, file)) != 1:
        raise click.UsageError("give one of: a TASK, --job ID, --eval FILE")
    if shots is not None and file is None:
        raise click.UsageError("--shots goes with --eval")
    if no_question and task is None:
        raise click.UsageError("--no-question goes with a TASK")
    if file is not None:
        _measure(file, 50 if shots is None else shots, as_json)
    elif request_id is not None:
        _show_stored(request_id, as_json)
    else:
        _decide(sys.stdin.read() if task == "-" else str(task), no_question, as_json)


def _decide(task: str, no_question: bool, as_json: bool) -> None:
    from pokestrator.jobs import Outcome

    settings = accepted_settings().model_copy(update={"inline": True, "poke_dry_run": True})
    try:
        new_job(task)
    except InvalidTask as error:
        fail(2, str(error))
    configure_logging("ERROR", redact=process_redactor())
    has_key = settings.anthropic_api_key is not None or settings.claude_code_oauth_token is not None
    with interruptible(), application_here(settings) as application:
        decision = application.runner.decide_only(task, may_ask=has_key and not no_question)
    if not (has_key or no_question) and not isinstance(decision, Outcome) and decision.route is None:
        fail(1, NO_KEY)
    if isinstance(decision, Outcome):
        fail(1, f"{decision.text}\n{decision.detail}".strip())
    _show(decision.record(), as_json)


def _show_stored(request_id: UUID, as_json: bool) -> None:
    from pokestrator.store.history import History

    with line_to_database(accepted_settings(), prepare=True) as line:
        decision = History(line).decision(request_id)
    if decision is None:
        fail(1, f"no decision is known of a request {request_id}")
    _show(decision, as_json)


def _show(decision: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(decision, indent=2))
        return
    who = {"words": "words alone", "claude": "Claude", "nobody": "nobody"}.get(decision["decided_by"], "nobody yet")
    click.echo(f"{decision['route'] or 'undecided'}  {decision['name'] or '-'}")
    click.echo(f"decided by {who} in {decision['milliseconds']:.0f} ms, ${decision['cost_usd']:.4f}")
    click.echo(f"because    {one_line(decision['reason'], 400)}")
    candidates = decision["candidates"]
    if not candidates:
        click.echo("no subagent or template shares a word with the task")
        return
    click.echo()
    print_table(("score", "name"), ((f"{each['score']:.1f}", each["name"]) for each in candidates[:SHOWN]))
    if len(candidates) > SHOWN:
        click.echo(f"and {len(candidates) - SHOWN} more (--json shows them)")


def _measure(file: Path, shots: int, as_json: bool) -> None:
    from pokestrator.evaluation import evaluate, measured, read_material
    from pokestrator.store.scratch import scratch

    try:
        material = read_material(file)
    except InvalidDefinition as error:
        fail(2, "\n".join(f"{file}: {problem}" for problem in error.problems))
    with database_url_at_hand(accepted_settings()) as url, scratch(url, measured(material, shots)) as database:
        figures = evaluate(database, material)
    if as_json:
        click.echo(json.dumps(figures.as_json()))
    else:
        _print_figures(figures)


def _print_figures(figures: Figures) -> None:
    def percent(share: float | None) -> str:
        return "-" if share is None else f"{100 * share:.1f} %"

    rows = [(f"recall at {at}", percent(share)) for at, share in figures.recall.items()]
    rows += [
        ("decided without a model", percent(figures.share)),
        ("  of these right", percent(figures.precision)),
        ("false matches, nothing fits", percent(figures.false_matches)),
        ("milliseconds p50", f"{figures.p50:.1f}"),
        ("milliseconds p95", f"{figures.p95:.1f}"),
    ]
    print_table(("figure", "value"), rows)
