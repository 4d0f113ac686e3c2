"""The way out: CONNECT tunnels for agents, only to hosts that their subagent's version lists, and never inside.

A name is resolved here and its address checked, and it is that address that is connected to: what the name stands for a
moment later does not matter.
"""

from __future__ import annotations

import ipaddress
import re
import select
import socket
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from pokestrator.addresses import is_public, matches
from pokestrator.claude.admission import Admission
from pokestrator.claude.relay_http import Conversation, Refused
from pokestrator.dialing import Address, Resolve, connect, resolve
from pokestrator.subagents import ANY_HOST

HTTPS = 443
CONNECT_SECONDS = 10.0
IDLE_SECONDS = 120.0  # without a byte either way, after which a tunnel ends
PIECE = 65_536

_TARGET = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253}):(?P<port>[0-9]{1,5})")


@dataclass(frozen=True)
class Egress:
    """Which hosts agents reach: those `listed` in their version, `any` public one, or `none`."""

    mode: Literal["listed", "any", "none"] = "listed"
    resolve: Resolve = resolve
    is_public: Callable[[str], bool] = is_public

    def admit(self, target: str, hosts: Sequence[str]) -> tuple[str, list[Address]]:
        """A target as CONNECT names it, tidied, and the addresses it may be reached at. Raises Refused."""
        found = _TARGET.fullmatch(target)
        if found is None:
            raise _refused("that is no host and port")
        host, port = found["host"].strip("[]").lower().rstrip("."), int(found["port"])
        if port != HTTPS:
            raise _refused(f"{host}:{port}: only port {HTTPS} is open to agents")
        self._check_host(host, hosts)
        try:
            addresses = list(self.resolve(host, port))
        except (OSError, UnicodeError) as error:
            raise Refused(502, "api_error", f"{host}: no such host ({error})") from error
        if not addresses:
            raise Refused(502, "api_error", f"{host}: no such host")
        if inside := [address for address, _ in addresses if not self.is_public(address)]:
            raise _refused(f"{host}: its address {inside[0]} is not a public one")
        return f"{host}:{port}", addresses

    def _check_host(self, host: str, hosts: Sequence[str]) -> None:
        if self.mode == "none":
            raise _refused(f"{host}: agents of this service reach no host (POKESTRATOR_EGRESS=none)")
        if self.mode == "any":
            return
        # Only `any` leads to an address without a name: names are what a version's author can judge.
        if _is_address(host):
            raise _refused(f"{host}: name the host; addresses are not open to agents")
        if ANY_HOST not in hosts and not matches(host, hosts):
            raise _refused(f"{host}: not in this subagent's hosts; its owner can list it there")


def tunnel(conversation: Conversation, target: str, admission: Admission, egress: Egress) -> None:
    """Carry bytes between an agent and a host until one of them, or the run, ends.

    Raises Refused, OSError, Finished.
    """
    try:
        name, addresses = egress.admit(target, admission.hosts)
    except Refused as refusal:
        admission.tell("refused", refusal.sentence)
        raise
    try:
        server = connect(addresses, CONNECT_SECONDS)
    except OSError as error:
        admission.tell("connection", f"{name}: {error.strerror or error}")
        raise Refused(502, "api_error", f"{name}: {error.strerror or error}") from error
    with server:
        admission.cuts(server)
        conversation.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        out = _Way(conversation.connection, server, conversation.early_bytes())
        back = _Way(server, conversation.connection)
        try:
            _carry(out, back)
        finally:
            admission.tell("connection", f"{name}, {_size(out.carried)} out, {_size(back.carried)} in")


@dataclass
class _Way:
    """One direction of a tunnel. Nothing more is read before what was read has been passed on."""

    source: socket.socket
    target: socket.socket
    waiting: bytes = b""
    has_ended: bool = False
    carried: int = field(default=0)

    def wants(self) -> tuple[socket.socket, int] | None:
        if self.waiting:
            return self.target, select.POLLOUT
        return None if self.has_ended else (self.source, select.POLLIN)

    def move(self) -> None:
        """As much as can be moved without waiting. Raises OSError."""
        with suppress(BlockingIOError, InterruptedError):
            if not self.waiting and not self.has_ended:
                self.waiting = self.source.recv(PIECE)
                if not self.waiting:
                    self.has_ended = True
                    self.target.shutdown(socket.SHUT_WR)
            if self.waiting:
                sent = self.target.send(self.waiting)
                self.waiting = self.waiting[sent:]
                self.carried += sent


def _carry(*ways: _Way) -> None:
    for way in ways:
        way.source.setblocking(False)
    while wanted := [want for way in ways if (want := way.wants())]:
        poller, masks = select.poll(), defaultdict[int, int](int)
        for connection, mask in wanted:
            masks[connection.fileno()] |= mask
        for handle, mask in masks.items():
            poller.register(handle, mask)
        if not poller.poll(IDLE_SECONDS * 1000):
            return
        for way in ways:
            try:
                way.move()
            except OSError:  # one side is gone, or the run has ended
                return


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _refused(sentence: str) -> Refused:
    return Refused(403, "permission_error", sentence)


def _size(number: int) -> str:
    """
    >>> _size(999), _size(5_321), _size(7_400_000)
    ('999 B', '5.3 KB', '7.4 MB')
    """
    if number < 1_000:
        return f"{number} B"
    return f"{number / 1_000:.1f} KB" if number < 1_000_000 else f"{number / 1_000_000:.1f} MB"
