"""Which addresses are public, which hosts are meant by a pattern, and whom a request may have called back."""

from __future__ import annotations

import pytest

from pokestrator.addresses import is_public, matches, may_be_called_back

POKE = ("poke.com", "*.poke.com")


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.255.255.254", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "192.168.1.1"),
        *("169.254.169.254", "100.64.0.1", "192.0.0.1", "192.0.2.1", "198.18.0.1", "203.0.113.9"),
        *("224.0.0.1", "240.0.0.1", "255.255.255.255"),
        *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "ff02::1", "2001:db8::1", "fec0::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "::10.0.0.1"),
        *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1"),
        *("2002:7f00:1::", "2002:a00:1::", "2001:0:4136:e378:8000:63bf:3fff:fdd2"),
        *("", "localhost", "poke.com", "127.1", "0x7f000001"),
    ],
)
def test_addresses_of_this_machine_its_network_or_nobody_are_not_public(address: str) -> None:
    assert is_public(address) is False


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.216.34", "172.32.0.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]
)
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(address) is True


def test_a_pattern_with_a_star_means_all_below_but_not_the_name_itself() -> None:
    assert matches("a.poke.com", ["*.poke.com"])
    assert matches("a.b.poke.com", ["*.poke.com"])
    assert not matches("poke.com", ["*.poke.com"])
    assert not matches("evilpoke.com", ["*.poke.com", "poke.com"])
    assert not matches("poke.com.evil.example", ["*.poke.com", "poke.com"])


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
