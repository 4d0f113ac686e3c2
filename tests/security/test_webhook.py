"""Where messages can be made to go: addresses that a request brings, names that lead elsewhere, redirects."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import example, given, settings
from hypothesis import strategies as st
from urllib3.util import parse_url

from pokestrator.addresses import matches, may_be_called_back
from pokestrator.delivery import Delivery
from pokestrator.demo.inbox import Inbox
from pokestrator.dialing import Address, resolve
from pokestrator.intake import new_job
from pokestrator.jobs import CallbackTarget, Channel, JobState, Outcome
from pokestrator.poke.api import Message, Poke
from pokestrator.store.callbacks import Callbacks
from pokestrator.store.embedded import EmbeddedPostgres
from pokestrator.store.jobs import Jobs
from pokestrator.store.pool import Database
from tests.integration.flow import HERE, POKE_KEY, TOKEN, callback_row, contents, eventually, rows
from tests.security.attacks import attack
from tests.security.door import Door, open_door
from tests.security.tls_host import TlsHost

TASK = "Write a poem about the lighthouse at dusk"


@pytest.fixture(scope="module")
def door(postgres: EmbeddedPostgres, migrated: str) -> Iterator[Door]:
    with open_door(postgres, migrated, POKESTRATOR_CALLBACK_HOSTS="poke.com,*.poke.com") as opened:
        yield opened


@attack("a callback address that is plain http, of another host, of an IP address, or tricks with names", "tool error")
@pytest.mark.parametrize(
    "url",
    [
        "http://poke.com/cb",
        "https://evil.example/cb",
        "https://evilpoke.com/cb",
        "https://poke.com.evil.example/cb",
        "https://poke.com@evil.example/cb",
        "https://evil.example\\.poke.com/cb",  # another reader of it ends the host at the backslash
        "https://127.0.0.1\\.poke.com/cb",
        "https://evil.example%2f.poke.com/cb",
        "https://evil.example/?https://poke.com/",
        "https://1.1.1.1/cb",
        "https://169.254.169.254/latest/meta-data",
        "http://127.0.0.1:8000/mcp",
        "https://localhost/cb",
        "https://[::1]/cb",
        "https://2130706433/cb",
        "file:///etc/passwd",
    ],
)
def test_a_request_cannot_have_its_answer_sent_just_anywhere(door: Door, url: str) -> None:
    headers = {"X_Poke_Callback_Url": url, "X_Poke_Callback_Token": "t"}
    before = door.tasks()
    answer = door.orchestrate(TASK, **headers)
    assert answer["isError"] is True
    assert answer["content"][0]["text"].startswith("X-Poke-Callback-Url: must be an https:// address at a host")
    assert "poke.com, *.poke.com" in answer["content"][0]["text"]
    assert door.tasks() == before


# from here on the address was accepted, by a setting of then or by a name that has changed hands ---------------------


def ended(jobs: Jobs, url: str) -> str:
    """A job with this callback address, whose message waits in the outbox; its id."""
    wanted = new_job(TASK, callback=CallbackTarget(url, TOKEN))
    jobs.finish(jobs.insert_claimed(wanted, "me", 60), Outcome(JobState.SUCCEEDED, "The result."))
    return str(wanted.id)


def deliver(database: Database, poke: Poke, database_url: str, job_id: str) -> None:
    delivery = Delivery(Callbacks(database), poke)
    delivery.start()
    try:
        assert eventually(lambda: callback_row(database_url, job_id)["state"] != "pending", 30)
    finally:
        delivery.close()


@attack("a callback address that was stored when more hosts were allowed", "not sent there: the message API gets it")
def test_an_address_that_is_not_allowed_any_more_gets_nothing(
    jobs: Jobs, database: Database, database_url: str, inbox: Inbox
) -> None:
    job_id = ended(jobs, inbox.callback_url(TOKEN))
    poke = Poke(inbox.message_url, POKE_KEY, dry_run=False, callback_hosts=("poke.com",))
    deliver(database, poke, database_url, job_id)
    assert [post.channel for post in inbox.received] == ["api_message"]
    assert contents(inbox.received) == ["The result."]


@attack(
    "an allowed name that resolves to 127.0.0.1, to 169.254.169.254 or to a private network",
    "no connection is made: the message API gets it",
)
@pytest.mark.parametrize("inside", ["127.0.0.1", "169.254.169.254", "10.0.0.7", "::1", "::ffff:192.168.0.1"])
def test_a_name_that_leads_inside_gets_nothing(
    inside: str, jobs: Jobs, database: Database, database_url: str, inbox: Inbox
) -> None:
    asked: list[str] = []

    def lies(host: str, port: int) -> Sequence[Address]:
        asked.append(host)
        return [("93.184.216.34", port), (inside, port)] if host == "hooks.poke.com" else resolve(host, port)

    job_id = ended(jobs, "https://hooks.poke.com/cb")
    poke = Poke(inbox.message_url, POKE_KEY, dry_run=False, callback_hosts=("*.poke.com",), resolve=lies)
    deliver(database, poke, database_url, job_id)
    assert asked[0] == "hooks.poke.com"
    assert [post.channel for post in inbox.received] == ["api_message"]


def test_a_message_api_that_leads_inside_makes_a_dead_letter_that_says_so(
    jobs: Jobs, database: Database, database_url: str
) -> None:
    wanted = new_job(TASK)
    jobs.finish(jobs.insert_claimed(wanted, "me", 60), Outcome(JobState.SUCCEEDED, "The result."))
    poke = Poke("https://poke.com/message", POKE_KEY, dry_run=False, resolve=lambda host, port: [("10.1.2.3", port)])
    deliver(database, poke, database_url, str(wanted.id))
    row = callback_row(database_url, wanted.id)
    assert row["state"] == "dead"
    assert row["last_error"] == "not sent: poke.com is at 10.1.2.3, which is not a public address"


class _Redirecting(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.send_response(307)
        self.send_header("Location", self.server.target)  # type: ignore[attr-defined]
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Silent."""


