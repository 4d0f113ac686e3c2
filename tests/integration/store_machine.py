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
from pokestrator.jobs import CANCELLED, CallbackTarget, Channel, Job, JobState, NewJob, Outcome
from pokestrator.runs import ErrorKind, Usage
from pokestrator.store.history import History
from pokestrator.store.jobs import Jobs
from pokestrator.store.pool import Database
from pokestrator.store.recovery import Recovery
from pokestrator.subagents import Subagent
from tests.integration.store_model import Model, ModelJob

T = TypeVar("T")

LEASE = 60.0

OWNER = st.sampled_from(["ann:1", "ben:2", "cat:3"])


def one_of(choices: Callable[[JobsMachine], Sequence[Any]]) -> st.SearchStrategy[Any]:
    """One of what there is at this step."""
    return st.runner().flatmap(lambda machine: st.sampled_from(choices(machine)))


def some_of(choices: Callable[[JobsMachine], Sequence[Any]]) -> st.SearchStrategy[list[Any]]:
    return st.runner().flatmap(lambda machine: st.lists(st.sampled_from(choices(machine)), max_size=4))


def jobs_of(machine: JobsMachine) -> list[ModelJob]:
    return list(machine.model.jobs.values())


def claims_of(machine: JobsMachine) -> list[Job]:
    """Those that stand, most often, and the last ones that were lost."""
    return in_favour(machine.claims, machine.model.owns)


def in_favour(those: Sequence[T], condition: Callable[[T], object]) -> list[T]:
    favoured, others = [each for each in those if condition(each)], [each for each in those if not condition(each)]
    return [*(favoured * 3), *others[-2:]]


def any_job(condition: Callable[[ModelJob], object]) -> Callable[..., Any]:
    """Only when there is such a job: rules that have nothing to do would take most of the steps."""
    return precondition(lambda machine: any(condition(job) for job in jobs_of(machine)))


