"""The state machine's rules about jobs: accept, claim, renew, expire, sweep, release, run, end, ask and cancel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import psycopg
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from pokestrator.errors import LeaseLost
from pokestrator.intake import Action, Question, new_job
from pokestrator.jobs import CANCELLED, CallbackTarget, Channel, Job, JobState, NewJob, Outcome, Route, Verdict
from pokestrator.runs import ErrorKind, Usage
from pokestrator.store.history import History
from pokestrator.store.jobs import Jobs
from pokestrator.store.pool import Database
from pokestrator.store.recovery import Recovery
from pokestrator.subagents import Subagent
from tests.integration.store_model import Model, ModelJob

T = TypeVar("T")

LEASE = 60.0
SUCCEEDED = Outcome(JobState.SUCCEEDED, "It went well.")
FAILED = Outcome(JobState.FAILED, "It took too long.", ErrorKind.TIMEOUT)

OWNER = st.sampled_from(["ann:1", "ben:2"])
ACTION = st.sampled_from([Action.STATUS, Action.STATUS, Action.CANCEL])


def one_of(choices: Callable[[JobsMachine], Sequence[Any]]) -> st.SearchStrategy[Any]:
    """One of what there is at this step."""
    return st.runner().flatmap(lambda machine: st.sampled_from(choices(machine)))


def some_of(choices: Callable[[JobsMachine], Sequence[Any]]) -> st.SearchStrategy[list[Any]]:
    return st.runner().flatmap(lambda machine: st.lists(st.sampled_from(choices(machine)), max_size=4))


def jobs_of(machine: JobsMachine) -> list[ModelJob]:
    return list(machine.model.jobs.values())


def owned(machine: JobsMachine) -> list[Job]:
    return [claim for claim in machine.claims if machine.model.owns(claim)]


def lost(machine: JobsMachine) -> list[Job]:
    return [claim for claim in machine.claims if not machine.model.owns(claim)]


def all_claims(machine: JobsMachine) -> list[Job]:
    return [*owned(machine), *lost(machine)]


def any_job(condition: Callable[[ModelJob], object]) -> Callable[..., Any]:
    """Only when there is such a job: rules that have nothing to do would take most of the steps."""
    return precondition(lambda machine: any(condition(job) for job in jobs_of(machine)))


has_jobs = precondition(lambda machine: machine.model.jobs)
has_claims = precondition(lambda machine: machine.claims)
has_owned = precondition(owned)


class JobsMachine(RuleBasedStateMachine):
    def __init__(self, database: Database, outside: psycopg.Connection[Any], subagent: Subagent, model: Model) -> None:
        super().__init__()
        outside.execute("TRUNCATE jobs, job_events, callbacks")
        self.jobs, self.history, self.recovery = Jobs(database), History(database), Recovery(database)
        self.outside, self.subagent, self.model = outside, subagent, model
        self.new: list[NewJob] = []
        self.claims: list[Job] = []  # every one that was ever handed out

    @initialize()
    def begin_with_a_running_job(self) -> None:
        self.accept("coffee", "u-1", None, None)
        self.accept("juice", "u-2", "key-1", "one")
        self.claim("ann:1", 1)
        self.begin_run(self.claims[0])

    # accept ------------------------------------------------------------------------------------------------------

    @rule(
        task=st.sampled_from(["tea", "cake"]),
        caller=st.sampled_from([None, "u-1", "u-2"]),
        key=st.sampled_from([None, None, "key-1", "key-2"]),
        address=st.sampled_from([None, "one", "two", "three"]),
        once_more=st.integers(0, 20),
    )
    def accept(self, task: str, caller: str | None, key: str | None, address: str | None, once_more: int = 0) -> None:
        target = CallbackTarget(f"https://poke.invalid/{address}", "token") if address else None
        self.new.append(new_job(task, {"idempotency_key": key} if key else "", caller=caller, callback=target))
        # Some come a second time, as after a COMMIT whose answer was lost; but not after they have been removed.
        again = [job for job in self.new[-1 - once_more : -once_more] if job.id in self.model.jobs]
        for job in (self.new[-1], *again):
            assert self.jobs.insert(job) == self.model.insert(job)

    @precondition(lambda self: not any(job.channel == "none" for job in jobs_of(self)))
    @rule(owner=OWNER)
    def ask_at_a_terminal(self, owner: str) -> None:
        job = new_job("tea", channel=Channel.NONE)
        claim = self.jobs.insert_claimed(job, owner, LEASE)
        self._taken([claim], owner, [self.model.jobs[self.model.insert(job)]])

    @has_jobs
    @rule(job=one_of(jobs_of), seconds=st.sampled_from([180, 90_000]))
    def let_time_pass_since_accept(self, job: ModelJob, seconds: int) -> None:
        self.change("UPDATE jobs SET created_at = created_at - make_interval(secs => %s) WHERE id = %s", seconds, job)
        job.age_seconds += seconds

    # claims ------------------------------------------------------------------------------------------------------

    @any_job(lambda job: job.state == "queued")
    @rule(owner=OWNER, limit=st.integers(0, 4))
    def claim(self, owner: str, limit: int) -> None:
        claims = self.jobs.claim(owner, LEASE, limit)
        wanted = self.model.claimable()
        taken = [self.model.jobs[claim.id] for claim in claims]
        assert sorted(taken, key=lambda job: job.run_at) == wanted[:limit]
        self._taken(claims, owner, taken)

    @any_job(lambda job: job.state == "queued")
    @rule(owner=OWNER, job=one_of(jobs_of))
    def claim_one(self, owner: str, job: ModelJob) -> None:
        claim = self.jobs.claim_one(job.id, owner, LEASE)
        assert (claim is not None) == self.model.may_run(job)
        if claim is not None:
            self._taken([claim], owner, [job])

    def _taken(self, claims: Sequence[Job], owner: str, jobs: Sequence[ModelJob]) -> None:
        for claim, job in zip(claims, jobs, strict=True):
            self.model.claim(job, owner)
            assert self.model.owns(claim)
        self.claims.extend(claims)

    @has_claims
    @rule(claims=some_of(all_claims))
    def renew(self, claims: list[Job]) -> None:
        kept = [claim for claim in claims if self.model.owns(claim)]
        assert self.jobs.renew(claims, LEASE) == {(claim.id, claim.claim_seq) for claim in kept}
        for claim in kept:
            self.model.jobs[claim.id].is_lapsed = False

    @has_claims
    @rule(claims=some_of(all_claims))
    def release(self, claims: list[Job]) -> None:
        given = {claim.id: self.model.jobs[claim.id] for claim in claims if self.model.owns(claim)}
        assert self.jobs.release(claims) == given.keys()
        self.model.requeue(list(given.values()))

    @any_job(lambda job: job.state == "running")
    @rule(
        lapsed=some_of(lambda machine: machine.model.running()),
        left=st.sampled_from(["-1 second", "1 day"]),
        sweeper=OWNER,
        dead=st.sets(OWNER, max_size=1),
        expired=st.booleans(),
    )
    def sweep(self, lapsed: list[ModelJob], left: str, sweeper: str, dead: set[str], expired: bool) -> None:
        for job in lapsed:  # a lease that lies a day ahead was written before the clock went back
            self.change("UPDATE jobs SET lease_until = now() + %s::interval WHERE id = %s", left, job)
            job.is_lapsed = True
        orphans = [job for job in self.model.running() if job.owner in dead or (expired and job.is_lapsed)]
        orphans = [job for job in orphans if job.owner != sweeper]
        swept = self.recovery.sweep(self._held(sweeper), dead_owners=dead, expired=expired)
        assert (set(swept.requeued), set(swept.ended)) == self.model.interrupt(orphans, orphaned=True)

    @any_job(lambda job: job.state == "running")
    @rule(owner=OWNER, forgotten=st.integers(0, 2))
    def release_unknown(self, owner: str, forgotten: int) -> None:
        held = self._held(owner)[forgotten:]
        known = {claim.id for claim in held}
        unknown = [job for job in self.model.running(owner) if job.id not in known]
        assert set(self.recovery.release_unknown(owner, held)) == {job.id for job in unknown}
        self.model.requeue(unknown)

    def _held(self, owner: str) -> list[Job]:
        return [claim for claim in owned(self) if self.model.jobs[claim.id].owner == owner]

    # runs --------------------------------------------------------------------------------------------------------

    @has_owned
    @rule(claim=one_of(owned))
    def begin_run(self, claim: Job) -> None:
        self.jobs.record_route(claim, Route.MATCH, "it fits")
        self.jobs.begin_run(claim, self.subagent.id, self.subagent.version, "it runs")
        self.model.jobs[claim.id].runs += 1

    @has_owned
    @rule(claim=one_of(owned), how=st.sampled_from(["succeeds", "fails", "is cut short", "the API has trouble"]))
    def end_run(self, claim: Job, how: str) -> None:
        job = self.model.jobs[claim.id]
        if how in ("succeeds", "fails"):
            outcome = SUCCEEDED if how == "succeeds" else FAILED
            self.jobs.finish(claim, outcome)
            self.model.finish(job, succeeded=outcome is SUCCEEDED, text=outcome.text)
        elif how == "is cut short":
            ended = self.jobs.interrupt(claim, "the slot died", Usage())
            again, _ = self.model.interrupt([job], orphaned=False)
            assert (ended is None) == (claim.id in again)
        else:
            ended = self.jobs.retry(claim, 0, "HTTP 529", Usage())
            assert (ended is not None) == job.cancel_requested
            self.model.retry(job)

    @precondition(lost)
    @rule(claim=one_of(lost))
    def write_late(self, claim: Job) -> None:
        """Whatever an owner writes that has lost its job, it is refused."""
        for write in (
            lambda: self.jobs.record_route(claim, Route.MATCH, "it fits"),
            lambda: self.jobs.begin_run(claim, self.subagent.id, self.subagent.version, "it runs"),
            lambda: self.jobs.finish(claim, SUCCEEDED),
            lambda: self.jobs.finish(claim, FAILED),
            lambda: self.jobs.interrupt(claim, "the slot died", Usage()),
            lambda: self.jobs.retry(claim, 0, "HTTP 529", Usage()),
        ):
            with pytest.raises(LeaseLost):
                write()
        self.model.reached["late owner"] += 1

    # questions ---------------------------------------------------------------------------------------------------

    @has_owned
    @rule(claim=one_of(owned))
    def cancel_a_run(self, claim: Job) -> None:
        job = self.model.jobs[claim.id]
        self._ask(Question(Action.CANCEL, job.id, job.caller), job if job.channel != "none" else None)
        assert job.owner is not None
        wanted = {each.id for each in self.model.running(job.owner) if each.cancel_requested}
        assert self.recovery.to_cancel(job.owner) == wanted

    @has_jobs
    @rule(job=one_of(jobs_of), caller=st.sampled_from(["its own", "u-1", None]), action=ACTION)
    def ask_by_id(self, job: ModelJob, caller: str | None, action: Action) -> None:
        caller = job.caller if caller == "its own" else caller
        visible = job.channel != "none" and caller == job.caller
        self._ask(Question(action, job.id, caller), job if visible else None)

    @has_jobs
    @rule(caller=st.sampled_from(["u-1", "u-2"]), action=ACTION)
    def ask_about_the_latest(self, caller: str, action: Action) -> None:
        self._ask(Question(action, None, caller), self.model.latest(caller))

    def _ask(self, question: Question, job: ModelJob | None) -> None:
        status = self.history.answer(question)
        assert (status is None) == (job is None)
        if status is None or job is None:
            return
        if question.action is Action.CANCEL:
            self.model.cancel(job)
        assert status.verdict == job.verdict
        assert (status.request_id, status.state, status.cancel_requested, status.result, status.delivery) == (
            job.id,
            job.state,
            job.cancel_requested,
            job.result,
            job.callback.state if job.callback else None,
        )

    @any_job(lambda job: job.is_ended)
    @rule(job=one_of(jobs_of), caller=st.sampled_from(["its own", "u-1"]), verdict=st.sampled_from(list(Verdict)))
    def judge(self, job: ModelJob, caller: str | None, verdict: Verdict) -> None:
        caller = job.caller if caller == "its own" else caller
        visible = job.channel != "none" and caller == job.caller
        if visible:
            self.model.judge(job, verdict)
        self._ask(Question(Action.FEEDBACK, job.id, caller, verdict, "so it was"), job if visible else None)

    @any_job(lambda job: job.state == "queued" and job.cancel_requested)
    @rule()
    def end_cancelled(self) -> None:
        wanted = [job for job in jobs_of(self) if job.state == "queued" and job.cancel_requested]
        assert set(self.recovery.end_cancelled()) == {job.id for job in wanted}
        for job in wanted:
            self.model.end(job, "cancelled", CANCELLED)
            self.model.reached["cancelled, then queued again"] += 1

    def change(self, statement: str, *values: object) -> None:
        """Write from outside; jobs among the values stand for their ids."""
        self.outside.execute(statement.encode(), [each.id if isinstance(each, ModelJob) else each for each in values])
