"""Who may talk to the MCP endpoint: asked before anything of a request's body is looked at."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence
from functools import partial
from urllib.parse import urlsplit

import mcp_types as types
from flask import Response, request

from pokestrator.addresses import is_loopback, matches
from pokestrator.telemetry import get_logger
from pokestrator.web.answers import envelope, json_answer, log_rejection, rejected
from pokestrator.web.limits import RequestLimits

log = get_logger(__name__)

TOO_MANY_REQUESTS = -32_000  # of JSON-RPC's codes, the first that are a server's own

# What a page of an allowed origin may send. Browsers ask for it before they send what could not come from a form.
PREFLIGHT = {
    "Access-Control-Allow-Methods": "POST",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, MCP-Protocol-Version, Mcp-Method, Mcp-Name",
    "Access-Control-Max-Age": "600",
}

Refuse = Callable[[], Response]


class Guard:
    """The key, the names that requests may be addressed to, the origins whose pages may call, and how often.

    Without a key only this machine may call, by a loopback name: else a web page could reach us from the person's own
    browser, by rebinding its name to this machine.
    """

    def __init__(
        self,
        api_key: str | None = None,
        *,
        hosts: Sequence[str] = (),
        origins: Sequence[str] = (),
        is_local: bool = True,
        requests_per_minute: int = 600,
    ) -> None:
        """`hosts`: names or `*.` and a name; none: any, where there is a key. `is_local`: we listen on loopback alone.

        Raises ValueError when `api_key` is blank.
        """
        if api_key is not None and not api_key.strip():
            raise ValueError("api_key is blank; give a key, or None for an open endpoint")
        # surrogateescape: the environment may hold bytes that are not UTF-8, and a key is bytes.
        self._api_key = None if api_key is None else api_key.encode("utf-8", "surrogateescape")
        self._hosts = tuple(host.strip("[]") for host in hosts)
        self._origins = frozenset(origins)
        self._is_local = is_local
        self._limits = RequestLimits(requests_per_minute)

    def turn_away(self) -> Response | None:
        """The answer to whoever has no business here, or comes too often; None for a caller."""
        address = request.remote_addr or ""
        answer = self._refusal() or self._preflight() or self._key_refusal()
        if answer is None:
            wait = self._limits.count_caller(address)
            return None if wait is None else _come_back(wait, log.warning)
        wait = self._limits.count_stranger(address)
        # Quietly: a line for each request of a flood would be a second one.
        return answer() if wait is None else _come_back(wait, log.debug)

    def open_to_page(self, response: Response) -> Response:
        """Let a page of an allowed origin read the answer."""
        origin = request.headers.get("Origin")
        if origin and self._is_allowed(origin):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.vary.add("Origin")
        return response

    def _refusal(self) -> Refuse | None:
        if not self._is_ours(_host_of("//" + request.headers.get("Host", ""))):
            return partial(rejected, 421, types.INVALID_REQUEST, f"Invalid Host header: {self._only('hosts')} may call")
        origin = request.headers.get("Origin")
        if origin and not self._is_allowed(origin):
            return partial(
                rejected, 403, types.INVALID_REQUEST, f"Invalid Origin header: {self._only('origins')} may call"
            )
        return None

    def _preflight(self) -> Refuse | None:
        """A browser's own question, which carries no key and starts nothing."""
        asks = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
        return partial(Response, status=204, headers=PREFLIGHT) if asks and request.headers.get("Origin") else None

    def _key_refusal(self) -> Refuse | None:
        if self._api_key is None:
            return None
        # WSGI hands headers over as latin-1, so this gives back the bytes that were sent.
        header = request.environ.get("HTTP_AUTHORIZATION", "").encode("latin-1")
        scheme, _, key = header.partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._api_key):
            return None
        return partial(_unauthorized, "wrong key" if header else "no key")

    def _is_ours(self, host: str) -> bool:
        if self._api_key is None:
            return is_loopback(host)
        if not self._hosts:
            return True
        return matches(host, self._hosts) or (self._is_local and is_loopback(host))

    def _is_allowed(self, origin: str) -> bool:
        return origin.lower() in self._origins or (self._api_key is None and is_loopback(_host_of(origin)))

    def _only(self, listed: str) -> str:
        return f"only listed {listed}" if self._api_key else "without a key, only this machine"


def _host_of(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:  # no address at all, such as "//["
        return ""


def _unauthorized(why: str) -> Response:
    log_rejection(401, why)
    body = {"error": "unauthorized", "message": "Send this server's key as `Authorization: Bearer <key>`."}
    return json_answer(body, 401, {"WWW-Authenticate": "Bearer"})


def _come_back(wait: int, write: Callable[..., object]) -> Response:
    write("mcp_rejected", status=429, reason="too many requests", address=request.remote_addr)
    error = {"code": TOO_MANY_REQUESTS, "message": f"Too many requests. Try again in {wait} seconds."}
    return json_answer(envelope(None, error=error), 429, {"Retry-After": str(wait)})
