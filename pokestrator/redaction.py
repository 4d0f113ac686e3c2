"""Takes known secrets out of texts, also where they are written in another way: base64, hex, percent-encoded, JSON,
and broken into lines, as `base64` and `xxd -p` print them.

By searches for fixed strings: one regular expression of all spellings takes two to three times as long on a long text,
and 20 ms to be made, each time that a run begins or ends.
"""

from __future__ import annotations

import base64
import functools
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs, quote, quote_plus, unquote, urlsplit

REDACTED = "[secret]"
LEAST_CHARACTERS = 8  # shorter values are no secrets, and would be found in ordinary words


class Redactor:
    """Call it with a text. Thread-safe; `also` adds secrets for a while, `learn` for good."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._lock = threading.Lock()
        self._known = Counter[str]()
        self._spellings: tuple[str, ...] = ()  # the longest first
        self._unbroken: tuple[str, ...] = ()  # the same without their own white space, which may have become another
        self.learn(secrets)

    def __call__(self, text: str) -> str:
        for spelling in self._spellings:
            if spelling in text:
                text = text.replace(spelling, REDACTED)
        whole = _without_breaks(text)
        for spelling in self._unbroken:
            if spelling in whole:
                text = _broken(spelling).sub(REDACTED, text)
        return text

    def learn(self, secrets: Iterable[str]) -> None:
        """Know these from now on."""
        self._change(Counter(secrets), Counter())

    @contextmanager
    def also(self, secrets: Iterable[str]) -> Iterator[None]:
        """Know these too, for as long as the block lasts."""
        added = Counter(secrets)
        self._change(added, Counter())
        try:
            yield
        finally:
            self._change(Counter(), added)

    def _change(self, added: Counter[str], removed: Counter[str]) -> None:
        with self._lock:
            self._known = self._known + added - removed
            known = [secret for secret in self._known if len(secret) >= LEAST_CHARACTERS]
            self._spellings = _longest_first(text for secret in known for text in spellings(secret))
            self._unbroken = _longest_first(text for secret in known for text in _unbroken(secret))


def redacted(value: Any, redact: Callable[[str], str]) -> Any:
    """A value of JSON with every text in it, names included, redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redact(str(name)): redacted(each, redact) for name, each in value.items()}
    return [redacted(each, redact) for each in value] if isinstance(value, (list, tuple)) else value


@functools.lru_cache(maxsize=256)  # runs come and go with the same ones
def spellings(secret: str) -> frozenset[str]:
    """How a secret, or what is secret in it, may stand in a text."""
    each_of = {secret, *passwords(secret), *_keys(secret)}
    # Shells drop the line's end that a key's file has.
    stripped = {each.strip() for each in each_of}
    return frozenset(text for each in each_of | stripped if len(each) >= LEAST_CHARACTERS for text in _spelled(each))


@functools.lru_cache(maxsize=256)
def _unbroken(secret: str) -> frozenset[str]:
    return frozenset(map(_without_breaks, spellings(secret)))


def _spelled(secret: str) -> set[str]:
    data = secret.encode("utf-8", "surrogateescape")
    found = {secret, secret.lower()}  # as part of a host's name
    found |= {json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], ascii(secret)[1:-1]}
    # As Python escapes for paths, for queries and for forms; as JavaScript does; and every byte.
    percent = {quote(data), quote(data, safe=""), quote_plus(data), quote(data, safe="!'()*")}
    percent.add("%" + data.hex("%").upper())
    found |= percent | {_PERCENT.sub(lambda code: code[0].lower(), each) for each in percent}
    found |= {data.hex(), data.hex().upper()}
    for before in range(3):  # base64 takes three bytes at a time: what stands before shifts it
        whole = base64.b64encode(bytes(before) + data).decode()
        # Only the characters that are made of the secret's own bytes alone.
        inner = whole[-(-before * 4 // 3) : (before + len(data)) * 4 // 3]
        found |= {inner, inner.translate(_URL_SAFE)}
    return found


def passwords(address: str) -> set[str]:
    """What is secret in an address that holds a password: itself, and the password as it stands there and decoded."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return set()
    fields = parse_qs(parts.query).get("password", [])  # PostgreSQL takes one there too
    found = {*fields, *([parts.password, unquote(parts.password)] if parts.password else [])}
    return found | {address} if found else found


def _keys(secret: str) -> set[str]:
    """What is secret in one that is a JSON object, such as the key file of a cloud's service account."""
    try:
        fields = json.loads(secret) if secret.lstrip().startswith("{") else {}
    except (ValueError, RecursionError):
        return set()
    return {value for name, value in fields.items() if isinstance(value, str) and _NAMES_A_KEY.search(name)}


def _longest_first(texts: Iterable[str]) -> tuple[str, ...]:
    long_enough = {text for text in texts if len(text) >= LEAST_CHARACTERS}
    return tuple(sorted(long_enough, key=lambda text: (-len(text), text)))


def _without_breaks(text: str) -> str:
    """`text` without what _BREAK finds."""
    if "\\" in text:
        text = _ESCAPED_BREAK.sub("", text)
    return "".join(text.split())


def _broken(spelling: str) -> re.Pattern[str]:
    """Finds it wherever it is broken into pieces."""
    return re.compile(_BREAK.join(map(re.escape, spelling)))


_BREAK = r"(?:\s|\\+[nrt])*"  # white space, also as JSON writes it, and JSON in JSON
_ESCAPED_BREAK = re.compile(r"\\+[nrt]")
_NAMES_A_KEY = re.compile("key|secret|token|password", re.IGNORECASE)
_PERCENT = re.compile("%[0-9A-F]{2}")
_URL_SAFE = str.maketrans("+/", "-_")
