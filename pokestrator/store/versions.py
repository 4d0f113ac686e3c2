"""Versions of subagents: immutable rows; the subagent's own row names the current one. And how each of them does."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import datetime

from psycopg.rows import DictRow

from pokestrator.jobs import Verdict
from pokestrator.store.pool import Connection, ConnectionSource
from pokestrator.subagents import Author, Definition, Origin, State, Subagent

INSERT_VERSION = """
INSERT INTO subagent_versions (subagent_id, version, author, note, description, system_prompt, tools, model, max_turns,
    timeout_seconds, max_budget_usd, credentials, optional_credentials, hosts, digest)
VALUES (%(subagent_id)s, %(version)s, %(author)s, %(note)s, %(description)s, %(system_prompt)s, %(tools)s, %(model)s,
    %(max_turns)s, %(timeout_seconds)s, %(max_budget_usd)s, %(credentials)s, %(optional_credentials)s, %(hosts)s,
    %(digest)s)"""

CURRENT = """
SELECT s.id, s.name, s.origin, s.state, s.version, v.author, v.description, v.system_prompt, v.tools, v.model,
    v.max_turns, v.timeout_seconds, v.max_budget_usd, v.credentials, v.optional_credentials, v.hosts, v.digest,
    s.created_at
FROM subagents s JOIN subagent_versions v ON v.subagent_id = s.id AND v.version = s.version"""

LOCK = "SELECT id FROM subagents WHERE name = %s FOR UPDATE"

# Of the ended runs that are still kept: those that were cancelled say nothing of the version. One that was done well
# and then rejected by the person is no success.
FIGURES = """
SELECT count(*) AS runs,
    avg((j.state = 'succeeded' AND j.verdict IS DISTINCT FROM 'bad')::integer)::float AS success_share,
    percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM j.finished_at - j.run_began_at)) AS p50_seconds,
    avg(j.cost_usd) AS mean_cost_usd
FROM jobs j
WHERE j.subagent_id = v.subagent_id AND j.subagent_version = v.version AND j.state IN ('succeeded', 'failed')"""

OF_ONE = f"""
SELECT v.*, f.* FROM subagents s JOIN subagent_versions v ON v.subagent_id = s.id, LATERAL ({FIGURES}) f
WHERE s.name = %s ORDER BY v.version"""

OF_ALL = f"""
SELECT s.id, s.name, s.origin, s.state, v.*, f.*
FROM subagents s JOIN subagent_versions v ON v.subagent_id = s.id AND v.version = s.version, LATERAL ({FIGURES}) f
WHERE %(archived)s OR s.state <> 'archived' ORDER BY s.name LIMIT %(limit)s"""

DESCRIPTIONS = """
SELECT s.name, v.description FROM subagents s JOIN subagent_versions v ON v.subagent_id = s.id AND v.version = s.version
WHERE s.state <> 'archived'"""


VERDICTS = """
SELECT j.id AS request_id, j.verdict_at AS at, j.subagent_version AS version, j.verdict,
    coalesce(j.verdict_note, '') AS note
FROM jobs j JOIN subagents s ON s.id = j.subagent_id
WHERE s.name = %s AND j.verdict IS NOT NULL ORDER BY j.verdict_at DESC LIMIT %s"""


@dataclass(frozen=True)
class Judged:
    """What a person said of a result."""

    request_id: uuid.UUID
    at: datetime
    version: int
    verdict: Verdict
    note: str


@dataclass(frozen=True)
class Figures:
    """How a version did in the runs that are kept: `success_share` is 0 to 1; all None where there was no run."""

    runs: int
    success_share: float | None
    p50_seconds: float | None
    mean_cost_usd: float | None


@dataclass(frozen=True)
class Version:
    """A version with its figures."""

    number: int
    author: Author
    at: datetime
    note: str
    definition: Definition
    figures: Figures


class Versions:
    """What people see of subagents and their versions. Raises StoreUnavailable when PostgreSQL cannot be reached."""

    def __init__(self, source: ConnectionSource) -> None:
        self._source = source

    def of(self, name: str) -> list[Version]:
        """All versions of a subagent, the first one first; none if it is not stored."""
        with self._source.connection() as connection:
            return [_version_of(row) for row in connection.execute(OF_ONE, [name])]

    def current(self, limit: int, *, archived: bool = False) -> list[tuple[Subagent, Version]]:
        """Subagents, by their names, each with its current version; those that are `archived` only if wanted."""
        with self._source.connection() as connection:
            rows = connection.execute(OF_ALL, {"limit": limit, "archived": archived})
            return [(subagent_of(row), _version_of(row)) for row in rows]

    def verdicts(self, name: str, limit: int) -> list[Judged]:
        """What people said of a subagent's results that are still kept, the latest first."""
        with self._source.connection() as connection:
            rows = connection.execute(VERDICTS, [name, limit])
            return [Judged(**{**row, "verdict": Verdict(row["verdict"])}) for row in rows]

    def descriptions(self) -> dict[str, str]:
        """The descriptions of all subagents that can be matched, by their names."""
        with self._source.connection() as connection:
            return {row["name"]: row["description"] for row in connection.execute(DESCRIPTIONS)}


def lock_subagent(connection: Connection, name: str) -> bool:
    """Lock the row of this name until the end of the transaction; False if there is none.

    A statement of its own: one that locks while it joins finds nothing when it had to wait for a new version, because
    it looks for the version that it saw before it waited.
    """
    return connection.execute(LOCK, [name]).fetchone() is not None


def locked(connection: Connection, name: str) -> DictRow | None:
    """A row of CURRENT, whose subagent is locked until the end of the transaction."""
    if not lock_subagent(connection, name):
        return None
    return connection.execute(f"{CURRENT} WHERE s.name = %s", [name]).fetchone()


def insert_version(
    connection: Connection, subagent_id: int, version: int, author: Author, definition: Definition, note: str = ""
) -> None:
    """Write a version; the row of its subagent must be locked. It does not become the current one by this."""
    fields = definition.model_dump(include=set(Definition.model_fields))
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    keys = {"subagent_id": subagent_id, "version": version, "author": author, "digest": definition.digest()}
    connection.execute(INSERT_VERSION, {**values, **keys, "note": note})


def definition_of(row: DictRow) -> Definition:
    """The definition in a row that has a version's columns."""
    return Definition(**{name: row[name] for name in Definition.model_fields})


def subagent_of(row: DictRow) -> Subagent:
    """A row of CURRENT."""
    return Subagent(
        row["id"], row["name"], Origin(row["origin"]), row["version"], definition_of(row), State(row["state"])
    )


def _version_of(row: DictRow) -> Version:
    figures = Figures(row["runs"], row["success_share"], row["p50_seconds"], row["mean_cost_usd"])
    author = Author(row["author"])
    return Version(row["version"], author, row["created_at"], row["note"], definition_of(row), figures)
