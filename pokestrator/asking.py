"""Questions to Claude for a job: what they may cost is reserved first, what they say is redacted and noted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from pokestrator.claude.pool import Claude
from pokestrator.errors import StoreUnavailable
from pokestrator.jobs import Job, JobState, Outcome
from pokestrator.redaction import Redactor, redacted
from pokestrator.runs import ErrorKind, RunEvent, RunRequest, RunResult, Usage, sentence
from pokestrator.store.budgets import Budgets, Reservation
from pokestrator.store.credentials import Credentials
from pokestrator.store.jobs import Jobs
from pokestrator.subagent_checks import secret_in
from pokestrator.telemetry import get_logger, one_line

log = get_logger(__name__)

BUDGET_IS_HELD = (
    "I couldn't start this: other tasks hold what is left of today's budget for Claude; please send it again in a few "
    "minutes."
)


class Asker:
    """Puts questions to Claude, for one job at a time in the caller's thread."""

    def __init__(
        self, *, jobs: Jobs, credentials: Credentials, budgets: Budgets, claude: Claude, redactor: Redactor
    ) -> None:
        self._jobs = jobs
        self._credentials = credentials
        self._budgets = budgets
        self._claude = claude
        self._redactor = redactor

    def reserve(self, job: Job, usd: float) -> Outcome | None:
        """How the job ends, or that it waits, when a ceiling is in the way of a run that may cost so much."""
        match self._budgets.reserve(job, usd):
            case Reservation.MADE:
                return None
            case Reservation.MUST_WAIT:
                detail = f"other runs hold what is left of today's budget; this one may cost {usd:g} US dollars"
                return Outcome(JobState.FAILED, BUDGET_IS_HELD, ErrorKind.BUDGET_SPENT, detail, is_transient=True)
            case Reservation.TOO_LATE:
                detail = f"today's budget has less left than the {usd:g} US dollars that this run may cost"
                return failed(ErrorKind.BUDGET_SPENT, detail)

    def holds_secret(self, text: str) -> bool:
        """Whether a text holds a secret of a setting or a stored credential, or what looks like one."""
        with self.redacting() as redact:
            return secret_in(text, redact) is not None

    def ask(self, job: Job, request: RunRequest) -> RunResult:
        """A run of Claude for a stored job. What is kept of it holds no credential, another subagent's neither."""
        with self.redacting():
            return self._ask(request, lambda event: self.note(job, event.kind, event.text))

    def ask_from_memory(self, request: RunRequest) -> RunResult:
        """A run of Claude for a job that is not stored; it has no timeline."""
        return self._ask(request, _ignore)

    @contextmanager
    def redacting(self) -> Iterator[Redactor]:
        """What takes secrets out of texts, those of all credentials too, for as long as the block lasts."""
        with self._redactor.also(self._credentials.every_value()):
            yield self._redactor

    def note(self, job: Job, kind: str, text: str) -> None:
        """Add a line to the job's timeline, without what is secret."""
        try:
            self._jobs.note(job, kind, one_line(self._redactor(text)))
        except StoreUnavailable as error:  # a timeline with a gap is no reason to end a run
            log.warning("event_not_stored", request_id=str(job.id), kind=kind, reason=str(error))

    def _ask(self, request: RunRequest, on_event: Callable[[RunEvent], None]) -> RunResult:
        """A run of Claude, nothing of which holds a secret that is known here."""
        with self._redactor.also(request.variables.values()):
            result = self._claude.run(request, on_event)
            structured = None if result.structured is None else redacted(result.structured, self._redactor)
            text, detail = self._redactor(result.text), self._redactor(result.detail)
        return replace(result, text=text, detail=detail, structured=structured)


def outcome_of(result: RunResult, timeout_seconds: float) -> Outcome:
    """How a job ends whose last run ended like this."""
    if result.error is None:
        return Outcome(JobState.SUCCEEDED, result.text, usage=result.usage)
    outcome = failed(result.error, result.detail, result.usage, timeout_seconds)
    return replace(outcome, is_transient=result.is_transient)


def failed(kind: ErrorKind, detail: str, usage: Usage | None = None, timeout_seconds: float = 0) -> Outcome:
    """A failure, with the one sentence that the person is told."""
    return Outcome(JobState.FAILED, sentence(kind, timeout_seconds), kind, detail, usage or Usage())


def _ignore(_event: RunEvent) -> None:
    """Runs from memory have no timeline."""
