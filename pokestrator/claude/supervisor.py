"""Makes a confined run's connections, and only to the relay: seccomp asks here about each connect().

Landlock's rule knows a port, but no address: the relay's port on any other machine could be dialled. So each connect()
of a run stops in the kernel until it is answered here, outside the jail. The address is read once, from the caller's
memory, and compared; the connection is then made with an address of our own, on the caller's socket: what another
thread of the caller writes into that memory meanwhile changes nothing. The call itself is never let go on.

https://docs.kernel.org/userspace-api/seccomp_filter.html#userspace-notification
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import socket
import struct
import threading
from contextlib import closing, suppress
from pathlib import Path

from pokestrator.claude.system_calls import call, libc
from pokestrator.telemetry import get_logger

log = get_logger(__name__)

MEET_SECONDS = 30.0  # for a launcher on a busy machine
CONNECT_SECONDS = 5  # on loopback: only a relay that is overrun takes that long
LEAVE_SECONDS = 1.0

# linux/seccomp.h
_RECEIVE, _ANSWER, _IS_VALID = 0xC0502100, 0xC0182101, 0x40082102
_NOTICE = struct.Struct("=QIIiIQ6Q")  # id, thread, flags, call, architecture, instruction, six arguments
_REPLY = struct.Struct("=QqiI")  # id, value, error, flags

_SEND_TIMEOUT = (socket.SOL_SOCKET, socket.SO_SNDTIMEO)  # connect() keeps to it, too
_TIME = struct.Struct("ll")  # seconds, microseconds

_LONGEST = 128  # bytes of a sockaddr
_LOOPBACK = bytes([127, 0, 0, 1])


class Supervisor:
    """One run's: listens at `folder`/NAME for the launcher, then answers for it. `port` is the relay's."""

    NAME = "supervisor"

    def __init__(self, folder: Path, port: int) -> None:
        self._path = folder / self.NAME
        self._port = port
        self._end, self._ended = os.pipe()  # closing one end is the sign to end
        self._door = socket.socket(socket.AF_UNIX)
        self._thread = threading.Thread(target=self._serve, name="supervisor", daemon=True)

    def start(self) -> None:
        """Be there for the launcher. Raises OSError."""
        handle = os.open(self._path.parent, os.O_PATH)
        try:
            self._door.bind(f"/proc/self/fd/{handle}/{self.NAME}")  # the folder's own path may be too long for a socket
        finally:
            os.close(handle)
        self._door.listen(1)
        self._thread.start()

    def close(self) -> None:
        """The run's processes are dead."""
        os.close(self._ended)
        if self._thread.ident is None:
            self._let_go()
        else:
            self._thread.join(LEAVE_SECONDS)

    def _let_go(self) -> None:
        self._door.close()
        os.close(self._end)

    def _serve(self) -> None:
        try:
            if not self._comes(self._door.fileno(), MEET_SECONDS):
                return
            notices = self._meet()
            try:
                while self._comes(notices):
                    self._attend(notices)
            finally:
                os.close(notices)
        except OSError as error:  # the run goes on, but none of its connects is answered: ENOSYS
            log.warning("supervisor_ended", reason=repr(error))
        finally:
            self._let_go()

    def _comes(self, handle: int, seconds: float | None = None) -> bool:
        """Whether there is something to read, before `seconds` have passed and before the end."""
        poller = select.poll()
        for each in (handle, self._end):
            poller.register(each, select.POLLIN)
        events = dict(poller.poll(None if seconds is None else seconds * 1000))
        return self._end not in events and bool(events.get(handle, 0) & select.POLLIN)

    def _meet(self) -> int:
        """The descriptor that we are asked by. Nobody else can come: nothing of the CLI is there before the answer."""
        visitor, _ = self._door.accept()
        self._path.unlink()
        with visitor:
            visitor.settimeout(MEET_SECONDS)
            _, handles, _, _ = socket.recv_fds(visitor, 1, 1)
            if not handles:
                raise OSError(errno.ECONNRESET, "the launcher has left")
            visitor.sendall(b"r")
        return handles[0]

    def _attend(self, notices: int) -> None:
        """Answer one call."""
        notice = bytearray(_NOTICE.size)
        try:
            fcntl.ioctl(notices, _RECEIVE, notice)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):  # whoever called is dead
                return
            raise
        number, thread, _, _, _, _, handle, address, length, *_ = _NOTICE.unpack(notice)
        try:
            self._connect(notices, number, thread, handle, address, length)
            trouble = 0
        except OSError as error:
            trouble = error.errno or errno.EACCES
        with suppress(FileNotFoundError):  # whoever called is dead
            fcntl.ioctl(notices, _ANSWER, _REPLY.pack(number, 0, -trouble, 0))

    def _connect(self, notices: int, number: int, thread: int, handle: int, address: int, length: int) -> None:
        """Make the connection that was asked for. Raises OSError, which is the call's own answer."""
        target = relay_address(_read(thread, address, min(length & 0xFFFFFFFF, _LONGEST)), self._port)
        with closing(_socket_of(thread, handle)) as connection:
            # Only this proves that memory and socket were the caller's, not a later process's with its number.
            fcntl.ioctl(notices, _IS_VALID, struct.pack("=Q", number))
            _connect(connection, target)


