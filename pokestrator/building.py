"""A task that nothing fits: a new subagent for its kind, or a wider version of the one that comes near."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pokestrator import drafting
from pokestrator.asking import Asker, failed, outcome_of
from pokestrator.drafting import Refused, draft_request, problems_of_draft, read_draft, widened
from pokestrator.errors import InvalidDefinition
from pokestrator.jobs import Job, Outcome
from pokestrator.redaction import Redactor
from pokestrator.runs import ErrorKind, RunRequest, Usage
from pokestrator.store.shortlist import Shortlists
from pokestrator.store.subagents import Subagents
from pokestrator.store.widening import Widening
from pokestrator.subagent_checks import secret_in
from pokestrator.subagents import Draft, Subagent, Template
from pokestrator.telemetry import get_logger, one_line

log = get_logger(__name__)

TRIES = 2
NAMES_SHOWN = 300  # to the drafter, so that it takes another; a prompt must not grow with the table


@dataclass(frozen=True)
class Built:
    """What takes the task from now on, and what drafting it has cost."""

    subagent: Subagent
    is_widened: bool
    usage: Usage

    @property
    def message(self) -> str:
        """What the person is told."""
        name, description = self.subagent.name.replace("_", " "), self.subagent.definition.description
        end = "" if description.endswith((".", "!", "?", "…")) else "."
        did = f"taught “{name}” to do it" if self.is_widened else f"built “{name}”"
        return f"I had nothing for this yet, so I {did}: {description}{end} Please send the task again to run it."


class Builder:
    """Takes a job that nothing fits, in the caller's thread, to the subagent that does."""

    def __init__(
        self,
        *,
        subagents: Subagents,
        widening: Widening,
        shortlists: Shortlists,
        templates: Sequence[Template],
        asker: Asker,
        model: str,
        timeout_seconds: float,
        most_usd: float,
    ) -> None:
        """`most_usd`: that a job may spend."""
        self._subagents = subagents
        self._widening = widening
        self._shortlists = shortlists
        self._templates = {template.name: template for template in templates}
        self._asker = asker
        self._model = model
        self._timeout_seconds = timeout_seconds
        self._most_usd = most_usd

    def build(self, job: Job, nearest: Mapping[str, str], spent_usd: float = 0.0) -> Built | Outcome:
        """The new or widened subagent, stored, or how the job ends without one. Raises LeaseLost, StoreUnavailable.

        `nearest`: descriptions of existing subagents by name, nearest to the task first; `spent_usd`: what the job has
        cost so far.
        """
        each_usd = min(drafting.DRAFT_BUDGET_USD, (self._most_usd - spent_usd) / TRIES)
        if lacking := self._asker.reserve(job, spent_usd + each_usd * TRIES):
            return lacking
        usage = Usage()
        refused: Refused | None = None
        for _ in range(TRIES):
            self._note_try(job, refused)
            # Read anew for each try: a draft may have been refused because another job has widened it meanwhile.
            widenable = self._widenable(nearest)
            request = replace(self._request(job, nearest, widenable, refused), max_budget_usd=each_usd)
            result = self._asker.ask(job, request)
            usage += result.usage
            if result.error is not None:
                return replace(outcome_of(result, request.timeout_seconds), usage=usage)
            try:
                draft = read_draft(result)
                subagent = self._store(job, draft, nearest, widenable)
            except InvalidDefinition as error:
                refused = Refused(result.structured or {}, error.problems)
                continue
            return self._built(job, Built(subagent, draft.widens is not None, usage))
        assert refused is not None, "there is at least one try"
        detail = f"{TRIES} drafts were refused; the last one: {'; '.join(refused.problems)}"
        return failed(ErrorKind.INVALID_DRAFT, detail, usage)

    def _note_try(self, job: Job, refused: Refused | None) -> None:
        if refused is None:
            self._asker.note(job, "drafting", f"asking {self._model} for a new subagent")
        else:
            log.info("draft_refused", request_id=str(job.id), problems=[one_line(each) for each in refused.problems])
            self._asker.note(job, "drafting", f"asking once more, the draft was refused: {'; '.join(refused.problems)}")

    def _widenable(self, nearest: Mapping[str, str]) -> list[Subagent]:
        if not nearest:
            return []
        names = list(nearest)[: drafting.NEAREST_SHOWN]
        limit, longest = drafting.PROMPTS_SHOWN, drafting.LONGEST_PROMPT_SHOWN
        return self._widening.widenable(names, limit=limit, longest_prompt=longest)

    def _request(
        self, job: Job, nearest: Mapping[str, str], widenable: Sequence[Subagent], refused: Refused | None
    ) -> RunRequest:
        request = draft_request(
            job.task,
            job.metadata,
            model=self._model,
            names_taken=[*self._templates, *self._subagents.names(NAMES_SHOWN)],
            timeout_seconds=self._timeout_seconds,
            nearest=nearest,
            widenable=widenable,
            refused=refused,
        )
        return replace(request, run_id=job.run_id)

    def _store(self, job: Job, draft: Draft, nearest: Mapping[str, str], widenable: Sequence[Subagent]) -> Subagent:
        """Check a draft and store it. Raises InvalidDefinition with what is wrong with it."""
        shown = {subagent.name: subagent for subagent in widenable}
        others = self._others(job, draft, nearest)
        with self._asker.redacting() as redact:
            current = shown.get(draft.widens or "")
            # An older one of this name is another subagent: beside it the new one will be numbered.
            name = current.name if current else f"{draft.name[:44]}_2" if draft.name in others else draft.name
            definition = widened(current.definition, draft) if current else draft.definition()
            problems = problems_of_draft(
                draft,
                name,
                definition,
                template_names=self._templates,
                widenable=shown,
                others=others,
                redact=redact,
            )
            cause = _example(job, redact)
        if problems:
            raise InvalidDefinition(problems)
        if current is None:
            return self._subagents.build(draft, cause, since=job.created_at, claim=job)
        examples = draft.examples if cause is None else (cause, *draft.examples)
        note = f"widened for: {one_line(cause or 'a task that holds a secret', 200)}"
        subagent = self._widening.widen(current, definition, examples, note=note, claim=job)
        if subagent is None:
            raise InvalidDefinition(
                [f"widens: {current.name} has been changed since you saw it; look at it as it is now"]
            )
        return subagent

    def _others(self, job: Job, draft: Draft, nearest: Mapping[str, str]) -> dict[str, str]:
        """Descriptions of the subagents that were there when the task came and may say what the draft says."""
        templates = tuple(self._templates.values())
        found = [each.name for each in self._shortlists.find(draft.description, templates).candidates]
        stored = self._widening.descriptions([draft.name, *nearest, *found], before=job.created_at)
        return {template.name: template.description for template in templates} | stored

    def _built(self, job: Job, built: Built) -> Built:
        name, version = built.subagent.name, built.subagent.version
        kind, what = ("widened", f"{name} version {version}") if built.is_widened else ("built", name)
        self._asker.note(job, kind, f"{what}: {built.subagent.definition.description}")
        log.info(kind, request_id=str(job.id), subagent=name, version=version)
        return built


def _example(job: Job, redact: Redactor) -> str | None:
    """The job's task, to be remembered; None where it holds a secret, which must not be shown to others."""
    return None if secret_in(job.task, redact) else job.task
