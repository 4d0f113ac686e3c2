"""The chaos harness's judgement: it must find what is wrong, and blame nobody for what was allowed."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Any

import pytest

from pokestrator.demo.inbox import Received
from pokestrator.jobs import RAN_AGAIN, TOO_LATE
from tests.chaos.faults import KINDS
from tests.chaos.ledgers import Ack, Cancel, Fault, Ledgers, Orphan, Refusal
from tests.chaos.schedule import plan, resources
from tests.chaos.verdict import Found, Verdict, calm_seconds, judge, recoveries

JOB, CALLBACK = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))
WHOLE = (0.0, 200.0)
JOB_ROW = {
    "id": JOB,
    "state": "succeeded",
    "error_kind": None,
    "runs": 1,
    "interruptions": 0,
    "api_retries": 0,
    "result": "Done.",
}


def ack(request_id: str = JOB, **changes: Any) -> Ack:
    values: dict[str, Any] = {"at": 10.0, "seconds": 0.1, "key": "key-1", "request_id": request_id}
    return Ack(**{**values, "durable": True, "duplicate": False, "instance": "A", **changes})


def post(at: float = 20.0, status: int = 200, key: str = CALLBACK) -> Received:
    return Received(at, "api_message", "/", {"idempotency-key": key}, {}, status)


def fault(name: str, start: float, end: float, **changes: Any) -> Fault:
    values: dict[str, Any] = {"instance": None, "affects": "everything", "doubles": True, "ended": end, "whole": end}
    return Fault(name=name, started=start, **{**values, **changes})


def found(**changes: Any) -> Found:
    job = JOB_ROW
    callback = {"id": CALLBACK, "job_id": JOB, "state": "delivered", "last_error": None}
    values: dict[str, Any] = {"jobs": [job], "callbacks": [callback], "events": [], "violations": []}
    return Found(**{**values, **changes})


def ledgers(*entries: Ack | Refusal | Cancel | Fault | Orphan) -> Ledgers:
    made = Ledgers()
    for entry in entries:
        match entry:
            case Ack():
                made.acks.add(entry)
            case Refusal():
                made.refusals.add(entry)
            case Cancel():
                made.cancels.add(entry)
            case Fault():
                made.faults.add(entry)
            case Orphan():
                made.orphans.add(entry)
    return made


def judged(made: Ledgers, posts: list[Received], rows: Found | None = None, unanswered: int = 0) -> Verdict:
    return judge(made, posts, rows or found(), unanswered, WHOLE)


def test_a_task_that_was_accepted_and_delivered_once_passes() -> None:
    assert judged(ledgers(ack()), [post(status=503), post(25.0)]).failures == []


def test_a_durable_task_that_reached_nobody_is_lost() -> None:
    verdict = judged(ledgers(ack()), [post(status=503)])
    assert len(verdict.failures) == 1
    assert verdict.failures[0].startswith("lost: 1")
    assert verdict.blamed == {JOB}


def test_a_durable_task_that_the_database_does_not_know_is_lost() -> None:
    verdict = judged(ledgers(ack()), [], found(jobs=[], callbacks=[]))
    assert "not in the database" in verdict.failures[0]


def test_a_task_that_ran_from_memory_may_be_lost_and_is_counted_apart() -> None:
    killed = fault("kill_master", 5.0, 15.0, affects="everything", instance="A")
    verdict = judged(ledgers(ack(durable=False), killed), [], found(jobs=[], callbacks=[]))
    assert verdict.failures == []
    assert ("accepted, not durable (from memory)", "1, 1 not delivered") in verdict.rows


def test_a_dead_letter_is_not_lost_but_does_not_pass() -> None:
    callback = {"id": CALLBACK, "job_id": JOB, "state": "dead", "last_error": "HTTP 400"}
    verdict = judged(ledgers(ack()), [], found(callbacks=[callback]))
    assert [failure.split("\n")[0] for failure in verdict.failures] == ["dead letters: 1"]


def test_a_second_delivery_without_a_fault_between_send_and_record_does_not_pass() -> None:
    verdict = judged(ledgers(ack()), [post(20.0), post(30.0)])
    assert verdict.failures[0].startswith("duplicates without such a fault: 1")


def test_a_second_delivery_after_a_fault_at_the_time_of_the_first_is_allowed() -> None:
    assert judged(ledgers(ack(), fault("kill_worker", 20.5, 20.5)), [post(20.0), post(30.0)]).failures == []


@pytest.mark.parametrize("changes", [{"doubles": False}, {"started": 40.0, "ended": 41.0, "whole": 41.0}])
def test_a_fault_of_another_kind_or_time_explains_no_second_delivery(changes: dict[str, Any]) -> None:
    values: dict[str, Any] = {"started": 20.5, "ended": 21.0, "whole": 21.0, "doubles": True, **changes}
    made = Fault(name="a fault", instance=None, affects="everything", **values)
    assert len(judged(ledgers(ack(), made), [post(20.0), post(30.0)]).failures) == 1


def test_a_job_with_two_callbacks_does_not_pass() -> None:
    verdict = judged(ledgers(ack()), [post(20.0), post(30.0, key=JOB)])
    assert verdict.failures[0].startswith("jobs with two callbacks: 1")


def test_a_job_that_nobody_was_told_of_does_not_pass() -> None:
    assert judged(ledgers(), [post()]).failures[0].startswith("jobs nobody was told of: 1")


def test_a_job_that_finished_twice_or_changed_after_its_end_does_not_pass() -> None:
    ends = [{"job_id": JOB, "kind": "finished"}] * 2
    changed = [{"job_id": JOB, "what": "left failed for queued", "at": "then"}]
    verdict = judged(ledgers(ack()), [post()], found(events=ends, violations=changed))
    assert verdict.failures[0].startswith("stale writes: 2")


def test_a_result_of_a_second_run_that_does_not_say_so_does_not_pass() -> None:
    silent = {**JOB_ROW, "runs": 2}
    honest = {**silent, "result": f"Done.\n\n{RAN_AGAIN}"}
    assert judged(ledgers(ack()), [post()], found(jobs=[honest])).failures == []
    assert judged(ledgers(ack()), [post()], found(jobs=[silent])).failures[0].startswith("results of second runs")


def test_a_cancelled_task_that_went_on_does_not_pass_nor_one_that_nobody_cancelled() -> None:
    cancelling = Cancel(12.0, JOB, "cancelling")
    late = {**JOB_ROW, "result": f"{TOO_LATE}\n\nDone."}
    cancelled = {**JOB_ROW, "state": "cancelled", "result": "Cancelled."}
    for row in (late, cancelled):
        assert judged(ledgers(ack(), cancelling), [post()], found(jobs=[row])).failures == []
    verdict = judged(ledgers(ack(), cancelling), [post()])
    assert verdict.failures[0].startswith("tasks that went on though they were cancelled: 1")
    at_once = Cancel(12.0, JOB, "cancelled")
    verdict = judged(ledgers(ack(), at_once), [post()], found(jobs=[late]))
    assert verdict.failures[0].startswith("tasks that went on though they were cancelled: 1")
    verdict = judged(ledgers(ack()), [post()], found(jobs=[cancelled]))
    assert verdict.failures[0].startswith("tasks cancelled though nobody asked: 1")


def test_a_call_that_failed_in_a_rolling_restart_does_not_pass_and_one_beside_it_does() -> None:
    rolling = fault("rolling_restart", 50.0, 60.0, affects="instance", instance="A", doubles=False)
    beside = Refusal(70.0, 0.1, "key-1", "A", "no connection", "refused")
    within = Refusal(55.0, 0.1, "key-1", "A", "no answer", "reset")
    assert judged(ledgers(ack(), rolling, beside), [post()]).failures == []
    assert judged(ledgers(ack(), rolling, within), [post()]).failures[0].startswith("failed accepts")


def test_an_orphan_is_counted_from_the_return_of_what_could_take_it_up() -> None:
    orphan = Orphan(JOB, 1, "host:1:x", "lease", 50.0, 100.0)
    outage = fault("database_outage", 40.0, 75.0)
    assert calm_seconds(orphan, ledgers(outage), WHOLE) == 25.0
    assert judged(ledgers(ack(), orphan, outage), [post()]).failures == []
    assert judged(ledgers(ack(), orphan), [post()]).failures[0].startswith("orphans above 30 s")


def test_a_fault_of_one_instance_leaves_the_orphan_to_the_other() -> None:
    orphan = Orphan(JOB, 1, "host:1:x", "lease", 50.0, 100.0)
    cut = fault("database_silent", 40.0, 95.0, affects="instance", instance="A")
    assert calm_seconds(orphan, ledgers(cut), WHOLE) == 50.0


def test_an_orphan_of_an_owner_that_died_here_is_found_within_seconds() -> None:
    late = Orphan(JOB, 1, "host:1:x", "death", 50.0, 57.0)
    assert judged(ledgers(ack(), late), [post()]).failures[0].startswith("orphans above 6 s")
    in_time = Orphan(JOB, 1, "host:1:x", "death", 50.0, 55.0)
    assert judged(ledgers(ack(), in_time), [post()]).failures == []


def test_a_call_that_nobody_answers_does_not_pass_unless_its_instance_was_ended_or_frozen() -> None:
    silent = Refusal(50.0, 10.0, "key-1", "A", "no answer", "timed out")
    frozen = fault("freeze_worker", 55.0, 70.0, affects="instance", instance="A")
    assert judged(ledgers(ack(), silent, frozen), [post()]).failures == []
    for other in (fault("freeze_worker", 55.0, 70.0, affects="instance", instance="B"), fault("frozen", 45.0, 70.0)):
        verdict = judged(ledgers(ack(), silent, other), [post()])
        assert verdict.failures[0].startswith("calls that a living instance did not answer: 1")


@pytest.mark.parametrize("entry", [Refusal(80.0, 0.1, "k", "A", "refused", "away"), ack(at=80.0, durable=False)])
def test_a_task_that_is_not_stored_though_the_database_has_long_been_back_does_not_pass(entry: Ack | Refusal) -> None:
    recent, earlier = fault("kill_postgres", 65.0, 71.0), fault("kill_postgres", 60.0, 69.0)
    assert judged(ledgers(ack(), entry, recent), [post()]).failures == []
    for other in (earlier, fault("database_silent", 65.0, 71.0, affects="instance", instance="B")):
        verdict = judged(ledgers(ack(), entry, other), [post()])
        assert verdict.failures[0].startswith("tasks not stored though nothing was broken for 10 s: 1")


def test_an_answer_that_takes_too_long_does_not_pass() -> None:
    assert judged(ledgers(ack(seconds=4.0)), [post()]).failures == []
    assert judged(ledgers(ack(seconds=6.0)), [post()]).failures[0].startswith("of which later than 5 s: 1")


def test_a_result_from_memory_is_lost_only_with_its_instance() -> None:
    lost, outage = ack(durable=False), fault("kill_postgres", 5.0, 15.0)
    nothing = found(jobs=[], callbacks=[])
    verdict = judged(ledgers(lost, outage), [], nothing)
    assert verdict.failures[0].startswith("results from memory that an instance has lost which went on: 1")
    killed = fault("kill_worker", 30.0, 31.0, affects="instance", instance="A")
    assert judged(ledgers(lost, outage, killed), [], nothing).failures == []


def test_recovery_is_the_time_until_both_accepts_and_claims_work() -> None:
    stopped = fault("kill_postgres", 30.0, 35.0)
    made = ledgers(stopped, ack(at=32.0), ack(at=36.0, seconds=0.5))
    claims = [{"kind": "claimed", "at": datetime.fromtimestamp(at, UTC)} for at in (31.0, 38.0)]
    assert recoveries(made, claims) == [(3.0, stopped)]


def test_the_same_seed_gives_the_same_plan_and_another_one_another() -> None:
    assert plan(7, 40, 120, KINDS) == plan(7, 40, 120, KINDS)
    assert plan(7, 40, 120, KINDS) != plan(8, 40, 120, KINDS)


def test_every_kind_comes_once_before_any_comes_again() -> None:
    names = [each.kind.name for each in plan(7, len(KINDS), 120, KINDS)]
    assert sorted(names) == sorted(kind.name for kind in KINDS)


def test_no_two_faults_break_the_same_thing_at_once() -> None:
    planned = plan(3, 200, 3_600, KINDS)
    for number, one in enumerate(planned):
        for other in planned[number + 1 :]:
            if set(resources(one.kind, one.instance)) & set(resources(other.kind, other.instance)):
                assert other.at >= one.at + one.seconds
