"""When a request has arrived: as much of HTTP/1.1 as it takes to know where one ends.

What a request says is decided by gunicorn's parser alone, which then gets these very bytes and no more. Should the two
ever disagree about the end, it finds the body cut short and refuses it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum, auto

MAX_HEAD_BYTES = 32 * 1024
MAX_CHUNK_LINE_BYTES = 1_024
FRAMING_BYTES = 256 * 1024  # what may come between the chunks of a body, and with its head
PIECE_BYTES = 8 * 1024  # what gunicorn reads at once from a socket; it copies the rest of a piece for each chunk

HEAD_END = b"\r\n\r\n"
LENGTH = re.compile(rb"\r\ncontent-length[ \t]*:[ \t]*([^\r\n]*)", re.IGNORECASE)
CODING = re.compile(rb"\r\ntransfer-encoding[ \t]*:[ \t]*([^\r\n]*)", re.IGNORECASE)
CHUNK_SIZE = re.compile(rb"[0-9a-fA-F]{1,8}")
EXPECTS = re.compile(rb"\r\nexpect[ \t]*:[ \t]*100-continue[ \t]*\r\n", re.IGNORECASE)


class Progress(Enum):
    MORE = auto()  # has to come
    WHOLE = auto()  # or refused by the parser, whatever else comes
    HEAD_TOO_LARGE = auto()
    BODY_TOO_LARGE = auto()


class Arrival:
    """The bytes of one connection's requests, in the order they came."""

    def __init__(self, max_body_bytes: int) -> None:
        self.data = bytearray()
        self._max_body_bytes = max_body_bytes
        self._start_over()

    def _start_over(self) -> None:
        self._searched = 0  # for the head's end
        self._end: int | None = None  # of the request; None: not known yet
        self._chunk: int | None = None  # where the next chunk begins, while there are any
        self._body_bytes = 0  # of the chunks so far
        self.expects_continue = False  # the client waits for our word before it sends the body

    def progress(self) -> Progress:
        """How far the first request in `data` has come."""
        if self._end is None and self._chunk is None:
            found = self._read_head()
            if found is not None:
                return found
        if self._chunk is not None:
            found = self._follow_chunks(self._chunk)
            if found is not None:
                return found
        assert self._end is not None
        return Progress.WHOLE if len(self.data) >= self._end else Progress.MORE

    def take(self) -> Iterator[bytes]:
        """The whole first request, in pieces; what came after it stays."""
        request = bytes(self.data[: self._end])
        del self.data[: self._end]
        self._start_over()
        return (request[at : at + PIECE_BYTES] for at in range(0, len(request), PIECE_BYTES))

    def _read_head(self) -> Progress | None:
        """Find where the head ends, and from it where the body does. None: found."""
        start = 2 if self.data.startswith(b"\r\n") else 0  # an empty line before a request is ignored
        head_end = self.data.find(HEAD_END, max(start, self._searched - len(HEAD_END)))
        self._searched = len(self.data)
        if head_end > MAX_HEAD_BYTES or (head_end < 0 and len(self.data) > MAX_HEAD_BYTES):
            return Progress.HEAD_TOO_LARGE
        if head_end < 0:
            # A bare LF is refused by the parser, which a head of such lines would never let us come to.
            return Progress.WHOLE if self.data.count(b"\n") != self.data.count(b"\r\n") else Progress.MORE
        return self._read_framing(bytes(self.data[start : head_end + 2]), head_end + len(HEAD_END))

    def _read_framing(self, head: bytes, body_at: int) -> Progress | None:
        lengths, codings = LENGTH.findall(head), CODING.findall(head)
        self.expects_continue = EXPECTS.search(head) is not None
        if not codings and len(lengths) == 1 and lengths[0].strip().isdigit():
            digits = lengths[0].strip().lstrip(b"0")
            if len(digits) > 9 or int(digits or b"0") > self._max_body_bytes:
                return Progress.BODY_TOO_LARGE
            self._end = body_at + int(digits or b"0")
        elif len(codings) == 1 and not lengths and codings[0].strip().lower().endswith(b"chunked"):
            self._chunk = body_at
        else:  # no body, or a head that is refused
            self._end = body_at
        return None

    def _follow_chunks(self, at: int) -> Progress | None:
        """Go from chunk to chunk as far as they have come. None: the last one has."""
        while True:
            line_end = self.data.find(b"\r\n", at, at + MAX_CHUNK_LINE_BYTES)
            if line_end < 0:
                return self._wait_for(at, MAX_CHUNK_LINE_BYTES)
            size = CHUNK_SIZE.match(self.data, at, line_end)
            if size is None:
                return Progress.WHOLE
            length = int(size[0], 16)
            if length == 0:
                return self._follow_trailers(line_end)
            at = line_end + 2 + length + 2
            if self._body_bytes + length > self._max_body_bytes or at > self._max_body_bytes + FRAMING_BYTES:
                return Progress.BODY_TOO_LARGE
            if at > len(self.data):
                return Progress.MORE
            self._chunk, self._body_bytes = at, self._body_bytes + length

    def _follow_trailers(self, line_end: int) -> Progress | None:
        end = self.data.find(HEAD_END, line_end)
        if end < 0:
            return self._wait_for(line_end, MAX_HEAD_BYTES)
        self._chunk, self._end = None, end + len(HEAD_END)
        return None

    def _wait_for(self, at: int, most: int) -> Progress:
        """For the end of what begins at `at`; the parser refuses what is longer than `most`."""
        return Progress.MORE if len(self.data) - at < most else Progress.WHOLE
