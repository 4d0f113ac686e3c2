"""The outbox's rows: claims and their fence, dead letters, and what clocks that jump leave behind."""

from __future__ import annotations

import uuid

import psycopg
import pytest
from psycopg.rows import dict_row

from pokestrator.demo.inbox import Inbox
from pokestrator.jobs import CallbackState, Channel
from pokestrator.poke.api import POST_SECONDS
from pokestrator.store.callbacks import CLAIM_DUE, HOLD_SECONDS, HOST_IN_URL, Callback, Callbacks, host_of
from pokestrator.store.history import History
from pokestrator.store.jobs import Jobs
from pokestrator.store.pool import Database
from tests.integration.flow import POKE_KEY, callback_row, rows
from tests.integration.outbox import change, delivering, finished, reaches, wait_left

API = [Channel.API_MESSAGE]
URL = "https://poke.invalid/callback/1"


@pytest.fixture
def callbacks(database: Database) -> Callbacks:
    return Callbacks(database)


@pytest.fixture
def history(database: Database) -> History:
    return History(database)


def claimed(callbacks: Callbacks) -> Callback:
    [callback] = callbacks.claim_due(API, 1)
    return callback


def dead(jobs: Jobs, callbacks: Callbacks, text: str = "Done.", reason: str = "HTTP 400 no") -> uuid.UUID:
    """The job of a new dead letter."""
    job_id = finished(jobs, text)
    callbacks.dead(claimed(callbacks), 400, reason)
    return job_id


# claims --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seen_by_analyze", [0, 1])
def test_a_claim_takes_no_more_than_its_limit_whatever_the_planner_knows(
    jobs: Jobs, callbacks: Callbacks, database_url: str, seen_by_analyze: int
) -> None:
    for _ in range(seen_by_analyze):
        finished(jobs)
    rows(database_url, "ANALYZE")
    for _ in range(10):
        finished(jobs)
    assert [len(callbacks.claim_due(API, 1)) for _ in range(3)] == [1, 1, 1]


def test_a_claim_passes_over_busy_urls_and_channels_that_are_not_asked_for(jobs: Jobs, callbacks: Callbacks) -> None:
    to_url, by_message = finished(jobs, url=URL), finished(jobs)
    both = list(Channel)[:2]
    assert callbacks.claim_due([Channel.CALLBACK], 5, busy=[URL]) == []
    assert [each.job_id for each in callbacks.claim_due(both, 5, busy=[URL])] == [by_message]
    assert [each.job_id for each in callbacks.claim_due(both, 5, busy=["https://other.invalid/"])] == [to_url]


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://poke.invalid/callback/1?a=b#c", "poke.invalid"),
        ("https://Poke.Invalid:8443/callback//x@y", "poke.invalid:8443"),
        ("http://[::1]:80", "[::1]:80"),
        ("https://poke.invalid?one", "poke.invalid"),
        ("https://one:secret@poke.invalid/", "poke.invalid"),
        ("https://poke.invalid#@other.invalid/", "poke.invalid"),
    ],
)
def test_a_claim_passes_over_busy_hosts(jobs: Jobs, callbacks: Callbacks, url: str, host: str) -> None:
    assert host_of(url) == host
    both = list(Channel)[:2]
    to_url, by_message = finished(jobs, url=url), finished(jobs)
    others = ["other.invalid", "", "invalid", "poke.invalid:1"]
    assert [each.job_id for each in callbacks.claim_due(both, 5, busy_hosts=[*others, host])] == [by_message]
    assert [each.job_id for each in callbacks.claim_due(both, 5, busy_hosts=others)] == [to_url]


def test_the_message_api_has_no_host_of_callback_urls() -> None:
    assert host_of(Channel.API_MESSAGE) == ""


def test_a_claim_passes_over_what_its_process_still_has_in_hand(
    jobs: Jobs, callbacks: Callbacks, database_url: str
) -> None:
    finished(jobs)
    mine = claimed(callbacks)
    change(database_url, mine.job_id, "lease_until = now() - interval '1 second'")
    assert callbacks.claim_due(API, 1, not_ids=[uuid.uuid4(), mine.id]) == []
    [other] = callbacks.claim_due(API, 1, not_ids=[uuid.uuid4()])
    assert (other.id, other.attempt) == (mine.id, 2)


def test_a_callback_that_fell_back_is_claimed_while_its_url_is_busy(
    jobs: Jobs, callbacks: Callbacks, database_url: str
) -> None:
    job_id = finished(jobs, url=URL)
    change(database_url, job_id, "channel = 'api_message'")
    assert len(callbacks.claim_due(API, 1, busy=[URL])) == 1


