"""The search for subagents that may fit a task: PostgreSQL's full-text search over names, descriptions and examples.

Each is scored by BM25 (Robertson and Zaragoza, The Probabilistic Relevance Framework, 2009), with the lexemes of
PostgreSQL's English dictionary as words. All functions raise StoreUnavailable when PostgreSQL cannot be reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from psycopg.rows import DictRow
from psycopg.types.json import Jsonb

from pokestrator.store.pool import ConnectionSource
from pokestrator.subagents import State, Template

SHORTLIST = 32
COMPARED = 5  # of the shortlist: their examples are compared with the task, one by one
EXAMPLES_COMPARED = 50
EXAMPLES_SHOWN = 2  # of the others
EXAMPLE_CHARACTERS = 300  # of an example that are read
TASK_CHARACTERS = 2_000  # of a task that are searched for; a longer one has said by then what it is about

SMALL = 1_000  # subagents, up to which every word of a task finds whom it may
# Beyond that, words are gone through from the rarest on, until they would find so many subagents: each by itself, and
# any two of them together. Whoever shares one common word alone with a task does not fit it.
FOUND_BY_ONE = 300
FOUND_BY_TWO = 3_000
MOST_FOUND = 3_000  # of those who know the two rarest words, where these are common: all of them fit about as little
PAIRED = 16  # words, at most: a long task has hundreds, and their pairs would keep PostgreSQL busy for minutes
MOST_SCORED = 100  # of those found: the best by the ROUGHLY rarest words alone
ROUGHLY = 8

# BM25's own constants, the power that rare words' weight is raised to, and what a word's beginning is worth. See
# docs/routing.md for what each gave.
K1, B, RARITY, BEGINNING = 2.0, 0.75, 1.25, 0.15

# ts_rank of one lexeme that occurs tf times is (1 + 1/4 + … + 1/tf²) / (π²/6), which is near tf / (tf + 0.64): read
# backwards, it tells tf faster than unnesting the whole text would.
CANDIDATES = """
WITH task AS (SELECT searchable(left(%(task)s, %(characters)s)) AS words),
templates AS MATERIALIZED (
    SELECT t.name, t.description, t.examples, findable(t.name, t.description,
        (SELECT string_agg(e, ' ') FROM jsonb_array_elements_text(t.examples) e)) AS search
    FROM jsonb_to_recordset(%(templates)s) AS t (name text, description text, examples jsonb)
    WHERE NOT EXISTS (SELECT FROM subagents s WHERE s.name = t.name)
), size AS MATERIALIZED (
    SELECT subagents + (SELECT count(*) FROM templates) AS documents, mean_length FROM search_statistics LIMIT 1
), words AS MATERIALIZED (
    SELECT lexeme, query, place,
        documents <= %(small)s OR reach <= %(by_one)s OR (place = 1 AND (known <= %(by_two)s OR words = 1))
            AS finds_alone,
        reach <= %(by_two)s OR place <= 2 AS finds_with_another,
        share * power(ln(1 + (greatest(documents - known, 0) + 0.5) / (known + 0.5)), %(rarity)s) AS weight
    FROM (
        SELECT *, sum(known) OVER rarest AS reach, row_number() OVER rarest AS place, count(*) OVER () AS words
        FROM (
            SELECT lexeme, share, exactly(lexeme) AS query, coalesce(s.subagents, 0)
                + (SELECT count(*) FROM templates WHERE search @@ exactly(lexeme)) AS known
            FROM (
                SELECT lexeme, 1.0::float8 AS share FROM task, unnest(words)
                UNION ALL SELECT unnest(beginnings(words)), %(beginning)s::float8 FROM task
            ) asked LEFT JOIN lexeme_statistics s USING (lexeme)
        ) counted WINDOW rarest AS (ORDER BY share DESC, known, lexeme)
    ) placed, size
), rarest AS MATERIALIZED (
    SELECT query, weight FROM words ORDER BY place LIMIT %(roughly)s
), paired AS MATERIALIZED (
    SELECT query, place FROM words WHERE finds_with_another AND NOT finds_alone ORDER BY place LIMIT %(paired)s
), wanted AS (
    SELECT string_agg(query, ' | ')::tsquery AS any_of FROM (
        SELECT query::text FROM words WHERE finds_alone
        UNION ALL SELECT concat('(', a.query, ' & ', b.query, ')') FROM paired a JOIN paired b ON a.place < b.place
    ) ways (query)
), found AS (
    SELECT s.id, s.name, s.state, s.search, s.search_length AS length FROM (
        SELECT * FROM subagents WHERE search @@ (SELECT any_of FROM wanted) AND state <> 'archived'
        LIMIT (SELECT CASE WHEN documents > %(small)s THEN %(most_found)s END FROM size)
    ) s
    ORDER BY (SELECT sum(weight) FROM rarest WHERE s.search @@ query) DESC NULLS LAST, s.id
    LIMIT %(most_scored)s
), documents AS (
    SELECT id, name, state, search, length, NULL::text AS description, NULL::jsonb AS examples FROM found
    UNION ALL SELECT NULL, name, NULL, search, words_in(search), description, examples FROM templates
), scored AS MATERIALIZED (
    SELECT d.*, (
        SELECT sum(w.weight * (%(k1)s + 1) * 0.64 * tf.rank
            / (0.64 * tf.rank + %(k1)s * (1 - tf.rank) * (1 - %(b)s + %(b)s * d.length / mean_length)))
        FROM words w, LATERAL (SELECT ts_rank('{1, 1, 1, 1}', d.search, w.query)::float8 AS rank OFFSET 0) tf
        WHERE tf.rank > 0
    ) AS score
    FROM documents d, size
), shortlist AS (
    SELECT *, row_number() OVER best AS place FROM scored WHERE score > 0
    WINDOW best AS (ORDER BY score DESC, id IS NULL, name) ORDER BY place LIMIT %(shortlist)s
)
SELECT c.name, c.state, c.score, coalesce(c.description, v.description) AS description, known.tasks, known.lexemes,
    CASE WHEN place <= %(compared)s THEN tsvector_to_array(searchable(
        concat_ws(' ', replace(c.name, '_', ' '), coalesce(c.description, v.description)))) END AS about,
    (SELECT jsonb_object_agg(lexeme, weight) FROM words WHERE left(lexeme, 1) <> '~') AS weights,
    (SELECT documents FROM size) AS among
