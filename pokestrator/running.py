"""One run of a job: its route, a new subagent where none fits, and the agent itself."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime
from typing import Literal

from pokestrator.asking import Asker, failed, outcome_of
from pokestrator.building import Builder
from pokestrator.from_memory import template_for
from pokestrator.jobs import Job, JobState, NewJob, Outcome, Route
from pokestrator.material import task_text
from pokestrator.routing import MOST_QUESTIONS, Decision, Router
from pokestrator.runs import ErrorKind, RunRequest, RunResult, sentence
from pokestrator.store.credentials import Credentials
from pokestrator.store.jobs import Jobs
from pokestrator.store.subagents import Subagents
from pokestrator.subagents import Definition, State, Subagent, Template
from pokestrator.telemetry import get_logger

log = get_logger(__name__)

DEFAULT_MAX_TURNS = 30
DEFAULT_MAX_BUDGET_USD = 1.0


@dataclass(frozen=True)
class RunPolicy:
    """What runs are allowed where a subagent's version says nothing, and the ceiling where it does."""

    model: str
    timeout_seconds: float  # a version may lower it, never raise it
    after_build: Literal["ask", "run"]
    most_usd: float = DEFAULT_MAX_BUDGET_USD  # that a run may spend, whatever its version says

    def request(
        self, definition: Definition, prompt: str, run_id: str, variables: Mapping[str, str] | None = None
    ) -> RunRequest:
        """A run of a subagent's version, with these credentials."""
        return RunRequest(
            prompt=prompt,
            system_prompt=definition.system_prompt,
            model=definition.model or self.model,
            timeout_seconds=self.timeout_of(definition),
            tools=definition.tools,
            max_turns=definition.max_turns or DEFAULT_MAX_TURNS,
            max_budget_usd=min(definition.max_budget_usd or DEFAULT_MAX_BUDGET_USD, self.most_usd),
            run_id=run_id,
            variables=variables or {},
            hosts=definition.hosts,
        )

    def timeout_of(self, definition: Definition) -> float:
        return min(definition.timeout_seconds or self.timeout_seconds, self.timeout_seconds)