def test_a_sender_whose_claim_lapsed_writes_nothing(
    jobs: Jobs, callbacks: Callbacks, history: History, database_url: str
) -> None:
    job_id = finished(jobs)
    late = claimed(callbacks)
    assert callbacks.claim_due(API, 1) == []
    change(database_url, job_id, "lease_until = now() - interval '1 second'")
    current = claimed(callbacks)
    before, timeline = callback_row(database_url, job_id), history.timeline(job_id)
    callbacks.dead(late, 400, "too late")
    callbacks.retry(late, 500, "too late", wait_seconds=5, channel=Channel.API_MESSAGE)
    callbacks.delivered(late, 200)
    assert callback_row(database_url, job_id) == before
    assert history.timeline(job_id) == timeline
    callbacks.delivered(current, 200)
    row = callback_row(database_url, job_id)
    assert (row["state"], row["attempts"]) == ("delivered", 2)


def test_a_delivered_callback_stays_delivered(jobs: Jobs, callbacks: Callbacks, database_url: str) -> None:
    job_id = finished(jobs)
    callback = claimed(callbacks)
    callbacks.delivered(callback, 200)
    callbacks.dead(callback, 400, "a second opinion")
    assert callback_row(database_url, job_id)["state"] == "delivered"
    assert callbacks.claim_due(API, 1) == []


def test_claims_stay_on_their_index_among_many_delivered_callbacks(database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True, row_factory=dict_row) as connection:
        connection.execute(
            """INSERT INTO jobs (id, task, metadata, channel, state, result, finished_at)
            SELECT gen_random_uuid(), 'task', '{}', 'api_message', 'succeeded', 'Done.', now()
            FROM generate_series(1, 20000)"""
        )
        connection.execute(
            """INSERT INTO callbacks (job_id, content, channel, state, ended_at)
            SELECT id, 'Done.', 'api_message', 'delivered', now() FROM jobs"""
        )
        connection.execute("ANALYZE jobs, callbacks")
        values = {
            "hold": 60,
            "channels": ["callback", "api_message"],
            "limit": 1,
            "job_id": None,
            "busy": [URL],
            "busy_hosts": ["poke.invalid"],
            "host": HOST_IN_URL,
            "not_ids": [uuid.uuid4()],
        }
        plan = connection.execute(f"EXPLAIN {CLAIM_DUE}".encode(), values).fetchall()
    text = "\n".join(line["QUERY PLAN"] for line in plan)
    assert "using callbacks_due" in text
    assert "Seq Scan" not in text, text


# clocks that jump ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tries", "ahead", "is_due"),
    [
        (0, "2 minutes", True),
        (0, "30 seconds", False),
        (1, "119 minutes", False),
        (1, "121 minutes", True),
        (5, "1 day", True),
        (6, "29 hours", False),
        (11, "31 hours", True),
    ],
)
def test_a_callback_that_waits_longer_than_any_wait_is_brought_forward(
    jobs: Jobs, callbacks: Callbacks, database_url: str, tries: int, ahead: str, is_due: bool
) -> None:
    job_id = finished(jobs)
    change(
        database_url,
        job_id,
        f"attempts = 20 + {tries}, attempts_before = 20, next_attempt_at = now() + interval '{ahead}'",
    )
    assert callbacks.bring_forward() == is_due
    assert (wait_left(database_url, job_id) <= 0) == is_due
    assert bool(callbacks.claim_due(API, 1)) == is_due


def test_a_hold_from_before_the_clock_went_back_counts_as_lapsed(
    jobs: Jobs, callbacks: Callbacks, database_url: str
) -> None:
    job_id = finished(jobs)
    for ahead, taken in [("9 minutes", 0), ("11 minutes", 1)]:
        change(database_url, job_id, f"lease_until = now() + interval '{ahead}'")
        assert len(callbacks.claim_due(API, 1)) == taken


def test_a_running_delivery_brings_forward_what_the_clock_left_behind(
    jobs: Jobs, database: Database, database_url: str
) -> None:
    job_id = finished(jobs)
    change(database_url, job_id, "next_attempt_at = now() + interval '1 day'")
    with Inbox(api_key=POKE_KEY) as inbox, delivering(database, inbox):
        reaches(database_url, job_id, "delivered")


def test_a_hold_is_longer_than_a_post() -> None:
    assert POST_SECONDS + 10 <= HOLD_SECONDS


# what nobody could send ----------------------------------------------------------------------------------------------


