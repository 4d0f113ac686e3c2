"""Versions of subagents: immutable rows; the subagent's own row names the current one."""

from __future__ import annotations

from psycopg.rows import DictRow

from pokestrator.store.pool import Connection
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
