"""A Hypothesis state machine drives the real store through its transitions and compares it with a model at each step.

STORE_MACHINE_EXAMPLES=1000 makes a long run of it, with other examples each time, and has a failing one made smaller,
which may take five minutes.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from typing import Any

import psycopg
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule, run_state_machine_as_test
from psycopg.rows import dict_row

from pokestrator.jobs import CANCELLED, RAN_AGAIN, Channel
from pokestrator.store.callbacks import Callback, Callbacks
from pokestrator.store.jobs import MAX_INTERRUPTIONS
from pokestrator.store.pool import Database
from pokestrator.store.subagents import Subagents
from pokestrator.subagents import Subagent
from tests.integration.flow import poet
from tests.integration.store_machine import JobsMachine, any_job, jobs_of, one_of, some_of
from tests.integration.store_model import Model, ModelCallback, ModelJob

LONG_RUN = int(os.environ.get("STORE_MACHINE_EXAMPLES", "0"))
SETTINGS = settings(
    max_examples=LONG_RUN or 20,
    stateful_step_count=50,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink] if LONG_RUN else [Phase.generate],
    suppress_health_check=list(HealthCheck),
)
BATCHES = range(3, 12)  # of examples, always the same ones: at least so many, and until all has been reached, at most

KEPT_DAYS = 30
CHANNELS = (Channel.CALLBACK, Channel.API_MESSAGE)
COLUMNS = ("state", "claim_seq", "owner", "cancel_requested", "interruptions", "api_retries", "runs", "result")
FINAL = ("succeeded", "failed", "cancelled")
SEEN = """
SELECT jobs.*, sent.state AS sent_state, sent.channel AS sent_channel, sent.attempts, sent.content,
    (SELECT count(*) FROM callbacks WHERE job_id = jobs.id) AS callbacks,
    ARRAY(SELECT kind FROM job_events WHERE job_id = jobs.id) AS events
