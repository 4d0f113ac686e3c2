"""The jobs table on real PostgreSQL: each transition with its fence, the outbox row of an end, and impossible rows."""

from __future__ import annotations

import threading
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import psycopg
import pytest

from pokestrator.errors import LeaseLost
from pokestrator.intake import new_job
from pokestrator.jobs import CallbackTarget, Channel, Job, JobState, NewJob, Outcome, Route
from pokestrator.runs import ErrorKind, Usage, sentence
from pokestrator.store.history import History
from pokestrator.store.jobs import MAX_INTERRUPTIONS, Jobs
from pokestrator.store.pool import Database
from pokestrator.store.recovery import Recovery
from tests.integration.flow import callback_row, job_row, poet, quiet_task, rows

LEASE = 20.0
DONE = Outcome(JobState.SUCCEEDED, "Done.")


def inserted(jobs: Jobs, count: int = 1) -> list[NewJob]:
    made = [new_job(f"Task number {number}") for number in range(count)]
    for job in made:
        jobs.insert(job)
    return made


def claimed(jobs: Jobs, job: NewJob | None = None) -> Job:
    if job is None:
        [job] = inserted(jobs)
    taken = jobs.claim_one(job.id, "me", LEASE)
    assert taken is not None
    return taken


def let_lease_run_out(url: str) -> None:
    rows(url, "UPDATE jobs SET lease_until = now() - interval '1 second' WHERE state = 'running'")


def sweep(recovery: Recovery) -> tuple[list[uuid.UUID], list[uuid.UUID]]:
    """Take what has no lease any more: (queued again, ended)."""
    recovered = recovery.sweep([], expired=True)
    return list(recovered.requeued), list(recovered.ended)


# claim -------------------------------------------------------------------------------------------------------------


def test_jobs_are_claimed_in_the_order_in_which_they_came(jobs: Jobs) -> None:
    made = inserted(jobs, 5)
    assert [job.id for job in jobs.claim("me", LEASE, 2)] == [job.id for job in made[:2]]
    assert [job.id for job in jobs.claim("me", LEASE, 9)] == [job.id for job in made[2:]]
    assert jobs.claim("me", LEASE, 9) == []


def test_a_claim_gives_the_job_as_it_was_sent_with_an_owner_a_lease_and_a_fence(
    jobs: Jobs, database_url: str, history: History
) -> None:
    target = CallbackTarget("https://poke.example/callback/1", "token-1")
    sent = new_job("Say „hi“ 👋", {"zone": "Europe/Berlin", "n": [1, 2.5, None]}, caller="u-1", callback=target)
    jobs.insert(sent)
    [job] = jobs.claim("me", LEASE, 1)
    for field in ("id", "task", "metadata", "caller", "channel"):
        assert getattr(job, field) == getattr(sent, field)
    assert (job.state, job.claim_seq, job.interruptions) == (JobState.RUNNING, 1, 0)
    stored = job_row(database_url, job.id)
    assert stored["owner"] == "me"
    assert 19 < (stored["lease_until"] - stored["started_at"]).total_seconds() <= 20
    assert [event.kind for event in history.timeline(job.id)] == ["accepted", "claimed"]


@pytest.mark.parametrize("seen_by_analyze", [0, 1])
def test_a_claim_takes_no_more_than_its_limit_whatever_the_planner_knows(
    jobs: Jobs, database_url: str, seen_by_analyze: int
) -> None:
    # By the statistics of an almost empty table the planner may join row by row, and run a subquery for each.
    inserted(jobs, seen_by_analyze)
    rows(database_url, "ANALYZE")
    inserted(jobs, 10)
    assert [len(jobs.claim("me", LEASE, 1)) for _ in range(3)] == [1, 1, 1]
    assert len(jobs.claim("me", LEASE, 4)) == 4


