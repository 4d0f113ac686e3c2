"""Landlock: from here on this process, and all that it starts, may touch some files and dial one port, and no others.

https://docs.kernel.org/userspace-api/landlock.html. It does not know addresses, only ports, and does not see who looks
at a file's attributes, or changes its mode, without opening it.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct

from pokestrator.claude.system_calls import Failed, call, checked

# linux/landlock.h. The kernel tells the version of the interface that it has.
WITH_PORTS, WITH_IOCTL, WITH_SCOPES = 4, 5, 6
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE, IOCTL_DEV = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14, 1 << 15
ALL_RIGHTS = (1 << 15) - 1  # as of WITH_PORTS
RIGHTS_OF_A_FILE = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
BIND_TCP, CONNECT_TCP = 1 << 0, 1 << 1
RULE_PATH, RULE_PORT = 1, 2
ABSTRACT_SOCKETS, SIGNALS = 1 << 0, 1 << 1


def version() -> int:
    """Of the kernel's interface; 0 where there is none, where it is switched off, and on processors unknown to us."""
    ask_version = 1
    try:
        return max(0, call("landlock_create_ruleset", None, ctypes.c_size_t(0), ask_version))
    except Failed:
        return 0


def opened(paths: list[str]) -> list[int]:
    """Descriptors that stand for files and folders, and open nothing; what is not there is left out."""
    handles = []
    for path in paths:
        try:
            handles.append(os.open(path, os.O_PATH | os.O_CLOEXEC))
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
    return handles


def restrict(readable: list[int], writable: list[int], port: int) -> None:
    """Read and execute what is `readable`, do everything in what is `writable`, connect to `port`. Nothing else."""
    has = version()
    if has < WITH_PORTS:
        raise Failed(f"Landlock version {WITH_PORTS} is needed, this kernel has {has or 'none'}")
    rights = ALL_RIGHTS | (IOCTL_DEV if has >= WITH_IOCTL else 0)
    handled = [rights, BIND_TCP | CONNECT_TCP]
    if has >= WITH_SCOPES:
        handled.append(ABSTRACT_SOCKETS | SIGNALS)
    attributes = struct.pack(f"{len(handled)}Q", *handled)
    size = ctypes.c_size_t(len(attributes))
    ruleset = checked(call("landlock_create_ruleset", attributes, size, 0), "landlock_create_ruleset")
    for handle in readable:
        _allow_path(ruleset, handle, EXECUTE | READ_FILE | READ_DIR)
    for handle in writable:
        _allow_path(ruleset, handle, rights)
    _allow(ruleset, RULE_PORT, struct.pack("QQ", CONNECT_TCP, port))
    checked(call("landlock_restrict_self", ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def _allow_path(ruleset: int, handle: int, rights: int) -> None:
    if not stat.S_ISDIR(os.fstat(handle).st_mode):
        rights &= RIGHTS_OF_A_FILE
    _allow(ruleset, RULE_PATH, struct.pack("=Qi", rights, handle))


def _allow(ruleset: int, kind: int, rule: bytes) -> None:
    checked(call("landlock_add_rule", ruleset, kind, rule, 0), "landlock_add_rule")
