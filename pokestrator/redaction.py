"""Takes known secrets out of texts, also where they are written in another way: base64, hex, percent-encoded, JSON."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, quote_plus

REDACTED = "[secret]"
LEAST_CHARACTERS = 8  # shorter values are no secrets, and would be found in ordinary words


class Redactor:
    """Call it with a text. Thread-safe; `also` adds secrets for a while."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._lock = threading.Lock()
        self._known = Counter(secrets)
        self._pattern = _pattern(self._known)

    def __call__(self, text: str) -> str:
        pattern = self._pattern
        return pattern.sub(REDACTED, text) if pattern is not None else text

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
            self._pattern = _pattern(self._known)


def redacted(value: Any, redact: Callable[[str], str]) -> Any:
    """A value of JSON with every text in it, names included, redacted."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redact(str(name)): redacted(each, redact) for name, each in value.items()}
    return [redacted(each, redact) for each in value] if isinstance(value, (list, tuple)) else value


def spellings(secret: str) -> set[str]:
    """How a secret may stand in a text."""
    data = secret.encode("utf-8", "surrogateescape")
    found = {secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], ascii(secret)[1:-1]}
    found |= {quote(data), quote(data, safe=""), quote_plus(data), data.hex(), data.hex().upper()}
    for before in range(3):  # base64 takes three bytes at a time: what stands before shifts it
        whole = base64.b64encode(bytes(before) + data).decode()
        # Only the characters that are made of the secret's own bytes alone.
        inner = whole[-(-before * 4 // 3) : (before + len(data)) * 4 // 3]
        found |= {inner, inner.translate(_URL_SAFE)}
    return {each for each in found if len(each) >= LEAST_CHARACTERS}


_URL_SAFE = str.maketrans("+/", "-_")


def _pattern(known: Iterable[str]) -> re.Pattern[str] | None:
    """Finds any spelling of any of these, the longest first."""
    texts = {text for secret in known if len(secret) >= LEAST_CHARACTERS for text in spellings(secret)}
    if not texts:
        return None
    return re.compile("|".join(map(re.escape, sorted(texts, key=lambda text: (-len(text), text)))))
