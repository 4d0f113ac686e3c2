"""The real service behind its real door, and clients that write what they like to it."""

from __future__ import annotations

import re
import socket
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from pokestrator.demo.inbox import Inbox
from pokestrator.demo.local import LocalService
from pokestrator.demo.messages_api import MessagesApi
from pokestrator.store.embedded import EmbeddedPostgres
from tests.acceptance.pair import environment
from tests.acceptance.processes import eventually
from tests.conftest import database_named
from tests.integration.flow import rows
from tests.integration.mcp_peer import LEGACY, Answer, HeaderList, ask, call, version_header

KEY = "door-schlüssel-5f0c"
PATIENCE = 60.0  # of a client in these tests, in seconds: longer than anything the service waits for


@dataclass(frozen=True)
class Door:
    service: LocalService
    database_url: str
    inbox: Inbox
    api: MessagesApi

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.service.url)
        assert parts.hostname is not None and parts.port is not None
        return parts.hostname, parts.port

    def connect(self, source: str = "127.0.0.1", *, narrow: bool = False) -> socket.socket:
        """A connection; a narrow one takes little, and has the other end buffer little, before somebody reads."""
        client = socket.socket()
        if narrow:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2_048)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        client.bind((source, 0))
        client.settimeout(PATIENCE)
        client.connect(self.address)
        return client

    def statuses(self, request: bytes) -> list[int]:
        """Send these bytes; the status of each answer until the service closes the connection."""
        with self.connect() as client:
            client.sendall(request)
            return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", everything(client))]

    def post(self, body: str | bytes, *headers: tuple[str, str | bytes], authorized: bool = True) -> Answer:
        """One message to the endpoint, with the key and the usual headers."""
        own: HeaderList = (*version_header(), *headers, *((key_header(),) if authorized else ()))
        return ask(self.service.url, body, own)

    def orchestrate(self, task: str, metadata: object = "", **headers: str) -> Any:
        """The result of one call."""
        named = [(name.replace("_", "-"), value) for name, value in headers.items()]
        answer = self.post(call({"task_description": task, "metadata": metadata}), *named)
        assert answer.status == 200, answer.body
        return answer.json["result"]

    def healthz(self, seconds: float = PATIENCE) -> requests.Response:
        """Asked on a connection of its own."""
        return requests.get(self.service.url.replace("/mcp", "/healthz"), timeout=seconds)

    def tasks(self) -> int:
        [row] = rows(self.database_url, "SELECT count(*) AS tasks FROM jobs")
        return int(row["tasks"])


@contextmanager
def open_door(postgres: EmbeddedPostgres, template: str, **settings: str) -> Iterator[Door]:
    """The service on a fresh clone of the database `template`."""
    name = f"door_{uuid.uuid4().hex}"
    rows(postgres.url, f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")
    with ExitStack() as stack:
        stack.callback(rows, postgres.url, f"DROP DATABASE {name} WITH (FORCE)")
        data = stack.enter_context(tempfile.TemporaryDirectory(prefix="pokestrator-door-"))
        inbox, api = stack.enter_context(Inbox()), stack.enter_context(MessagesApi())
        url = database_named(postgres, name)
        values: Mapping[str, str] = {"DATABASE_URL": url, "POKESTRATOR_API_KEY": KEY, "POKESTRATOR_DRAIN_SECONDS": "0"}
        service = stack.enter_context(LocalService(environment(inbox, api, Path(data), **{**values, **settings})))
        door = Door(service, url, inbox, api)
        assert eventually(lambda: door.healthz().json()["status"] == "ok", PATIENCE), service.log
        yield door


def key_header(key: str = KEY) -> tuple[str, bytes]:
    return "Authorization", f"Bearer {key}".encode()


def request(*headers: str | bytes, body: bytes = b"", start: str = "POST /mcp HTTP/1.1") -> bytes:
    """A request as bytes, with the key and exactly these headers beside the usual ones."""
    name, value = key_header()
    usual = [
        start.encode(),
        b"Host: localhost",
        f"{name}: ".encode() + value,
        b"Content-Type: application/json",
        b"Accept: application/json, text/event-stream",
        f"MCP-Protocol-Version: {LEGACY}".encode(),
    ]
    own = [header.encode() if isinstance(header, str) else header for header in headers]
    return b"\r\n".join([*usual, *own, b"", b""]) + body


def everything(client: socket.socket) -> bytes:
    """What comes until the other end closes the connection."""
    received = b""
    try:
        while piece := client.recv(64 * 1024):
            received += piece
    except ConnectionResetError:  # closed, with something of ours unread
        pass
    return received