class Runner:
    """Takes one job at a time, in the caller's thread, to an outcome; writes its way there, but not its end."""

    def __init__(
        self,
        *,
        jobs: Jobs,
        subagents: Subagents,
        router: Router,
        credentials: Credentials,
        templates: Sequence[Template],
        asker: Asker,
        builder: Builder,
        policy: RunPolicy,
    ) -> None:
        self._jobs = jobs
        self._subagents = subagents
        self._router = router
        self._credentials = credentials
        self._from_memory = MemoryBudget(policy.most_usd)
        self._templates = {template.name: template for template in templates}
        self._asker = asker
        self._builder = builder
        self._policy = policy

    def outcome(self, job: Job) -> Outcome:
        """Run a claimed job, from its route to its result. Raises LeaseLost, StoreUnavailable."""
        decision = self._router.decide(job.task, job.metadata, lambda request: self._ask_router(job, request))
        if isinstance(decision, Outcome):
            return decision
        log.info(
            "routed",
            request_id=str(job.id),
            route=decision.route,
            subagent=decision.name,
            decided_by=decision.decided_by,
            ms=round(decision.milliseconds, 1),
        )
        if decision.route is Route.BUILD_NEW:
            self._record(job, decision)
            outcome = self._build(job, decision)
        elif (subagent := self._find(decision)) is None:
            outcome = self.outcome(job)  # it was renamed or archived just now: the next decision knows that
        else:
            self._record(job, decision)
            outcome = self._run_agent(job, subagent, decision.usage.cost_usd)
        return replace(outcome, usage=outcome.usage + decision.usage)

    def decide_only(self, task: str, *, may_ask: bool) -> Decision | Outcome:
        """What would be decided on a task, at once and without a job. Raises StoreUnavailable.

        Not `may_ask`: where words do not decide, the decision stays open.
        """
        return self._router.decide(task, "", self._asker.ask_from_memory if may_ask else None)

    def _ask_router(self, job: Job, request: RunRequest) -> RunResult | Outcome:
        usd = min(request.max_budget_usd, self._policy.most_usd / MOST_QUESTIONS)
        if lacking := self._asker.reserve(job, MOST_QUESTIONS * usd):
            return lacking
        self._asker.note(job, "routing", f"asking {request.model} who this is for")
        return self._asker.ask(job, replace(request, run_id=job.run_id, max_budget_usd=usd))

    def _record(self, job: Job, decision: Decision) -> None:
        assert decision.route is not None, "Claude was there to be asked"
        with self._asker.redacting() as redact:
            record = decision.record()
            reason = redact(decision.reason)
            self._jobs.record_route(job, decision.route, reason, {**record, "reason": reason})

    def _find(self, decision: Decision) -> Subagent | None:
        assert decision.name is not None, "matches and templates are named"
        subagent = self._subagents.get(decision.name)
        if subagent is None and decision.name in self._templates:
            subagent = self._subagents.adopt(self._templates[decision.name])
        return None if subagent is None or subagent.state is State.ARCHIVED else subagent

    def _run_agent(self, job: Job, subagent: Subagent, spent_usd: float = 0.0) -> Outcome:
        needed, optional = subagent.definition.credentials, subagent.definition.optional_credentials
        found, missing = self._credentials.values([*needed, *optional])
        if unknown := {name: why for name, why in missing.items() if name in needed}:
            return _without(unknown)
        request = self._policy.request(subagent.definition, task_text(job.task, job.metadata), job.run_id, found)
        # What finding or building the subagent has cost is part of what a job may spend.
        request = replace(request, max_budget_usd=min(request.max_budget_usd, self._policy.most_usd - spent_usd))
        if lacking := self._asker.reserve(job, spent_usd + request.max_budget_usd):
            return lacking
        holds_secret = self._asker.holds_secret(job.task)
        note = f"{subagent.name} version {subagent.version}"
        self._jobs.begin_run(job, subagent.id, subagent.version, note)
        result = self._asker.ask(job, request)
        return replace(outcome_of(result, request.timeout_seconds), holds_secret=holds_secret)

    def _build(self, job: Job, decision: Decision) -> Outcome:
        spent_usd = decision.usage.cost_usd
        built = self._builder.build(job, decision.nearest or {}, spent_usd)
        if isinstance(built, Outcome):
            return built
        if self._policy.after_build == "run":
            outcome = self._run_agent(job, built.subagent, spent_usd + built.usage.cost_usd)
            return replace(outcome, usage=outcome.usage + built.usage)
        return Outcome(JobState.SUCCEEDED, built.message, usage=built.usage)

    def outcome_from_memory(self, job: NewJob) -> Outcome:
        """Run a job that is not in the database, if a template fits it."""
        template = template_for(job.task, tuple(self._templates.values()))
        log.info("routed", request_id=str(job.id), subagent=template.name if template else None, durable=False)
        if template is None:
            return failed(ErrorKind.NOT_STORED, "no template fits clearly, and the database is away")
        if template.credentials or template.optional_credentials:
            return failed(ErrorKind.NOT_STORED, f"the credentials of {template.name} are in the database")
        request = self._policy.request(template.definition(), task_text(job.task, job.metadata), str(job.id))
        if not self._from_memory.reserve(request.max_budget_usd):
            return failed(ErrorKind.BUDGET_SPENT, "as much was spent from memory as may be on a day")
        result = self._asker.ask_from_memory(request)
        self._from_memory.settle(request.max_budget_usd, result.usage.cost_usd)
        return outcome_of(result, request.timeout_seconds)


class MemoryBudget:
    """What this process may spend a day while the database, which has the accounts, is away. Thread-safe."""

    def __init__(self, daily_usd: float) -> None:
        self._daily_usd = daily_usd
        self._lock = threading.Lock()
        self._day: date | None = None
        self._usd = 0.0

    def reserve(self, usd: float) -> bool:
        with self._lock:
            today = datetime.now(UTC).date()
            if self._day != today:
                self._day, self._usd = today, 0.0
            if self._usd + usd > self._daily_usd:
                return False
            self._usd += usd
            return True

    def settle(self, reserved_usd: float, spent_usd: float) -> None:
        with self._lock:
            self._usd = max(0.0, self._usd - reserved_usd + spent_usd)


def _without(missing: Mapping[str, str]) -> Outcome:
    """How a job ends whose subagent needs credentials that cannot be had: their names, and why not."""
    kind = ErrorKind.NEEDS_CREDENTIALS
    detail = "; ".join(f"{name} {why}" for name, why in missing.items())
    return Outcome(JobState.FAILED, sentence(kind, missing=list(missing)), kind, detail)