def test_what_nobody_had_a_key_for_in_all_the_time_of_the_tries_becomes_a_dead_letter(
    jobs: Jobs, database: Database, history: History, database_url: str
) -> None:
    old, young, has_url, held = finished(jobs), finished(jobs), finished(jobs, url=URL), finished(jobs)
    change(database_url, young, "next_attempt_at = now() - interval '75 hours'")
    for job_id in (old, held, has_url):
        change(database_url, job_id, "next_attempt_at = now() - interval '77 hours'")
    for job_id in (held, has_url):
        change(database_url, job_id, "lease_until = now() + interval '1 minute'")
    with Inbox() as inbox, delivering(database, inbox, key=None):
        row = reaches(database_url, old, "dead")
    assert row["last_error"] == "no POKE_API_KEY was set for 76 hours"
    assert (history.timeline(old)[-1].kind, history.timeline(old)[-1].text) == ("callback dead", row["last_error"])
    for job_id in (young, has_url, held):
        assert callback_row(database_url, job_id)["state"] == "pending"


# dead letters --------------------------------------------------------------------------------------------------------


def test_dead_letters_are_listed_newest_first(jobs: Jobs, callbacks: Callbacks) -> None:
    ids = [dead(jobs, callbacks, f"Text {number}.", f"HTTP 400 {number}") for number in range(3)]
    finished(jobs)
    letters = callbacks.dead_letters(2)
    assert [letter.request_id for letter in letters] == [ids[2], ids[1]]
    assert (letters[0].content, letters[0].reason, letters[0].status, letters[0].tries) == (
        "Text 2.",
        "HTTP 400 2",
        400,
        1,
    )


@pytest.mark.parametrize("by", ["job_id", "id"])
def test_a_replayed_dead_letter_has_its_whole_schedule_before_it_and_keeps_its_fence(
    jobs: Jobs, callbacks: Callbacks, history: History, database_url: str, by: str
) -> None:
    job_id = finished(jobs)
    change(database_url, job_id, "attempts = 11, begun_at = now() - interval '76 hours'")
    last = claimed(callbacks)
    assert (last.attempt, last.tries) == (12, 12)
    assert last.age_seconds > 76 * 3_600 - 1
    callbacks.dead(last, 503, "HTTP 503")
    assert callbacks.replay(callback_row(database_url, job_id)[by]) is CallbackState.DEAD
    assert history.timeline(job_id)[-1].kind == "replayed"
    again = claimed(callbacks)
    assert (again.id, again.attempt, again.tries) == (last.id, 13, 1)
    assert 0 <= again.age_seconds < 60
    callbacks.dead(last, 503, "late")
    assert callback_row(database_url, job_id)["state"] == "pending"


def test_only_dead_letters_are_replayed_or_discarded(jobs: Jobs, callbacks: Callbacks, database_url: str) -> None:
    job_id = finished(jobs)
    assert callbacks.replay(job_id) is callbacks.discard(job_id) is CallbackState.PENDING
    callbacks.delivered(claimed(callbacks), 200)
    before = callback_row(database_url, job_id)
    assert callbacks.replay(job_id) is callbacks.discard(job_id) is CallbackState.DELIVERED
    assert callback_row(database_url, job_id) == before
    assert callbacks.replay(uuid.uuid4()) is callbacks.discard(uuid.uuid4()) is None
    assert callbacks.replay_dead() == callbacks.discard_dead() == 0


def test_all_dead_letters_are_replayed_at_once(jobs: Jobs, database: Database, database_url: str) -> None:
    callbacks = Callbacks(database)
    ids = [dead(jobs, callbacks), dead(jobs, callbacks)]
    assert callbacks.replay_dead() == 2
    assert callbacks.replay_dead() == 0
    with Inbox(api_key=POKE_KEY) as inbox, delivering(database, inbox):
        for job_id in ids:
            reaches(database_url, job_id, "delivered")


def test_a_discarded_dead_letter_is_gone_and_its_job_says_so(
    jobs: Jobs, callbacks: Callbacks, history: History, database_url: str
) -> None:
    one, others = dead(jobs, callbacks), [dead(jobs, callbacks), dead(jobs, callbacks)]
    assert callbacks.discard(one) is CallbackState.DEAD
    assert history.timeline(one)[-1].kind == "dead letter discarded"
    assert callbacks.discard(one) is None
    assert {letter.request_id for letter in callbacks.dead_letters(10)} == set(others)
    assert callbacks.discard_dead() == 2
    assert rows(database_url, "SELECT id FROM callbacks") == []
