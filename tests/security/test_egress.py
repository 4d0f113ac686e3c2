"""The way out of an agent: to a host that its subagent lists, and nowhere else. The host is played on loopback."""

from __future__ import annotations

import base64
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pokestrator.addresses import is_public
from pokestrator.claude.egress import Egress
from pokestrator.claude.pool import Slots
from pokestrator.demo.messages_api import MessagesApi
from pokestrator.runs import RunEvent
from tests.integration.agent_runs import agent_environment, bash, scripted, wait_until
from tests.integration.relaying import Run, admitted, relaying
from tests.security.attacks import attack
from tests.security.tls_host import PAGE, TlsHost

LISTED = "tides.example"
HOSTS = (LISTED, "inside.example", "metadata.example")

CURL = f"curl -sS https://{LISTED}/curl"
PYTHON = f"""/usr/bin/python3 -c '
import urllib.request
print(urllib.request.urlopen("https://{LISTED}/python").read().decode())'"""
# Node's own fetch looks at HTTPS_PROXY from version 22.21 on; before, programs did this themselves.
NODE = f"""node -e '
const proxy = new URL(process.env.HTTPS_PROXY);
const auth = "Basic " + Buffer.from(proxy.username + ":" + proxy.password).toString("base64");
const by = {{host: proxy.hostname, port: proxy.port, method: "CONNECT", path: "{LISTED}:443"}};
require("http").request({{...by, headers: {{"proxy-authorization": auth}}}}).on("connect", (answer, socket) => {{
    const asked = {{host: "{LISTED}", path: "/node"}};
    const over = () => require("tls").connect({{socket, servername: "{LISTED}"}});
    require("https").get({{...asked, createConnection: over}}, (page) => page.pipe(process.stdout));
}}).end();'"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsHost]:
    with TlsHost(LISTED, tmp_path_factory.mktemp("tls")) as host:
        yield host


@pytest.fixture(scope="module")
def egress(host: TlsHost) -> Egress:
    """The host's address counts as a public one here; no other address on loopback does."""
    addresses = {
        LISTED: host.address,
        "inside.example": ("127.0.0.2", 443),
        "metadata.example": ("169.254.169.254", 443),
    }

    def resolve(name: str, _port: int) -> list[tuple[str, int]]:
        if name in addresses:
            return [addresses[name]]
        raise OSError("no such name")

    return Egress("listed", resolve, lambda address: address == "127.0.0.1" or is_public(address))


@pytest.fixture(scope="module")
def api() -> Iterator[MessagesApi]:
    with MessagesApi() as api:
        yield api


@pytest.fixture(scope="module")
def slots(api: MessagesApi, host: TlsHost, egress: Egress) -> Iterator[Slots]:
    trust = {"SSL_CERT_FILE": str(host.ca_file), "NODE_EXTRA_CA_CERTS": str(host.ca_file)}
    slots = Slots(1, agent_environment(api.url, **trust), egress)
    slots.start()
    try:
        yield slots
    finally:
        slots.close()


@pytest.fixture(scope="module")
def run(api: MessagesApi, egress: Egress) -> Iterator[Run]:
    """A run without an agent, for what is tried with raw sockets."""
    with relaying(api.url, egress) as relay, admitted(relay, hosts=HOSTS) as run:
        yield run


def of_agent(slots: Slots, api: MessagesApi, *steps: dict[str, Any], **changes: Any) -> tuple[str, list[RunEvent]]:
    """What an agent's last tool call printed, and what the timeline says of its connections."""
    events: list[RunEvent] = []
    changes = {"tools": ("Bash", "WebFetch"), "hosts": HOSTS, "timeout_seconds": 40.0, **changes}
    result = slots.run(scripted(*steps, {"text": "Done."}, **changes), events.append)
    assert result.text == "Done.", result
    blocks = [b for m in api.requests[-1].body["messages"] if isinstance(m["content"], list) for b in m["content"]]
    printed = [block["content"] for block in blocks if block["type"] == "tool_result"][-1]
    text = printed if isinstance(printed, str) else "".join(part["text"] for part in printed)
    return text, [event for event in events if event.kind in ("connection", "refused")]


