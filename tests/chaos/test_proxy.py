"""The proxy of the harness breaks connections in the way each of its modes says, and heals."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.chaos.proxy import PASS, Mode, Proxy

PATIENCE = 5.0


@contextmanager
def echo() -> Iterator[tuple[str, int]]:
    """A server that sends back what it gets."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(1_000):
                    connection.sendall(data)
            except OSError:
                return

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[:2]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(PATIENCE)


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with echo() as address, Proxy(address) as opened:
        yield opened


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), PATIENCE)


def says(connection: socket.socket, data: bytes) -> bytes:
    connection.sendall(data)
    return connection.recv(1_000)


def test_it_carries_both_ways(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        assert says(connection, b"one") == b"one"
        assert says(connection, b"two") == b"two"


def test_refused_connections_are_refused_and_open_ones_reset_until_it_passes_again(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        assert says(connection, b"one") == b"one"
        with proxy.broken(Mode("refuse")):
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
            with pytest.raises(ConnectionRefusedError):
                connect(proxy)
    with connect(proxy) as connection:
        assert says(connection, b"two") == b"two"


@pytest.mark.parametrize("kind", ["drop", "half_open"])
def test_a_silent_line_answers_nothing_closes_nothing_and_is_reset_when_it_heals(proxy: Proxy, kind: str) -> None:
    with connect(proxy) as connection:
        assert says(connection, b"one") == b"one"
        proxy.switch(Mode(kind))  # type: ignore[arg-type]
        connection.sendall(b"two")
        connection.settimeout(0.5)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(PATIENCE)
        proxy.switch(PASS)
        with pytest.raises(ConnectionResetError):
            connection.recv(1)


def test_a_line_that_was_silent_for_nobody_goes_on(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        assert says(connection, b"one") == b"one"
        with proxy.broken(Mode("drop")):
            pass
        assert says(connection, b"two") == b"two"


def test_a_cut_answer_ends_after_its_bytes_with_a_reset(proxy: Proxy) -> None:
    with connect(proxy) as connection, proxy.broken(Mode("cut", after=4, direction="answer")):
        assert says(connection, b"abc") == b"abc"
        assert says(connection, b"defg") == b"d"
        with pytest.raises(ConnectionResetError):
            connection.recv(1)


def test_a_cut_request_never_arrives_whole(proxy: Proxy) -> None:
    with connect(proxy) as connection, proxy.broken(Mode("cut", after=2, direction="request")):
        connection.sendall(b"abc")
        with pytest.raises(ConnectionResetError):
            while connection.recv(1):
                pass


def test_a_slow_line_delivers_late(proxy: Proxy) -> None:
    with connect(proxy) as connection, proxy.broken(Mode("delay", seconds=0.3)):
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            says(connection, b"one")
        connection.settimeout(PATIENCE)
        assert connection.recv(10) == b"one"


def test_reset_ends_what_is_open_and_nothing_else(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        assert says(connection, b"one") == b"one"
        assert proxy.reset() == 1
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    with connect(proxy) as connection:
        assert says(connection, b"two") == b"two"