def _connect(connection: socket.socket, target: bytes) -> None:
    """connect() as the caller would have made it, but where that waits, for CONNECT_SECONDS at most. Raises OSError."""
    if not os.get_blocking(connection.fileno()):
        _dial(connection, target)
        return
    before = connection.getsockopt(*_SEND_TIMEOUT, _TIME.size)
    connection.setsockopt(*_SEND_TIMEOUT, _TIME.pack(CONNECT_SECONDS, 0))
    try:
        _dial(connection, target)
    except BlockingIOError as error:
        raise OSError(errno.ETIMEDOUT, "the relay does not answer") from error
    finally:
        connection.setsockopt(*_SEND_TIMEOUT, before)


def _dial(connection: socket.socket, target: bytes) -> None:
    if libc.connect(connection.fileno(), target, len(target)) < 0:
        raise _error()


def relay_address(asked: bytes, port: int) -> bytes:
    """The relay's address as a sockaddr of the family that was asked for. Raises OSError where it was not asked for.

    What is compared is what the kernel would look at: family, port and address.
    """
    if len(asked) < 2:
        raise OSError(errno.EINVAL, "no address")
    (family,) = struct.unpack("=H", asked[:2])
    if family == socket.AF_INET and asked[2:8] == struct.pack("!H", port) + _LOOPBACK:
        return struct.pack("=H", family) + struct.pack("!H", port) + _LOOPBACK + bytes(8)
    mapped = bytes(10) + b"\xff\xff" + _LOOPBACK
    if family == socket.AF_INET6 and asked[2:4] == struct.pack("!H", port) and asked[8:24] == mapped:
        return struct.pack("=H", family) + struct.pack("!H", port) + bytes(4) + mapped + bytes(4)
    raise OSError(errno.EACCES, "only the relay can be reached")


def _read(thread: int, address: int, length: int) -> bytes:
    with Path(f"/proc/{thread}/mem").open("rb", buffering=0) as memory:
        return os.pread(memory.fileno(), length, address)


def _socket_of(thread: int, handle: int) -> socket.socket:
    """The socket that a thread knows by this descriptor."""
    process = os.pidfd_open(_process_of(thread))
    try:
        ours = call("pidfd_getfd", process, ctypes.c_int(handle & 0xFFFFFFFF), 0)
        if ours < 0:
            raise _error()
    finally:
        os.close(process)
    try:
        return socket.socket(fileno=ours)
    except OSError:  # it is no socket
        os.close(ours)
        raise


def _process_of(thread: int) -> int:
    """The process of a thread: pidfds are of processes."""
    for line in Path(f"/proc/{thread}/status").read_text(errors="replace").splitlines():
        if line.startswith("Tgid:"):
            return int(line.split()[1])
    raise OSError(errno.ESRCH, "no such thread")


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
