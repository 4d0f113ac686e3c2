"""What the jobs and callbacks tables should hold, in a few pure lines: the model beside the store's state machine."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from pokestrator.jobs import CANCELLED, RAN_AGAIN, TOO_LATE, Idempotency, Job, NewJob
from pokestrator.runs import ErrorKind, sentence
from pokestrator.store.callbacks import Callback

GIVEN_UP = sentence(ErrorKind.INTERRUPTED)


@dataclass
class ModelCallback:
    channel: str
    content: str
    state: str = "pending"
    attempts: int = 0
    attempts_before: int = 0  # its schedule began
    has_hold: bool = False  # a sender's, which may have lapsed
    is_held: bool = False
    is_due: bool = True
    is_old: bool = False  # ended longer ago than anything is kept

    def begin_anew(self) -> None:
        self.state, self.is_due, self.is_old, self.attempts_before = "pending", True, False, self.attempts


@dataclass
class ModelJob:
    id: uuid.UUID
    serial: int
    caller: str | None
    idempotency: Idempotency | None
    channel: str
    callback_url: str | None
    run_at: float  # orders them as they came
    state: str = "queued"
    age_seconds: float = 0.0
    claim_seq: int = 0
    owner: str | None = None
    is_lapsed: bool = False  # the lease of its run
    cancel_requested: bool = False
    interruptions: int = 0
    api_retries: int = 0
    runs: int = 0
    result: str | None = None
    verdict: str | None = None
    is_old: bool = False
    callback: ModelCallback | None = None

    @property
    def is_ended(self) -> bool:
        return self.state not in ("queued", "running")

    @property
    def is_removable(self) -> bool:
        sent = self.callback is None or (self.callback.state == "delivered" and self.callback.is_old)
        return self.is_ended and self.is_old and sent


@dataclass
class Model:
    """Each function does to the model what its namesake of the store should do, and returns what it should return."""

    jobs: dict[uuid.UUID, ModelJob] = field(default_factory=dict)
    reached: Counter[str] = field(default_factory=Counter)  # what has happened at all
    accepted: int = 0

    # accept ------------------------------------------------------------------------------------------------------

    def insert(self, new: NewJob) -> uuid.UUID:
        if new.id in self.jobs:  # whichever other it would repeat by now
            self.reached["same id"] += 1
            return new.id
        earlier = self._earlier(new.idempotency) if new.idempotency else None
        if earlier is not None:
            if new.callback is not None:
                self._readdress(earlier, new.callback.url)
            self.reached["duplicate"] += 1
            return earlier.id
        url = new.callback.url if new.callback else None
        self.accepted += 1
        serial = self.accepted
        self.jobs[new.id] = ModelJob(new.id, serial, new.caller, new.idempotency, new.channel, url, serial)
        return new.id

    def _earlier(self, wanted: Idempotency) -> ModelJob | None:
        return _newest(
            job
            for job in self.jobs.values()
            if job.idempotency is not None
            and job.idempotency.key == wanted.key
            and job.age_seconds < wanted.seconds
            and not ((job.is_ended or job.cancel_requested) and wanted.while_unfinished)
        )

    def latest(self, caller: str) -> ModelJob | None:
        return _newest(job for job in self.jobs.values() if job.caller == caller and job.channel != "none")

    def _readdress(self, job: ModelJob, url: str) -> None:
        job.channel, job.callback_url = "callback", url
        if (sent := job.callback) is not None and sent.state in ("pending", "dead"):
            self.reached[f"readdressed while {sent.state}"] += 1
            sent.channel = "callback"
            sent.begin_anew()

    # runs --------------------------------------------------------------------------------------------------------

    def claimable(self) -> list[ModelJob]:
        """Without those of terminals, oldest first."""
        waiting = [job for job in self.jobs.values() if self.may_run(job) and job.channel != "none"]
        return sorted(waiting, key=lambda job: job.run_at)

    def may_run(self, job: ModelJob) -> bool:
        return job.state == "queued" and not job.cancel_requested

    def claim(self, job: ModelJob, owner: str) -> None:
        job.state, job.owner, job.is_lapsed = "running", owner, False
        job.claim_seq += 1

    def owns(self, claim: Job) -> bool:
        job = self.jobs.get(claim.id)
        return job is not None and job.state == "running" and job.claim_seq == claim.claim_seq

    def finish(self, job: ModelJob, *, succeeded: bool, text: str, interruptions: int = 0) -> None:
        if job.cancel_requested and not succeeded:
            self.end(job, "cancelled", CANCELLED, interruptions)
            return
        if job.runs > 1:
            text = f"{text}\n\n{RAN_AGAIN}"
            self.reached["said that it ran again"] += 1
        if job.cancel_requested:
            text = f"{TOO_LATE}\n\n{text}"
            self.reached["cancelled too late"] += 1
        self.end(job, "succeeded" if succeeded else "failed", text, interruptions)

    def end(self, job: ModelJob, state: str, text: str, interruptions: int = 0) -> None:
        job.state, job.owner, job.is_lapsed, job.result = state, None, False, text
        job.interruptions += interruptions
        if job.channel != "none":
            job.callback = ModelCallback(job.channel, text)

    def interrupt(self, jobs: Sequence[ModelJob], *, orphaned: bool) -> tuple[set[uuid.UUID], set[uuid.UUID]]:
        """Ids of those queued again, and of those ended."""
        last = {job.id: job for job in jobs if job.interruptions == 2 or job.cancel_requested}
        last |= {job.id: job for job in jobs if orphaned and job.channel == "none"}
        for job in last.values():
            self.reached["cancelled, then interrupted" if job.cancel_requested else "given up"] += 1
            self.finish(job, succeeded=False, text=GIVEN_UP, interruptions=1)
        again = [job for job in jobs if job.id not in last]
        self.requeue(again)
        for job in again:
            job.interruptions += 1
        return {job.id for job in again}, set(last)

    def retry(self, job: ModelJob) -> None:
        if job.cancel_requested:
            self.finish(job, succeeded=False, text="")
            return
        self.requeue([job])
        job.api_retries += 1

    def requeue(self, jobs: Sequence[ModelJob]) -> None:
        """In its old place: by its age, as it is now."""
        for job in jobs:
            job.state, job.owner, job.is_lapsed = "queued", None, False
            job.run_at = job.serial - job.age_seconds * 1_000

    def running(self, owner: str | None = None) -> list[ModelJob]:
        return [job for job in self.jobs.values() if job.state == "running" and owner in (None, job.owner)]

    def cancel(self, job: ModelJob) -> None:
        if job.state == "queued":
            self.end(job, "cancelled", CANCELLED)
            self.reached["cancelled while queued"] += 1
        elif job.state == "running":
            job.cancel_requested = True

    def judge(self, job: ModelJob, verdict: str) -> None:
        if job.state == "succeeded":
            job.verdict = verdict
            self.reached[f"judged {verdict}"] += 1

    # the outbox --------------------------------------------------------------------------------------------------

    def sendable(self, channels: Collection[str]) -> list[ModelJob]:
        return [
            job
            for job in self.jobs.values()
            if (sent := job.callback) is not None
            and (sent.state, sent.is_held, sent.is_due) == ("pending", False, True)
            and sent.channel in channels
        ]

    def sender_owns(self, claimed: Callback) -> ModelCallback | None:
        job = self.jobs.get(claimed.job_id)
        sent = job.callback if job else None
        return sent if sent and (sent.state, sent.attempts) == ("pending", claimed.attempt) else None


def _newest(jobs: Iterable[ModelJob]) -> ModelJob | None:
    return min(jobs, key=lambda job: (job.age_seconds, -job.serial), default=None)
