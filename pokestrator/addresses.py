"""Which addresses stay on this machine, which are anybody's, and which hosts and URLs may be given secrets."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from urllib.parse import urlsplit

# `is_global` of Python 3.11 calls all of these global, and newer ones some: the IETF's own, the relays of 6to4, and
# the address at which Azure's machines find their keeper.
_NOT_FOR_US_4 = [IPv4Network(each) for each in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32")]

# Of IPv6, only 2000::/3 is handed out. Left out of it: the IETF's own (Teredo, ORCHID, …) and what is for documents.
_HANDED_OUT = IPv6Network("2000::/3")
_NOT_FOR_US_6 = [IPv6Network(each) for each in ("2001::/23", "2001:db8::/32", "3fff::/20")]

# What carries an IPv4 address, and the bits that follow it: there one ends where that address leads.
_MAPPED, _NAT64, _SIX_TO_FOUR = IPv6Network("::ffff:0:0/96"), IPv6Network("64:ff9b::/96"), IPv6Network("2002::/16")
_CARRIERS = ((_MAPPED, 0), (_NAT64, 0), (_SIX_TO_FOUR, 80))
_ISATAP = (0x0000_5EFE, 0x0200_5EFE)  # bits 64 to 95 of an address, in any network; an IPv4 address follows

# Whatever a host is made of beyond these, another reader of the same URL may take for the host's end: for urllib3,
# `https://evil.example\\.poke.com` leads to evil.example.
_PLAIN = re.compile(r"[!-~]+")
_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?")


def is_loopback(host: str) -> bool:
    """Whether `host` (a name or an address, IPv6 with or without brackets) stays on this machine."""
    if host == "localhost":
        return True
    address = _address(host)
    return address is not None and address.is_loopback


def is_address(host: str) -> bool:
    """Whether `host` is an IP address, IPv6 with or without brackets, and no name."""
    return _address(host) is not None


def is_public(address: str) -> bool:
    """Whether an IP address, as a connection has it, belongs to a machine of the public internet.

    Not public: private, loopback, link-local (cloud metadata too), shared (CGNAT), multicast, reserved, unspecified;
    IPv6 forms that carry such an IPv4 address; an address with a zone; and whatever is no IP address.
    """
    parsed = _address(address)
    if isinstance(parsed, IPv4Address):
        return _is_public_4(parsed)
    return parsed is not None and parsed.scope_id is None and _is_public_6(parsed)


def matches(host: str, patterns: Collection[str]) -> bool:
    """Whether a host, given without a port, is one of `patterns`.

    `*.example.com` stands for every name below example.com, not for itself, and for no IP address.

    >>> [matches(host, ["poke.com", "*.poke.com"]) for host in ("POKE.com.", "a.b.poke.com", "evilpoke.com")]
    [True, True, False]
    >>> matches("[0:0::1]", ["[::1]"]), matches("127.0.0.1", ["*.0.0.1"])
    (True, False)
    """
    name = _normal(host)
    if not name:
        return False
    for pattern in patterns:
        if pattern.startswith("*."):
            below = _normal(pattern[1:])
            if name.endswith(below) and len(name) > len(below) and not is_address(name):
                return True
        elif name == _normal(pattern):
            return True
    return False


def is_safe_url(url: str) -> bool:
    """https anywhere, plain http on this machine only."""
    try:
        parts = urlsplit(url)
        host, _port = parts.hostname, parts.port
    except ValueError:  # brackets that do not close, a port beyond 65,535
        return False
    return bool(host) and (parts.scheme == "https" or (parts.scheme == "http" and is_loopback(host or "")))


def may_be_called_back(url: str, hosts: Collection[str]) -> bool:
    """Whether a request may name this address for its answer: https at a listed host.

    A loopback host only where it is listed itself; then plain http will do. No other address without a name.
    """
    if not _PLAIN.fullmatch(url):  # urlsplit drops tabs and line ends
        return False
    try:
        parts = urlsplit(url)
        host, _port = parts.hostname or "", parts.port
    except ValueError:  # brackets that do not close, a port beyond 65,535
        return False
    if "@" in parts.netloc or not (_NAME.fullmatch(host) or is_address(host)) or not matches(host, hosts):
        return False
    if is_loopback(host):
        return parts.scheme in ("http", "https")
    return parts.scheme == "https" and not is_address(host)


def _address(host: str) -> IPv4Address | IPv6Address | None:
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        return ipaddress.ip_address(bare)
    except ValueError:
        return None


def _is_public_4(address: IPv4Address) -> bool:
    if address.is_multicast or address.is_reserved or not address.is_global:
        return False
    return not any(address in network for network in _NOT_FOR_US_4)


def _is_public_6(address: IPv6Address) -> bool:
    bits = int(address)
    for network, bits_after in _CARRIERS:
        if address in network:
            return _is_public_4(_last_4_bytes(bits >> bits_after))
    if address not in _HANDED_OUT or any(address in network for network in _NOT_FOR_US_6):
        return False
    return (bits >> 32) & 0xFFFF_FFFF not in _ISATAP or _is_public_4(_last_4_bytes(bits))


def _last_4_bytes(bits: int) -> IPv4Address:
    return IPv4Address(bits & 0xFFFF_FFFF)


def _normal(host: str) -> str:
    """One spelling for each host: lower case, no final dot, addresses as Python writes them."""
    lower = host.lower()
    address = _address(lower)
    return str(address) if address is not None else lower.removesuffix(".")
