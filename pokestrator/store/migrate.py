"""Numbered migrations, applied at boot. Any number of processes may boot at once: an advisory lock lets one apply."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import psycopg

from pokestrator.errors import PokestratorError, StoreUnavailable
from pokestrator.store.pool import Connection, Database, reason_of

FOLDER = Path(__file__).parent / "migrations"
LOCK_KEY = 0x706F6B65  # "poke"
MIGRATION_SECONDS = 300
TURN_SECONDS = 20  # to wait for the process that migrates; who gives up tries again
TABLE_SECONDS = 2  # to wait for a table

LEDGER = """
CREATE TABLE IF NOT EXISTS schema_migrations (
    number integer PRIMARY KEY,
    name text NOT NULL,
    checksum text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
)"""


class MigrationChanged(PokestratorError):
    """A migration that was applied before has another text now. Put the old text back and add a new number."""


@dataclass(frozen=True)
class Migration:
    number: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


def load_migrations(folder: Path = FOLDER) -> list[Migration]:
    """The files `NNNN_name.sql` of `folder` in their order."""
    return [
        Migration(int(path.stem.split("_", 1)[0]), path.stem, path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.sql"))
    ]


def migrate(database: Database, migrations: list[Migration] | None = None) -> list[str]:
    """Apply what is missing, each migration in its own transaction. Returns the names applied by this call.

    Raises StoreUnavailable, also when PostgreSQL refuses a migration; MigrationChanged when an applied file was edited.
    """
    applied = []
    with database.connect(operation_seconds=MIGRATION_SECONDS + 10) as connection:
        try:
            connection.execute(f"SET statement_timeout = '{MIGRATION_SECONDS}s'".encode())
            connection.execute(f"SET lock_timeout = '{TURN_SECONDS}s'".encode())
            connection.execute("SELECT pg_advisory_lock(%s)", [LOCK_KEY])
            # A change of a table that waits for a long reader holds up all who come after it: rather try again later.
            connection.execute(f"SET lock_timeout = '{TABLE_SECONDS}s'".encode())
            connection.execute(LEDGER)
            for migration in load_migrations() if migrations is None else migrations:
                if _apply(connection, migration):
                    applied.append(migration.name)
        except psycopg.Error as error:
            raise StoreUnavailable(reason_of(error)) from error
    return applied  # closing the connection has released the lock


def _apply(connection: Connection, migration: Migration) -> bool:
    row = connection.execute("SELECT checksum FROM schema_migrations WHERE number = %s", [migration.number]).fetchone()
    if row is not None:
        if row["checksum"] != migration.checksum:
            raise MigrationChanged(
                f"{migration.name}.sql was changed after it had been applied; put it back and add a new migration"
            )
        return False
    with connection.transaction():
        connection.execute(migration.sql.encode())
        connection.execute(
            "INSERT INTO schema_migrations (number, name, checksum) VALUES (%s, %s, %s)",
            [migration.number, migration.name, migration.checksum],
        )
    return True
