"""Credentials and callback tokens in real PostgreSQL: encrypted, and what becomes of them without their key."""

from __future__ import annotations

import pytest

from pokestrator.errors import SecretKeyError
from pokestrator.intake import new_job
from pokestrator.jobs import CallbackTarget, Channel, Job, JobState, Outcome
from pokestrator.store.callbacks import Callbacks
from pokestrator.store.credentials import Credentials
from pokestrator.store.jobs import Jobs
from pokestrator.store.pool import Database
from pokestrator.store.secrets import Vault, new_key
from tests.integration.flow import callback_row, job_row, rows

KEY = new_key()
BOTH = [Channel.CALLBACK, Channel.API_MESSAGE]
TARGET = CallbackTarget("https://poke.invalid/1", "token-canary")
DONE = Outcome(JobState.SUCCEEDED, "Done.")


@pytest.fixture
def credentials(database: Database) -> Credentials:
    return Credentials(database, Vault(KEY))


def ended(jobs: Jobs, target: CallbackTarget = TARGET) -> Job:
    """A job that has just ended and wants its answer at `target`."""
    job = jobs.insert_claimed(new_job("Feed the parrots", callback=target), "me", 60)
    jobs.finish(job, DONE)
    return job


# credentials -------------------------------------------------------------------------------------------------------


def test_what_is_stored_is_given_to_who_names_it_and_the_rest_is_missing(credentials: Credentials) -> None:
    assert credentials.set("STRIPE_API_KEY", "rk_canary")
    assert credentials.set("SHOP_TOKEN", "two\nlines")
    found, missing = credentials.values(["SHOP_TOKEN", "GITHUB_TOKEN"])
    assert found == {"SHOP_TOKEN": "two\nlines"}
    assert missing == {"GITHUB_TOKEN": "is not stored"}
    assert credentials.values([]) == ({}, {})


def test_setting_it_again_overwrites_it_and_says_so(credentials: Credentials) -> None:
    assert credentials.set("STRIPE_API_KEY", "old")
    assert not credentials.set("STRIPE_API_KEY", "new")
    assert credentials.values(["STRIPE_API_KEY"])[0] == {"STRIPE_API_KEY": "new"}
    [entry] = credentials.list()
    assert entry.name == "STRIPE_API_KEY"
    assert entry.created_at < entry.updated_at


def test_what_is_removed_is_gone(credentials: Credentials, database_url: str) -> None:
    credentials.set("STRIPE_API_KEY", "rk_canary")
    assert credentials.remove("STRIPE_API_KEY")
    assert not credentials.remove("STRIPE_API_KEY")
    assert credentials.list() == []
    assert rows(database_url, "SELECT name FROM credentials") == []


def test_with_another_key_it_matches_and_missing_with_the_reason(credentials: Credentials, database: Database) -> None:
    credentials.set("STRIPE_API_KEY", "rk_canary")
    for vault, reason in ((Vault(new_key()), "another POKESTRATOR_SECRET_KEY"), (Vault(), "is not set")):
        other = Credentials(database, vault)
        found, missing = other.values(["STRIPE_API_KEY"])
        assert found == {}
        assert reason in missing["STRIPE_API_KEY"]
        assert reason in other.list()[0].problem
    assert Credentials(database, Vault(f"{new_key()},{KEY}")).values(["STRIPE_API_KEY"])[1] == {}


def test_without_a_key_nothing_is_stored(database: Database) -> None:
    with pytest.raises(SecretKeyError, match="POKESTRATOR_SECRET_KEY is not set"):
        Credentials(database, Vault()).set("STRIPE_API_KEY", "rk_canary")
    assert Credentials(database, Vault()).list() == []


def test_the_table_takes_nothing_in_the_clear_and_no_other_names(database_url: str) -> None:
    for name, secret in (("STRIPE_API_KEY", "rk_canary"), ("stripe", "fernet:x")):
        with pytest.raises(Exception, match="violates check constraint"):
            rows(database_url, "INSERT INTO credentials (name, secret) VALUES (%s, %s)", name, secret)


# callback tokens ---------------------------------------------------------------------------------------------------


def test_a_callback_token_is_encrypted_in_its_row_and_sent_as_it_came(database: Database, database_url: str) -> None:
    jobs = Jobs(database, Vault(KEY))
    job = ended(jobs)
    stored = job_row(database_url, job.id)["callback_token"]
    assert stored.startswith("fernet:")
    assert TARGET.token not in stored
    [callback] = Callbacks(database, Vault(KEY)).claim_due(BOTH, 1)
    assert callback.target == TARGET


def test_the_token_of_a_call_that_comes_again_is_encrypted_too(database: Database, database_url: str) -> None:
    jobs = Jobs(database, Vault(KEY))
    again = CallbackTarget("https://poke.invalid/2", "token-canary-2")
    first = new_job("Feed the parrots", caller="u-1")
    second = new_job("Feed the parrots", caller="u-1", callback=again)
    assert jobs.insert(first) == jobs.insert(second) == first.id
    assert "canary" not in job_row(database_url, first.id)["callback_token"]
    claimed = jobs.claim_one(first.id, "me", 60)
    assert claimed is not None
    jobs.finish(claimed, DONE)
    [callback] = Callbacks(database, Vault(KEY)).claim_due(BOTH, 1)
    assert callback.target == again


def test_a_token_that_an_earlier_release_stored_in_the_clear_is_still_sent(database: Database) -> None:
    ended(Jobs(database))
    [callback] = Callbacks(database, Vault(KEY)).claim_due(BOTH, 1)
    assert callback.target == TARGET


@pytest.mark.parametrize("other", [Vault(new_key()), Vault()], ids=["another key", "no key"])
def test_a_token_whose_key_is_lost_leaves_its_callback_to_the_message_api_at_once(
    database: Database, database_url: str, other: Vault
) -> None:
    job = ended(Jobs(database, Vault(KEY)))
    callbacks = Callbacks(database, other)
    [callback] = callbacks.claim_due(BOTH, 1)
    assert (callback.job_id, callback.channel, callback.target) == (job.id, Channel.API_MESSAGE, None)
    assert callback.tries == 1  # what could not be sent was no try
    callbacks.delivered(callback, 200)
    assert callback_row(database_url, job.id)["state"] == "delivered"
    events = [row["text"] for row in rows(database_url, "SELECT text FROM job_events WHERE kind = 'callback failed'")]
    assert len(events) == 1
    assert "POKESTRATOR_SECRET_KEY" in events[0]


def test_without_the_message_api_it_waits_for_that_and_holds_up_nobody(database: Database, database_url: str) -> None:
    lost = [ended(Jobs(database, Vault(KEY))) for _ in range(3)]
    readable = ended(Jobs(database, Vault(other := new_key())))
    callbacks = Callbacks(database, Vault(other))
    [callback] = callbacks.claim_due([Channel.CALLBACK], 1)
    assert (callback.job_id, callback.target) == (readable.id, TARGET)
    for job in lost:
        row = callback_row(database_url, job.id)
        assert (row["state"], row["channel"], row["lease_until"]) == ("pending", "api_message", None)
    assert callbacks.claim_due([Channel.CALLBACK], 1) == []
    assert {each.job_id for each in callbacks.claim_due(BOTH, 9)} == {job.id for job in lost}  # now there is a key