has_jobs = precondition(lambda machine: machine.model.jobs)
has_claims = precondition(lambda machine: machine.claims)


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
    )
    def accept(self, task: str, caller: str | None, key: str | None, address: str | None) -> None:
        target = CallbackTarget(f"https://poke.invalid/{address}", "token") if address else None
        self._insert(new_job(task, {"idempotency_key": key} if key else "", caller=caller, callback=target))

    @precondition(lambda self: self.new)
    @rule(job=one_of(lambda machine: machine.new))
    def insert_once_more(self, job: NewJob) -> None:
        """As after a COMMIT whose answer was lost."""
        self._insert(job)

    def _insert(self, job: NewJob) -> None:
        self.new.append(job)
        assert self.jobs.insert(job) == self.model.insert(job)

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

    @has_jobs
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
            assert claim.callback is None or claim.callback.url == job.callback_url
        self.claims.extend(claims)

    @has_claims
    @rule(claims=some_of(claims_of))
    def renew(self, claims: list[Job]) -> None:
        owned = [claim for claim in claims if self.model.owns(claim)]
        assert self.jobs.renew(claims, LEASE) == {claim.id for claim in owned}
        for claim in owned:
            self.model.jobs[claim.id].is_lapsed = False

    @has_claims
    @rule(claims=some_of(claims_of))
    def release(self, claims: list[Job]) -> None:
        owned = {claim.id: self.model.jobs[claim.id] for claim in claims if self.model.owns(claim)}
        assert self.jobs.release(claims) == owned.keys()
        self.model.requeue(list(owned.values()))

    @any_job(lambda job: job.state == "running")
    @rule(job=one_of(lambda machine: machine.model.running()), left=st.sampled_from(["-1 second", "1 day"]))
    def let_lease_run_out(self, job: ModelJob, left: str) -> None:
        """A lease that lies a day ahead was written before the clock went back."""
        self.change("UPDATE jobs SET lease_until = now() + %s::interval WHERE id = %s", left, job)
        job.is_lapsed = True

    @any_job(lambda job: job.state == "running")
    @rule(sweeper=OWNER, dead=st.sets(OWNER, max_size=2), expired=st.booleans())
    def sweep(self, sweeper: str, dead: set[str], expired: bool) -> None:
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
        return [claim for claim in self.claims if self.model.owns(claim) and self.model.jobs[claim.id].owner == owner]

    # runs --------------------------------------------------------------------------------------------------------

    @has_claims
    @rule(claim=one_of(claims_of))
    def begin_run(self, claim: Job) -> None:
        if self._fenced(claim, lambda: self.jobs.begin_run(claim, self.subagent.id, self.subagent.version, "it runs")):
            self.model.jobs[claim.id].runs += 1

    @has_claims
    @rule(claim=one_of(claims_of))
    def succeed(self, claim: Job) -> None:
        self._finish(claim, JobState.SUCCEEDED, None)

    @has_claims
    @rule(claim=one_of(claims_of))
    def fail(self, claim: Job) -> None:
        self._finish(claim, JobState.FAILED, ErrorKind.TIMEOUT)

    def _finish(self, claim: Job, state: JobState, error: ErrorKind | None) -> None:
        if self._fenced(claim, lambda: self.jobs.finish(claim, Outcome(state, "It ended.", error))):
            self.model.finish(self.model.jobs[claim.id], succeeded=error is None, text="It ended.")

    @has_claims
    @rule(claim=one_of(claims_of))
    def interrupt(self, claim: Job) -> None:
        if self._fenced(claim, lambda: self.jobs.interrupt(claim, "the slot died", Usage())):
            self.model.interrupt([self.model.jobs[claim.id]], orphaned=False)

    @has_claims
    @rule(claim=one_of(claims_of))
    def retry(self, claim: Job) -> None:
        if self._fenced(claim, lambda: self.jobs.retry(claim, 0, "HTTP 529", Usage())):
            job = self.model.jobs[claim.id]
            if job.cancel_requested:
                self.model.finish(job, succeeded=False, text="")
            else:
                self.model.requeue([job])
                job.api_retries += 1

    def _fenced(self, claim: Job, write: Callable[[], object]) -> bool:
        """Whether a write was its owner's; any other is refused."""
        if self.model.owns(claim):
            write()
            return True
        with pytest.raises(LeaseLost):
            write()
        self.model.reached["late owner"] += 1
        return False

    # questions ---------------------------------------------------------------------------------------------------

    @has_jobs
    @rule(
        job=one_of(jobs_of),
        caller=st.sampled_from([None, "u-1", "u-2", "its own", "its own"]),
        action=st.sampled_from(Action),
    )
    def ask_by_id(self, job: ModelJob, caller: str | None, action: Action) -> None:
        caller = job.caller if caller == "its own" else caller
        visible = job.channel != "none" and caller == job.caller
        self._ask(Question(action, job.id, caller), job if visible else None)

    @has_jobs
    @rule(caller=st.sampled_from(["u-1", "u-2"]), action=st.sampled_from(Action))
    def ask_about_the_latest(self, caller: str, action: Action) -> None:
        self._ask(Question(action, None, caller), self.model.latest(caller))

    def _ask(self, question: Question, job: ModelJob | None) -> None:
        status = self.history.answer(question)
        assert (status is None) == (job is None)
        if status is None or job is None:
            return
        if question.action is Action.CANCEL:
            self.model.cancel(job)
        assert (status.request_id, status.state, status.cancel_requested, status.result, status.delivery) == (
            job.id,
            job.state,
            job.cancel_requested,
            job.result,
            job.callback.state if job.callback else None,
        )

    @any_job(lambda job: job.state == "running" and job.cancel_requested)
    @rule(owner=OWNER)
    def look_for_cancelled_runs(self, owner: str) -> None:
        wanted = {job.id for job in self.model.running(owner) if job.cancel_requested}
        assert self.recovery.to_cancel(owner) == wanted

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
