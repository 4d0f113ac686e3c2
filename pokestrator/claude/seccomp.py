"""seccomp: a filter in the kernel that looks at each system call of this process, and of all that it starts.

https://docs.kernel.org/userspace-api/seccomp_filter.html. It sees numbers and arguments, but no memory. Where it cannot
decide, about connect(), it asks a supervisor (supervisor.py).
"""

from __future__ import annotations

import _socket  # the bare one: `socket` takes as long to load as all the rest of a jail
import ctypes
import errno
import os
import struct

from pokestrator.claude.system_calls import (
    FLAGS_OF_SENDING,
    OF_ONESELF,
    REFUSED,
    Failed,
    call,
    checked,
    machine,
    number_of,
)

# linux/seccomp.h, linux/filter.h, linux/audit.h
SET_MODE_FILTER, NEW_LISTENER, WAIT_KILLABLE = 1, 1 << 3, 1 << 5
KILL, REFUSE, ASK, ALLOW = 0x80000000, 0x00050000, 0x7FC00000, 0x7FFF0000
LOAD, AND, IF_EQUAL, IF_AT_LEAST, IF_ANY_BIT, RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # where they are in struct seccomp_data
X32 = 0x40000000  # from here on, x86_64's numbers are of another ABI
SOCKET_TYPE = 0xF  # without SOCK_NONBLOCK and SOCK_CLOEXEC
FAST_OPEN = 0x20000000  # MSG_FASTOPEN: sends and connects in one, past both connect() and Landlock
NEW_NAMESPACES = 0x7E020080  # all CLONE_NEW… flags


Step = tuple[int, int, int, int]  # one instruction of a filter: code, steps to skip if true, if false, constant


def restrict(supervisor: _socket.socket | None) -> None:
    """Install the filter. A supervisor is sent the descriptor by which it is asked about each connect()."""
    steps = filter_of(asks=supervisor is not None)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(code)))
    if supervisor is None:
        checked(_install(program, 0), "seccomp")
        return
    # Else a signal that is no one's death would let the call be made twice, once for nobody (Linux 5.19).
    listener = _install(program, NEW_LISTENER | WAIT_KILLABLE)
    if listener < 0 and ctypes.get_errno() == errno.EINVAL:
        listener = _install(program, NEW_LISTENER)
    checked(listener, "seccomp with a listener")
    supervisor.sendmsg([b"l"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack("i", listener))])
    if supervisor.recv(1) != b"r":
        raise Failed("the supervisor is not ready")
    supervisor.close()
    os.close(listener)


def _install(program: ctypes.Array[ctypes.c_char], flags: int) -> int:
    return call("seccomp", SET_MODE_FILTER, flags, program)


def filter_of(*, asks: bool) -> list[Step]:
    """The filter's instructions; with `asks`, a supervisor decides about connect()."""
    audit_number, _ = machine()
    steps = [(LOAD, 0, 0, ARCHITECTURE), (IF_EQUAL, 1, 0, audit_number), _end(KILL), (LOAD, 0, 0, NUMBER)]
    if os.uname().machine == "x86_64":
        steps += [(IF_AT_LEAST, 0, 1, X32), _end(KILL)]
    for name in REFUSED:
        steps += _on_call(name, [_refuse()])
    # Its flags lie in memory, where no filter can look; the C library falls back to clone().
    steps += _on_call("clone3", [_refuse(errno.ENOSYS)])
    steps += _on_call("clone", [*_refuse_bits(0, NEW_NAMESPACES), _end(ALLOW)])
    for name, argument in FLAGS_OF_SENDING.items():
        steps += _on_call(name, [*_refuse_bits(argument, FAST_OPEN), _end(ALLOW)])
    for name, arguments in OF_ONESELF.items():
        own = [step for argument in arguments for step in _only(argument, 0)]
        steps += _on_call(name, [*own, _end(ALLOW)])
    # Multipath TCP and SCTP would pass Landlock's rule on ports.
    stream = _only(1, _socket.SOCK_STREAM, mask=SOCKET_TYPE)
    tcp = [*_only(0, _socket.AF_INET, _socket.AF_INET6), *stream, *_only(2, 0, _socket.IPPROTO_TCP)]
    steps += _on_call("socket", [*tcp, _end(ALLOW)])
    # One end of a pair of datagram sockets can be sent from to any Unix socket that has a path.
    steps += _on_call("socketpair", [*_only(0, _socket.AF_UNIX), *stream, _end(ALLOW)])
    steps += _on_call("connect", [_end(ASK if asks else ALLOW)])
    return [*steps, _end(ALLOW)]


def _on_call(name: str, then: list[Step]) -> list[Step]:
    return [(IF_EQUAL, 0, len(then), number_of(name)), *then]


def _refuse_bits(argument: int, bits: int) -> list[Step]:
    return [_load(argument), (IF_ANY_BIT, 0, 1, bits), _refuse()]


def _only(argument: int, *values: int, mask: int | None = None) -> list[Step]:
    """Refuse the call unless this argument is one of `values`."""
    steps = [_load(argument)] + ([(AND, 0, 0, mask)] if mask is not None else [])
    comparisons = [(IF_EQUAL, len(values) - index, 0, value) for index, value in enumerate(values)]
    return [*steps, *comparisons, _refuse()]


def _load(argument: int) -> Step:
    """The lower half of an argument: all of it, for those that are looked at."""
    return LOAD, 0, 0, ARGUMENTS + 8 * argument


def _refuse(number: int = errno.EPERM) -> Step:
    return _end(REFUSE | number)


def _end(action: int) -> Step:
    return RETURN, 0, 0, action
