"""What a run showed: computed from the ledgers, the inbox and the database after everything has settled. No I/O."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pokestrator.demo.inbox import Received
from pokestrator.jobs import RAN_AGAIN, TOO_LATE
from tests.chaos.ledgers import Ack, Fault, Interval, Ledgers, Orphan, Refusal, calm_spans, clock, overlap

ORPHAN_SECONDS = 30.0
LOCAL_ORPHAN_SECONDS = 6.0  # where the owner died on this machine
ANSWER_SECONDS = 5.0  # 2 are promised; the rest is a busy machine's
HEALED_SECONDS = 10.0  # after a fault, until everything goes on
FROM_MEMORY_SECONDS = 90.0  # that a result from memory is tried to be sent, about
# Who called that instance then may have got no answer; its memory is gone, or stood still.
ENDS_OF_WORKERS = frozenset({"kill_worker", "kill_master", "freeze_worker", "rolling_restart"})
SENT_TO_RECORDED_SECONDS = 5.0  # a fault within so much of a delivery can have hidden that it was one

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Found:
    """What the database holds in the end: rows of jobs, callbacks, job_events and chaos_violations."""

    jobs: Sequence[Row]
    callbacks: Sequence[Row]
    events: Sequence[Row]
    violations: Sequence[Row]


@dataclass
class Verdict:
    """`rows` are the table's lines, `failures` what must not be, `blamed` the jobs to look at."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    blamed: set[str] = field(default_factory=set)

    def must_be_none(self, what: str, found: Sequence[str], request_ids: Iterable[str] = ()) -> None:
        self.rows.append((f"{what} (must be 0)", str(len(found))))
        if found:
            self.failures.append(f"{what}: {len(found)}\n" + "\n".join(f"  - {line}" for line in found[:20]))
            self.blamed |= set(request_ids)


def judge(ledgers: Ledgers, posts: Sequence[Received], found: Found, unanswered: int, whole: Interval) -> Verdict:
    verdict = Verdict()
    jobs_of_keys = {str(row["id"]): str(row["job_id"]) for row in found.callbacks}
    delivered = _delivered(posts, jobs_of_keys)
    _judge_acks(verdict, ledgers, delivered, found, unanswered)
    _judge_duplicates(verdict, posts, jobs_of_keys, list(ledgers.faults))
    _judge_writes(verdict, found)
    _judge_second_runs(verdict, found)
    _judge_cancels(verdict, ledgers, found)
    _judge_orphans(verdict, ledgers, whole)
    _measure_recoveries(verdict, ledgers, found)
    _judge_accepts(verdict, ledgers)
    _judge_calm_accepts(verdict, ledgers)
    _judge_memory(verdict, ledgers, delivered, whole)
    _count_faults(verdict, ledgers)
    return verdict


# jobs and callbacks ------------------------------------------------------------------------------------------------


def _delivered(posts: Sequence[Received], jobs_of_keys: Mapping[str, str]) -> set[str]:
    """Ids of the jobs that a POST was answered with 2xx for. A run from memory has its own id for a key."""
    return {jobs_of_keys.get(key, key) for key, _ in _successes(posts)}


def _successes(posts: Sequence[Received]) -> list[tuple[str, float]]:
    """(Idempotency-Key, when) of each POST that was answered with 2xx."""
    return [(post.headers.get("idempotency-key", ""), post.at) for post in posts if 200 <= post.status < 300]


