"""Connections to hosts that others have named: resolved here, and made to the addresses that were looked at.

What the name stands for a moment later does not matter then.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence

Address = tuple[str, int]
Resolve = Callable[[str, int], Sequence[Address]]


def resolve(host: str, port: int) -> list[Address]:
    """What the system's resolver says: IP addresses, each with a port. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys((str(address[0]), int(address[1])) for *_, address in found))


def connect(addresses: Sequence[Address], seconds: float) -> socket.socket:
    """A connection to the first that answers, each in so many seconds. Raises OSError."""
    trouble = OSError("it has no address")
    for address in addresses:
        try:
            return socket.create_connection(address, seconds)
        except OSError as error:
            trouble = error
    raise trouble
