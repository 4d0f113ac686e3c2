"""Credentials of providers in PostgreSQL: encrypted, and read only for the run whose subagent names them.

All functions raise StoreUnavailable when PostgreSQL cannot be reached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from pokestrator.errors import SecretKeyError
from pokestrator.store.pool import ConnectionSource
from pokestrator.store.secrets import Vault

# xmax is 0 for a row that this statement has made.
SET = """
INSERT INTO credentials (name, secret) VALUES (%(name)s, %(secret)s)
ON CONFLICT (name) DO UPDATE SET secret = excluded.secret, updated_at = now()
RETURNING xmax = 0 AS is_new"""

LIST = "SELECT name, secret, created_at, updated_at FROM credentials ORDER BY name"

REMOVE = "DELETE FROM credentials WHERE name = %s"

VALUES = "SELECT name, secret FROM credentials WHERE name = ANY (%s)"

EVERY = "SELECT secret FROM credentials"

NOT_STORED = "is not stored"


@dataclass(frozen=True)
class Entry:
    """A stored credential, without its value. `problem`: why it cannot be decrypted, or empty."""

    name: str
    created_at: datetime
    updated_at: datetime
    problem: str


class Credentials:
    """The credentials table. Values leave it by values() and every_value() alone."""

    def __init__(self, source: ConnectionSource, vault: Vault) -> None:
        self._source = source
        self._vault = vault

    def set(self, name: str, value: str) -> bool:
        """Store a value; whether there was none of this name before. Raises SecretKeyError without a key."""
        secret = self._vault.encrypt(value)
        with self._source.connection() as connection:
            row = connection.execute(SET, {"name": name, "secret": secret}).fetchone()
        assert row is not None
        return bool(row["is_new"])

    def list(self) -> Sequence[Entry]:
        """All of them, by name."""
        with self._source.connection() as connection:
            rows = connection.execute(LIST).fetchall()
        return [Entry(row["name"], row["created_at"], row["updated_at"], self._open(row["secret"])[1]) for row in rows]

    def remove(self, name: str) -> bool:
        """Delete one; whether there was one."""
        with self._source.connection() as connection:
            return connection.execute(REMOVE, [name]).rowcount > 0

    def values(self, names: Sequence[str]) -> tuple[dict[str, str], Mapping[str, str]]:
        """The values of those that can be had, and for each other name why not, in the order of `names`."""
        if not names:
            return {}, {}
        with self._source.connection() as connection:
            stored = {row["name"]: row["secret"] for row in connection.execute(VALUES, [list(names)])}
        found: dict[str, str] = {}
        missing: dict[str, str] = {}
        for name in names:
            value, problem = self._open(stored[name]) if name in stored else (None, NOT_STORED)
            if value is None:
                missing[name] = problem
            else:
                found[name] = value
        return found, missing

    def every_value(self) -> Sequence[str]:
        """All that can be decrypted, for whoever takes secrets out of texts."""
        with self._source.connection() as connection:
            secrets = [row["secret"] for row in connection.execute(EVERY)]
        return [value for value, _ in map(self._open, secrets) if value is not None]

    def _open(self, secret: str) -> tuple[str | None, str]:
        """A value, or None and why it cannot be decrypted."""
        try:
            return self._vault.decrypt(secret), ""
        except SecretKeyError as error:
            return None, f"cannot be decrypted: {error}"
