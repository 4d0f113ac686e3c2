"""Which addresses are public, which hosts a pattern stands for, and whom a request may have called back."""

from __future__ import annotations

import doctest

import pytest

from pokestrator import addresses
from pokestrator.addresses import is_public, matches, may_be_called_back

PUBLIC = """
8.8.8.8 1.1.1.1 100.63.255.255 100.128.0.1 172.15.0.1 172.32.0.1 192.0.1.1 198.17.255.255 223.255.255.254 168.63.129.15
2606:4700::1111 2a00:1450:4001::1 2620:4f:8000::1 [2606:4700::1111]
::ffff:8.8.8.8 64:ff9b::8.8.8.8 2002:808:808::1 2606:4700::5efe:808:808
"""

NOT_PUBLIC = {
    "unspecified": "0.0.0.0 0.1.2.3 ::",
    "loopback": "127.0.0.1 127.255.255.254 ::1 [::1]",
    "private": "10.0.0.1 172.16.0.1 172.31.255.255 192.168.1.1 fc00::1 fd00:ec2::254",
    "site-local": "fec0::1",
    "link-local": "169.254.0.1 169.254.169.254 fe80::1 fe80::1%eth0",
    "cgnat": "100.64.0.1 100.100.100.200 100.127.255.255",
    "multicast": "224.0.0.1 233.252.0.1 239.255.255.250 ff02::1 ff0e::1",
    "reserved": "240.0.0.1 255.255.255.255 4000::1 5f00::1 100::1 100:0:0:1::1 8000::1",
    "the IETF's": "192.0.0.1 192.0.0.9 192.0.0.192 192.88.99.1 2001::1 2001:20::1 2001:1::1 2001:2::1",
    "benchmarks and documents": "198.18.0.1 192.0.2.1 198.51.100.1 203.0.113.1 2001:db8::1 3fff::1",
    "Azure's host": "168.63.129.16",
    "mapped": "::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::ffff:100.64.0.1 ::ffff:0.0.0.0",
    "compatible, translated": "::127.0.0.1 ::8.8.8.8 ::ffff:0:127.0.0.1",
    "nat64": "64:ff9b::127.0.0.1 64:ff9b::10.0.0.1 64:ff9b::a9fe:a9fe 64:ff9b:1::1",
    "6to4": "2002:7f00:1:: 2002:a00:1::1 2002:a9fe:a9fe::1 2002:6440:1::",
    "teredo": "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    "isatap": "2606:4700::5efe:7f00:1 2606:4700::200:5efe:a00:1",
    "a zone": "2606:4700::1111%eth0",
    "other spellings": "127.1 2130706433 0x7f.0.0.1 0177.0.0.1 010.8.8.8 8.8.8 ::ffff:8.8.8.8.8 8.8.8.8:443",
    "no address": "poke.com localhost [8.8.8.8 ] [ x",
}

POKE = ("poke.com", "*.poke.com")
PATTERNS = ("poke.com", "*.poke.com", "127.0.0.1", "[::1]", "localhost", "*.0.0.2")
LISTED = "poke.com POKE.COM poke.com. a.poke.com a.b.Poke.com. 127.0.0.1 ::1 [0::1] localhost"
OTHERS = """
evilpoke.com poke.com.evil.example com .poke.com poke.com.. poke.com:443 ke.com
127.0.0.2 127.1 [::2] a.localhost 10.0.0.2 ::ffff:127.0.0.1
"""


@pytest.mark.parametrize("address", PUBLIC.split())
def test_anybodys_addresses_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("address", [each for kind in NOT_PUBLIC.values() for each in [*kind.split(), ""]])
def test_what_is_not_anybodys_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("host", LISTED.split())
def test_a_listed_host_matches_in_any_spelling(host: str) -> None:
    assert matches(host, PATTERNS)


@pytest.mark.parametrize("host", [*OTHERS.split(), "", ".", " poke.com", "poke.com\n"])
def test_another_host_does_not_match(host: str) -> None:
    assert not matches(host, PATTERNS)


def test_a_wildcard_does_not_stand_for_its_own_name() -> None:
    assert not matches("poke.com", ["*.poke.com"])


@pytest.mark.parametrize(
    "url", ["https://poke.com/cb", "https://api.poke.com:8443/cb?x=1", "https://POKE.com/cb", "https://poke.com./cb"]
)
def test_https_at_a_listed_host_may_be_called_back(url: str) -> None:
    assert may_be_called_back(url, POKE)


@pytest.mark.parametrize(
    "url",
    [
        "http://poke.com/cb",
        "https://evilpoke.com/cb",
        "https://poke.com.evil.example/cb",
        "https://poke.com@evil.example/cb",
        "https://user:pass@poke.com/cb",
        "https://evil.example/poke.com",
        "https://evil.example#poke.com",
        "https://1.1.1.1/cb",
        "https://127.0.0.1/cb",
        "http://localhost/cb",
        "https://[::1]/cb",
        "https://2130706433/cb",
        "https://0x7f.1/cb",
        "https:///cb",
        "https://[",
        "https://poke.com:port/",
        "https://poke.com\t/cb",
        "https://po\nke.com/cb",
        "https://poke.com/cb\n",
        "https://evil.example\\.poke.com/cb",
        "https://evil.example\\@poke.com/cb",
        "https://127.0.0.1\\.poke.com/cb",
        "https://evil.example%2f.poke.com/cb",
        "https://evil.example%00.poke.com/cb",
        "https://evil.example;.poke.com/cb",
        "https://évil.poke.com/cb",
        "https://poke.com。/cb",
        "https://.poke.com/cb",
        "https://a..poke.com/cb",
        "https://[::ffff:127.0.0.1]/cb",
        "https://[64:ff9b::7f00:1]/cb",
        "ftp://poke.com/cb",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "",
    ],
)
def test_nothing_else_may_be_called_back(url: str) -> None:
    assert not may_be_called_back(url, POKE)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_loopback_host_may_be_called_back_only_where_it_is_listed_itself(scheme: str) -> None:
    assert may_be_called_back(f"{scheme}://127.0.0.1:9/cb", ["127.0.0.1"])
    assert may_be_called_back(f"{scheme}://[::1]:9/cb", ["[::1]"])
    assert not may_be_called_back(f"{scheme}://127.0.0.2:9/cb", ["127.0.0.1", "localhost", *POKE])
    assert not may_be_called_back("http://poke.com/cb", ["127.0.0.1", *POKE])


def test_the_examples_are_true() -> None:
    assert doctest.testmod(addresses).failed == 0
