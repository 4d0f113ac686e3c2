"""The door against HTTP itself: keys, names, framing, clients that take their time. Raw bytes to the real gunicorn."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import flask
import pytest

from pokestrator.store.embedded import EmbeddedPostgres
from pokestrator.web.gathering import MAX_BUFFERED_BYTES, READ_SECONDS, WRITE_SECONDS
from pokestrator.web.guard import Guard
from pokestrator.web.mcp import MAX_BODY_BYTES
from tests.acceptance.processes import eventually, is_read
from tests.integration.mcp_peer import call, rpc
from tests.security.attacks import attack
from tests.security.door import KEY, PATIENCE, Door, everything, open_door, request

PING = rpc("ping").encode()
TASK = call({"task_description": "Split a bill of 184.50 between 5 people"}).encode()
SMUGGLED = request(f"Content-Length: {len(TASK)}", "Connection: close", body=TASK)
SLOW = 64
CONNECTIONS = 512  # gunicorn.conf.py


@pytest.fixture(scope="module")
def door(postgres: EmbeddedPostgres, migrated: str) -> Iterator[Door]:
    with open_door(
        postgres,
        migrated,
        POKESTRATOR_ALLOWED_HOSTS="agent.example, *.apps.example",
        RENDER_EXTERNAL_HOSTNAME="Agent-1.onrender.com",
        POKESTRATOR_ALLOWED_ORIGINS="https://page.example",
    ) as opened:
        yield opened
        assert "Traceback" not in opened.service.log


# The key -----------------------------------------------------------------------------------------------------------

WRONG: dict[str, bytes | None] = {
    "none": None,
    "empty": b"Bearer ",
    "wrong": b"Bearer wrong",
    "a prefix": f"Bearer {KEY[:-1]}".encode(),
    "one letter more": f"Bearer {KEY}x".encode(),
    "in another encoding": f"Bearer {KEY}".encode("latin-1"),
    "any bytes": b"Bearer \xff\xfe\x80\xc3",
    "as a password": f"Basic {KEY}".encode(),
    "twice": f"Bearer {KEY}, Bearer {KEY}".encode(),
}


@attack(
    "a call without the key, with a wrong one, a prefix, other bytes, another scheme",
    "401 with `WWW-Authenticate: Bearer`; nothing is stored",
)
@pytest.mark.parametrize("value", WRONG.values(), ids=WRONG)
def test_only_the_key_opens(door: Door, value: bytes | None) -> None:
    tasks = door.tasks()
    answer = door.post(TASK, *([] if value is None else [("Authorization", value)]), authorized=False)
    assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert door.tasks() == tasks


@attack("the key in the query of the address", "401; a key there would be in the logs of every proxy")
@pytest.mark.parametrize("name", ["api_key", "key", "access_token", "token", "Authorization"])
def test_a_key_in_the_query_does_not_count(door: Door, name: str) -> None:
    start = f"POST /mcp?{name}=door-schl%C3%BCssel-5f0c HTTP/1.1"
    asked = request(f"Content-Length: {len(PING)}", "Connection: close", body=PING, start=start)
    without_key = b"\r\n".join(line for line in asked.split(b"\r\n") if not line.startswith(b"Authorization"))
    assert door.statuses(without_key) == [401]


# Names -------------------------------------------------------------------------------------------------------------


@attack("a request addressed to a name that is not ours", "421")
@pytest.mark.parametrize(
    "host",
    ["evil.example", "agent.example.evil.example", "apps.example", "evilapps.example", "169.254.169.254", "[", ""],
)
def test_a_foreign_host_is_refused(door: Door, host: str) -> None:
    assert door.post(PING, ("Host", host)).status == 421


@pytest.mark.parametrize(
    "host", ["agent.example", "AGENT.example:443", "a.b.apps.example", "agent-1.onrender.com", "localhost:1", "[::1]"]
)
def test_our_own_names_are_answered(door: Door, host: str) -> None:
    assert door.post(PING, ("Host", host)).status == 200


def test_a_health_check_may_use_any_name(door: Door) -> None:
    assert door.statuses(b"GET /healthz HTTP/1.1\r\nHost: 10.1.2.3\r\nConnection: close\r\n\r\n") == [200]


@attack("a web page of another origin calls from the person's browser", "403, and no leave to read the answer")
@pytest.mark.parametrize("origin", ["https://evil.example", "http://page.example", "http://localhost:3000", "null"])
def test_a_foreign_origin_is_refused(door: Door, origin: str) -> None:
    answer = door.post(PING, ("Origin", origin))
    assert answer.status == 403
    assert "Access-Control-Allow-Origin" not in answer.headers


def test_a_page_of_an_allowed_origin_may_call_and_read(door: Door) -> None:
    origin = ("Origin", "https://page.example")
    asked = request("Origin: https://page.example", "Access-Control-Request-Method: POST", "Connection: close")
    keyless = asked.replace(b"POST /mcp", b"OPTIONS /mcp").replace(b"Authorization", b"X-Nothing")
    assert door.statuses(keyless) == [204]
    answer = door.post(PING, origin)
    assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (200, "https://page.example")
    assert door.post(PING, origin, authorized=False).status == 401


@attack("without a key: a web page that has its own name point to this machine (DNS rebinding)", "421, or 403")
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "localhost.evil.example"}, 421),
        ({"Host": "localhost", "Origin": "http://evil.example"}, 403),
        ({"Host": "localhost", "Origin": "http://localhost.evil.example"}, 403),
        ({"Host": "127.0.0.1:8000", "Origin": "http://localhost:3000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
    ],
)
def test_without_a_key_only_this_machine_may_call(headers: dict[str, str], status: int) -> None:
    app, guard = flask.Flask(__name__), Guard(None, hosts=["evil.example"])
    app.before_request(guard.turn_away)
    app.add_url_rule("/", view_func=lambda: "in")
    assert app.test_client().get("/", headers=headers).status_code == status


# Framing -----------------------------------------------------------------------------------------------------------

LENGTH = f"Content-Length: {len(PING)}"
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(PING), PING)
FRAMINGS: dict[str, bytes] = {
    "length and chunks": request(LENGTH, "Transfer-Encoding: chunked", body=CHUNKED),
    "chunks and length": request("Transfer-Encoding: chunked", "Content-Length: 4", body=CHUNKED),
    "chunked twice": request("Transfer-Encoding: chunked, chunked", body=CHUNKED),
    "two lines of chunked": request("Transfer-Encoding: chunked", "Transfer-Encoding: chunked", body=CHUNKED),
    "two lines, one hidden": request("Transfer-Encoding: chunked", "Transfer-Encoding: identity", body=CHUNKED),
    "a coding that is none": request("Transfer-Encoding: xchunked", body=CHUNKED),
    "a hidden coding": request("Transfer-Encoding: \x0bchunked", body=CHUNKED),
    "not chunked at last": request("Transfer-Encoding: chunked, identity", body=CHUNKED),
    "two lengths": request(LENGTH, "Content-Length: 0", body=PING),
    "the same length twice": request(LENGTH, LENGTH, body=PING),
    "two lengths in one": request(f"{LENGTH}, {len(PING)}", body=PING),
    "a length of +2": request("Content-Length: +2", body=b"{}"),
    "a length of -1": request("Content-Length: -1", body=PING),
    "a length of 0x2": request("Content-Length: 0x2", body=b"{}"),
    "a length of 1_0": request("Content-Length: 1_0", body=PING),
    "a length in other digits": request("Content-Length: ²".encode("latin-1"), body=b"{}"),
    "a space before the colon": request("Content-Length : 0", body=PING),
    "Host with a space": request(LENGTH, body=PING).replace(b"Host:", b"Host :"),
    "two Hosts": request(LENGTH, "Host: localhost", body=PING),
    "a folded line": request(LENGTH, "X-Folded: a\r\n b", body=PING),
    "a line of its own": request(LENGTH, "nonsense", body=PING),
    "bare LF": request(LENGTH, body=PING).replace(b"\r\n", b"\n"),
    "one bare LF": request(LENGTH, "X-A: b\nX-C: d", body=PING),
    "a bare CR": request(LENGTH, "X-A: b\rX-C: d", body=PING),
    "NUL in a header": request(LENGTH, "X-A: b\x00", body=PING),
    "a chunk of -1": request("Transfer-Encoding: chunked", body=b"-1\r\n" + CHUNKED),
    "a chunk of 0x1": request("Transfer-Encoding: chunked", body=b"0x1\r\na\r\n0\r\n\r\n"),
    "a chunk without its end": request("Transfer-Encoding: chunked", body=b"1\r\nabc\r\n0\r\n\r\n"),
    "a chunk line without end": request("Transfer-Encoding: chunked", body=b"1;" + b"a" * 10_000),
    "HTTP/1.0 with chunks": request("Transfer-Encoding: chunked", body=CHUNKED).replace(b"HTTP/1.1", b"HTTP/1.0"),
    "no version": request(LENGTH, body=PING).replace(b" HTTP/1.1", b""),
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) + b"\r\n",
    "not HTTP at all": b"\x00\xff" * 400 + b"\n",
}


@attack(
    "length and chunks, chunks twice, two lengths, a length of `+2`, bare LF, `Host :` and other requests that two "
    "servers could read differently, each with a second request behind it",
    "400 (501 for an unknown coding) and the connection closed; the second request is not read",
)
@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_request_of_two_meanings_is_refused_with_all_that_follows(door: Door, framing: str) -> None:
    tasks = door.tasks()
    [status] = door.statuses(FRAMINGS[framing] + SMUGGLED)
    assert status in (400, 501)
    assert door.tasks() == tasks


def test_requests_that_follow_each_other_are_answered_in_turn(door: Door) -> None:
    chunked = request("Transfer-Encoding: chunked", body=CHUNKED)
    last = request(LENGTH, "Connection: close", body=PING)
    with door.connect() as client:
        client.sendall(chunked + request(LENGTH, body=PING) + b"\r\n" + chunked + last)
        answers = everything(client)
    assert answers.count(b'"result":{}') == answers.count(b"HTTP/1.1 200 OK") == 4


def test_a_body_may_come_in_any_pieces(door: Door) -> None:
    chunks = b"".join(b"1;a=b\r\n%c\r\n" % byte for byte in PING) + b"0\r\nX-Trailer: x\r\n\r\n"
    asked = request("Transfer-Encoding: chunked", "Connection: close", body=chunks)
    with door.connect() as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(asked), 7):
            client.sendall(asked[at : at + 7])
        assert b'"result":{}' in everything(client)


def test_a_client_that_asks_before_it_sends_its_body_is_told_to_go_on(door: Door) -> None:
    with door.connect() as client:
        client.sendall(request(LENGTH, "Expect: 100-continue", "Connection: close"))
        assert client.recv(1_000).startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
        client.sendall(PING)
        assert b'"result":{}' in everything(client)


@attack("headers that speak for a proxy: `SCRIPT_NAME`, `X-Forwarded-For` and the like", "as if they were not there")
@pytest.mark.parametrize("header", ["SCRIPT_NAME: /mcp", "PATH_INFO: /healthz", "X_Poke_User_Id: me"])
def test_nobody_speaks_for_a_proxy(door: Door, header: str) -> None:
    forwarded = ("X-Forwarded-For: 10.0.0.1", "X-Forwarded-Proto: https", "X-Forwarded-Ssl: off")
    assert door.statuses(request(LENGTH, header, *forwarded, "Connection: close", body=PING)) == [200]


# Time --------------------------------------------------------------------------------------------------------------


@attack("64 connections that send a header byte now and then", "others are answered meanwhile; 408 after 10 s")
@attack("64 connections that send a body byte now and then", "others are answered meanwhile; 408 after 10 s")
def test_slow_senders_keep_nobody_out_and_are_refused(door: Door) -> None:
    headers = [request()[:80]] * SLOW
    bodies = [request("Content-Length: 4096")] * (SLOW // 2) + [request("Transfer-Encoding: chunked")] * (SLOW // 2)
    began = time.monotonic()
    clients = [door.connect() for _ in [*headers, *bodies]]
    try:
        for client, start in zip(clients, [*headers, *bodies], strict=True):
            client.sendall(start)
        assert all(eventually(lambda each=client: is_read(each)) for client in clients)
        assert door.healthz(READ_SECONDS).status_code == 200
        assert door.post(PING).status == 200
        if time.monotonic() - began < READ_SECONDS:  # else this machine was too busy to show it
            assert select.select(clients, [], [], 0)[0] == []  # and all of them were at it
        answered: dict[socket.socket, bytes] = {}
        while len(answered) < len(clients):
            assert time.monotonic() - began < PATIENCE
            for client in set(clients) - answered.keys():
                if select.select([client], [], [], 0)[0]:
                    answered[client] = everything(client)
                else:
                    client.sendall(b"1")
            threading.Event().wait(0.3)
    finally:
        for client in clients:
            client.close()
    assert {answer[:21] for answer in answered.values()} == {b"HTTP/1.1 408 Request T"[:21]}


@attack("more connections than a worker may have, each with half a request", "the oldest get 503, others are answered")
def test_half_requests_make_room_for_whole_ones(door: Door) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(door.connect()) for _ in range(CONNECTIONS + 50)]
        for client in clients:
            client.sendall(request()[:80])
        assert door.healthz().status_code == 200
        assert b" 503 " in everything(clients[0])


@attack("half requests that would fill the memory", "the largest get 503 when all of them together are 32 MB")
def test_half_requests_do_not_fill_the_memory(door: Door) -> None:
    half = request(f"Content-Length: {MAX_BODY_BYTES}", body=b" " * (MAX_BODY_BYTES - 1))
    with ExitStack() as stack:
        clients = [stack.enter_context(door.connect()) for _ in range(MAX_BUFFERED_BYTES // MAX_BODY_BYTES + 5)]
        for client in clients:
            client.sendall(half)
        assert eventually(lambda: select.select(clients, [], [], 0)[0], READ_SECONDS)
        [refused, *_] = select.select(clients, [], [], 0)[0]
        assert b" 503 " in everything(refused)
        assert door.post(PING).status == 200


@attack("64 connections that ask again and again and read no answer", "closed; others are answered meanwhile")
def test_clients_that_read_nothing_keep_nobody_out(door: Door) -> None:
    listing = rpc("tools/list").encode()
    asked = request(f"Content-Length: {len(listing)}", body=listing) * 60
    clients = [door.connect(narrow=True) for _ in range(SLOW)]
    try:
        for client in clients:
            client.sendall(asked)
        for _ in range(20):
            assert door.healthz(WRITE_SECONDS - 1).status_code == 200  # a thread that waits for one does so for longer
    finally:
        for client in clients:
            client.close()


@attack("64 connections that stay open after their last answer", "closed 2 s later; others are answered meanwhile")
def test_clients_that_do_not_close_keep_nobody_out(door: Door) -> None:
    clients = [door.connect() for _ in range(SLOW)]
    try:
        for client in clients:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        for client in clients:
            assert b" 200 OK" in client.recv(64)
        began = time.monotonic()
        assert door.healthz().status_code == 200
        assert time.monotonic() - began < SLOW  # one after the other would take twice as many seconds
    finally:
        for client in clients:
            client.close()


# Size --------------------------------------------------------------------------------------------------------------

FIVE_MB = 5 * 1024 * 1024


@attack("a body of 5 MB, announced or in chunks", "413 without reading it")
@pytest.mark.parametrize("header", [f"Content-Length: {FIVE_MB}", "Transfer-Encoding: chunked"])
def test_a_large_body_is_refused(door: Door, header: str) -> None:
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    body = b" " * FIVE_MB if "Length" in header else chunk * (FIVE_MB // 0x10000) + b"0\r\n\r\n"
    assert door.statuses(request(header, body=body)) == [413]


@attack("a length of a million digits, a head of a megabyte, 10,000 headers", "413 or 431")
@pytest.mark.parametrize(
    ("head", "status"),
    [
        (request("Content-Length: " + "9" * 10_000), 413),
        (request("X-Long: " + "x" * 1_000_000), 431),
        (request(*["X-Many: 1"] * 10_000), 431),
        (b"GET /" + b"x" * 1_000_000, 431),
        (request(*["X-Many: 1"] * 101), 431),
    ],
)
def test_a_large_head_is_refused(door: Door, head: bytes, status: int) -> None:
    assert door.statuses(head) == [status]


# Answers -----------------------------------------------------------------------------------------------------------


def test_every_answer_has_the_security_headers(door: Door) -> None:
    wanted = {
        b"content-security-policy: default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
        b"x-content-type-options: nosniff",
        b"x-frame-options: deny",
        b"referrer-policy: no-referrer",
        b"cache-control: no-store",
    }
    ping = request(LENGTH, "Connection: close", body=PING)
    asked = {
        200: ping,
        400: ping.replace(b"Host:", b"Host :"),
        401: ping.replace(b"Authorization", b"X-Nothing"),
        403: ping.replace(b"\r\nAccept", b"\r\nOrigin: null\r\nAccept"),
        404: ping.replace(b"POST /mcp", b"POST /other"),
        405: ping.replace(b"POST /mcp", b"GET /mcp"),
        413: ping.replace(LENGTH.encode(), b"Content-Length: 1000000"),
        421: ping.replace(b"Host: localhost", b"Host: evil.example"),
    }
    for status, each in asked.items():
        with door.connect() as client:
            client.sendall(each)
            head = everything(client).partition(b"\r\n\r\n")[0].lower()
        assert f" {status} ".encode() in head
        assert wanted <= set(head.split(b"\r\n")), status
        assert not any(line.startswith(b"server:") and b"/" in line for line in head.split(b"\r\n"))
