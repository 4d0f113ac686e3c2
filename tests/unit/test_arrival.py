"""When a request has arrived: never too early, never too late, however its bytes come."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from gunicorn.config import Config
from gunicorn.http import get_parser
from gunicorn.http.errors import ParseException
from hypothesis import given, settings
from hypothesis import strategies as st

from pokestrator.web.arrival import MAX_HEAD_BYTES, Arrival, Progress

MOST = 1_000
HEAD = b"POST /mcp HTTP/1.1\r\nHost: localhost\r\n"


def arrive(pieces: Iterable[bytes]) -> tuple[list[Progress], list[bytes], bytes]:
    """What is said after each piece, the requests that are whole, and what is left."""
    arrival = Arrival(MOST)
    said, requests = [], []
    for piece in pieces:
        arrival.data += piece
        while (progress := arrival.progress()) is Progress.WHOLE and arrival.data:
            requests.append(b"".join(arrival.take()))
        said.append(progress)
    return said, requests, bytes(arrival.data)


def sized(body: bytes) -> bytes:
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


def chunked(chunks: Iterable[bytes], trailer: bytes = b"") -> bytes:
    body = b"".join(b"%X;x=y\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    return HEAD + b"Transfer-Encoding: Chunked\r\n\r\n" + body + b"0\r\n" + trailer + b"\r\n"


bodies = st.binary(max_size=200)
whole_requests = st.one_of(
    st.just(b"GET /healthz HTTP/1.0\r\n\r\n"),
    st.just(HEAD + b"\r\n"),
    bodies.map(sized),
    st.builds(chunked, st.lists(st.binary(min_size=1, max_size=60), max_size=5), st.sampled_from([b"", b"A: b\r\n"])),
)


@given(st.lists(whole_requests, min_size=1, max_size=4), st.lists(st.integers(1, 50), min_size=1, max_size=20))
@settings(deadline=None, max_examples=200)
def test_requests_arrive_whole_and_one_by_one_in_whatever_pieces(requests: list[bytes], sizes: list[int]) -> None:
    sent, pieces = b"".join(requests), []
    while sent:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(sent[:size])
        sent = sent[size:]
    _, arrived, left = arrive(pieces)
    assert (arrived, left) == (requests, b"")


LINES = [b"Content-Length: 3", b"Content-Length: 0", b"Transfer-Encoding: chunked", b"transfer-encoding:gzip, chunked"]
STRANGE = [*LINES, b"Content-Length : 3", b" folded", b"A: b\nC: d", b"A: b\rC: d", b"Expect: 100-continue", b":", b""]
TAILS = [
    b"abc",
    b"3\r\nabc\r\n0\r\n\r\n",
    b"0\r\n\r\n",
    b"\r\n\r\n",
    b"3\r\nabc\r\n0\r\nA: b\r\n\r\n",
    b"x",
    b"3;\r\n",
    b"",
]


@given(st.lists(st.sampled_from(STRANGE), max_size=4), st.lists(st.sampled_from(TAILS), max_size=3))
@settings(deadline=None, max_examples=500)
def test_what_the_parser_accepts_it_was_given_to_the_last_byte(lines: list[bytes], tails: list[bytes]) -> None:
    arrival = Arrival(MOST)
    arrival.data += b"\r\n".join([HEAD.rstrip(), *lines, b"", b""]) + b"".join(tails)
    if arrival.progress() is not Progress.WHOLE:
        return
    parser = get_parser(Config(), arrival.take(), ("127.0.0.1", 1))  # type: ignore[no-untyped-call]
    try:
        request = next(parser)
        request.body.read()
    except (ParseException, StopIteration):  # the connection is closed
        return
    assert parser.unreader.read(1) == b""


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"", Progress.MORE),
        (b"POST /mcp HTTP/1.1\r\nHost: localhost\r\n", Progress.MORE),
        (sized(b"abc")[:-1], Progress.MORE),
        (chunked([b"abc"])[:-1], Progress.MORE),
        (chunked([b"abc"])[:-9], Progress.MORE),
        (b"GET / HTTP/1.1\nHost: localhost\n\n", Progress.WHOLE),
        (HEAD + b"Content-Length: 1001\r\n\r\n", Progress.BODY_TOO_LARGE),
        (HEAD + b"Content-Length: " + b"9" * 5_000 + b"\r\n\r\n", Progress.BODY_TOO_LARGE),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n3e9\r\n", Progress.BODY_TOO_LARGE),
        (chunked([b"x" * 600, b"x" * 600]), Progress.BODY_TOO_LARGE),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", Progress.WHOLE),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * 2_000, Progress.WHOLE),
        (HEAD + b"A: " + b"x" * MAX_HEAD_BYTES, Progress.HEAD_TOO_LARGE),
        (HEAD + b"A: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n", Progress.HEAD_TOO_LARGE),
    ],
)
def test_what_is_said_of_a_request_that_is_not_whole(sent: bytes, said: Progress) -> None:
    arrival = Arrival(MOST)
    arrival.data += sent
    assert arrival.progress() is said


def test_the_largest_body_is_taken() -> None:
    for request in (sized(b"x" * MOST), chunked([b"x" * MOST])):
        assert arrive([request])[1] == [request]
