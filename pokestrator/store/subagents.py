"""Subagents in PostgreSQL: names, their immutable versions, the tasks they take, and the search over them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from psycopg.rows import DictRow
from psycopg.types.json import Jsonb

from pokestrator.errors import LeaseLost
from pokestrator.jobs import Job
from pokestrator.store.pool import Connection, ConnectionSource
from pokestrator.subagents import Author, Definition, Draft, Origin, Subagent, Template

SHORTLIST = 20

INSERT_SUBAGENT = """
INSERT INTO subagents (name, origin, version) VALUES (%s, %s, 1) ON CONFLICT (name) DO NOTHING RETURNING id"""

INSERT_VERSION = """
INSERT INTO subagent_versions (subagent_id, version, author, description, system_prompt, tools, model, max_turns,
    timeout_seconds, max_budget_usd, credentials, optional_credentials, hosts, digest)
VALUES (%(subagent_id)s, %(version)s, %(author)s, %(description)s, %(system_prompt)s, %(tools)s, %(model)s,
    %(max_turns)s, %(timeout_seconds)s, %(max_budget_usd)s, %(credentials)s, %(optional_credentials)s, %(hosts)s,
    %(digest)s)"""

INSERT_EXAMPLE = """
INSERT INTO subagent_examples (subagent_id, task, source) VALUES (%s, left(%s, 2000), %s) ON CONFLICT DO NOTHING"""

DELETE_TEMPLATE_EXAMPLES = "DELETE FROM subagent_examples WHERE subagent_id = %s AND source = 'template'"

# The name's words, the description and the examples: `document` here and in CANDIDATES must be made alike.
REFRESH_SEARCH = """
UPDATE subagents SET search = searchable(concat_ws(' ', replace(subagents.name, '_', ' '), v.description,
    (SELECT string_agg(task, ' ') FROM subagent_examples e WHERE e.subagent_id = subagents.id)))
FROM subagent_versions v
WHERE subagents.id = %s AND v.subagent_id = subagents.id AND v.version = subagents.version"""

CURRENT = """
SELECT s.id, s.name, s.origin, s.version, v.author, v.description, v.system_prompt, v.tools, v.model, v.max_turns,
    v.timeout_seconds, v.max_budget_usd, v.credentials, v.optional_credentials, v.hosts, v.digest, s.created_at
FROM subagents s JOIN subagent_versions v ON v.subagent_id = s.id AND v.version = s.version"""

HOLD_CLAIM = "SELECT id FROM jobs WHERE id = %s AND claim_seq = %s AND state = 'running' FOR SHARE"

# Full-text search finds stored subagents that share a word with the task (any word, the best SHORTLIST by rank);
# templates that are not stored yet are candidates beside them. For each: the task's lexemes that it knows, and its
# most similar example (shared lexemes over all lexemes of both).
CANDIDATES = """
WITH task AS (
    SELECT lexemes, coalesce((SELECT string_agg(quote_lexeme, ' | ') FROM (
            SELECT '''' || replace(replace(l, '\\', '\\\\'), '''', '''''') || '''' AS quote_lexeme
            FROM unnest(lexemes) l) q), '')::tsquery AS any_of
    FROM (SELECT tsvector_to_array(searchable(%(task)s)) AS lexemes) t
), stored AS (
    SELECT s.id, s.name, s.search FROM subagents s, task
    WHERE s.search @@ task.any_of ORDER BY ts_rank(s.search, task.any_of) DESC, s.id LIMIT %(limit)s
), templates AS (
    SELECT t.name, t.examples, searchable(concat_ws(' ', replace(t.name, '_', ' '), t.description,
        (SELECT string_agg(e, ' ') FROM jsonb_array_elements_text(t.examples) e))) AS search
    FROM jsonb_to_recordset(%(templates)s) AS t (name text, description text, examples jsonb)
    WHERE t.name NOT IN (SELECT name FROM subagents)
), candidates AS (
    SELECT name, true AS is_stored, search,
        ARRAY(SELECT tsvector_to_array(e.search)::text FROM subagent_examples e WHERE e.subagent_id = stored.id)
            AS examples
    FROM stored
    UNION ALL
    SELECT name, false, search,
        ARRAY(SELECT tsvector_to_array(searchable(e))::text FROM jsonb_array_elements_text(examples) e)
    FROM templates
)
SELECT name, is_stored, task.lexemes,
    ARRAY(SELECT unnest(task.lexemes) INTERSECT SELECT unnest(tsvector_to_array(candidates.search)) ORDER BY 1)
        AS shared,
    coalesce((SELECT max(
        (SELECT count(*) FROM unnest(e::text[]) l WHERE l = ANY (task.lexemes))::float
        / nullif((SELECT count(DISTINCT l) FROM unnest(e::text[] || task.lexemes) l), 0))
        FROM unnest(examples) e), 0) AS similarity
