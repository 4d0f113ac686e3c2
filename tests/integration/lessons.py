"""What the tests of remembering share: jobs that were done, and what their subagent knows afterwards."""

from __future__ import annotations

import uuid
from typing import Any

from pokestrator.intake import new_job
from pokestrator.jobs import Channel, Job, JobState, Outcome, Route
from pokestrator.runs import ErrorKind
from pokestrator.store.history import History
from pokestrator.store.jobs import Jobs
from pokestrator.subagents import Subagent
from tests.integration.flow import row, rows

DONE = Outcome(JobState.SUCCEEDED, "It is done.")
FAILED = Outcome(JobState.FAILED, "It took too long.", ErrorKind.TIMEOUT)


def begun(
    jobs: Jobs,
    subagent: Subagent,
    task: str,
    *,
    route: Route | None = Route.MATCH,
    caller: str | None = None,
    channel: Channel = Channel.API_MESSAGE,
) -> Job:
    """A job whose run of the subagent has begun."""
    metadata = {"idempotency_key": str(uuid.uuid4())}  # whatever is said again, is a job of its own
    job = jobs.insert_claimed(new_job(task, metadata, caller=caller, channel=channel), "me", 60)
    if route is not None:
        jobs.record_route(job, route, "it fits")
    jobs.begin_run(job, subagent.id, subagent.version, "it runs")
    return job


def done(jobs: Jobs, subagent: Subagent, task: str, *, outcome: Outcome = DONE, **more: Any) -> Job:
    """A job that has ended."""
    job = begun(jobs, subagent, task, **more)
    jobs.finish(job, outcome)
    return job


def examples(url: str, subagent: Subagent) -> dict[str, tuple[str, int]]:
    """Its examples, with their source and how often they were used."""
    query = "SELECT task, source, uses FROM subagent_examples WHERE subagent_id = %s"
    return {each["task"]: (each["source"], each["uses"]) for each in rows(url, query, subagent.id)}


def remembered(url: str, subagent: Subagent) -> dict[str, int]:
    """Those that its jobs have taught it, and how often they were used."""
    return {task: uses for task, (source, uses) in examples(url, subagent).items() if source == "person"}


def found_by(url: str, word: str) -> list[str]:
    """The names of the subagents whose text for search holds a word."""
    query = "SELECT name FROM subagents WHERE search @@ plainto_tsquery('english', %s) ORDER BY id"
    return [each["name"] for each in rows(url, query, word)]


def state_of(url: str, subagent: Subagent) -> str:
    return str(row(url, "SELECT state FROM subagents WHERE id = %s", subagent.id)["state"])


def put_on_probation(url: str, subagent: Subagent) -> None:
    rows(url, "UPDATE subagents SET state = 'probation' WHERE id = %s", subagent.id)


def trusted(history: History, job: Job) -> bool:
    """Whether it was this job that ended its subagent's probation."""
    return "trusted" in [event.kind for event in history.timeline(job.id)]