FROM shortlist c
    LEFT JOIN subagents s ON s.id = c.id
    LEFT JOIN subagent_versions v ON v.subagent_id = s.id AND v.version = s.version
    LEFT JOIN LATERAL (
        SELECT array_agg(left(task, %(example_characters)s) ORDER BY turn) AS tasks,
            jsonb_agg(CASE WHEN place <= %(compared)s THEN tsvector_to_array(search) END ORDER BY turn) AS lexemes
        FROM (
            SELECT task, search, row_number() OVER (ORDER BY uses DESC, used_at DESC, task) AS turn
            FROM subagent_examples WHERE subagent_id = c.id
            UNION ALL SELECT e, searchable(e), n FROM jsonb_array_elements_text(c.examples) WITH ORDINALITY t (e, n)
        ) e WHERE turn <= CASE WHEN place <= %(compared)s THEN %(examples_compared)s ELSE %(examples_shown)s END
    ) known ON true
ORDER BY place"""

# Those who share nothing with the task, when there are so few that all can be shown.
EVERYBODY = """
SELECT s.name, s.state, v.description,
    ARRAY(SELECT left(task, %(example_characters)s) FROM subagent_examples e WHERE e.subagent_id = s.id
        ORDER BY uses DESC, used_at DESC, task LIMIT %(examples_shown)s) AS tasks
