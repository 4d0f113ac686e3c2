"""Jobs whose owner is gone are found in time, and no living owner's job is taken, whatever clocks do."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from pokestrator import sweeping
from pokestrator.errors import LeaseLost, StoreUnavailable
from pokestrator.intake import Action, Question, new_job
from pokestrator.jobs import RAN_AGAIN, Channel, Job, JobState, Outcome
from pokestrator.liveness import Liveness
from pokestrator.runs import Usage
from pokestrator.store.callbacks import Callbacks
from pokestrator.store.history import History
from pokestrator.store.jobs import Jobs
from pokestrator.store.recovery import Recovery
from pokestrator.sweeping import LOOK_SECONDS, SWEEP_SECONDS
from tests.integration.flow import captured_logs, rows
from tests.integration.passing_time import LEASE, Instance, World, passing_time
from tests.integration.test_liveness import owner

DAY = 86_400
ALMOST = LEASE - 1  # a lease, but for the second in which it is given
IN_TIME = LEASE + SWEEP_SECONDS
PROMISED = 30


@pytest.fixture
def world(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with passing_time(database_url, monkeypatch) as world:
        yield world


@pytest.fixture
def liveness(tmp_path: Path) -> Liveness:
    return Liveness(tmp_path / "owners")


@pytest.fixture
def settled(world: World, liveness: Liveness) -> Instance:
    """An instance that has been up for a while."""
    instance = Instance(world, "here:1:00000001", liveness)
    world.live(30, instance)
    return instance


def claimed(world: World, owner: str = "elsewhere:1:00000002", task: str = "A long task") -> Job:
    job = new_job(task)
    world.jobs.insert(job)
    taken = world.jobs.claim_one(job.id, owner, LEASE)
    assert taken is not None
    return taken


def running(world: World, instance: Instance) -> Job:
    """A job that `instance` runs."""
    instance.held.append(claimed(world, instance.owner))
    return instance.held[-1]


def was_left_alone(world: World, job: Job) -> bool:
    row = world.row(job)
    return (row["state"], row["claim_seq"], row["interruptions"]) == ("running", job.claim_seq, 0)


# leases --------------------------------------------------------------------------------------------------------------


def test_an_orphan_is_found_when_its_lease_has_run_out_and_not_before(world: World, settled: Instance) -> None:
    orphan = claimed(world)
    assert ALMOST <= world.seconds_until("queued", orphan, settled) <= IN_TIME
    assert world.row(orphan)["interruptions"] == 1


def test_a_job_that_is_renewed_is_never_taken(world: World, settled: Instance, liveness: Liveness) -> None:
    other = Instance(world, "elsewhere:1:00000003", liveness, phase=2)
    mine, others = running(world, settled), running(world, other)
    world.live(90, settled, other)
    assert was_left_alone(world, mine)
    assert was_left_alone(world, others)


def test_its_own_runs_are_not_taken_by_a_sweeper_whose_heartbeat_fails(
    world: World, settled: Instance, liveness: Liveness
) -> None:
    mine = running(world, settled)
    settled.has_heartbeat = False
    world.live(60, settled)
    assert was_left_alone(world, mine)
    world.live(40, Instance(world, "elsewhere:1:00000003", liveness))
    assert world.state(mine) == "queued"


def test_a_sweep_says_what_it_did(world: World, settled: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    again, over = claimed(world), claimed(world)
    rows(world.url, "UPDATE jobs SET interruptions = 2 WHERE id = %s", over.id)
    with captured_logs(monkeypatch, sweeping) as logs:
        world.live(26, settled)
    told = {line["request_id"]: (line["log_level"], line["outcome"]) for line in logs if line["event"] == "interrupted"}
    assert told == {str(again.id): ("warning", "queued again"), str(over.id): ("error", "ended")}
    assert world.state(over) == "failed"


# absences ------------------------------------------------------------------------------------------------------------


def test_a_new_sweeper_waits_a_lease(world: World, liveness: Liveness) -> None:
    orphan = claimed(world)
    world.pass_by(600)
    instance = Instance(world, "here:1:00000004", liveness)
    assert ALMOST <= world.seconds_until("queued", orphan, instance) <= LEASE + 1


@pytest.mark.parametrize(("away", "waits"), [(LEASE / 4 + 1, True), (60, True), (LEASE / 4 - 1, False), (0, False)])
def test_after_an_outage_owners_get_a_lease_to_renew_but_not_after_a_blip(
    world: World, settled: Instance, away: float, waits: bool
) -> None:
    orphan = claimed(world)
    world.live(18, settled)
    world.pass_by(away)
    settled.sweeper.database_back(away, [])
    found = world.seconds_until("queued", orphan, settled)
    if waits:
        assert ALMOST <= found <= IN_TIME
    else:
        assert found <= 2 + SWEEP_SECONDS  # what was left of its lease


@pytest.mark.parametrize("still", [LEASE / 2 + 1, 60, DAY])
def test_a_process_that_stood_still_sweeps_only_after_a_lease(
    world: World, settled: Instance, liveness: Liveness, still: float
) -> None:
    # The machine slept, or it was stopped, and others with it: they need time to say that they live.
    other = Instance(world, "elsewhere:1:00000003", liveness, phase=1)
    others, orphan = running(world, other), claimed(world)
    world.pass_by(still)
    assert ALMOST <= world.seconds_until("queued", orphan, settled, other) <= IN_TIME
    assert was_left_alone(world, others)


def test_after_an_outage_claims_whose_answer_was_lost_are_given_back_unpunished(
    world: World, settled: Instance
) -> None:
    known, unknown, others = running(world, settled), claimed(world, settled.owner), claimed(world)
    settled.sweeper.database_back(0.5, settled.held)
    assert [world.state(job) for job in (known, unknown, others)] == ["running", "queued", "running"]
    assert world.row(unknown)["interruptions"] == 0
    assert History(world.database).timeline(unknown.id)[-1].kind == "released"
    with pytest.raises(LeaseLost):
        world.jobs.finish(unknown, Outcome(JobState.SUCCEEDED, "Too late."))


# the database's clock ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [DAY, -DAY, 600, -600, -60])
@pytest.mark.parametrize("phase", range(5))
def test_when_the_clock_jumps_no_living_owner_loses_a_job_and_orphans_are_still_found(
    world: World, settled: Instance, liveness: Liveness, jump: int, phase: int
) -> None:
    other = Instance(world, "elsewhere:1:00000003", liveness, phase=phase)
    mine, others = running(world, settled), running(world, other)
    world.live(10 + phase, settled, other)
    orphan = claimed(world)
    world.jump(jump)
    assert world.seconds_until("queued", orphan, settled, other) <= PROMISED
    world.live(30, settled, other)
    assert was_left_alone(world, mine)
    assert was_left_alone(world, others)


@pytest.mark.parametrize("jump", [DAY, -DAY, -600])
def test_also_when_it_jumped_while_the_database_was_away(
    world: World, settled: Instance, liveness: Liveness, jump: int
) -> None:
    other = Instance(world, "elsewhere:1:00000003", liveness, phase=2)
    others, orphan = running(world, other), claimed(world)
    world.pass_by(8)
    world.jump(jump)
    settled.sweeper.database_back(8, [])
    assert world.seconds_until("queued", orphan, settled, other) <= PROMISED
    assert was_left_alone(world, others)


def test_also_when_the_database_fails_just_when_the_jump_is_seen(world: World, settled: Instance) -> None:
    orphan = claimed(world)
    world.live(5, settled)
    with psycopg.connect(world.url) as another:  # whose process stands still, and then goes
        another.execute("SELECT id FROM jobs FOR UPDATE")
        world.jump(-600)
        with pytest.raises(StoreUnavailable):
            world.live(6, settled)
    assert world.seconds_until("queued", orphan, settled) <= PROMISED


def test_a_job_queued_before_the_clock_went_back_does_not_wait_behind_all_that_come_later(
    world: World, settled: Instance, database_url: str
) -> None:
    before, later = new_job("Queued before the clock went back"), new_job("Queued when all was well again")
    world.jobs.insert(before)
    rows(database_url, "UPDATE jobs SET run_at = now() + interval '1 day'")  # as it was then
    world.live(30, settled)
    world.jobs.insert(later)
    assert [job.id for job in world.jobs.claim("me", LEASE, 1)] == [before.id]


@pytest.mark.parametrize("jump", [DAY, -DAY, -600])
def test_a_queued_job_is_claimed_after_the_clock_jumped(world: World, settled: Instance, jump: int) -> None:
    before = new_job("Queued before the clock jumped")
    world.jobs.insert(before)
    back = claimed(world)
    world.jump(jump)
    world.jobs.release([back])
    after = new_job("Queued after it")
    world.jobs.insert(after)
    assert {job.id for job in world.jobs.claim("me", LEASE, 9)} == {before.id, back.id, after.id}


@pytest.mark.parametrize("jump", [DAY, -DAY, -600])
def test_a_result_is_sent_after_the_clock_jumped(world: World, jump: int) -> None:
    callbacks = Callbacks(world.database)
    job = claimed(world)
    world.jobs.finish(job, Outcome(JobState.SUCCEEDED, "Done."))
    world.jump(jump)
    callbacks.bring_forward()
    [callback] = callbacks.claim_due([Channel.API_MESSAGE], 5)
    assert callback.job_id == job.id


# locks ---------------------------------------------------------------------------------------------------------------


def test_the_jobs_of_an_owner_that_was_killed_here_are_queued_again_at_once(
    world: World, settled: Instance, tmp_path: Path
) -> None:
    with owner(tmp_path / "owners") as living, owner(tmp_path / "owners") as killed:
        orphan, others, remote = (claimed(world, name) for name in (killed.name, living.name, "far.example:1:00000009"))
        world.live(5, settled)
        assert world.state(orphan) == "running"
        killed.kill()
        assert world.seconds_until("queued", orphan, settled) <= LOOK_SECONDS
        assert was_left_alone(world, others)
        assert was_left_alone(world, remote)


def test_also_right_after_an_outage(world: World, liveness: Liveness, tmp_path: Path) -> None:
    # A lock is no lease: nobody who lives can have lost one.
    with owner(tmp_path / "owners") as killed:
        orphan = claimed(world, killed.name)
        killed.kill()
    instance = Instance(world, "here:1:00000005", liveness)
    instance.sweeper.database_back(60, [])
    assert world.seconds_until("queued", orphan, instance) <= LOOK_SECONDS


def test_an_owner_that_is_only_stopped_keeps_its_jobs_until_their_leases_run_out(
    world: World, settled: Instance, tmp_path: Path
) -> None:
    with owner(tmp_path / "owners") as stopped:
        os.kill(stopped.process.pid, signal.SIGSTOP)
        job = claimed(world, stopped.name)
        assert ALMOST <= world.seconds_until("queued", job, settled) <= IN_TIME


# cancelled, and given up ---------------------------------------------------------------------------------------------


def test_a_cancelled_job_whose_owner_left_is_ended_by_the_next_who_looks(world: World, settled: Instance) -> None:
    job = claimed(world)
    History(world.database).answer(Question(Action.CANCEL, job.id, None))
    world.jobs.release([job])
    assert world.state(job) == "queued"
    assert world.seconds_until("cancelled", job, settled) <= 1


@pytest.mark.parametrize("by_its_owner", [True, False])
def test_a_job_that_is_given_up_after_several_runs_says_that_it_ran_again(
    jobs: Jobs, recovery: Recovery, database_url: str, by_its_owner: bool
) -> None:
    job: Job | None = jobs.insert_claimed(new_job("A poisonous task"), "me", LEASE)
    for _ in range(3):
        assert job is not None
        rows(database_url, "UPDATE jobs SET runs = runs + 1")
        if by_its_owner:
            jobs.interrupt(job, "the slot died", Usage())
        else:
            recovery.sweep([], dead_owners=["me"])
        job = jobs.claim_one(job.id, "me", 20)
    assert job is None
    content = rows(database_url, "SELECT content FROM callbacks")[0]["content"]
    assert content.startswith("This task was interrupted three times and was given up")
    assert content.endswith(RAN_AGAIN)
