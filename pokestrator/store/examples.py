"""The tasks that a subagent takes: examples of them, and the text that full-text search finds it by."""

from __future__ import annotations

from collections.abc import Sequence

from pokestrator.store.pool import Connection
from pokestrator.subagents import Author

INSERT_EXAMPLE = """
INSERT INTO subagent_examples (subagent_id, task, source) VALUES (%s, left(%s, 2000), %s) ON CONFLICT DO NOTHING"""

DELETE_TEMPLATE_EXAMPLES = "DELETE FROM subagent_examples WHERE subagent_id = %s AND source = 'template'"

REFRESH_SEARCH = """
UPDATE subagents SET search_made_at = now(), search = findable(subagents.name, v.description,
    (SELECT string_agg(task, ' ') FROM subagent_examples e WHERE e.subagent_id = subagents.id))
FROM subagent_versions v
WHERE subagents.id = %s AND v.subagent_id = subagents.id AND v.version = subagents.version"""


def add_examples(connection: Connection, subagent_id: int, tasks: Sequence[str], source: Author) -> None:
    """Add tasks that are not known yet, and have the subagent found by them."""
    for task in tasks:
        connection.execute(INSERT_EXAMPLE, [subagent_id, task, source])
    refresh_search(connection, subagent_id)


def replace_template_examples(connection: Connection, subagent_id: int, tasks: Sequence[str]) -> None:
    """Exchange a template's own examples for those that its file has now."""
    connection.execute(DELETE_TEMPLATE_EXAMPLES, [subagent_id])
    add_examples(connection, subagent_id, tasks, Author.TEMPLATE)


def refresh_search(connection: Connection, subagent_id: int) -> None:
    """Make the text that a subagent is found by anew. To be called whenever its name, its current version or its
    examples have changed, in the same transaction."""
    connection.execute(REFRESH_SEARCH, [subagent_id])
