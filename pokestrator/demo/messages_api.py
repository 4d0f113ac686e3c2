"""A scripted stand-in for Anthropic's Messages API on loopback, for the demo and the tests. No model is behind it.

`python -m pokestrator.demo.messages_api [--port N]` prints its address and serves until SIGTERM. What it answers is
in script.py; this file speaks HTTP: JSON and server-sent events, and the faults on the way.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from pokestrator.demo.loopback import Handler, LoopbackServer
from pokestrator.demo.script import FAULTS, ScriptError, Step, kind_of, message_of, turn_of

MESSAGES = "/v1/messages"
KEPT_REQUESTS = 10_000


@dataclass(frozen=True)
class RecordedRequest:
    """One request as it came. `at` is time.time(); `path` has no query; header names are in lower case."""

    at: float
    path: str
    headers: Mapping[str, str] = field(repr=False)
    body: dict[str, Any]
    method: str = "POST"


class MessagesApi(LoopbackServer):
    """The server; `url` is for ANTHROPIC_BASE_URL.

    With `api_key` only that key is let in (x-api-key or a Bearer token); without, any.
    """

    def __init__(self, api_key: str | None = None, port: int = 0) -> None:
        super().__init__(port)
        self.api_key = api_key
        self._news = threading.Condition()
        self._requests: deque[RecordedRequest] = deque(maxlen=KEPT_REQUESTS)
        self._questions = 0
        self._attempts: Counter[str] = Counter()

    @property
    def requests(self) -> list[RecordedRequest]:
        """The last 10,000 requests, oldest first."""
        with self._news:
            return list(self._requests)

    def wait_for_requests(self, n: int, timeout: float) -> bool:
        """Wait until `n` requests to /v1/messages have come since the start; False after `timeout` seconds."""
        with self._news:
            return self._news.wait_for(lambda: self._questions >= n, timeout)

    def record(self, request: RecordedRequest) -> None:
        with self._news:
            self._requests.append(request)
            self._questions += request.path == MESSAGES and request.method == "POST"
            self._news.notify_all()

    def attempt(self, key: str) -> int:
        """How many requests of this turn have come, with this one."""
        with self._news:
            self._attempts[key] += 1
            return self._attempts[key]


class _Handler(Handler):
    disable_nagle_algorithm = True  # events are small writes

    @property
    def _api(self) -> MessagesApi:
        api: MessagesApi = self.server.owner
        return api

    def do_HEAD(self) -> None:
        self._record({})
        self._send_json(200, {})

    def do_GET(self) -> None:
        path = self._record({})
        if path == "/v1/models":
            self._send_json(200, {"data": [], "has_more": False, "first_id": None, "last_id": None})
        else:
            self._send_error(404, "not_found_error", f"the script has no {path}")

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        try:
            body = json.loads(raw)
        except ValueError:
            body = None
        path = self._record(body if isinstance(body, dict) else {})
        if self.server.stopping.is_set():
            self.close_connection = True
        elif not self._let_in():
            self._send_error(401, "authentication_error", "invalid x-api-key")
        elif not isinstance(body, dict):
            self._send_error(400, "invalid_request_error", "the body is not a JSON object")
        elif path == f"{MESSAGES}/count_tokens":
            self._send_json(200, {"input_tokens": max(1, len(raw) // 4)})
        elif path == MESSAGES:
            self._answer(body)
        else:
            self._send_error(404, "not_found_error", f"the script has no {path}")

    def _record(self, body: dict[str, Any]) -> str:
        path = urlsplit(self.path).path
        headers = {name.lower(): value for name, value in self.headers.items()}
        self._api.record(RecordedRequest(time.time(), path, headers, body, self.command))
        return path

    def _let_in(self) -> bool:
        key = self._api.api_key
        return (
            key is None or key == self.headers.get("x-api-key") or self.headers.get("authorization") == f"Bearer {key}"
        )

    def _answer(self, body: dict[str, Any]) -> None:
        try:
            turn = turn_of(body)
            step = turn.step(self._api.attempt(turn.key) if turn.key else 1)
            message = message_of(step, str(body.get("model", "scripted")))
        except ScriptError as error:
            self._send_error(400, "invalid_request_error", str(error))
            return
        if self.server.stopping.wait(step.get("delay", 0)):
            self.close_connection = True
        elif "status" in step:
            text = step.get("message", f"scripted {step['status']}")
            self._send_error(step["status"], step.get("type", "api_error"), text, step.get("headers", {}))
        elif "hang" in step and not (step.get("after_start") and body.get("stream")):
            self._hang(step)
        elif body.get("stream"):
            self._stream(step, message)
        else:
            self._send_whole(step, message)

    def _hang(self, step: Step) -> None:
        self.server.stopping.wait(step["hang"])
        self.close_connection = True

    # One JSON answer

    def _send_whole(self, step: Step, message: dict[str, Any]) -> None:
        if "sse_error" in step:
            self._send_error(529, step["sse_error"], "a scripted error")
            return
        data = json.dumps(message).encode()
        half = data[: len(data) // 2]
        if "malformed" in step:
            data = half
        self._send_head(200, {"content-type": "application/json", "content-length": str(len(data))})
        self.wfile.write(half if "cut" in step else data)

    def _send_json(self, status: int, value: dict[str, Any], headers: Mapping[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        fixed = {"content-type": "application/json", "content-length": str(len(data))}
        self._send_head(status, {**fixed, **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(data)

    def _send_error(self, status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        self._send_json(status, {"type": "error", "error": {"type": kind, "message": message}}, headers)

    def _send_head(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        self.send_header("request-id", f"req_scripted_{uuid.uuid4().hex[:16]}")
        self.send_header("connection", "close")
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    # Server-sent events

    def _stream(self, step: Step, message: dict[str, Any]) -> None:
        self._send_head(200, {"content-type": "text/event-stream; charset=utf-8", "transfer-encoding": "chunked"})
        usage = message["usage"]
        start = {**message, "content": [], "stop_reason": None, "usage": {**usage, "output_tokens": 1}}
        self._send_event("message_start", message=start)
        self._send_event("ping")
        if "sse_error" in step:
            self._send_event("error", error={"type": step["sse_error"], "message": "a scripted error"})
            self._send_chunk(b"")
            return
        for index, block in enumerate(message["content"]):
            self._send_block(index, block, half=kind_of(step) in FAULTS)
        if "hang" in step:
            self._hang(step)
        elif "malformed" in step:
            self._send_chunk(b'event: content_block_delta\ndata: {"type": "content_blo\n\n')
            self._send_chunk(b"")
        elif "cut" not in step:  # a cut leaves the chunked body without its end
            delta = {"stop_reason": message["stop_reason"], "stop_sequence": None}
            self._send_event("message_delta", delta=delta, usage={"output_tokens": usage["output_tokens"]})
            self._send_event("message_stop")
            self._send_chunk(b"")

    def _send_block(self, index: int, block: dict[str, Any], *, half: bool) -> None:
        """One content block, or the first half of it."""
        if block["type"] == "text":
            empty, kind, key, whole = {**block, "text": ""}, "text_delta", "text", block["text"]
        else:
            whole = json.dumps(block["input"])
            empty, kind, key = {**block, "input": {}}, "input_json_delta", "partial_json"
        self._send_event("content_block_start", index=index, content_block=empty)
        if half:
            whole = whole[: len(whole) // 2]
        for at in range(0, len(whole), 400):
            self._send_event("content_block_delta", index=index, delta={"type": kind, key: whole[at : at + 400]})
        if not half:
            self._send_event("content_block_stop", index=index)

    def _send_event(self, kind: str, **fields: Any) -> None:
        self._send_chunk(f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode())

    def _send_chunk(self, data: bytes) -> None:
        """One chunk of a chunked body; an empty one ends it."""
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))


MessagesApi.handler = _Handler


def main() -> None:
    parser = argparse.ArgumentParser(
        description="A scripted stand-in for Anthropic's Messages API: no model behind it."
    )
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1 (default: a free one)")
    arguments = parser.parse_args()
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with MessagesApi(port=arguments.port) as api:
        print(api.url, flush=True)
        print("Scripted: its answers are made up by a script, not by Claude.", file=sys.stderr, flush=True)
        ended.wait()


if __name__ == "__main__":
    main()
