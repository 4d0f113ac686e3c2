"""The search for subagents that may fit a task: PostgreSQL's full-text search over names, descriptions and examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from psycopg.types.json import Jsonb

from pokestrator.store.pool import ConnectionSource
from pokestrator.subagents import Template

SHORTLIST = 20

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


class Shortlists:
    """Finds candidates for tasks. Raises StoreUnavailable when PostgreSQL cannot be reached."""

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