FROM jobs LEFT JOIN callbacks AS sent ON sent.job_id = jobs.id"""

# What the examples must have come through, or they show less than they seem to.
REACHED = {
    "cancelled too late",
    "cancelled while queued",
    "cancelled, then interrupted",
    "cancelled, then queued again",
    "dead",
    "delivered",
    "elsewhere",
    "failed before its schedule",
    "later",
    "duplicate",
    "given up",
    "judged bad",
    "judged good",
    "late owner",
    "late sender",
    "readdressed while pending",
    "removed",
    "replayed",
    "said that it ran again",
    "same id",
}


def sending(machine: StoreMachine) -> list[Callback]:
    return [each for each in machine.sent if machine.model.sender_owns(each)]


def too_late(machine: StoreMachine) -> list[Callback]:
    return [each for each in machine.sent if not machine.model.sender_owns(each)]


def ended_of(machine: StoreMachine) -> list[ModelJob]:
    return [job for job in jobs_of(machine) if job.is_ended]


is_sending = precondition(sending)


class StoreMachine(JobsMachine):
    def __init__(self, database: Database, outside: psycopg.Connection[Any], subagent: Subagent, model: Model) -> None:
        super().__init__(database, outside, subagent, model)
        self.callbacks = Callbacks(database)
        self.sent: list[Callback] = []  # every attempt that was ever handed out
        self.before: dict[uuid.UUID, dict[str, Any]] = {}  # what the last look found

    # the outbox --------------------------------------------------------------------------------------------------

    @any_job(lambda job: job.callback and job.callback.state == "pending")
    @rule(channels=st.sampled_from([CHANNELS, CHANNELS, CHANNELS[1:]]), limit=st.integers(1, 3))
    def claim_callbacks(self, channels: Sequence[Channel], limit: int) -> None:
        wanted = {job.id: job for job in self.model.sendable(channels)}
        claimed = self.callbacks.claim_due(channels, limit)
        assert len(claimed) == min(limit, len(wanted))
        for each in claimed:
            sent = wanted[each.job_id].callback
            assert sent is not None
            sent.attempts, sent.has_hold, sent.is_held = sent.attempts + 1, True, True
            assert (each.attempt, each.channel, each.content) == (sent.attempts, sent.channel, sent.content)
            assert each.tries == sent.attempts - sent.attempts_before
            if each.channel is Channel.CALLBACK:
                assert each.target is not None
                assert each.target.url == wanted[each.job_id].callback_url  # the newest
        self.sent.extend(claimed)

    @is_sending
    @rule(
        claimed=one_of(sending), how=st.sampled_from(["delivered", "delivered", "dead", "later", "elsewhere", "back"])
    )
    def end_sending(self, claimed: Callback, how: str) -> None:
        sent = self.model.sender_owns(claimed)
        assert sent is not None
        had_hold, sent.has_hold, sent.is_held = sent.has_hold, False, False
        if how == "delivered":
            self.callbacks.delivered(claimed, 200)
            sent.state, sent.is_old = how, False
        elif how == "back":
            self.callbacks.give_back(claimed)
            if had_hold:
                sent.is_due, sent.attempts_before = True, min(sent.attempts_before + 1, sent.attempts)
        else:
            how = self._fail_to_send(claimed, sent, how)
        self.model.reached[how] += 1

    def _fail_to_send(self, claimed: Callback, sent: ModelCallback, how: str) -> str:
        if how == "dead":
            self.callbacks.dead(claimed, 400, "HTTP 400")
        elif how == "later":
            self.callbacks.retry(claimed, 503, "HTTP 503", wait_seconds=60, channel=claimed.channel)
        else:
            self.callbacks.retry(claimed, 401, "HTTP 401", wait_seconds=0, channel=Channel.API_MESSAGE)
        if sent.attempts_before >= claimed.attempt:  # it was readdressed or replayed meanwhile
            return "failed before its schedule"
        if how == "dead":
            sent.state, sent.is_old = how, False
        else:
            sent.is_due = how == "elsewhere"
            sent.channel = claimed.channel if how == "later" else Channel.API_MESSAGE
        return how

    @precondition(too_late)
    @rule(claimed=one_of(too_late))
    def record_late(self, claimed: Callback) -> None:
        self.callbacks.delivered(claimed, 200)
        self.callbacks.dead(claimed, 400, "HTTP 400")
        self.callbacks.retry(claimed, 503, "HTTP 503", wait_seconds=0, channel=Channel.API_MESSAGE)
        self.model.reached["late sender"] += 1

    @any_job(lambda job: job.callback and job.callback.is_held)
    @rule()
    def let_senders_vanish(self) -> None:
        self.change("UPDATE callbacks SET lease_until = now() - interval '1 second' WHERE lease_until IS NOT NULL")
        for job in ended_of(self):
            if job.callback is not None:
                job.callback.is_held = False

    @any_job(lambda job: job.is_ended)
    @rule(job=one_of(ended_of))
    def replay(self, job: ModelJob) -> None:
        sent = job.callback
        assert self.callbacks.replay(job.id) == (sent.state if sent else None)
        if sent is not None and sent.state == "dead":
            sent.begin_anew()
            self.model.reached["replayed"] += 1

    # retention ---------------------------------------------------------------------------------------------------

    @any_job(lambda job: job.is_ended)
    @rule(old=some_of(ended_of), limit=st.sampled_from([1, 100]))
    def remove_old(self, old: list[ModelJob], limit: int) -> None:
        for job in old:
            self.change("UPDATE jobs SET finished_at = finished_at - interval '40 days' WHERE id = %s", job)
            self.change("UPDATE callbacks SET ended_at = ended_at - interval '40 days' WHERE job_id = %s", job)
            job.is_old = True
            if job.callback is not None:
                job.callback.is_old = job.callback.state != "pending"
        removable = [job.id for job in jobs_of(self) if job.is_removable]
        assert self.recovery.remove_old(KEPT_DAYS, limit) == min(limit, len(removable))
        left = self._look().keys()
        for job_id in set(removable) - left:
            del self.model.jobs[job_id]
            del self.before[job_id]
            self.model.reached["removed"] += 1

    # what must hold after every step -----------------------------------------------------------------------------

    @invariant()
    def the_model_and_the_promises_hold(self) -> None:
        seen = self._look()
        self._check_model(seen)
        self._check_promises(seen)
        self.before = seen

    def _check_model(self, seen: dict[uuid.UUID, dict[str, Any]]) -> None:
        assert seen.keys() == self.model.jobs.keys(), "what was accepted exists"
        for job in jobs_of(self):
            row, sent = seen[job.id], job.callback
            assert {name: row[name] for name in COLUMNS} == {name: getattr(job, name) for name in COLUMNS}
            assert (row["channel"], row["callback_url"]) == (job.channel, job.callback_url)
            assert (row["sent_state"], row["sent_channel"], row["attempts"], row["content"]) == (
                (sent.state, sent.channel, sent.attempts, sent.content) if sent else (None, None, None, None)
            )

    def _check_promises(self, seen: dict[uuid.UUID, dict[str, Any]]) -> None:
        for job_id, row in seen.items():
            is_ended = row["state"] in FINAL
            assert (row["state"] == "running") == (row["owner"] is not None) == (row["lease_until"] is not None)
            assert row["callbacks"] == (1 if is_ended and row["channel"] != "none" else 0)
            assert row["interruptions"] <= MAX_INTERRUPTIONS
            assert is_ended or row["interruptions"] < MAX_INTERRUPTIONS
            assert (row["state"] == "cancelled") == (row["result"] == CANCELLED)
            if row["state"] in ("succeeded", "failed"):
                assert row["result"].endswith(RAN_AGAIN) == (row["runs"] > 1)
            for kind, times in {"accepted": 1, "claimed": row["claim_seq"], "finished": int(is_ended)}.items():
                assert row["events"].count(kind) == times, kind
            if (before := self.before.get(job_id)) is not None:
                assert row["claim_seq"] >= before["claim_seq"]
                assert not before["cancel_requested"] or row["claim_seq"] == before["claim_seq"], "it ran once more"
                if before["state"] in FINAL:
                    assert [row[name] for name in COLUMNS] == [before[name] for name in COLUMNS]
        assert self.before.keys() <= seen.keys()
        assert len({(claim.id, claim.claim_seq) for claim in self.claims}) == len(self.claims), "one fence, two owners"

    def _look(self) -> dict[uuid.UUID, dict[str, Any]]:
        return {row["id"]: row for row in self.outside.execute(SEEN)}


def test_the_store_does_what_its_model_does_whatever_comes_in_whatever_order(
    database: Database, database_url: str
) -> None:
    subagent = Subagents(database).adopt(poet())
    model = Model()

    def machine() -> StoreMachine:
        model.jobs.clear()
        return StoreMachine(database, outside, subagent, model)

    with psycopg.connect(database_url, autocommit=True, row_factory=dict_row) as outside:
        for batch in range(1 if LONG_RUN else BATCHES.stop):
            if batch in BATCHES and set(model.reached) >= REACHED:
                break
            run_state_machine_as_test(machine if LONG_RUN else seed(batch)(machine), settings=SETTINGS)
    assert LONG_RUN or set(model.reached) >= REACHED, model.reached