@attack("a receiver that redirects to an address inside", "not followed")
def test_a_redirect_is_not_followed(jobs: Jobs, database: Database, database_url: str, inbox: Inbox) -> None:
    server = HTTPServer(("127.0.0.1", 0), _Redirecting)
    server.target = inbox.callback_url(TOKEN)  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        wanted = new_job(TASK)
        jobs.finish(jobs.insert_claimed(wanted, "me", 60), Outcome(JobState.SUCCEEDED, "The result."))
        poke = Poke(f"http://127.0.0.1:{server.server_port}/", POKE_KEY, dry_run=False, callback_hosts=HERE)
        deliver(database, poke, database_url, str(wanted.id))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert callback_row(database_url, wanted.id)["last_status"] == 307
    assert inbox.received == []


@attack("netrc and proxy variables of the machine", "not looked at")
def test_the_machines_own_settings_change_nothing(
    jobs: Jobs, database: Database, database_url: str, inbox: Inbox, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    netrc = f"{tmp_path}/netrc"
    with open(netrc, "w", encoding="utf-8") as file:  # noqa: PTH123
        file.write("machine 127.0.0.1 login evil password evil\n")
    monkeypatch.setenv("NETRC", netrc)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    wanted = new_job(TASK)
    jobs.finish(jobs.insert_claimed(wanted, "me", 60), Outcome(JobState.SUCCEEDED, "The result."))
    deliver(database, Poke(inbox.message_url, POKE_KEY, dry_run=False), database_url, str(wanted.id))
    assert inbox.received[0].headers["authorization"] == f"Bearer {POKE_KEY}"


@attack("metadata that names a callback address", "not looked at: the message API gets the result")
def test_metadata_chooses_no_receiver(door: Door) -> None:
    with Inbox() as elsewhere:
        url = elsewhere.callback_url(TOKEN)
        named = {"callback": {"url": url, "token": TOKEN}, "callback_url": url, "X-Poke-Callback-Url": url}
        answer = door.orchestrate(TASK, {**named, "X-Poke-Callback-Token": TOKEN, "webhook_url": url})
        request_id = answer["structuredContent"]["request_id"]
        row = callback_of(door, request_id)
        assert (row["channel"], row["state"]) == ("api_message", "delivered")
        assert request_id in [post.body.get("request_id") for post in door.inbox.received]
        assert elsewhere.received == []


def callback_of(door: Door, request_id: str) -> dict[str, Any]:
    """Its row, once it is no longer pending."""
    query = "SELECT * FROM callbacks WHERE job_id = %s AND state <> 'pending'"
    found = eventually(lambda: rows(door.database_url, query, request_id), 60)
    assert found, "no message was written in a minute"
    return dict(found[0])


# what the address says stays with the name ---------------------------------------------------------------------------


@attack("an allowed name at a public address that cannot prove it is that host", "nothing is sent")
@pytest.mark.parametrize(("name", "sent"), [("hooks.poke.com", True), ("other.poke.com", False)])
def test_a_connection_to_a_checked_address_is_still_one_to_the_name(
    name: str, sent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TlsHost("hooks.poke.com", tmp_path) as host:
        monkeypatch.setattr("requests.adapters.DEFAULT_CA_BUNDLE_PATH", str(host.ca_file))
        poke = Poke(
            "https://poke.invalid/",
            POKE_KEY,
            dry_run=False,
            callback_hosts=("*.poke.com",),
            resolve=lambda _host, _port: [host.address],
            is_public=lambda address: address == "127.0.0.1",  # the host is played here
        )
        target = CallbackTarget(f"https://{name}/cb", TOKEN)
        receipt = poke.send(Message(uuid.uuid4(), TASK, "The result.", Channel.CALLBACK, target, "key"))
        assert receipt.delivered is sent, receipt
        body = '{"content": "The result.", "hasMore": false}'
        assert host.asked == ([f"{name} {body}"] if sent else [])


HOSTS = ("poke.com", ".poke.com", "evil.example", "127.0.0.1", "::1", "a", "443")
SIGNS = (*"/\\@:?#.;[]-_*", "//", "https:", "%2f", "%00", "\t", "\n", "\u3002", "\uff0f", "\u212a")
urls = st.lists(st.sampled_from((*HOSTS, *SIGNS)), max_size=9).map(lambda parts: "https://" + "".join(parts))


@attack("any callback address that two readers of a URL read in two ways", "tool error")
@settings(deadline=None, max_examples=500)
@given(urls)
@example("https://evil.example\\.poke.com/")
@example("https://a.poke.com:443/\\@evil.example")
def test_the_host_that_is_allowed_is_the_host_that_is_called(url: str) -> None:
    if may_be_called_back(url, ("poke.com", "*.poke.com")):
        called = parse_url(str(requests.Request("POST", url).prepare().url))  # what the connection is made from
        assert matches(called.host or "", ("poke.com", "*.poke.com"))
