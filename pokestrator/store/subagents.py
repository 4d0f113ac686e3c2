"""Subagents in PostgreSQL: names, their immutable versions, the tasks they take, and the search over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from psycopg.rows import DictRow
from psycopg.types.json import Jsonb

from pokestrator.store.pool import Connection, ConnectionSource
from pokestrator.subagents import Author, Definition, Draft, Origin, Subagent, Template

SHORTLIST = 20

INSERT_SUBAGENT = """
INSERT INTO subagents (name, origin, version) VALUES (%s, %s, 1) ON CONFLICT (name) DO NOTHING RETURNING id"""

INSERT_VERSION = """
INSERT INTO subagent_versions (subagent_id, version, author, description, system_prompt, tools, model, max_turns,
    timeout_seconds, max_budget_usd, credentials, hosts, digest)
VALUES (%(subagent_id)s, %(version)s, %(author)s, %(description)s, %(system_prompt)s, %(tools)s, %(model)s,
    %(max_turns)s, %(timeout_seconds)s, %(max_budget_usd)s, %(credentials)s, %(hosts)s, %(digest)s)"""

INSERT_EXAMPLE = "INSERT INTO subagent_examples (subagent_id, task) VALUES (%s, left(%s, 2000)) ON CONFLICT DO NOTHING"

# The name's words, the description and the examples: `document` here and in CANDIDATES must be made alike.
REFRESH_SEARCH = """
UPDATE subagents SET search = searchable(concat_ws(' ', replace(subagents.name, '_', ' '), v.description,
    (SELECT string_agg(task, ' ') FROM subagent_examples e WHERE e.subagent_id = subagents.id)))
FROM subagent_versions v
WHERE subagents.id = %s AND v.subagent_id = subagents.id AND v.version = subagents.version"""

CURRENT = """
SELECT s.id, s.name, s.origin, s.version, v.author, v.description, v.system_prompt, v.tools, v.model, v.max_turns,
    v.timeout_seconds, v.max_budget_usd, v.credentials, v.hosts, v.digest
FROM subagents s JOIN subagent_versions v ON v.subagent_id = s.id AND v.version = s.version"""

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
        return self._store(template.name, Origin.TEMPLATE, Author.TEMPLATE, template.definition(), template.examples)

    def build(self, draft: Draft, cause: str) -> Subagent:
        """Store a draft; `cause`, the task it was drafted for, is its first example.

        Two jobs that draft one name end with one subagent, which then knows both tasks.
        """
        return self._store(draft.name, Origin.BUILT, Author.DRAFTER, draft.definition(), (cause, *draft.examples))

    def follow(self, templates: Sequence[Template]) -> list[str]:
        """Give stored templates whose file has changed a new version, unless the owner has edited them.

        Returns the names that got one.
        """
        changed = []
        for template in templates:
            with self._source.connection() as connection:
                query = f"{CURRENT} WHERE s.name = %s AND s.origin = 'template' FOR UPDATE OF s"
                row = connection.execute(query, [template.name]).fetchone()
                if row is None or row["author"] != Author.TEMPLATE or row["digest"] == template.definition().digest():
                    continue
                version = row["version"] + 1
                _insert_version(connection, row["id"], version, Author.TEMPLATE, template.definition())
                connection.execute("UPDATE subagents SET version = %s WHERE id = %s", [version, row["id"]])
                for example in template.examples:
                    connection.execute(INSERT_EXAMPLE, [row["id"], example])
                connection.execute(REFRESH_SEARCH, [row["id"]])
            changed.append(template.name)
        return changed

    def _store(
        self, name: str, origin: Origin, author: Author, definition: Definition, examples: Sequence[str]
    ) -> Subagent:
        with self._source.connection() as connection:
            # Of two that store one name at once, the second waits here for the first to commit.
            created = connection.execute(INSERT_SUBAGENT, [name, origin]).fetchone()
            if created:
                _insert_version(connection, created["id"], 1, author, definition)
            row = connection.execute(f"{CURRENT} WHERE s.name = %s FOR UPDATE OF s", [name]).fetchone()
            assert row is not None, "inserted or found above"
            for example in examples if created else examples[:1]:
                connection.execute(INSERT_EXAMPLE, [row["id"], example])
            connection.execute(REFRESH_SEARCH, [row["id"]])
            return _subagent(row)


def _insert_version(
    connection: Connection, subagent_id: int, version: int, author: Author, definition: Definition
) -> None:
    values = {name: list(v) if isinstance(v, tuple) else v for name, v in definition.model_dump().items()}
    keys = {"subagent_id": subagent_id, "version": version, "author": author, "digest": definition.digest()}
    connection.execute(INSERT_VERSION, {**values, **keys})


def _subagent(row: DictRow) -> Subagent:
    definition = Definition(**{name: row[name] for name in Definition.model_fields})
    return Subagent(row["id"], row["name"], Origin(row["origin"]), row["version"], definition)
