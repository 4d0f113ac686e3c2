"""A TCP proxy on loopback that can be broken in many ways while it runs.

`pass` carries; `delay` holds every piece of data back; `drop` swallows both directions, `half_open` only what the
server says, and nothing is closed; `cut` resets a connection after so many bytes of one direction; `refuse` accepts no
connection. A connection that lost bytes can never go on, so a new mode resets it, as a firewall does that has lost its
state.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

LOOK_SECONDS = 0.2  # how often a silent connection looks whether the mode has changed
STUCK_SECONDS = 15.0  # a peer that takes nothing for so long is given up
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends RST

Address = str | tuple[str, int]  # the path of a Unix socket, or host and port


@dataclass(frozen=True)
class Mode:
    kind: Literal["pass", "delay", "drop", "half_open", "cut", "refuse"] = "pass"
    seconds: float = 0.0  # of a delay
    after: int = 0  # bytes until a cut
    direction: Literal["request", "answer"] = "answer"  # that is counted for a cut


PASS = Mode()


class Proxy:
    """Listens on a port of its own (`port`, from the start to `close`) and carries to `target`."""

    def __init__(self, target: Address) -> None:
        self.target = target
        self._mode = PASS
        self._lock = threading.Lock()
        self._links: set[_Link] = set()
        self._listener = _bound(0)
        self.port: int = self._listener.getsockname()[1]
        self._accepting: threading.Thread | None = None
        self._closed = False

    @property
    def mode(self) -> Mode:
        return self._mode

    def __enter__(self) -> Proxy:
        self._listen()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._closed = True
        self._refuse()
        self._listener.close()
        self.reset()

    @contextmanager
    def broken(self, mode: Mode) -> Iterator[None]:
        """`mode` for a while."""
        self.switch(mode)
        try:
            yield
        finally:
            self.switch(PASS)

    def switch(self, mode: Mode) -> None:
        """From now on `mode`, for the connections that are open too."""
        before, self._mode = self._mode, mode
        for link in self._open_links():
            link.restart()
        if mode.kind == "refuse":
            self._refuse()
            self.reset()
        elif before.kind == "refuse":
            self._listen()

    def reset(self) -> int:
        """RST to both ends of every open connection; returns how many there were."""
        links = self._open_links()
        for link in links:
            link.reset()
        return len(links)

    def _open_links(self) -> list[_Link]:
        with self._lock:
            return list(self._links)

    def _listen(self) -> None:
        self._listener.listen(128)
        self._accepting = threading.Thread(target=self._accept, args=(self._listener,), name="proxy", daemon=True)
        self._accepting.start()

    def _refuse(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # ends accept()
        self._listener.close()
        if self._accepting is not None:
            self._accepting.join()
        self._listener = _bound(self.port)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(client,), name="proxy", daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        try:
            server = _connected(self.target)
        except OSError:  # as a port behind which nothing listens
            _close(client, reset=True)
            return
        link = _Link(client, server)
        with self._lock:
            self._links.add(link)
        try:
            link.carry(self)
        finally:
            with self._lock:
                self._links.discard(link)


class _Link:
    """One connection and its counterpart."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self._client, self._server = client, server
        self._ending = threading.Event()  # to be reset
        self._lossy = False
        self._carried = {"request": 0, "answer": 0}
        for each in (client, server):
            each.settimeout(STUCK_SECONDS)

    def restart(self) -> None:
        """The mode has changed: count anew, and end if bytes are missing."""
        self._carried = {"request": 0, "answer": 0}
        if self._lossy:
            self.reset()

    def reset(self) -> None:
        self._ending.set()
        for each in (self._client, self._server):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RD)  # sends nothing, wakes our thread

    def carry(self, proxy: Proxy) -> None:
        """Until one side ends, or it is to be reset."""
        orderly = False
        with suppress(OSError):
            orderly = self._pump(proxy)
        reset = self._ending.is_set() or not orderly
        _close(self._client, reset=reset)
        _close(self._server, reset=reset)

    def _pump(self, proxy: Proxy) -> bool:
        """Whether it ended in order."""
        while not self._ending.is_set():
            for source in select.select([self._client, self._server], [], [], LOOK_SECONDS)[0]:
                data = source.recv(65_536)
                if self._ending.is_set():
                    return False
                if not data:
                    return not self._lossy
                if not self._forward(source, data, proxy):
                    return False
        return False

    def _forward(self, source: socket.socket, data: bytes, proxy: Proxy) -> bool:
        """Carry a piece as the mode says; False when the connection is to be cut."""
        mode = proxy.mode
        request = source is self._client
        sink = self._server if request else self._client
        if mode.kind == "delay" and self._ending.wait(mode.seconds):
            return False
        if mode.kind == "drop" or (mode.kind == "half_open" and not request):
            self._lossy = True
            return True
        direction = "request" if request else "answer"
        if mode.kind == "cut" and direction == mode.direction:
            room = max(mode.after - self._carried[direction], 0)
            self._carried[direction] += len(data)
            if len(data) > room:
                sink.sendall(data[:room])
                return False
        sink.sendall(data)
        return True


def _bound(port: int) -> socket.socket:
    # Bound, but not listening: the kernel refuses connections, and nobody else gets the port.
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(("127.0.0.1", port))
    return bound


def _connected(target: Address) -> socket.socket:
    connecting = socket.socket(socket.AF_UNIX if isinstance(target, str) else socket.AF_INET)
    try:
        connecting.settimeout(STUCK_SECONDS)
        connecting.connect(target)
    except OSError:
        connecting.close()
        raise
    return connecting


def _close(end: socket.socket, *, reset: bool) -> None:
    with suppress(OSError):
        if reset and end.family == socket.AF_INET:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    end.close()
