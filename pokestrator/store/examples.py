"""The tasks that a subagent takes: examples of them, and the text that full-text search finds it by.

Given examples come with a template, a draft or the owner's edit; remembered ones (source 'person') are tasks that were
done well. Those who write here have locked the subagent's row, so that two never count or fold at once.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from psycopg.rows import DictRow

from pokestrator.store.pool import Connection
from pokestrator.subagents import Author

MAX_EXAMPLES = 50  # of a subagent
MAX_EXAMPLE_CHARACTERS = 2_000  # a longer task is kept to its beginning
ALIKE = 0.8  # Jaccard index of their lexemes from which two tasks are one example

INSERT_EXAMPLE = """
INSERT INTO subagent_examples (subagent_id, version, task, source, job_id)
SELECT id, version, left(%(task)s, 2000), %(source)s, %(job_id)s FROM subagents WHERE id = %(subagent_id)s
ON CONFLICT DO NOTHING"""

DELETE_TEMPLATE_EXAMPLES = "DELETE FROM subagent_examples WHERE subagent_id = %s AND source = 'template'"

REFRESH_SEARCH = """
UPDATE subagents SET search_made_at = now(), search = findable(subagents.name, v.description,
    (SELECT string_agg(task, ' ') FROM subagent_examples e WHERE e.subagent_id = subagents.id))
FROM subagent_versions v
WHERE subagents.id = %s AND v.subagent_id = subagents.id AND v.version = subagents.version"""

# What ts_delete takes away are the lexemes that both have. Tasks without any lexeme are compared as texts.
# MATERIALIZED: or the task would be parsed again for each example.
NEAREST = """
WITH asked AS MATERIALIZED (
    SELECT lexemes, cardinality(lexemes) AS many, lower(btrim(regexp_replace(%(task)s, '\\s+', ' ', 'g'))) AS words
    FROM (SELECT tsvector_to_array(searchable(%(task)s)) AS lexemes) AS parsed
), measured AS (
    SELECT e.id, e.source, e.job_id, e.uses, CASE
        WHEN many > 0 THEN shared / (many + length(e.search) - shared)
        WHEN lower(btrim(regexp_replace(e.task, '\\s+', ' ', 'g'))) = words THEN 1 ELSE 0 END AS likeness
    FROM subagent_examples AS e, asked,
        LATERAL (SELECT (length(e.search) - length(ts_delete(e.search, lexemes)))::float8 AS shared) AS both_have
    WHERE subagent_id = %(subagent_id)s
        AND (length(e.search) = 0) = (many = 0) AND length(e.search) BETWEEN many * %(alike)s AND many / %(alike)s
)
SELECT id, source, job_id FROM measured WHERE likeness >= %(alike)s
ORDER BY likeness DESC, (job_id = %(job_id)s) IS TRUE DESC, uses DESC, id LIMIT 1"""

USE = "UPDATE subagent_examples SET uses = uses + 1, used_at = now() WHERE id = %s"

UNUSE = "UPDATE subagent_examples SET uses = greatest(uses - 1, 0) WHERE id = %s"

# What came with later versions, or was done well by them, while the subagent was said to be for something else.
DELETE_UNDONE = """
DELETE FROM subagent_examples AS e USING subagent_versions AS undone, subagent_versions AS back_to
WHERE e.subagent_id = %(id)s AND e.version > %(to)s AND e.source IN ('drafter', 'person')
    AND undone.subagent_id = %(id)s AND undone.version = e.version
    AND back_to.subagent_id = %(id)s AND back_to.version = %(to)s AND back_to.description <> undone.description"""

# The newest is kept, whatever it counts: it has had no time to be used, and would else leave as soon as all others have
# been. Remembered ones leave before given ones.
REMOVE_LEAST_USEFUL = """
DELETE FROM subagent_examples WHERE id = ANY (ARRAY(
    SELECT id FROM subagent_examples WHERE subagent_id = %s AND id <> %s
    ORDER BY source = 'person', uses DESC, used_at DESC, id DESC OFFSET %s))"""

VOUCH = "UPDATE subagent_examples SET job_id = %s WHERE id = %s AND source = 'person'"

# What it taught; or else the remembered one that it is like, unless a person has praised the job that vouches for that.
FORGET_TAUGHT = "DELETE FROM subagent_examples WHERE subagent_id = %s AND job_id = %s AND source = 'person'"
FORGET = """
DELETE FROM subagent_examples AS e WHERE id = %s AND source = 'person'
    AND NOT EXISTS (SELECT FROM jobs WHERE jobs.id = e.job_id AND verdict = 'good')"""


def add_examples(
    connection: Connection,
    subagent_id: int,
    tasks: Sequence[str],
    source: Author,
    job_id: uuid.UUID | None = None,
) -> None:
    """Add tasks that are not known yet, and have the subagent found by them. `job_id`: the job that brought them."""
    for task in tasks:
        values = {"subagent_id": subagent_id, "task": task, "source": source, "job_id": job_id}
        connection.execute(INSERT_EXAMPLE, values)
    refresh_search(connection, subagent_id)


def replace_template_examples(connection: Connection, subagent_id: int, tasks: Sequence[str]) -> None:
    """Exchange a template's own examples for those that its file has now."""
    connection.execute(DELETE_TEMPLATE_EXAMPLES, [subagent_id])
    add_examples(connection, subagent_id, tasks, Author.TEMPLATE)


