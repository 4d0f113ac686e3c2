"""The flow: accept() takes a task in, run_job() takes a claimed job to its end."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pokestrator.building import draft_request, read_draft, task_text
from pokestrator.claude.pool import Claude
from pokestrator.delivery import Delivery
from pokestrator.errors import InvalidDefinition, LeaseLost, StoreUnavailable, TryAgainLater
from pokestrator.jobs import Acknowledgement, Channel, Job, JobState, NewJob, Outcome, Route
from pokestrator.routing import Decision, decide, decide_from_memory
from pokestrator.runs import ErrorKind, RunEvent, RunRequest, RunResult, Usage, sentence
from pokestrator.store.jobs import Jobs
from pokestrator.store.subagents import Subagents
from pokestrator.subagents import Definition, Subagent, Template
from pokestrator.telemetry import get_logger, one_line

log = get_logger(__name__)

ACCEPTED = "Working on it. The result comes later as its own message; there is no need to ask again."
ACCEPTED_FROM_MEMORY = (
    "Working on it, but the database is away: if this service restarts before the result is sent, it is lost."
)
BUSY_WITHOUT_DATABASE = (
    "The database is away and nothing more can run from memory; nothing was stored. Try again in a minute."
)
UNCERTAIN = "The database went away while this was being stored. Try again in a minute."
RETRY_SECONDS = 1.0
NAMES_SHOWN = 300  # to the drafter, so that it takes another; a prompt must not grow with the table
DEFAULT_MAX_TURNS = 30
DEFAULT_MAX_BUDGET_USD = 1.0


@dataclass(frozen=True)
class RunPolicy:
    """What runs are allowed where a subagent's version says nothing, and the ceiling where it does."""

    model: str
    fast_model: str
    timeout_seconds: float  # a version may lower it, never raise it
    after_build: Literal["ask", "run"]

    def request(self, definition: Definition, prompt: str) -> RunRequest:
        """A run of a subagent's version."""
        return RunRequest(
            prompt=prompt,
            system_prompt=definition.system_prompt,
            model=definition.model or self.model,
            timeout_seconds=self.timeout_of(definition),
            tools=definition.tools,
            max_turns=definition.max_turns or DEFAULT_MAX_TURNS,
            max_budget_usd=definition.max_budget_usd or DEFAULT_MAX_BUDGET_USD,
        )

    def timeout_of(self, definition: Definition) -> float:
        return min(definition.timeout_seconds or self.timeout_seconds, self.timeout_seconds)


