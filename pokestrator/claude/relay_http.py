"""HTTP as the relay speaks it with agents: one connection carries one request, and what is refused says why."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any, cast

IDLE_SECONDS = 10.0  # that a client may stay silent while we wait for its request
LONGEST_LINE = 65_536  # bytes of a request's first line
MOST_BODY = 16 * 2**20  # bytes; Claude's API takes twice as much, and no conversation is as long


class Refused(Exception):
    """The request is answered with this status and this sentence."""

    def __init__(self, status: int, kind: str, sentence: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status, self.kind, self.sentence, self.headers = status, kind, sentence, dict(headers or {})


class Conversation(BaseHTTPRequestHandler):
    """One connection, from its request to its answer."""

    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS
    disable_nagle_algorithm = True  # events are small writes

    def handle(self) -> None:
        self.close_connection = True
        try:
            self.raw_requestline = self.rfile.readline(LONGEST_LINE + 1)
            if not self.raw_requestline:
                return
            if len(self.raw_requestline) > LONGEST_LINE:
                self.requestline = self.command = self.request_version = ""
                raise Refused(414, "invalid_request_error", "the address is too long")
            if self.parse_request():  # else it has answered
                self.respond()
        except Refused as refusal:
            self.refuse(refusal)
        except OSError:  # the client is gone, or what it waited for has broken off: nobody is left to be told
            return

    def respond(self) -> None:
        """Answer the request whose head has come. Raises Refused, OSError."""
        raise NotImplementedError

    def refuse(self, refusal: Refused) -> None:
        """In the words of Claude's API, whose clients show the message; others find the sentence in the first line."""
        body = {"type": "error", "error": {"type": refusal.kind, "message": refusal.sentence}}
        data = json.dumps(body).encode()
        self.begin(
            refusal.status,
            {**refusal.headers, "content-type": "application/json", "content-length": str(len(data))},
            re.sub(r"[^ -~]", "?", refusal.sentence),
        )
        if self.command != "HEAD":
            self.wfile.write(data)

    def begin(self, status: int, headers: Mapping[str, str], reason: str | None = None) -> None:
        """The head of an answer, after which the connection ends."""
        self.send_response_only(status, reason)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("connection", "close")
        self.end_headers()

    def body(self) -> bytes:
        """The request's body. Raises Refused unless its length is said once, plainly, and is not too much."""
        lengths = self.headers.get_all("content-length") or []
        if self.headers.get_all("transfer-encoding") or len(lengths) > 1:
            raise Refused(400, "invalid_request_error", "say the body's length once, by content-length")
        if not lengths or not re.fullmatch(r"[0-9]{1,12}", lengths[0]):
            raise Refused(411, "invalid_request_error", "the body's length is missing")
        length = int(lengths[0])
        if length > MOST_BODY:
            raise Refused(413, "request_too_large", f"the body has more than {MOST_BODY} bytes")
        data = self.rfile.read(length)
        if len(data) < length:
            raise ConnectionError("the body ended early")
        return data

    def early_bytes(self) -> bytes:
        """What has already come after the head; from now on the socket waits for nothing."""
        self.connection.setblocking(False)
        reader = cast(io.BufferedReader, self.rfile)
        return reader.read(len(reader.peek(1)))

    # BaseHTTPRequestHandler's own answers and log

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        self.refuse(Refused(int(code), "invalid_request_error", message or "not understood"))

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: what agents ask is in their timelines."""