def remove_undone(connection: Connection, subagent_id: int, to: int) -> None:
    """Take away the tasks that only versions after `to` were said to be for. To be called before that is current again.

    What the owner or a template gave stays.
    """
    connection.execute(DELETE_UNDONE, {"id": subagent_id, "to": to})


def refresh_search(connection: Connection, subagent_id: int) -> None:
    """Make the text that a subagent is found by anew. To be called whenever its name, its current version or its
    examples have changed, in the same transaction."""
    connection.execute(REFRESH_SEARCH, [subagent_id])


def remember(connection: Connection, subagent_id: int, job_id: uuid.UUID, task: str) -> None:
    """Make a task that was done well an example, or count it for the example that it is nearly the same as.

    Beyond MAX_EXAMPLES the least useful leaves. The subagent's row must be locked.
    """
    known = _nearest(connection, subagent_id, job_id, task)
    if known is not None:
        connection.execute(USE, [known["id"]])
    else:
        _add(connection, subagent_id, job_id, task)


def praise(connection: Connection, subagent_id: int, job_id: uuid.UUID, task: str) -> None:
    """Have a job vouch for the remembered example of its task, which is made if it is not there."""
    known = _nearest(connection, subagent_id, job_id, task)
    if known is not None:
        connection.execute(VOUCH, [job_id, known["id"]])
    else:
        _add(connection, subagent_id, job_id, task)


def forget(connection: Connection, subagent_id: int, job_id: uuid.UUID, task: str) -> None:
    """Take away the remembered example of a job's task, whichever job taught it.

    A given one stays, and one for which a job vouches that a person has praised: there the job no longer counts. The
    subagent's row must be locked.
    """
    removed = connection.execute(FORGET_TAUGHT, [subagent_id, job_id]).rowcount
    if not removed and (known := _nearest(connection, subagent_id, job_id, task)) is not None:
        removed = connection.execute(FORGET, [known["id"]]).rowcount
        if not removed:
            connection.execute(UNUSE, [known["id"]])
    if removed:
        refresh_search(connection, subagent_id)


def _nearest(connection: Connection, subagent_id: int, job_id: uuid.UUID, task: str) -> DictRow | None:
    """The example that a task is nearly the same as, if there is one."""
    kept = task[:MAX_EXAMPLE_CHARACTERS]
    values = {"subagent_id": subagent_id, "job_id": job_id, "task": kept, "alike": ALIKE}
    return connection.execute(NEAREST, values).fetchone()


def _add(connection: Connection, subagent_id: int, job_id: uuid.UUID, task: str) -> None:
    kept = task[:MAX_EXAMPLE_CHARACTERS]
    if not kept.strip():
        return
    values = {"subagent_id": subagent_id, "task": kept, "source": Author.PERSON, "job_id": job_id}
    added = connection.execute(f"{INSERT_EXAMPLE} RETURNING id", values).fetchone()
    if added is not None:
        connection.execute(REMOVE_LEAST_USEFUL, [subagent_id, added["id"], MAX_EXAMPLES - 1])
        refresh_search(connection, subagent_id)
