"""What Poke's HTTP API looks like. Its facts come from the `poke` package and poke.com's developer pages:

    callback      POST {X-Poke-Callback-Url}, Bearer {token}, {"content": …, "hasMore": false}
    api_message   POST https://poke.com/api/v1/inbound/api-message, Bearer {key}, {"message": …, …}

Refusals carry `error` or `message`; 429 carries `retryAfterMs` (callback) or `Retry-After`.
"""

from __future__ import annotations

import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from pokestrator.addresses import is_loopback, is_public, may_be_called_back
from pokestrator.dialing import Resolve, connect, resolve
from pokestrator.jobs import CallbackTarget, Channel
from pokestrator.poke.post import CONNECT_SECONDS, NOT_SENT, Inside, Post, Receipt, host_name, refused, send
from pokestrator.telemetry import get_logger, one_line

log = get_logger(__name__)

POST_SECONDS = 45.0  # in all, where cut_overdue() is called: a receiver that drips is never late with a byte


@dataclass(frozen=True)
class Message:
    """One text for the person who sent the task."""

    request_id: uuid.UUID
    task: str
    content: str
    channel: Channel
    target: CallbackTarget | None  # for Channel.CALLBACK
    idempotency_key: str  # the same for every try of one callback


class Poke:
    """Sends messages to Poke, from any number of threads. Without a key the message API is not among its channels."""

    def __init__(
        self,
        message_url: str,
        api_key: str | None,
        *,
        dry_run: bool,
        callback_hosts: Collection[str] = (),
        resolve: Resolve = resolve,
        is_public: Callable[[str], bool] = is_public,
    ) -> None:
        """`callback_hosts`: see addresses.may_be_called_back. `is_public`: of an address that is not loopback."""
        self._message_url = message_url
        self._api_key = api_key
        self._dry_run = dry_run
        self._callback_hosts = callback_hosts
        self._resolve = resolve
        self._is_public = is_public
        self._lock = threading.Lock()
        self._posts: set[Post] = set()
        self._is_closed = False

    @property
    def channels(self) -> tuple[Channel, ...]:
        """The channels that can be used now."""
        if self._api_key or self._dry_run:
            return (Channel.CALLBACK, Channel.API_MESSAGE)
        return (Channel.CALLBACK,)

    def send(self, message: Message) -> Receipt:
        """POST one message; never raises for what the network or Poke does."""
        if self._dry_run:
            log.info("callback_dry_run", request_id=str(message.request_id), content=one_line(message.content))
            return Receipt(delivered=True)
        if message.channel is Channel.CALLBACK and message.target is not None:
            if not may_be_called_back(message.target.url, self._callback_hosts):
                return refused(f"{host_name(message.target.url)} is not among POKESTRATOR_CALLBACK_HOSTS")
            body: dict[str, Any] = {"content": message.content, "hasMore": False}
            return self._post(message.target.url, message.target.token, body, message.idempotency_key)
        body = {"message": message.content, "request_id": str(message.request_id), "task": one_line(message.task)}
        return self._post(self._message_url, self._api_key or "", body, message.idempotency_key)

    def cut_overdue(self) -> None:
        """Break off the POSTs that have taken longer than POST_SECONDS: they fail at once."""
        with self._lock:
            overdue = [post for post in self._posts if time.monotonic() - post.began > POST_SECONDS]
        for post in overdue:
            post.cut()

    def close(self) -> None:
        """Break off all POSTs; later ones fail without having been sent."""
        with self._lock:
            self._is_closed = True
            posts = list(self._posts)
        for post in posts:
            post.cut()

    def _dial(self, host: str, port: int) -> socket.socket:
        """A connection to a host, at an address that belongs there. Raises OSError, Inside."""
        permits = is_loopback if is_loopback(host) else self._is_public  # a loopback host is one that the owner named
        addresses = self._resolve(host, port)
        if bad := [address for address, _ in addresses if not permits(address)]:
            raise Inside(f"{host} is at {bad[0]}, which is not a public address")
        return connect(addresses, CONNECT_SECONDS)

    def _post(self, url: str, token: str, body: dict[str, Any], idempotency_key: str) -> Receipt:
        post = Post(self._dial)
        with self._lock:
            if self._is_closed:
                return NOT_SENT
            self._posts.add(post)
        try:
            receipt = send(post, url, token, body, idempotency_key)
        finally:
            with self._lock:
                self._posts.discard(post)
            post.forget()
        if post.is_cut_unconnected and self._is_closed:
            return NOT_SENT
        if post.is_cut and receipt.status is None:
            seconds = round(time.monotonic() - post.began)
            return Receipt(False, None, f"broken off after {seconds} s at {host_name(url)}")
        return receipt
