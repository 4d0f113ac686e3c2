"""`python -m pokestrator feedback …`: the owner's word on a result, whoever asked for it."""

from __future__ import annotations

import json
from uuid import UUID

import click

from pokestrator.environ import process_redactor
from pokestrator.errors import InvalidTask
from pokestrator.intake import check_note
from pokestrator.jobs import JobState, Verdict
from pokestrator.terminal import accepted_settings, fail, line_to_database


@click.command()
@click.argument("request_id", type=click.UUID)
@click.argument("verdict", type=click.Choice([each.value for each in Verdict]))
@click.option("--note", help="Why, in at most 1,000 characters.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def feedback(request_id: UUID, verdict: str, note: str | None, as_json: bool) -> None:
    """Say that the result of the request with this ID was good or bad. The last word counts.

    A bad one is no example any more for tasks like it, and counts against the version that gave it.
    """
    from pokestrator.store.history import History

    settings = accepted_settings()
    try:
        checked = process_redactor()(check_note(note, "--note"))
    except InvalidTask as error:
        fail(2, str(error))
    with line_to_database(settings) as line:
        status = History(line).judge(request_id, Verdict(verdict), checked)
    if status is None:
        fail(1, f"there is no request {request_id}")
    if status.state is not JobState.SUCCEEDED:
        fail(1, f"request {request_id} is {status.state}: there is no result to judge")
    if as_json:
        click.echo(json.dumps({"request_id": str(request_id), "state": status.state, "verdict": status.verdict}))
    else:
        click.echo(f"{request_id} is noted as {status.verdict}.")
