"""A PostgreSQL address as libpq reads it, checked before libpq does: its own messages quote parts of the password."""

from __future__ import annotations

import re

# A name, an address in brackets or nothing, and a port.
HOST = re.compile(r"(?:\[[^][]*\]|[^][:]*)(?::([0-9]{0,6}))?")


def check_postgres_url(url: object) -> object:
    """Return `url`. Raises ValueError for text that libpq would refuse or misread: what is allowed, and nothing of it.

    The user and password end at the first @; the hosts, divided by commas and each with a port of its own, end at the
    first / or ?. All of that may be empty, when the query names a folder of Unix sockets.
    """
    if not isinstance(url, str):
        return url
    if not url.startswith(("postgres://", "postgresql://")):
        raise ValueError("an address that starts with postgres:// or postgresql://")
    if re.search(r"%(?!(?!00)[0-9a-fA-F]{2})", url):
        raise ValueError(
            "an address in which each % is followed by two hexadecimal digits other than 00 "
            "(percent-encode a % of the user or password as %25)"
        )
    authority = url.partition("://")[2].partition("/")[0]
    before, at, after = authority.partition("@")
    hosts = (after if at else before).partition("?")[0]
    if "@" in hosts:
        raise ValueError("an address with one @ before the host (percent-encode an @ of the user or password as %40)")
    found = [HOST.fullmatch(host) for host in hosts.split(",")]
    if not all(match and (not match[1] or 1 <= int(match[1]) <= 65_535) for match in found):
        raise ValueError(
            "an address whose port is a number from 1 to 65535, with an IPv6 address in brackets "
            "(percent-encode a / of the user or password as %2F)"
        )
    return url
