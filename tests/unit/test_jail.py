"""The jail's rules as values: numbers of system calls, the filter's decisions, addresses, folders."""

from __future__ import annotations

import errno
import os
import re
import socket
import struct
from pathlib import Path

import pytest

from pokestrator.claude import folders, seccomp, system_calls
from pokestrator.claude.confinement import Confinement
from pokestrator.claude.probing import without
from pokestrator.claude.supervisor import relay_address

HEADERS = {0: Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), 1: Path("/usr/include/asm-generic/unistd.h")}
KILLED, REFUSED, ASKED, ALLOWED = "killed", "refused", "asked", "allowed"


@pytest.mark.parametrize("column", HEADERS, ids=["x86_64", "aarch64"])
def test_the_numbers_are_the_kernels(column: int) -> None:
    if not HEADERS[column].exists():
        pytest.skip("the kernel's headers are not installed")
    text = HEADERS[column].read_text()
    known = {name: int(number) for name, number in re.findall(r"#define\s+__NR(?:3264)?_(\w+)\s+(\d+)", text)}
    ours = {name: numbers[column] for name, numbers in {**system_calls.CALLS, **system_calls.REFUSED}.items()}
    assert {name: number for name, number in ours.items() if known.get(name, number) != number} == {}
    assert len(known.keys() & ours.keys()) > 60


def decision(call: str, *arguments: int, architecture: int = 0xC000003E, number: int | None = None) -> str:
    """What the filter decides, as the kernel would run it."""
    given = [*arguments, *[0] * (6 - len(arguments))]
    number = system_calls.number_of(call) if number is None else number
    data = struct.pack("=IIQ6Q", number, architecture, 0, *(each & 2**64 - 1 for each in given))
    steps, at, value = seccomp.filter_of(asks=True), 0, 0
    while True:
        code, if_true, if_false, constant = steps[at]
        at += 1
        if code == seccomp.LOAD:
            (value,) = struct.unpack_from("=I", data, constant)
        elif code == seccomp.AND:
            value &= constant
        elif code == seccomp.RETURN:
            kinds = {seccomp.KILL: KILLED, seccomp.REFUSE: REFUSED, seccomp.ASK: ASKED, seccomp.ALLOW: ALLOWED}
            return kinds[constant & 0xFFFF0000]
        else:
            holds = {
                seccomp.IF_EQUAL: value == constant,
                seccomp.IF_AT_LEAST: value >= constant,
                seccomp.IF_ANY_BIT: bool(value & constant),
            }[code]
            at += if_true if holds else if_false


UNIX, INET, INET6, STREAM, DATAGRAM = 1, 2, 10, 1, 2
NONBLOCK_AND_CLOEXEC = 0o2004000


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="these are x86_64's")
@pytest.mark.parametrize(
    ("call", "arguments", "expected"),
    [
        ("socket", (INET, STREAM | NONBLOCK_AND_CLOEXEC, 6), ALLOWED),
        ("socket", (INET6, STREAM, 0), ALLOWED),
        ("socket", (INET, STREAM, 262), REFUSED),
        ("socket", (INET, DATAGRAM, 0), REFUSED),
        ("socket", (UNIX, STREAM, 0), REFUSED),
        ("socketpair", (UNIX, STREAM | NONBLOCK_AND_CLOEXEC, 0), ALLOWED),
        ("socketpair", (UNIX, DATAGRAM, 0), REFUSED),
        ("connect", (3, 0, 16), ASKED),
        ("sendto", (3, 0, 1, 0x4000), ALLOWED),
        ("sendto", (3, 0, 1, 0x20004000), REFUSED),
        ("sendmsg", (3, 0, 0x20000000), REFUSED),
        ("sendmmsg", (3, 0, 1, 0x20000000), REFUSED),
        ("clone", (0x3D0F00,), ALLOWED),
        ("clone", (0x10000011,), REFUSED),
        ("clone3", (), REFUSED),
        ("prlimit64", (0, 7), ALLOWED),
        ("prlimit64", (1, 7), REFUSED),
        ("setpriority", (0, 0, 5), ALLOWED),
        ("setpriority", (0, 1, 5), REFUSED),
        ("setpriority", (2, 0, 5), REFUSED),
        ("listen", (3, 1), REFUSED),
        ("seccomp", (1, 8), REFUSED),
    ],
)
def test_the_filter_decides(call: str, arguments: tuple[int, ...], expected: str) -> None:
    assert decision(call, *arguments) == expected


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="these are x86_64's")
def test_other_kinds_of_system_calls_are_the_end() -> None:
    assert decision("", number=39) == ALLOWED
    assert decision("", number=39 | 0x40000000) == KILLED, "x32"
    assert decision("", number=39, architecture=0x40000003) == KILLED, "i386"


