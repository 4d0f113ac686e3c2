"""The flow: accept() takes a task in, run_job() takes a claimed job to its end or to its next try."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace

from pokestrator.asking import failed
from pokestrator.claude.pool import Claude
from pokestrator.delivery import Delivery
from pokestrator.errors import InvalidTask, LeaseLost, StoreUnavailable, TryAgainLater
from pokestrator.intake import Action, Question
from pokestrator.jobs import Acknowledgement, Channel, Job, JobState, JobStatus, NewJob, Outcome
from pokestrator.running import Runner
from pokestrator.runs import ErrorKind
from pokestrator.store.history import History
from pokestrator.store.jobs import Jobs
from pokestrator.telemetry import get_logger, one_line

log = get_logger(__name__)

ACCEPTED = "Working on it. The result comes later as its own message; there is no need to ask again."
ACCEPTED_FROM_MEMORY = (
    "Working on it, but the database is away: if this service restarts before the result is sent, it is lost."
)
ACCEPTED_BEFORE = "This was handed over before and is not done twice. Its result comes, or came, as its own message."
BUSY_WITHOUT_DATABASE = (
    "The database is away or too slow, and nothing more can run from memory; nothing was stored. Try again in a minute."
)
UNCERTAIN = (
    "The database went away while this was being stored, so it may run or may not. If no result has come in some "
    "minutes, send it again."
)
BUSY = "The database is busy, and this was not stored. Try again in a moment."
NOTHING_TO_SAY = "The database is away, so nothing can be said or done about earlier tasks. Try again in a minute."
UNCERTAIN_ANSWER = "The database went away, and whether that was done is not known. Ask again in a minute."
NOT_YOURS = "names no task of yours that is still known; leave it out for your latest task"
NONE_YET = "is missing, and no task of yours is known"
NONE_ENDED = "is missing, and no task of yours has ended"
NO_RESULT = {  # to judge
    JobState.FAILED: "failed, so there is no result to judge",
    JobState.CANCELLED: "was cancelled, so there is no result to judge",
}
NO_RESULT_YET = "has not ended; say what its result is like once it is there"

ACCEPT_SECONDS = 1.0  # for storing a task; with the lookup below, an answer comes in under 2 s
LOOKUP_SECONDS = 0.5  # for asking again, when the answer to a COMMIT was lost
IMPATIENT_SECONDS = 0.25  # in place of ACCEPT_SECONDS, while the database is known to be away or was just now
IMPATIENCE_LASTS = 2.0  # seconds: or those who come while it hangs would wait for each other
UNCERTAIN_LASTS = 3_600.0  # seconds that a call is remembered which may have been stored: Poke has given up long before
RETRY_SECONDS = 1.0
BUDGET_WAIT = 15.0  # seconds before a job looks again whether what others had reserved is free
API_WAITS = (5.0, 25.0)  # seconds before the second and the third try, when Claude's API had trouble


class Service:
    """One instance's flow, from an `orchestrate` call to the callback in the outbox."""

    def __init__(
        self,
        *,
        jobs: Jobs,
        history: History,
        runner: Runner,
        claude: Claude,
        delivery: Delivery,
        stopping: threading.Event,
        redact: Callable[[str], str],
        accept_seconds: float | None = ACCEPT_SECONDS,
    ) -> None:
        """`accept_seconds`: how long a caller waits for the database; None, while somebody may be stepping."""
        self._jobs = jobs
        self._history = history
        self._runner = runner
        self._claude = claude
        self._delivery = delivery
        self._stopping = stopping
        self._redact = redact
        self._accept_seconds = accept_seconds
        self._impatient_until = 0.0
        self._runs_here: dict[uuid.UUID, str] = {}
        self._from_memory: dict[str, uuid.UUID] = {}  # by idempotency key, while it runs
        self._uncertain: dict[str, float] = {}  # when a call of this idempotency key may have been stored
        self._memory_turn = threading.Lock()

    # in --------------------------------------------------------------------------------------------------------

    def accept(
        self, job: NewJob, submit_from_memory: Callable[[Callable[[], None]], bool], *, impatient: bool = False
    ) -> Acknowledgement:
        """Store the job; when this returns, it is committed, or the answer says that it is not durable.

        `impatient`: the database is known to be away. Raises TryAgainLater when the job was not taken.
        """
        started = time.monotonic()
        stored = self._store(job, impatient=impatient)
        ack = self._take_into_memory(job, submit_from_memory) if stored is None else _stored(job, stored)
        log.info(
            "accepted",
            request_id=str(ack.request_id),
            durable=ack.durable,
            duplicate=ack.duplicate,
            channel=job.channel,
            ms=round(1000 * (time.monotonic() - started), 1),
        )
        return ack

    def _take_into_memory(
        self, job: NewJob, submit_from_memory: Callable[[Callable[[], None]], bool]
    ) -> Acknowledgement:
        key = job.idempotency.key if job.idempotency else str(job.id)

        def run() -> None:
            try:
                self._run_from_memory(job)
            finally:
                self._from_memory.pop(key, None)

        with self._memory_turn:
            if key in self._from_memory:
                return Acknowledgement(self._from_memory[key], False, ACCEPTED_BEFORE, duplicate=True)
            self._from_memory[key] = job.id
            if not submit_from_memory(run):
                del self._from_memory[key]
                raise TryAgainLater(BUSY_WITHOUT_DATABASE)
        return Acknowledgement(job.id, False, ACCEPTED_FROM_MEMORY)

    def _store(self, job: NewJob, *, impatient: bool) -> uuid.UUID | None:
        """The stored job's id (an earlier one's, if this repeats it); None when it certainly is not stored.

        Raises TryAgainLater when that is not known, or when the database is there and only busy: what runs from memory
        meanwhile could be the very task that another call is storing.
        """
        within = self._accept_seconds
        if within is not None and (impatient or time.monotonic() < self._impatient_until):
            within = IMPATIENT_SECONDS
        try:
            return self._jobs.insert(job, within)
        except StoreUnavailable as error:
            log.warning("not_stored", request_id=str(job.id), reason=str(error), certain=not error.maybe_committed)
            if within == self._accept_seconds:  # else a database that is only slow would never be waited for again
                self._impatient_until = time.monotonic() + IMPATIENCE_LASTS
            if error.is_busy and not impatient and not error.maybe_committed:
                raise TryAgainLater(BUSY) from error
            if not error.maybe_committed:
                if self._may_be_stored(job):
                    raise TryAgainLater(UNCERTAIN) from error
                return None
        try:
            # The COMMIT's answer was lost. Storing the same id again waits for what may still be under way, and stores
            # it once; a guess could run the task twice.
            return self._jobs.insert(job, LOOKUP_SECONDS)
        except StoreUnavailable as error:
            if job.idempotency is not None:
                self._uncertain[job.idempotency.key] = time.monotonic()
            raise TryAgainLater(UNCERTAIN) from error

    def _may_be_stored(self, job: NewJob) -> bool:
        """Whether an earlier try of this call may have been stored: its repetition must not run from memory."""
        long_ago = time.monotonic() - UNCERTAIN_LASTS
        for key, at in list(self._uncertain.items()):
            if at < long_ago:
                self._uncertain.pop(key, None)
        return job.idempotency is not None and job.idempotency.key in self._uncertain

    def ask(self, question: Question) -> JobStatus:
        """The status of a caller's job, cancelled or judged first if that was asked. Raises InvalidTask,
        TryAgainLater."""
        question = replace(question, note=self._redact(question.note))
        try:
            status = self._answer(question)
        except StoreUnavailable as error:
            raise TryAgainLater(UNCERTAIN_ANSWER if error.maybe_committed else NOTHING_TO_SAY) from error
        if status is None:
            raise InvalidTask("metadata.request_id", _none_found(question))
        if question.action is Action.FEEDBACK and status.state is not JobState.SUCCEEDED:
            raise InvalidTask("metadata.request_id", _not_to_judge(question, status))
        if status.state is JobState.CANCELLED:
            self._delivery.wake()
        return status

    def _answer(self, question: Question) -> JobStatus | None:
        try:
            return self._history.answer(question, self._accept_seconds)
        except StoreUnavailable as error:
            if not error.maybe_committed:
                raise
            return self._history.answer(question, LOOKUP_SECONDS)  # to do it twice does no harm

    def end_run(self, job_id: uuid.UUID) -> None:
        """End this job's run, if it is in this process."""
        if run_id := self._runs_here.get(job_id):
            self._claude.cancel(run_id)

    # the run ---------------------------------------------------------------------------------------------------

    def run_job(self, job: Job) -> float | None:
        """Take a claimed job to its end and put its callback into the outbox; or queue it for another try.

        Returns the seconds until that try, None at the end. Raises LeaseLost.
        """
        started = time.monotonic()
        self._runs_here[job.id] = job.run_id
        try:
            outcome = self._runner.outcome(job)
        except LeaseLost:
            raise
        except StoreUnavailable as error:
            self._release(job, error)
            raise LeaseLost(f"released, because the database was away: {error}") from error
        except Exception as error:
            log.exception("run_failed", request_id=str(job.id))
            outcome = failed(ErrorKind.INTERNAL, self._redact(f"{type(error).__name__}: {error}"))
        finally:
            if self._runs_here.get(job.id) == job.run_id:  # not a later claim's
                del self._runs_here[job.id]
        if self._stopping.is_set() and outcome.error is ErrorKind.AGENT_CRASHED:
            raise LeaseLost("this instance ended the run because it is leaving")
        final, wait = self._settle(job, outcome)
        log.info(
            "will_run_again" if final is None else "finished",
            request_id=str(job.id),
            state=final.state if final else JobState.QUEUED,
            error=outcome.error,
            detail=one_line(outcome.detail),
            seconds=round(time.monotonic() - started, 2),
            cost_usd=round(outcome.usage.cost_usd, 4),
        )
        self._delivery.wake()
        return wait if final is None else None

    def _settle(self, job: Job, outcome: Outcome) -> tuple[Outcome | None, float]:
        """Write what becomes of the job: how it ended, or None and the seconds until it may run again.

        What was cut short, and what the API failed to do, is tried again; not for a terminal, where a person waits.
        """
        if job.channel is not Channel.NONE:
            if outcome.error is ErrorKind.AGENT_CRASHED:
                return self._write(job, lambda: self._jobs.interrupt(job, outcome.detail, outcome.usage)), 0.0
            if outcome.is_transient and outcome.error is ErrorKind.BUDGET_SPENT:
                detail, usage = outcome.detail, outcome.usage
                wait = BUDGET_WAIT * random.uniform(0.8, 1.2)
                return self._write(job, lambda: self._jobs.retry(job, wait, detail, usage, counts=False)), wait
            if outcome.is_transient and job.api_retries < len(API_WAITS):
                wait = API_WAITS[job.api_retries] * random.uniform(0.8, 1.2)
                why = f"{outcome.error}: {outcome.detail}"
                return self._write(job, lambda: self._jobs.retry(job, wait, why, outcome.usage)), wait
        return self._write(job, lambda: self._jobs.finish(job, outcome)), 0.0

    def _write(self, job: Job, transition: Callable[[], Outcome | None]) -> Outcome | None:
        """Write a run's end; while the database is away, keep the result and try again. Raises LeaseLost."""
        while True:
            try:
                return transition()
            except StoreUnavailable as error:
                log.warning("finish_waits", request_id=str(job.id), reason=str(error))
                if self._stopping.wait(RETRY_SECONDS):
                    raise LeaseLost(f"the database is away, and this instance is leaving: {error}") from error

    def _release(self, job: Job, error: StoreUnavailable) -> None:
        """Give a job back that the database's absence has stopped, once it is there again; that is no interruption."""
        log.warning("run_stopped", request_id=str(job.id), reason=str(error))
        if job.channel is Channel.NONE:  # a terminal's job: nobody else may run it
            raise error
        while not self._stopping.wait(RETRY_SECONDS):
            try:
                self._jobs.release([job])
                return
            except StoreUnavailable:
                continue

    def _run_from_memory(self, job: NewJob) -> None:
        outcome = self._runner.outcome_from_memory(job)
        log.info("finished", request_id=str(job.id), state=outcome.state, error=outcome.error, durable=False)
        self._delivery.send_from_memory(job, outcome.text)

    # here and now --------------------------------------------------------------------------------------------------

    def run_now(self, job_id: uuid.UUID, owner: str, lease_seconds: float) -> None:
        """Run one accepted job in the caller's own thread, later tries and the callback included.

        Does nothing when another instance has it.
        """
        wait: float | None = 0.0
        while wait is not None and not self._stopping.wait(wait):
            job = self._jobs.claim_one(job_id, owner, lease_seconds)
            if job is None:
                return
            wait = self.run_job(job)
        self._delivery.deliver(job_id)


def _stored(job: NewJob, stored: uuid.UUID) -> Acknowledgement:
    if stored != job.id:
        return Acknowledgement(stored, True, ACCEPTED_BEFORE, duplicate=True)
    return Acknowledgement(stored, True, ACCEPTED)


def _none_found(question: Question) -> str:
    if question.request_id is not None:
        return NOT_YOURS
    return NONE_ENDED if question.action is Action.FEEDBACK else NONE_YET


def _not_to_judge(question: Question, status: JobStatus) -> str:
    which = "names a task that" if question.request_id else "is missing, and your task that ended last"
    return f"{which} {NO_RESULT.get(status.state, NO_RESULT_YET)}"