def asked(run: Run, head: bytes) -> bytes:
    """The first answer to raw bytes."""
    with socket.create_connection(("127.0.0.1", run.port), 10) as connection:
        connection.sendall(head)
        return connection.recv(65_536)


def connect(target: str, token: str | None) -> bytes:
    head = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n"
    if token is not None:
        head += f"Proxy-Authorization: Basic {base64.b64encode(f'run:{token}'.encode()).decode()}\r\n"
    return f"{head}\r\n".encode()


# what gets out -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("program", "command"), [("curl", CURL), ("/usr/bin/python3", PYTHON), ("node", NODE)])
def test_programs_reach_a_listed_host_and_the_timeline_says_what_they_carried(
    slots: Slots, api: MessagesApi, host: TlsHost, program: str, command: str
) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"there is no {program}")
    printed, events = of_agent(slots, api, bash(command))
    assert PAGE in printed
    assert f"/{Path(program).name.rstrip('3')}" in host.asked
    assert [event.kind for event in events] == ["connection"]
    assert events[0].text.startswith(f"{LISTED}:443, ")
    assert events[0].text.endswith(" KB in")


def test_the_clis_own_web_fetch_reaches_a_listed_host(slots: Slots, api: MessagesApi, host: TlsHost) -> None:
    fetch = {"tool": "WebFetch", "input": {"url": f"https://{LISTED}/fetch", "prompt": "When is the tide out?"}}
    _, events = of_agent(slots, api, fetch)
    assert "/fetch" in host.asked
    assert {event.text.split(",")[0] for event in events} == {f"{LISTED}:443"}
    assert any("The tide is out at noon." in str(request.body) for request in api.requests)


# what does not -------------------------------------------------------------------------------------------------------


@attack("an agent's curl to a host that its subagent does not list", "403 at the proxy; told in the job's timeline")
def test_a_host_that_is_not_listed_is_refused(slots: Slots, api: MessagesApi) -> None:
    printed, events = of_agent(slots, api, bash("curl -sS https://other.example/ 2>&1"))
    assert "403" in printed
    assert events == [RunEvent("refused", "other.example: not in this subagent's hosts; its owner can list it there")]


@attack("an agent's WebFetch of a page on a host that is not listed", "403 at the proxy; told in the job's timeline")
def test_web_fetch_of_a_host_that_is_not_listed_is_refused(slots: Slots, api: MessagesApi, host: TlsHost) -> None:
    before = len(host.asked)
    fetch = {"tool": "WebFetch", "input": {"url": "https://other.example/", "prompt": "What does it say?"}}
    _, events = of_agent(slots, api, fetch)
    assert {event.kind for event in events} == {"refused"}
    assert len(host.asked) == before


@attack("a run whose subagent lists no host connects to one", "403 at the proxy")
def test_a_run_that_lists_nothing_reaches_nothing(slots: Slots, api: MessagesApi) -> None:
    printed, events = of_agent(slots, api, bash(f"{CURL} 2>&1"), hosts=())
    assert PAGE not in printed
    assert [event.kind for event in events] == ["refused"]


@attack("plain http through the proxy", "403: only https, by CONNECT")
def test_plain_http_is_refused(slots: Slots, api: MessagesApi) -> None:
    printed, _ = of_agent(slots, api, bash(f"curl -sS http://{LISTED}/ 2>&1"))
    assert "only https" in printed


@attack("without the proxy, straight to a host", "no name, or no connection")
def test_names_mean_nothing_without_the_proxy(slots: Slots, api: MessagesApi) -> None:
    printed, _ = of_agent(slots, api, bash(f"env -u HTTPS_PROXY -u https_proxy {CURL} 2>&1"))
    assert PAGE not in printed