def test_many_claimers_never_get_one_job_twice(jobs: Jobs, database: Database) -> None:
    made = inserted(jobs, 120)
    together = threading.Barrier(4)

    def claim_all(owner: str) -> list[Job]:
        line = database.line()
        taken: list[Job] = []
        together.wait()
        while more := Jobs(line).claim(owner, LEASE, 3):
            taken.extend(more)
        line.close()
        return taken

    with ThreadPoolExecutor(4) as claimers:
        taken = [job for part in claimers.map(claim_all, "abcd") for job in part]
    # A claimer may see nothing while others hold the last rows, so what matters is that nothing is taken twice.
    assert Counter(job.id for job in taken) == Counter(job.id for job in made)
    assert {job.claim_seq for job in taken} == {1}


def test_a_job_that_is_due_later_is_not_claimed_yet(jobs: Jobs, database_url: str) -> None:
    later, now = inserted(jobs, 2)
    rows(database_url, "UPDATE jobs SET run_at = now() + interval '1 minute' WHERE id = %s", later.id)
    assert [job.id for job in jobs.claim("me", LEASE, 9)] == [now.id]
    assert jobs.claim_one(later.id, "me", LEASE) is None


def test_a_limit_of_nothing_claims_nothing(jobs: Jobs) -> None:
    inserted(jobs)
    assert jobs.claim("me", LEASE, 0) == []


def test_claim_one_takes_that_job_once(jobs: Jobs) -> None:
    _, second = inserted(jobs, 2)
    taken = jobs.claim_one(second.id, "me", LEASE)
    assert taken is not None
    assert taken.id == second.id
    assert jobs.claim_one(second.id, "other", LEASE) is None


def test_a_job_inserted_as_claimed_is_never_seen_as_queued(jobs: Jobs, database: Database, database_url: str) -> None:
    # Others see only what is committed, and the row's only commit has it running.
    seen: list[Job] = []
    stop = threading.Event()

    def claim_greedily() -> None:
        line = database.line()
        while not stop.is_set():
            seen.extend(Jobs(line).claim("greedy", LEASE, 5))
        line.close()

    thread = threading.Thread(target=claim_greedily)
    thread.start()
    mine = [jobs.insert_claimed(new_job("Mine"), "me", LEASE) for _ in range(40)]
    stop.set()
    thread.join()
    assert seen == []
    assert {job_row(database_url, job.id)["owner"] for job in mine} == {"me"}
    assert {(job.state, job.claim_seq) for job in mine} == {(JobState.RUNNING, 1)}


# the fence ---------------------------------------------------------------------------------------------------------


def test_the_fence_grows_with_each_claim(jobs: Jobs) -> None:
    first = claimed(jobs)
    jobs.release([first])
    second = jobs.claim("other", LEASE, 1)[0]
    assert (first.claim_seq, second.claim_seq) == (1, 2)


def test_renew_keeps_only_what_is_still_owned(jobs: Jobs, database_url: str) -> None:
    kept, released, ended = (claimed(jobs) for _ in range(3))
    jobs.release([released])
    taken_over = jobs.claim_one(released.id, "other", LEASE)
    assert taken_over is not None
    jobs.finish(ended, DONE)
    rows(database_url, "UPDATE jobs SET lease_until = now() WHERE state = 'running'")
    before = job_row(database_url, released.id)["lease_until"]
    assert jobs.renew([kept, released, ended], 60) == {(kept.id, kept.claim_seq)}
    assert job_row(database_url, released.id)["lease_until"] == before
    row = rows(database_url, "SELECT extract(epoch FROM lease_until - now()) AS left FROM jobs WHERE id = %s", kept.id)
    assert 50 < row[0]["left"] <= 60


def test_finish_after_the_lease_was_lost_changes_nothing(
    jobs: Jobs, database_url: str, history: History, recovery: Recovery
) -> None:
    lost = claimed(jobs)
    let_lease_run_out(database_url)
    sweep(recovery)
    owned = jobs.claim_one(lost.id, "other", LEASE)
    assert owned is not None
    before, timeline = job_row(database_url, lost.id), history.timeline(lost.id)
    with pytest.raises(LeaseLost):
        jobs.finish(lost, DONE)
    assert job_row(database_url, lost.id) == before
    assert history.timeline(lost.id) == timeline
    assert rows(database_url, "SELECT id FROM callbacks") == []
    jobs.finish(owned, Outcome(JobState.SUCCEEDED, "Done by the other."))
    assert callback_row(database_url, lost.id)["content"] == "Done by the other."


