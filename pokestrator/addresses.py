"""Which addresses stay on this machine, and which are safe to send secrets to."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
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


def may_be_called_back(url: str, hosts: Collection[str]) -> bool:
    """Whether a request may name this address for its answer: https at a listed host.

    A loopback host only where it is listed itself; then plain http will do. No other address without a name.
    """
    try:
        parts = urlsplit(url)
        host, _port = parts.hostname, parts.port
    except ValueError:
        return False
    if not host or "@" in parts.netloc:
        return False
    if is_loopback(host):
        return parts.scheme in ("http", "https") and not {host, f"[{host}]"}.isdisjoint(hosts)
    return parts.scheme == "https" and not _is_address(host) and matches(host.rstrip("."), hosts)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def matches(host: str, patterns: Collection[str]) -> bool:
    """Whether `host` is one of `patterns`, or below one that is written `*.` and a name. All in lower case."""
    return any(
        host == each or (each.startswith("*.") and host.endswith(each[1:]) and host != each[1:]) for each in patterns
    )


_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # an IPv4 address in its last 32 bits
_GIVEN_OUT = ipaddress.ip_network("2000::/3")  # all that is in use of IPv6 outside


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the internet at large, and so do those that it may be translated to."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        inner = ip.ipv4_mapped or ip.sixtofour
        if inner is not None:
            return is_public(str(inner))
        if ip.teredo is not None or ip not in _GIVEN_OUT:
            return False
    return ip.is_global and not ip.is_multicast