class Service:
    """One instance's flow, from an `orchestrate` call to the callback in the outbox."""

    def __init__(
        self,
        *,
        jobs: Jobs,
        subagents: Subagents,
        templates: Sequence[Template],
        claude: Claude,
        delivery: Delivery,
        policy: RunPolicy,
        stopping: threading.Event,
    ) -> None:
        self._jobs = jobs
        self._subagents = subagents
        self._templates = {template.name: template for template in templates}
        self._claude = claude
        self._delivery = delivery
        self._policy = policy
        self._stopping = stopping

    # in --------------------------------------------------------------------------------------------------------

    def accept(self, job: NewJob, submit_from_memory: Callable[[Callable[[], None]], bool]) -> Acknowledgement:
        """Store the job; when this returns, it is committed, or the answer says that it is not durable.

        Raises TryAgainLater when the job was not taken.
        """
        started = time.monotonic()
        durable = self._store(job)
        if not durable and not submit_from_memory(lambda: self._run_from_memory(job)):
            raise TryAgainLater(BUSY_WITHOUT_DATABASE)
        milliseconds = round(1000 * (time.monotonic() - started), 1)
        log.info("accepted", request_id=str(job.id), durable=durable, channel=job.channel, ms=milliseconds)
        return Acknowledgement(job.id, durable, ACCEPTED if durable else ACCEPTED_FROM_MEMORY)

    def _store(self, job: NewJob) -> bool:
        """Whether the job is stored. Raises TryAgainLater when that is not known."""
        try:
            self._jobs.insert(job)
            return True
        except StoreUnavailable as error:
            log.warning("not_stored", request_id=str(job.id), reason=str(error))
            if not error.maybe_committed:
                return False
        try:
            # The COMMIT's answer was lost. Storing the same id again waits for what may still be under way, and stores
            # it once; a guess could run the task twice.
            self._jobs.insert(job)
            return True
        except StoreUnavailable as error:
            raise TryAgainLater(UNCERTAIN) from error

    # the run ---------------------------------------------------------------------------------------------------

    def run_job(self, job: Job) -> None:
        """Take a claimed job to its end and put its callback into the outbox. Raises LeaseLost."""
        started = time.monotonic()
        try:
            outcome = self._outcome(job)
        except LeaseLost:
            raise
        except StoreUnavailable as error:
            self._release(job, error)
            raise LeaseLost(f"released, because the database was away: {error}") from error
        except Exception as error:
            log.exception("run_failed", request_id=str(job.id))
            outcome = failed(ErrorKind.INTERNAL, f"{type(error).__name__}: {error}")
        if self._stopping.is_set() and outcome.error is ErrorKind.AGENT_CRASHED:
            raise LeaseLost("this instance ended the run because it is leaving")
        self._finish(job, outcome)
        log.info(
            "finished",
            request_id=str(job.id),
            state=outcome.state,
            error=outcome.error,
            detail=one_line(outcome.detail),
            seconds=round(time.monotonic() - started, 2),
            cost_usd=round(outcome.usage.cost_usd, 4),
        )
        self._delivery.wake()

    def _outcome(self, job: Job) -> Outcome:
        decision = decide(self._subagents.candidates(job.task, tuple(self._templates.values())))
        log.info("routed", request_id=str(job.id), route=decision.route, subagent=decision.name, reason=decision.reason)
        if decision.route is Route.BUILD_NEW:
            self._jobs.record_route(job, decision.route, decision.reason, None)
            return self._build(job)
        subagent = self._find(decision)
        self._jobs.record_route(job, decision.route, decision.reason, (subagent.id, subagent.version))
        return self._run_agent(job, subagent)

    def _find(self, decision: Decision) -> Subagent:
        assert decision.name is not None, "matches and templates are named"
        subagent = self._subagents.get(decision.name)
        return subagent or self._subagents.adopt(self._templates[decision.name])

    def _run_agent(self, job: Job, subagent: Subagent) -> Outcome:
        request = self._policy.request(subagent.definition, task_text(job.task, job.metadata))
        self._note(job, "running", f"{subagent.name} version {subagent.version}")
        result = self._claude.run(request, lambda event: self._note(job, event.kind, event.text))
        return outcome_of(result, request.timeout_seconds)

    def _build(self, job: Job) -> Outcome:
        self._note(job, "drafting", f"asking {self._policy.fast_model} for a new subagent")
        request = draft_request(
            job.task,
            job.metadata,
            model=self._policy.fast_model,
            names_taken=[*self._templates, *self._subagents.names(NAMES_SHOWN)],
            timeout_seconds=self._policy.timeout_seconds,
        )
        result = self._claude.run(request, lambda event: self._note(job, event.kind, event.text))
        if result.error is not None:
            return outcome_of(result, request.timeout_seconds)
        try:
            draft = read_draft(result, self._templates.keys())
        except InvalidDefinition as error:
            return failed(ErrorKind.INVALID_DRAFT, str(error), result.usage)
        subagent = self._subagents.build(draft, job.task, since=job.created_at)
        self._note(job, "built", f"{subagent.name}: {subagent.definition.description}")
        log.info("built", request_id=str(job.id), subagent=subagent.name)
        if self._policy.after_build == "run":
            outcome = self._run_agent(job, subagent)
            return replace(outcome, usage=outcome.usage + result.usage)
        return Outcome(JobState.SUCCEEDED, _built(subagent), usage=result.usage)

    def _finish(self, job: Job, outcome: Outcome) -> None:
        """Write the end; while the database is away, keep the result and try again."""
        while True:
            try:
                return self._jobs.finish(job, outcome)
            except StoreUnavailable as error:
                log.warning("finish_waits", request_id=str(job.id), reason=str(error))
                if self._stopping.wait(RETRY_SECONDS):
                    raise

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

    def _note(self, job: Job, kind: str, text: str) -> None:
        try:
            self._jobs.add_event(job.id, kind, one_line(text))
        except StoreUnavailable as error:  # a timeline with a gap is no reason to end a run
            log.warning("event_not_stored", request_id=str(job.id), kind=kind, reason=str(error))

    # without the database ----------------------------------------------------------------------------------------

    def _run_from_memory(self, job: NewJob) -> None:
        decision = decide_from_memory(job.task, tuple(self._templates.values()))
        log.info("routed", request_id=str(job.id), route=decision.route, reason=decision.reason, durable=False)
        if decision.name is None:
            outcome = failed(ErrorKind.NOT_STORED, decision.reason)
        else:
            template = self._templates[decision.name]
            request = self._policy.request(template.definition(), task_text(job.task, job.metadata))
            outcome = outcome_of(self._claude.run(request, _ignore), request.timeout_seconds)
        log.info("finished", request_id=str(job.id), state=outcome.state, error=outcome.error, durable=False)
        self._delivery.send_from_memory(job, outcome.text)

    # here and now --------------------------------------------------------------------------------------------------

    def run_now(self, job_id: uuid.UUID, owner: str, lease_seconds: float) -> None:
        """Run one accepted job in the caller's own thread, callback included; nothing if another instance has it."""
        job = self._jobs.claim_one(job_id, owner, lease_seconds)
        if job is None:
            return
        self.run_job(job)
        self._delivery.deliver(job.id)


def outcome_of(result: RunResult, timeout_seconds: float) -> Outcome:
    """How a job ends whose last run ended like this."""
    if result.error is None:
        return Outcome(JobState.SUCCEEDED, result.text, usage=result.usage)
    return failed(result.error, result.detail, result.usage, timeout_seconds)


def failed(kind: ErrorKind, detail: str, usage: Usage | None = None, timeout_seconds: float = 0) -> Outcome:
    """A failure, with the one sentence that the person is told."""
    return Outcome(JobState.FAILED, sentence(kind, timeout_seconds), kind, detail, usage or Usage())


def _built(subagent: Subagent) -> str:
    name, description = subagent.name.replace("_", " "), subagent.definition.description
    return f"I had nothing for this yet, so I built “{name}”: {description} Please send the task again to run it."


def _ignore(_event: RunEvent) -> None:
    """Runs from memory have no timeline."""