def test_a_job_ends_once(jobs: Jobs, database_url: str) -> None:
    job = claimed(jobs)
    jobs.finish(job, DONE)
    with pytest.raises(LeaseLost):
        jobs.finish(job, Outcome(JobState.SUCCEEDED, "Done again."))
    assert callback_row(database_url, job.id)["content"] == "Done."


def test_a_route_is_not_recorded_with_an_old_fence(jobs: Jobs, database_url: str, history: History) -> None:
    lost = claimed(jobs)
    jobs.release([lost])
    assert jobs.claim_one(lost.id, "other", LEASE) is not None
    with pytest.raises(LeaseLost):
        jobs.record_route(lost, Route.BUILD_NEW, "nothing fits")
    assert job_row(database_url, lost.id)["route"] is None
    assert history.road(lost.id) == (None, None)


def test_a_route_and_the_run_of_a_subagents_version_are_recorded(
    jobs: Jobs, database: Database, history: History
) -> None:
    from pokestrator.store.subagents import Subagents

    subagent = Subagents(database).adopt(poet())
    job = claimed(jobs)
    jobs.record_route(job, Route.TEMPLATE, "it fits")
    assert history.timeline(job.id)[-1].text == "template: it fits"
    jobs.begin_run(job, subagent.id, subagent.version, "sea_poet version 1")
    assert history.road(job.id) == (Route.TEMPLATE, "sea_poet")
    assert history.timeline(job.id)[-1].text == "sea_poet version 1"


# giving back and being interrupted ---------------------------------------------------------------------------------


def test_a_released_job_is_queued_again_unpunished(jobs: Jobs, database_url: str, history: History) -> None:
    job = claimed(jobs)
    assert jobs.release([job]) == {job.id}
    row = job_row(database_url, job.id)
    assert (row["state"], row["owner"], row["lease_until"], row["interruptions"]) == ("queued", None, None, 0)
    assert jobs.release([job]) == set()
    assert history.timeline(job.id)[-1].kind == "released"


def test_a_release_with_an_old_fence_leaves_the_new_owner_alone(jobs: Jobs, database_url: str) -> None:
    lost = claimed(jobs)
    jobs.release([lost])
    jobs.claim_one(lost.id, "other", LEASE)
    assert jobs.release([lost]) == set()
    assert job_row(database_url, lost.id)["owner"] == "other"


def test_only_jobs_whose_lease_ran_out_are_requeued(jobs: Jobs, database_url: str, recovery: Recovery) -> None:
    expired = claimed(jobs)
    let_lease_run_out(database_url)
    kept = claimed(jobs)
    [waiting] = inserted(jobs)
    assert sweep(recovery) == ([expired.id], [])
    assert job_row(database_url, expired.id)["interruptions"] == 1
    assert job_row(database_url, kept.id)["state"] == "running"
    assert job_row(database_url, waiting.id)["interruptions"] == 0


def test_the_third_interruption_fails_the_job_and_tells_the_person(
    jobs: Jobs, database_url: str, history: History, recovery: Recovery
) -> None:
    [job] = inserted(jobs)
    for interruption in range(1, MAX_INTERRUPTIONS):
        claimed(jobs, job)
        let_lease_run_out(database_url)
        assert sweep(recovery) == ([job.id], [])
        assert job_row(database_url, job.id)["interruptions"] == interruption
    claimed(jobs, job)
    let_lease_run_out(database_url)
    assert sweep(recovery) == ([], [job.id])
    outcome = history.outcome(job.id)
    assert outcome is not None
    assert (outcome.state, outcome.error) == (JobState.FAILED, ErrorKind.INTERRUPTED)
    callback = callback_row(database_url, job.id)
    assert (callback["content"], callback["state"]) == (sentence(ErrorKind.INTERRUPTED), "pending")
    assert jobs.claim("me", LEASE, 9) == []