FROM subagents s JOIN subagent_versions v ON v.subagent_id = s.id AND v.version = s.version
WHERE s.state <> 'archived' ORDER BY s.id LIMIT %(limit)s"""

NAMES = "SELECT name FROM subagents WHERE name = ANY (%s)"


@dataclass(frozen=True)
class Example:
    """A task that a candidate takes. `lexemes` are known only for those that are compared with the task."""

    task: str  # its first EXAMPLE_CHARACTERS
    lexemes: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Candidate:
    """A stored subagent (`state`) or a template (no state) that may fit a task, best first in a shortlist."""

    name: str
    state: State | None
    description: str
    examples: tuple[Example, ...] = ()
    score: float = 0.0  # BM25; 0: shares no word with the task
    about: frozenset[str] | None = None  # the lexemes of name and description, where it is compared

    @property
    def is_stored(self) -> bool:
        return self.state is not None


@dataclass(frozen=True)
class Shortlist:
    """Who may fit a task, best first, and what each of the task's lexemes weighs."""

    candidates: tuple[Candidate, ...]
    weights: dict[str, float]
    among: int = 0  # so many they were chosen


class Shortlists:
    """Finds candidates for tasks."""

    def __init__(self, source: ConnectionSource) -> None:
        self._source = source

    def find(self, task: str, templates: Sequence[Template]) -> Shortlist:
        """The best SHORTLIST of stored subagents and templates that share a word with the task, in one query."""
        values = {
            **{"task": task, "characters": TASK_CHARACTERS, "templates": Jsonb([_described(t) for t in templates])},
            **{
                "small": SMALL,
                "by_one": FOUND_BY_ONE,
                "by_two": FOUND_BY_TWO,
                "most_found": MOST_FOUND,
                "paired": PAIRED,
                "most_scored": MOST_SCORED,
                "roughly": ROUGHLY,
                "shortlist": SHORTLIST,
            },
            **{"k1": K1, "b": B, "rarity": RARITY, "beginning": BEGINNING, "compared": COMPARED},
            **{"examples_compared": EXAMPLES_COMPARED, "examples_shown": EXAMPLES_SHOWN},
            **{"example_characters": EXAMPLE_CHARACTERS},
        }
        with self._source.connection() as connection:
            rows = connection.execute(CANDIDATES, values).fetchall()
        if not rows:
            return Shortlist((), {})
        return Shortlist(tuple(_candidate(row) for row in rows), rows[0]["weights"] or {}, rows[0]["among"])

    def others(self, shortlist: Shortlist, templates: Sequence[Template], most: int) -> tuple[Candidate, ...] | None:
        """Everybody else, or None when all together are more than `most`."""
        with self._source.connection() as connection:
            values = {
                "examples_shown": EXAMPLES_SHOWN,
                "example_characters": EXAMPLE_CHARACTERS,
                "limit": most + 1,
            }
            stored = connection.execute(EVERYBODY, values).fetchall()
            named = connection.execute(NAMES, [[template.name for template in templates]])
            taken = {row["name"] for row in named} | {candidate.name for candidate in shortlist.candidates}
        everybody = [
            Candidate(row["name"], State(row["state"]), row["description"], tuple(map(Example, row["tasks"])))
            for row in stored
        ] + [
            Candidate(t.name, None, t.description, tuple(map(Example, t.examples[:EXAMPLES_SHOWN])))
            for t in templates
            if t.name not in taken
        ]
        listed = {candidate.name for candidate in shortlist.candidates}
        others = tuple(candidate for candidate in everybody if candidate.name not in listed)
        return others if len(others) + len(listed) <= most else None


def _described(template: Template) -> dict[str, object]:
    return {"name": template.name, "description": template.description, "examples": list(template.examples)}


def _candidate(row: DictRow) -> Candidate:
    examples = tuple(
        Example(task, frozenset(lexemes or ()))
        for task, lexemes in zip(row["tasks"] or (), row["lexemes"] or (), strict=True)
    )
    return Candidate(
        name=row["name"],
        state=State(row["state"]) if row["state"] else None,
        description=row["description"],
        examples=examples,
        score=row["score"],
        about=None if row["about"] is None else frozenset(row["about"]),
    )