INSIDE = [
    ("169.254.169.254:443", "name the host"),
    ("metadata.example:443", "not a public one"),
    ("inside.example:443", "not a public one"),
    ("127.0.0.1:443", "name the host"),
    ("[::1]:443", "name the host"),
    ("[::ffff:169.254.169.254]:443", "name the host"),
    (f"{LISTED}:22", "only port 443"),
    (f"{LISTED}:5432", "only port 443"),
    (f"{LISTED}.:443.evil.example", "no host and port"),
    (f"user@{LISTED}:443", "no host and port"),
]


@attack("CONNECT to 169.254.169.254, by its address or by a listed name that resolves to it", "403")
@attack("CONNECT to a listed name that resolves to loopback, to other ports, to odd targets", "403")
@pytest.mark.parametrize(("target", "why"), INSIDE)
def test_what_is_inside_is_refused(run: Run, target: str, why: str) -> None:
    answer = asked(run, connect(target, run.token))
    assert answer.startswith(b"HTTP/1.1 403 "), answer
    assert why in answer.decode()


@attack("with POKESTRATOR_EGRESS=any: private, loopback, mapped and shortened addresses", "403")
@pytest.mark.parametrize(
    "target",
    [
        *("127.0.0.1", "127.1", "0x7f.1", "2130706433", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1"),
        *("169.254.169.254", "100.64.0.1", "224.0.0.1", "localhost", "[::1]", "[::]", "[fe80::1]", "[fd00::1]"),
        *("[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]"),
    ],
)
def test_even_where_any_host_may_be_reached_those_inside_may_not(api: MessagesApi, target: str) -> None:
    with relaying(api.url, Egress("any")) as relay, admitted(relay) as run:
        answer = asked(run, connect(f"{target}:443", run.token))
        assert answer.split(b" ")[1] in (b"403", b"502"), answer  # 502: the resolver knows no such name
        assert b"not a public one" in answer or b"no such host" in answer


@attack("one of a name's addresses is inside, another is not", "403")
def test_a_name_with_one_address_inside_is_refused(api: MessagesApi, host: TlsHost) -> None:
    mixed = Egress("listed", lambda *_: [host.address, ("127.0.0.2", 443)], lambda address: address == "127.0.0.1")
    with relaying(api.url, mixed) as relay, admitted(relay, hosts=HOSTS) as run:
        assert asked(run, connect(f"{LISTED}:443", run.token)).startswith(b"HTTP/1.1 403 ")


def test_where_no_host_may_be_reached_none_is(api: MessagesApi, egress: Egress) -> None:
    none = Egress("none", egress.resolve, egress.is_public)
    with relaying(api.url, none) as relay, admitted(relay, hosts=("*", *HOSTS)) as run:
        assert asked(run, connect(f"{LISTED}:443", run.token)).startswith(b"HTTP/1.1 403 ")


def test_a_star_is_any_public_host(api: MessagesApi, egress: Egress) -> None:
    with relaying(api.url, egress) as relay, admitted(relay, hosts=("*",)) as run:
        assert asked(run, connect(f"{LISTED}:443", run.token)).startswith(b"HTTP/1.1 200 ")
        assert asked(run, connect("inside.example:443", run.token)).startswith(b"HTTP/1.1 403 ")


@attack("the proxy without a token, or with one of no run", "407")
@pytest.mark.parametrize("token", [None, "", "x" * 43, "prefix"])
def test_a_stranger_is_not_served_by_the_proxy(run: Run, token: str | None) -> None:
    token = run.token[:-1] if token == "prefix" else token
    assert asked(run, connect(f"{LISTED}:443", token)).startswith(b"HTTP/1.1 407 ")


@attack("the proxy with a finished run's token; a tunnel that was left open at the run's end", "407; cut")
def test_the_end_of_a_run_ends_its_tunnels_and_its_token(api: MessagesApi) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        own = Egress("listed", lambda *_: [server.getsockname()], lambda _: True)
        with relaying(api.url, own) as relay:
            with admitted(relay, hosts=HOSTS) as run:
                tunnel = socket.create_connection(("127.0.0.1", run.port), 10)
                tunnel.sendall(connect(f"{LISTED}:443", run.token))
                other_end, _ = server.accept()
                assert tunnel.recv(100).startswith(b"HTTP/1.1 200 ")
                tunnel.sendall(b"abc")
                assert other_end.recv(3) == b"abc"
                began = time.monotonic()
            assert time.monotonic() - began < 1
            assert run.events == [RunEvent("connection", f"{LISTED}:443, 3 B out, 0 B in")]
            with tunnel, other_end:
                assert (tunnel.recv(100), other_end.recv(100)) == (b"", b"")
            assert asked(run, connect(f"{LISTED}:443", run.token)).startswith(b"HTTP/1.1 407 ")


@attack("hundreds of connections that say nothing", "they make room for those that do")
def test_silent_connections_keep_nobody_out(api: MessagesApi, egress: Egress) -> None:
    with relaying(api.url, egress) as relay, admitted(relay, hosts=HOSTS) as run:
        silent = [socket.create_connection(("127.0.0.1", run.port), 10) for _ in range(200)]
        try:
            assert asked(run, connect(f"{LISTED}:443", run.token)).startswith(b"HTTP/1.1 200 ")
            silent[0].settimeout(5)  # half of what a silent connection is given where there is room
            assert silent[0].recv(1) == b""
        finally:
            for each in silent:
                each.close()


@attack("a run that opens tunnels without end", "no more than 32 at once")
def test_one_run_has_so_many_connections_and_no_more(api: MessagesApi, egress: Egress) -> None:
    with relaying(api.url, egress) as relay, admitted(relay, hosts=HOSTS) as run:
        tunnels = [socket.create_connection(("127.0.0.1", run.port), 10) for _ in range(33)]
        answers = []
        for tunnel in tunnels:
            tunnel.sendall(connect(f"{LISTED}:443", run.token))
            answers.append(tunnel.recv(12))
        for tunnel in tunnels:
            tunnel.close()
        assert answers == [b"HTTP/1.1 200"] * 32 + [b""]


def test_much_goes_both_ways_at_once_through_a_tunnel(api: MessagesApi) -> None:
    """An echo that reads and writes in turn would stand still, if the tunnel did one after the other."""
    many = b"x" * 3_000_000
    with socket.create_server(("127.0.0.1", 0)) as echo:
        own = Egress("listed", lambda *_: [echo.getsockname()], lambda _: True)
        with relaying(api.url, own) as relay, admitted(relay, hosts=HOSTS) as run:
            client = socket.create_connection(("127.0.0.1", run.port), 10)
            client.sendall(connect(f"{LISTED}:443", run.token))
            server, _ = echo.accept()
            assert client.recv(100).startswith(b"HTTP/1.1 200 ")
            _exchange(client, server, many)
            client.close()
            server.close()
            assert wait_until(lambda: run.events, 5)
        assert run.events == [RunEvent("connection", f"{LISTED}:443, 3.0 MB out, 3.0 MB in")]


def _exchange(client: socket.socket, server: socket.socket, data: bytes) -> None:
    """Both send all of `data` before they read anything, as far as the kernel's buffers and the tunnel let them."""
    left = {client: data, server: data}
    got = {client: 0, server: 0}
    for each in left:
        each.setblocking(False)
    deadline = time.monotonic() + 20
    while min(got.values()) < len(data) and time.monotonic() < deadline:
        for each in (client, server):
            with suppress(BlockingIOError):
                left[each] = left[each][each.send(left[each]) :] if left[each] else b""
            with suppress(BlockingIOError):
                got[each] += len(each.recv(1_000_000))
    assert got == {client: len(data), server: len(data)}