def _judge_acks(verdict: Verdict, ledgers: Ledgers, delivered: set[str], found: Found, unanswered: int) -> None:
    durable = {ack.request_id for ack in ledgers.acks if ack.durable}
    from_memory = {ack.request_id for ack in ledgers.acks if not ack.durable} - durable
    states = {str(row["id"]): str(row["state"]) for row in found.jobs}
    dead = {str(row["job_id"]): str(row["last_error"]) for row in found.callbacks if row["state"] == "dead"}
    lost = sorted(durable - delivered - dead.keys())
    kinds = Counter(str(row["error_kind"] or row["state"]) for row in found.jobs)
    ends = ", ".join(f"{kind} {n}" for kind, n in kinds.most_common())
    verdict.rows += [
        ("accepted, durable", str(len(durable))),
        ("accepted, not durable (from memory)", f"{len(from_memory)}, {len(from_memory - delivered)} not delivered"),
        ("delivered", str(len(durable & delivered))),
        ("how the jobs ended", ends),
    ]
    verdict.must_be_none("lost", [f"{each}: {states.get(each, 'not in the database')}" for each in lost], lost)
    verdict.must_be_none("dead letters", [f"{each}: {reason}" for each, reason in sorted(dead.items())], dead)
    keys: dict[str, set[str]] = defaultdict(set)
    for ack in ledgers.acks:
        keys[ack.key].add(ack.request_id)
    known = {ack.request_id for ack in ledgers.acks}
    strangers = sorted(states.keys() - known)
    verdict.must_be_none("jobs nobody was told of", [f"{each}: {states[each]}" for each in strangers], strangers)
    verdict.must_be_none("calls never answered", [f"{unanswered} calls"] * bool(unanswered))


def _judge_duplicates(
    verdict: Verdict, posts: Sequence[Received], jobs_of_keys: Mapping[str, str], faults: Sequence[Fault]
) -> None:
    times: dict[str, list[float]] = defaultdict(list)
    keys: dict[str, set[str]] = defaultdict(set)
    for key, at in _successes(posts):
        times[key].append(at)
        keys[jobs_of_keys.get(key, key)].add(key)
    explained, unexplained, blamed = 0, [], []
    for key, sent in times.items():
        for first, second in zip(sorted(sent), sorted(sent)[1:], strict=False):
            window = first - 1.0, first + SENT_TO_RECORDED_SECONDS
            if any(fault.doubles and overlap(fault.interval, window) for fault in faults):
                explained += 1
            else:
                job = jobs_of_keys.get(key, key)
                unexplained.append(f"{job}: at {clock(first)} and {clock(second)}, with no fault between")
                blamed.append(job)
    verdict.rows.append(("duplicates after a fault between send and record", str(explained)))
    verdict.must_be_none("duplicates without such a fault", unexplained, blamed)
    doubled = sorted(job for job, own in keys.items() if len(own) > 1)
    verdict.must_be_none("jobs with two callbacks", doubled, doubled)


def _judge_writes(verdict: Verdict, found: Found) -> None:
    stale = [(str(row["job_id"]), f"{row['what']} at {row['at']}") for row in found.violations]
    ends = Counter(str(row["job_id"]) for row in found.events if row["kind"] == "finished")
    stale += [(job, f"finished {n} times") for job, n in ends.items() if n > 1]
    verdict.must_be_none("stale writes", [f"{job}: {what}" for job, what in stale], [job for job, _ in stale])


def _judge_second_runs(verdict: Verdict, found: Found) -> None:
    """What comes from a second run must say so, since the first may have done something already."""
    again = [row for row in found.jobs if row["runs"] > 1]
    interrupted = sum(row["interruptions"] for row in found.jobs)
    retried = sum(row["api_retries"] for row in found.jobs)
    text = f"{len(again)} (interruptions {interrupted}, tries after trouble of the API {retried})"
    verdict.rows.append(("jobs that ran more than once", text))
    silent = sorted(str(row["id"]) for row in again if row["state"] == "succeeded" and RAN_AGAIN not in row["result"])
    verdict.must_be_none("results of second runs that do not say so", silent, silent)


def _judge_cancels(verdict: Verdict, ledgers: Ledgers, found: Found) -> None:
    """Who was told that a task is being cancelled is told that it was, or that it had been done before."""
    jobs = {str(row["id"]): row for row in found.jobs}
    tally = Counter(each.status or "no answer" for each in ledgers.cancels)
    verdict.rows.append(("cancels", ", ".join(f"{status} {n}" for status, n in tally.most_common()) or "none"))
    ignored = []
    for each in ledgers.cancels:
        row = jobs.get(each.request_id)
        if row is None or each.status not in ("cancelled", "cancelling") or row["state"] == "cancelled":
            continue
        in_time = each.status == "cancelling" and row["state"] == "succeeded" and row["result"].startswith(TOO_LATE)
        if not in_time:
            ignored.append(each.request_id)
    verdict.must_be_none("tasks that went on though they were cancelled", ignored, ignored)
    asked = {each.request_id for each in ledgers.cancels}
    unasked = sorted(job for job, row in jobs.items() if row["state"] == "cancelled" and job not in asked)
    verdict.must_be_none("tasks cancelled though nobody asked", unasked, unasked)