FROM candidates, task"""


@dataclass(frozen=True)
class Candidate:
    """A stored subagent or a template, measured against a task.

    `lexemes`: the task's own; `shared`: those of them that stand in the candidate's name, description or examples.
    `similarity`: 0 to 1, of the task and its most similar example (Jaccard index of their lexemes).
    """

    name: str
    is_stored: bool
    lexemes: tuple[str, ...]
    shared: tuple[str, ...]
    similarity: float


class Subagents:
    """The subagents' tables. All functions raise StoreUnavailable when PostgreSQL cannot be reached."""

    def __init__(self, source: ConnectionSource) -> None:
        self._source = source

    def candidates(self, task: str, templates: Sequence[Template]) -> list[Candidate]:
        """Stored subagents and templates that may fit the task, in no order."""
        described = [{"name": t.name, "description": t.description, "examples": list(t.examples)} for t in templates]
        with self._source.connection() as connection:
            values = {"task": task, "limit": SHORTLIST, "templates": Jsonb(described)}
            return [
                Candidate(row["name"], row["is_stored"], tuple(row["lexemes"]), tuple(row["shared"]), row["similarity"])
                for row in connection.execute(CANDIDATES, values)
            ]

    def get(self, name: str) -> Subagent | None:
        with self._source.connection() as connection:
            row = connection.execute(f"{CURRENT} WHERE s.name = %s", [name]).fetchone()
        return _subagent(row) if row else None

    def all(self) -> list[Subagent]:
        with self._source.connection() as connection:
            return [_subagent(row) for row in connection.execute(f"{CURRENT} ORDER BY s.id")]

    def names(self, limit: int) -> list[str]:
        """The names in use, newest first."""
        with self._source.connection() as connection:
            rows = connection.execute("SELECT name FROM subagents ORDER BY id DESC LIMIT %s", [limit])
            return [row["name"] for row in rows]

    def adopt(self, template: Template) -> Subagent:
        """Store a template as a subagent, or return the one already stored under its name."""
        with self._source.connection() as connection:
            row, created = _insert(connection, template.name, Origin.TEMPLATE, Author.TEMPLATE, template)
            if created:
                _add_examples(connection, row["id"], template.examples, Author.TEMPLATE)
        return _subagent(row)

    def build(self, draft: Draft, cause: str, *, since: datetime, claim: Job | None = None) -> Subagent:
        """Store a draft; `cause`, the task it was drafted for, is its first example.

        Two jobs that draft one name at the same time end with one subagent, which then knows both tasks. One that had
        the name before `since`, when the task came, is another subagent, which did not fit: the new one is numbered.
        With `claim`, only for a job that still is the caller's: raises LeaseLost.
        """
        for number in itertools.count(1):
            name = draft.name if number == 1 else f"{draft.name[:44]}_{number}"
            with self._source.connection() as connection:
                if claim is not None:
                    _hold(connection, claim)
                row, created = _insert(connection, name, Origin.BUILT, Author.DRAFTER, draft.definition())
                if not created and row["created_at"] < since:
                    continue
                _add_examples(connection, row["id"], (cause, *draft.examples) if created else (cause,), Author.DRAFTER)
            return _subagent(row)
        raise AssertionError("count() has no end")

    def follow(self, templates: Sequence[Template]) -> list[str]:
        """Give stored templates whose file has changed a new version, unless the owner has edited them.

        Returns the names that got one.
        """
        changed = []
        for template in templates:
            with self._source.connection() as connection:
                query = f"{CURRENT} WHERE s.name = %s AND s.origin = 'template' FOR UPDATE OF s"
                row = connection.execute(query, [template.name]).fetchone()
                if row is None or row["author"] != Author.TEMPLATE or row["digest"] == template.digest():
                    continue
                version = row["version"] + 1
                _insert_version(connection, row["id"], version, Author.TEMPLATE, template)
                connection.execute("UPDATE subagents SET version = %s WHERE id = %s", [version, row["id"]])
                connection.execute(DELETE_TEMPLATE_EXAMPLES, [row["id"]])
                _add_examples(connection, row["id"], template.examples, Author.TEMPLATE)
            changed.append(template.name)
        return changed


def _hold(connection: Connection, claim: Job) -> None:
    """Keep a job with its owner until the end of the transaction. Raises LeaseLost where it has another one by now."""
    if connection.execute(HOLD_CLAIM, [claim.id, claim.claim_seq]).fetchone() is None:
        raise LeaseLost(f"job {claim.id} has another owner or has ended")


def _insert(
    connection: Connection, name: str, origin: Origin, author: Author, definition: Definition
) -> tuple[DictRow, bool]:
    """The locked row of this name with its current version, and whether it was made here."""
    # Of two that store one name at once, the second waits here for the first to commit.
    created = connection.execute(INSERT_SUBAGENT, [name, origin]).fetchone()
    if created:
        _insert_version(connection, created["id"], 1, author, definition)
    row = connection.execute(f"{CURRENT} WHERE s.name = %s FOR UPDATE OF s", [name]).fetchone()
    assert row is not None, "inserted or found above"
    return row, created is not None


def _insert_version(
    connection: Connection, subagent_id: int, version: int, author: Author, definition: Definition
) -> None:
    fields = definition.model_dump(include=set(Definition.model_fields))
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    keys = {"subagent_id": subagent_id, "version": version, "author": author, "digest": definition.digest()}
    connection.execute(INSERT_VERSION, {**values, **keys})


def _add_examples(connection: Connection, subagent_id: int, tasks: Sequence[str], source: Author) -> None:
    for task in tasks:
        connection.execute(INSERT_EXAMPLE, [subagent_id, task, source])
    connection.execute(REFRESH_SEARCH, [subagent_id])


def _subagent(row: DictRow) -> Subagent:
    definition = Definition(**{name: row[name] for name in Definition.model_fields})
    return Subagent(row["id"], row["name"], Origin(row["origin"]), row["version"], definition)
