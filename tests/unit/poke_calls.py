"""What the tests of Poke's HTTP API share: calls of it, and servers that play it badly."""

from __future__ import annotations

import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from pokestrator.demo.inbox import Inbox
from pokestrator.jobs import CallbackTarget, Channel
from pokestrator.poke.api import Message, Poke
from pokestrator.poke.post import Receipt

HERE = ("127.0.0.1",)  # whose callbacks are allowed
KEY = "poke-api-key-of-the-owner"
TOKEN = "token-of-the-callback"
REQUEST_ID = uuid.uuid4()
CONTENT = "Zählung: 🐑 3\n“done”"


def by_message_api(inbox: Inbox, content: str = CONTENT) -> Receipt:
    return Poke(inbox.message_url, KEY, dry_run=False, callback_hosts=HERE).send(message(content=content))


def by_callback(url: str, token: str = TOKEN) -> Receipt:
    return Poke("https://poke.invalid/", KEY, dry_run=False, callback_hosts=HERE).send(
        message(CallbackTarget(url, token))
    )


def message(target: CallbackTarget | None = None, task: str = "count\n my sheep", content: str = CONTENT) -> Message:
    channel = Channel.CALLBACK if target else Channel.API_MESSAGE
    return Message(REQUEST_ID, task, content, channel, target, "key-of-this-callback")


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that reads one request and then does as `answer` says with the connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError), listener.accept()[0] as connection:
                received = b""
                while b'"message"' not in received:  # the body has come
                    received += connection.recv(65_536)
                answer(connection)

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.join(timeout=10)
    assert not server.is_alive(), "the sender has hung up"


def send_to(url: str) -> Receipt:
    return Poke(url, KEY, dry_run=False, callback_hosts=HERE).send(message())


def head(status: int, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status} X", *headers, "\r\n"]).encode()
