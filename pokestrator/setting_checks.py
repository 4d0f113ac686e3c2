"""What single settings may be: each check takes a value as it came and returns it, perhaps tidied.

Text that is refused raises ValueError with what is allowed; anything else is left to the setting's type.
"""

from __future__ import annotations

import base64
import re
from urllib.parse import urlsplit

from pokestrator.addresses import is_safe_url

HOST_PATTERN = re.compile(r"(\*\.)?([a-z0-9]([a-z0-9-]*[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]*[a-z0-9])?|\[[0-9a-f:]+\]")
MAKE_SECRET_KEY = "python -m pokestrator credentials new-key"
SECRET_KEY_BYTES = 32
_STANDARD_BASE64 = str.maketrans("-_", "+/")


def check_url(value: object) -> object:
    if isinstance(value, str) and not is_safe_url(value):
        raise ValueError("an https:// address, or http:// on this machine")
    return value


def check_path(value: object) -> object:
    if isinstance(value, str) and (not value.startswith("/") or value == "/" or value.rstrip("/") == "/healthz"):
        raise ValueError("a path such as /mcp, and not /healthz")
    return value.rstrip("/") if isinstance(value, str) else value


def without_brackets(value: object) -> object:
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        return value[1:-1]
    return value


def upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def check_hosts(value: object) -> object:
    """Host names with commas between them, in lower case; `*.` in front of one means all below it, not itself."""
    if not isinstance(value, str):
        return value
    hosts = _parts(value)
    if bad := [host for host in hosts if not HOST_PATTERN.fullmatch(host)]:
        raise ValueError(f"host names with commas between, such as example.com or *.example.com, unlike {bad[0]!r}")
    return hosts


def check_origins(value: object) -> object:
    """Web origins with commas between them, in lower case."""
    if not isinstance(value, str):
        return value
    origins = _parts(value)
    if bad := [origin for origin in origins if not _is_origin(origin)]:
        raise ValueError(f"origins with commas between, such as https://example.com, unlike {bad[0]!r}")
    return origins


def check_secret_key(value: object) -> object:
    """One or several keys as `secret_keys` reads them."""
    if isinstance(value, str):
        secret_keys(value)
    return value


def secret_keys(value: str) -> tuple[bytes, ...]:
    """The keys in `value`, with commas between, each as Fernet takes it; the first one is to encrypt with.

    A key is 32 bytes in base64, URL-safe (Fernet's own) or standard (which Render's `generateValue` makes).
    """
    keys = [part.strip().translate(_STANDARD_BASE64) for part in value.split(",")]
    try:
        decoded = [base64.b64decode(key.encode(), validate=True) for key in keys]
    except ValueError:
        decoded = []
    if not decoded or any(len(key) != SECRET_KEY_BYTES for key in decoded):
        raise ValueError(f"a key as `{MAKE_SECRET_KEY}` prints one")
    return tuple(base64.urlsafe_b64encode(key) for key in decoded)


def _parts(value: str) -> tuple[str, ...]:
    return tuple(part for part in (each.strip().lower() for each in value.split(",")) if part)


def _is_origin(value: str) -> bool:
    try:
        parts = urlsplit(value)
        host, _port = parts.hostname, parts.port
    except ValueError:
        return False
    return bool(host) and parts.scheme in ("http", "https") and value == f"{parts.scheme}://{parts.netloc}"
