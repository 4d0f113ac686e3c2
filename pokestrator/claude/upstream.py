"""Claude's API as the relay reaches it: its address, the owner's key, and the owner's proxy and CA files."""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Callable, Mapping
from urllib.parse import unquote, urlsplit

import urllib3
from requests.utils import DEFAULT_CA_BUNDLE_PATH, should_bypass_proxies
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, ProxyError, SSLError

from pokestrator.telemetry import get_logger

log = get_logger(__name__)

API = "https://api.anthropic.com"
KEY, OAUTH = "ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN"
CA_FILES = ("SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS")
PROXIES = frozenset({"HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "https_proxy", "http_proxy", "no_proxy"})
OWNERS = PROXIES | {KEY, OAUTH, "ANTHROPIC_BASE_URL"}  # names that no agent's process is given with the owner's values
CONNECT_SECONDS = 10.0

Connected = Callable[[socket.socket], None]


class Unreachable(Exception):
    """No connection to Claude's API could be made; the text says why."""


class Broken(Exception):
    """The connection ended before the answer did."""


class Upstream:
    """What the relay does its requests with. Opens nothing by itself."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """`environment`: the owner's."""
        self._url = (environment.get("ANTHROPIC_BASE_URL") or API).rstrip("/")
        self._key, self._oauth = environment.get(KEY), environment.get(OAUTH)
        self._ca_files = [environment[name] for name in CA_FILES if environment.get(name)]
        self._proxy = _proxy_for(self._url, environment)
        self._context: ssl.SSLContext | None = None

    @property
    def token_name(self) -> str | None:
        """The variable that the CLI reads its key or token from; None when the owner has neither."""
        return KEY if self._key else OAUTH if self._oauth else None

    @property
    def secrets(self) -> list[str]:
        """What nobody must be told of what it may say: its own key."""
        return [secret for secret in (self._key, self._oauth) if secret]

    def prepare(self) -> None:
        """Read the CA files, so that no request waits for it."""
        if self._context is None:
            context = ssl.create_default_context(cafile=DEFAULT_CA_BUNDLE_PATH)
            for path in self._ca_files:
                try:
                    context.load_verify_locations(path)
                except OSError as error:  # as Node does: it may not even be needed
                    log.error("ca_file_not_read", path=path, reason=str(error))
            self._context = context

    def connections(self, connected: Connected) -> Connections:
        """Connections for one run: none of them is ever another's. `connected` is told of each."""
        self.prepare()
        if self._proxy is None:
            manager = urllib3.PoolManager(ssl_context=self._context)
        else:
            authority = urlsplit(self._proxy).netloc.rpartition("@")[0]
            headers = urllib3.make_headers(proxy_basic_auth=unquote(authority)) if authority else None
            manager = urllib3.ProxyManager(self._proxy, proxy_headers=headers, ssl_context=self._context)
        manager.pool_classes_by_scheme = _pools(connected)
        return Connections(manager, self._url, self._credentials())

    def _credentials(self) -> dict[str, str]:
        if self._key:
            return {"x-api-key": self._key}
        return {"authorization": f"Bearer {self._oauth}"} if self._oauth else {}


class Connections:
    """One run's way to the API, with the owner's key. Thread-safe."""

    def __init__(self, manager: urllib3.PoolManager, url: str, credentials: Mapping[str, str]) -> None:
        self._manager = manager
        self._url = url
        self._credentials = credentials

    def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
        """The answer, its body still to be read; `headers` name nobody. Raises Unreachable, Broken."""
        # No time limit for reading: the run's own deadline ends it, which cuts the connection.
        timeout = urllib3.Timeout(connect=CONNECT_SECONDS, read=None)
        try:
            return self._manager.urlopen(
                "POST",
                self._url + path,
                body=body,
                headers={**headers, **self._credentials},
                timeout=timeout,
                redirect=False,
                retries=False,
                preload_content=False,
                decode_content=True,
            )
        except (NewConnectionError, ConnectTimeoutError, ProxyError, SSLError) as error:
            raise Unreachable(_why(error)) from error
        except (HTTPError, OSError) as error:
            raise Broken(str(error)) from error

    def close(self) -> None:
        self._manager.clear()


def _pools(connected: Connected) -> dict[str, type[HTTPConnectionPool]]:
    """Pools whose connections tell of their sockets, which the end of a run cuts."""

    class Plain(HTTPConnection):
        def connect(self) -> None:
            super().connect()
            connected(self.sock)

    class Secure(HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            connected(self.sock)

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = Secure

    return {"http": PlainPool, "https": SecurePool}


def _proxy_for(url: str, environment: Mapping[str, str]) -> str | None:
    """The owner's proxy for this address; None for a direct way."""
    no_proxy = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    if should_bypass_proxies(url, no_proxy=f"{no_proxy},127.0.0.1,localhost"):
        return None
    scheme = urlsplit(url).scheme
    return environment.get(f"{scheme}_proxy") or environment.get(f"{scheme.upper()}_PROXY") or None


def _why(error: HTTPError) -> str:
    """What kept us from connecting, with the word that programmers know it by."""
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.errno):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, socket.gaierror):
        return f"ENOTFOUND: {cause.strerror}"
    if isinstance(cause, ssl.SSLError):
        return f"certificate or TLS: {cause.reason}"
    if isinstance(cause, OSError) and cause.errno:
        return f"{errno.errorcode.get(cause.errno, cause.errno)}: {cause.strerror}"
    return type(error).__name__