def test_two_sweepers_interrupt_a_job_once(jobs: Jobs, database_url: str, recovery: Recovery) -> None:
    made = [claimed(jobs) for _ in range(30)]
    let_lease_run_out(database_url)
    with ThreadPoolExecutor(4) as sweepers:
        swept = [requeued for requeued, _ in sweepers.map(lambda _: sweep(recovery), range(4))]
    assert Counter(job_id for part in swept for job_id in part) == Counter(job.id for job in made)
    assert rows(database_url, "SELECT DISTINCT interruptions FROM jobs") == [{"interruptions": 1}]


# the end -----------------------------------------------------------------------------------------------------------


def test_an_end_writes_the_result_the_usage_and_the_callback(jobs: Jobs, database_url: str, history: History) -> None:
    job = claimed(jobs)
    jobs.finish(job, Outcome(JobState.SUCCEEDED, "Forty-two.", usage=Usage(0.25, 100, 20, 3)))
    row = job_row(database_url, job.id)
    assert (row["state"], row["result"], row["owner"]) == ("succeeded", "Forty-two.", None)
    assert (row["cost_usd"], row["input_tokens"], row["output_tokens"], row["turns"]) == (0.25, 100, 20, 3)
    callback = callback_row(database_url, job.id)
    assert (callback["content"], callback["channel"], callback["attempts"]) == ("Forty-two.", "api_message", 0)
    assert [event.kind for event in history.timeline(job.id)] == ["accepted", "claimed", "finished"]


def test_a_failure_keeps_its_kind_and_detail(jobs: Jobs, history: History) -> None:
    job = claimed(jobs)
    failed = Outcome(JobState.FAILED, "Out of time.", ErrorKind.TIMEOUT, "no result after 30 s")
    jobs.finish(job, failed)
    assert history.outcome(job.id) == failed
    assert history.timeline(job.id)[-1].text == "failed: timeout"


def test_a_callback_that_cannot_be_written_leaves_the_job_running(
    jobs: Jobs, database_url: str, history: History
) -> None:
    job = claimed(jobs)
    rows(database_url, "ALTER TABLE callbacks ADD CONSTRAINT nothing_goes CHECK (false) NOT VALID")
    with pytest.raises(psycopg.errors.CheckViolation, match="nothing_goes"):
        jobs.finish(job, DONE)
    assert job_row(database_url, job.id)["state"] == "running"
    assert history.outcome(job.id) is None
    assert "finished" not in [event.kind for event in history.timeline(job.id)]
    rows(database_url, "ALTER TABLE callbacks DROP CONSTRAINT nothing_goes")
    jobs.finish(job, DONE)
    assert callback_row(database_url, job.id)["content"] == "Done."


def test_a_job_without_a_channel_leaves_no_callback(jobs: Jobs, database_url: str) -> None:
    job = claimed(jobs, _inserted(jobs, quiet_task()))
    jobs.finish(job, DONE)
    assert rows(database_url, "SELECT id FROM callbacks") == []


def test_a_long_result_is_kept_whole_and_sent_short(jobs: Jobs, database_url: str) -> None:
    job = claimed(jobs)
    jobs.finish(job, replace(DONE, text="x" * 9_000))
    assert len(job_row(database_url, job.id)["result"]) == 9_000
    content = callback_row(database_url, job.id)["content"]
    assert len(content) == 4_000
    assert content.endswith("… (shortened)")


def test_what_postgresql_cannot_hold_is_taken_out_of_what_agents_write(
    jobs: Jobs, database_url: str, history: History
) -> None:
    job = claimed(jobs)
    jobs.note(job, "text", "a\x00b\ud800c")
    jobs.record_route(job, Route.BUILD_NEW, "nothing fits")
    jobs.finish(job, Outcome(JobState.FAILED, "d\x00e\udfff", ErrorKind.INTERNAL, "\x00f"))
    assert [event.text for event in history.timeline(job.id) if event.kind == "text"] == ["ab?c"]
    row = job_row(database_url, job.id)
    assert (row["result"], row["error_detail"]) == ("de?", "f")
    assert callback_row(database_url, job.id)["content"] == "de?"