# time --------------------------------------------------------------------------------------------------------------


def calm_seconds(orphan: Orphan, ledgers: Ledgers, whole: Interval, instances: Sequence[str] = ("A", "B")) -> float:
    """The longest time that the orphan lay there while one instance, undisturbed all along, could have taken it up."""
    longest = 0.0
    for instance in instances:
        disturbed = [fault.interval for fault in ledgers.faults if fault.touches(instance)]
        for start, end in calm_spans((whole[0], max(whole[1], orphan.ended)), disturbed):
            longest = max(longest, min(end, orphan.ended) - max(start, orphan.started))
    return longest


def _judge_orphans(verdict: Verdict, ledgers: Ledgers, whole: Interval) -> None:
    measured = [(calm_seconds(orphan, ledgers, whole), orphan) for orphan in ledgers.orphans]
    longest = max((seconds for seconds, _ in measured), default=0.0)
    raw = max((orphan.seconds for _, orphan in measured), default=0.0)
    local = [seconds for seconds, orphan in measured if orphan.cause == "death"]
    late = sum(seconds > LOCAL_ORPHAN_SECONDS for seconds in local)
    verdict.rows += [
        ("orphaned runs", f"{len(measured)}, of which {len(local)} by their owner's death"),
        ("longest orphan, outages not counted (at most 30 s)", f"{longest:.1f} s"),
        ("longest orphan, outages counted", f"{raw:.1f} s"),
        ("longest orphan after a death on this machine", f"{max(local, default=0.0):.1f} s, {late} above 6 s"),
    ]
    verdict.blamed |= {each.job_id for seconds, each in measured if seconds > LOCAL_ORPHAN_SECONDS}
    if late:
        verdict.failures.append(f"orphans above 6 s after a death on this machine: {late}")
    over = [(seconds, orphan) for seconds, orphan in measured if seconds > ORPHAN_SECONDS]
    if over:
        lines = [
            f"  - {orphan.job_id}: {seconds:.1f} s from {clock(orphan.started)} ({orphan.cause}, {orphan.owner})"
            for seconds, orphan in over
        ]
        verdict.failures.append("\n".join(["orphans above 30 s:", *lines[:20]]))


def recoveries(ledgers: Ledgers, events: Sequence[Row]) -> list[tuple[float, Fault]]:
    """For each fault that no other one outlived: how long after its end both accepts and claims had worked again."""
    accepted = sorted(ack.at + ack.seconds for ack in ledgers.acks if ack.durable)
    claimed = sorted(row["at"].timestamp() for row in events if row["kind"] == "claimed")
    found = []
    faults = [fault for fault in ledgers.faults if fault.affects != "nothing"]
    for fault in faults:
        nexts = [next((at for at in times if at >= fault.ended), None) for times in (accepted, claimed)]
        if None in nexts:
            continue  # the load had ended
        back = max(at for at in nexts if at is not None)
        others = [other for other in faults if other is not fault and overlap(other.interval, (fault.ended, back))]
        if not others:
            found.append((back - fault.ended, fault))
    return found


def _measure_recoveries(verdict: Verdict, ledgers: Ledgers, found: Found) -> None:
    measured = recoveries(ledgers, found.events)
    longest = max(measured, key=lambda pair: pair[0], default=None)
    text = f"{longest[0]:.1f} s, after {longest[1].name}; of {len(measured)} measured" if longest else "none measured"
    verdict.rows.append(("longest recovery (until accepts and claims work)", text))