def ipv4(address: str, port: int) -> bytes:
    return struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + socket.inet_aton(address) + bytes(8)


def ipv6(address: str, port: int) -> bytes:
    packed = socket.inet_pton(socket.AF_INET6, address)
    return struct.pack("=H", socket.AF_INET6) + struct.pack("!H", port) + bytes(4) + packed + bytes(4)


@pytest.mark.parametrize("address", [ipv4("127.0.0.1", 4321), ipv6("::ffff:127.0.0.1", 4321)], ids=["IPv4", "IPv6"])
def test_the_relay_is_connected_to(address: bytes) -> None:
    assert relay_address(address, 4321) == address


@pytest.mark.parametrize(
    "address",
    [
        ipv4("127.0.0.1", 4322),
        ipv4("127.0.0.2", 4321),
        ipv4("0.0.0.0", 4321),
        ipv6("::1", 4321),
        ipv6("::", 4321),
        ipv6("::ffff:127.0.0.2", 4321),
        ipv6("::ffff:127.0.0.1", 4322),
        struct.pack("=H", socket.AF_UNSPEC) + ipv4("127.0.0.1", 4321)[2:],
        struct.pack("=H", socket.AF_UNIX) + b"/run/postgresql",
        ipv4("127.0.0.1", 4321)[:7],
        b"\x02",
        b"",
    ],
)
def test_nothing_else_is_connected_to(address: bytes) -> None:
    with pytest.raises(OSError) as refused:
        relay_address(address, 4321)
    assert refused.value.errno in (errno.EACCES, errno.EINVAL)


def test_what_is_closed_is_left_out_of_what_may_be_read(tmp_path: Path) -> None:
    for name in ("bin", "src/app/data", "src/other", "share"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "src" / "link").symlink_to(tmp_path / "src" / "app")
    left = without(tmp_path, [tmp_path / "src" / "app", Path("/elsewhere")])
    assert sorted(left) == [str(tmp_path / name) for name in ("bin", "share", "src/other")]
    assert without(tmp_path, [Path("/elsewhere"), tmp_path]) == [str(tmp_path)]


def test_a_limited_agent_has_only_what_needs_nothing_from_here() -> None:
    every = ["Bash", "Read", "WebFetch", "WebSearch"]
    assert Confinement("limited", "open").allowed(every) == ("WebSearch",)
    assert Confinement("limited", "open", all_tools=True).allowed([*every, "Task"]) == tuple(every)
    assert Confinement("confined", "by port only").allowed([*every, "Task"]) == tuple(every)


def test_a_folder_is_removed_however_it_was_left(tmp_path: Path) -> None:
    kept, folder = tmp_path / "kept", tmp_path / "run"
    kept.mkdir()
    (kept / "file").touch(mode=0o640)
    (folder / "locked" / "inner" / "more").mkdir(parents=True)
    (folder / "locked" / "link").symlink_to(kept)
    (folder / "locked" / "file").touch()
    (folder / "locked" / "inner").chmod(0)
    (folder / "locked").chmod(0)
    deep = os.open(folder, os.O_RDONLY)
    for _ in range(1_500):
        os.mkdir("deeper", dir_fd=deep)
        below = os.open("deeper", os.O_RDONLY, dir_fd=deep)
        os.close(deep)
        deep = below
    os.close(deep)
    folders.remove(folder)
    assert not folder.exists()
    assert [path.name for path in kept.iterdir()] == ["file"]


def test_a_link_in_the_folders_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (tmp_path / "run").symlink_to(tmp_path / "kept")
    with pytest.raises(OSError):
        folders.remove(tmp_path / "run")
    assert (tmp_path / "kept" / "file").exists()