def test_a_job_that_is_stored_twice_is_one_job(jobs: Jobs, history: History) -> None:
    [job] = inserted(jobs)
    jobs.insert(job)
    assert [claimed.id for claimed in jobs.claim("me", 20, 5)] == [job.id]
    assert [event.kind for event in history.timeline(job.id)] == ["accepted", "claimed"]


def test_a_terminals_job_whose_terminal_is_gone_is_not_run_by_others(
    jobs: Jobs, database_url: str, recovery: Recovery
) -> None:
    job = jobs.insert_claimed(new_job("here and now", channel=Channel.NONE), "a terminal", 0)
    assert sweep(recovery) == ([], [job.id])
    assert job_row(database_url, job.id)["error_detail"] == "the terminal that asked for it is gone"


# impossible rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "constraint"),
    [
        ("state = 'running'", "only_running_jobs_are_owned"),
        ("state = 'running', owner = 'me'", "only_running_jobs_are_owned"),
        ("state = 'running', lease_until = now()", "only_running_jobs_are_owned"),
        ("owner = 'me', lease_until = now()", "only_running_jobs_are_owned"),
        ("state = 'succeeded', finished_at = now()", "succeeded_jobs_have_a_result"),
        ("state = 'succeeded', result = 'x'", "ended_jobs_say_when"),
        ("finished_at = now()", "ended_jobs_say_when"),
        ("state = 'failed', finished_at = now(), result = 'x'", "failed_jobs_say_why"),
        ("state = 'succeeded', finished_at = now(), result = 'x', error_kind = 'timeout'", "failed_jobs_say_why"),
        ("error_kind = 'timeout'", "failed_jobs_say_why"),
        ("channel = 'callback'", "callback_target_goes_with_its_channel"),
        ("callback_url = 'https://poke.example', callback_token = 't'", "callback_target_goes_with_its_channel"),
        ("channel = 'callback', callback_url = 'https://poke.example'", "callback_target_goes_with_its_channel"),
        ("task = ''", "jobs_task_check"),
        ("task = repeat('x', 20001)", "jobs_task_check"),
    ],
)
def test_an_impossible_job_is_refused(jobs: Jobs, database_url: str, change: str, constraint: str) -> None:
    [job] = inserted(jobs)
    with pytest.raises(psycopg.errors.CheckViolation) as refused:
        rows(database_url, f"UPDATE jobs SET {change} WHERE id = %s", job.id)
    assert refused.value.diag.constraint_name == constraint


def test_words_outside_the_enums_are_refused(jobs: Jobs, database_url: str) -> None:
    [job] = inserted(jobs)
    for change in ("state = 'completed'", "route = 'other'", "error_kind = 'unlucky'", "channel = 'pigeon'"):
        with pytest.raises(psycopg.errors.InvalidTextRepresentation):
            rows(database_url, f"UPDATE jobs SET {change} WHERE id = %s", job.id)


def test_a_job_has_one_callback_and_it_has_a_channel(jobs: Jobs, database_url: str) -> None:
    job = claimed(jobs)
    jobs.finish(job, DONE)
    insert = "INSERT INTO callbacks (job_id, content, channel) VALUES (%s, 'again', %s)"
    with pytest.raises(psycopg.errors.UniqueViolation):
        rows(database_url, insert, job.id, "api_message")
    with pytest.raises(psycopg.errors.CheckViolation):
        rows(database_url, insert, job.id, Channel.NONE)
    with pytest.raises(psycopg.errors.CheckViolation, match="ended_callbacks_say_when"):
        rows(database_url, "UPDATE callbacks SET state = 'dead' WHERE job_id = %s", job.id)


def _inserted(jobs: Jobs, job: NewJob) -> NewJob:
    jobs.insert(job)
    return job