def _judge_accepts(verdict: Verdict, ledgers: Ledgers) -> None:
    frozen = [fault for fault in ledgers.faults if fault.name == "freeze_worker"]

    def stood_still(entry: Ack | Refusal) -> bool:
        times = entry.at, entry.at + entry.seconds
        return any(fault.instance == entry.instance and overlap(fault.interval, times) for fault in frozen)

    answers = [*ledgers.acks, *ledgers.refusals.where(lambda refusal: refusal.kind == "refused")]
    answered = sorted(entry.seconds for entry in answers if not stood_still(entry))
    if answered:
        middle, slow = answered[len(answered) // 2], answered[min(int(len(answered) * 0.99), len(answered) - 1)]
        text = f"{middle:.3f} s / {slow:.2f} s / {answered[-1]:.2f} s"
        verdict.rows.append(("answers to accepts under faults (not by a frozen worker), p50 / p99 / max", text))
        verdict.rows.append(("of which later than 2 s", str(sum(seconds > 2 for seconds in answered))))
        late = [f"{seconds:.1f} s" for seconds in answered if seconds > ANSWER_SECONDS]
        verdict.must_be_none(f"of which later than {ANSWER_SECONDS:.0f} s", late)
    tries = Counter(refusal.kind for refusal in ledgers.refusals)
    text = ", ".join(f"{kind} {n}" for kind, n in tries.most_common()) or "none"
    verdict.rows.append(("tries that were not accepted (sent again)", text))
    duplicates = sum(ack.duplicate for ack in ledgers.acks)
    verdict.rows.append(("acks that named an earlier job", str(duplicates)))
    failed = [
        f"{refusal.key} at {clock(refusal.at)} by {refusal.instance}: {refusal.kind}: {refusal.text}"
        for fault in ledgers.faults
        if fault.name == "rolling_restart"
        for refusal in ledgers.refusals
        if fault.started <= refusal.at <= fault.whole
    ]
    verdict.must_be_none("failed accepts during rolling restarts", failed)


def _judge_calm_accepts(verdict: Verdict, ledgers: Ledgers) -> None:
    """What may be refused, or be left without an answer, while something is broken, may not be otherwise."""

    def ended(entry: Refusal) -> bool:
        times = entry.at - 1, entry.at + entry.seconds + 1
        return any(_ends(fault, entry.instance) and overlap(fault.interval, times) for fault in ledgers.faults)

    def broken(entry: Ack | Refusal) -> bool:
        times = entry.at - HEALED_SECONDS, entry.at + entry.seconds
        return any(fault.touches(entry.instance) and overlap(fault.interval, times) for fault in ledgers.faults)

    silent = ledgers.refusals.where(lambda refusal: refusal.kind == "no answer" and not ended(refusal))
    lines = [f"{each.key} at {clock(each.at)} by {each.instance}: {each.text}" for each in silent]
    verdict.must_be_none("calls that a living instance did not answer", lines)
    refused = ledgers.refusals.where(lambda refusal: refusal.kind == "refused" and not broken(refusal))
    from_memory = ledgers.acks.where(lambda ack: not ack.durable and not broken(ack))
    lines = [f"{each.key} at {clock(each.at)} by {each.instance}" for each in [*refused, *from_memory]]
    verdict.must_be_none(f"tasks not stored though nothing was broken for {HEALED_SECONDS:.0f} s", lines)


def _judge_memory(verdict: Verdict, ledgers: Ledgers, delivered: set[str], whole: Interval) -> None:
    def may_be_lost(ack: Ack) -> bool:
        left = ack.at, ack.at + FROM_MEMORY_SECONDS
        ended = any(_ends(fault, ack.instance) and overlap(fault.interval, left) for fault in ledgers.faults)
        return ended or left[1] > whole[1]

    lost = ledgers.acks.where(lambda ack: not ack.durable and ack.request_id not in delivered and not may_be_lost(ack))
    lines = [f"{each.request_id} at {clock(each.at)} by {each.instance}" for each in lost]
    verdict.must_be_none("results from memory that an instance has lost which went on", lines)


def _ends(fault: Fault, instance: str) -> bool:
    return fault.name in ENDS_OF_WORKERS and fault.instance == instance


def _count_faults(verdict: Verdict, ledgers: Ledgers) -> None:
    counts = Counter(fault.name for fault in ledgers.faults)
    verdict.rows.append(("faults", str(len(ledgers.faults))))
    verdict.rows.append(("of which", ", ".join(f"{name} {n}" for name, n in sorted(counts.items()))))
    if len(ledgers.missed):
        verdict.rows.append(("faults that found nothing to break", ", ".join(ledgers.missed)))
    verdict.must_be_none("errors of the harness", list(ledgers.errors))
