"""Which addresses stay on this machine, and which are safe to send secrets to."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Whether `host` (a name or an address, IPv6 with or without brackets) stays on this machine."""
    name = host.strip("[]")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def is_safe_url(url: str) -> bool:
    """https anywhere, plain http on this machine only."""
    try:
        parts = urlsplit(url)
        host, _port = parts.hostname, parts.port
    except ValueError:  # brackets that do not close, a port beyond 65,535
        return False
    return bool(host) and (parts.scheme == "https" or (parts.scheme == "http" and is_loopback(host or "")))


def matches(host: str, patterns: Iterable[str]) -> bool:
    """Whether `host` is one of `patterns`, or below one that is written `*.` and a name. All in lower case."""
    return any(
        host == each or (each.startswith("*.") and host.endswith(each[1:]) and host != each[1:]) for each in patterns
    )


_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_GIVEN_OUT = ipaddress.ip_network("2000::/3")  # all of IPv6 that is given out to the internet at large
# What Python's tables still call global: anycast relays into 6to4, and documentation.
_NOT_GLOBAL = [ipaddress.ip_network("192.88.99.0/24"), ipaddress.ip_network("3fff::/20")]
_ISATAP = (0x00005EFE, 0x02005EFE)  # the upper half of an interface's id, whose lower half is an IPv4 address


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the internet at large, and so do those that it may be translated to."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if (inner := _translated(ip)) is not None:
            return is_public(str(inner))
        if ip not in _GIVEN_OUT or ip.teredo is not None:
            return False
        if int(ip) >> 32 & 0xFFFFFFFF in _ISATAP and not is_public(_last_four_bytes(ip)):
            return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _NOT_GLOBAL)


def _translated(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that a packet to this one reaches in the end, where that can be told."""
    if ip in _NAT64:
        return ipaddress.IPv4Address(_last_four_bytes(ip))
    return ip.ipv4_mapped or ip.sixtofour


def _last_four_bytes(ip: ipaddress.IPv6Address) -> str:
    return str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
